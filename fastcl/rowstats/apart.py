"""Rows against rows of which none is a view of another, such as those of other ranks: no views, and both roles at once.

The derivative of x has two parts: x as anchors of y, and x as candidates of the anchors y, whose statistics and
upstream gradients come from elsewhere. One pass over the tiles serves both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastcl.rowstats import chunked
from fastcl.rowstats.chunked import Anchors, LogSums
from fastcl.rowstats.dense import UNLABELLED
from fastcl.rowstats.order import Layout


def layout_of(x: Tensor, y: Tensor, labels: Tensor | None, labels_y: Tensor | None, peers: bool) -> Layout:
    """The order of both sides, in which every row is a sample of its own.

    Args:
        peers: whether statistics of peers are needed; peers never count as others.
    """
    ids = torch.arange(len(x) + len(y), dtype=torch.int64, device=x.device)
    layout = Layout.of(ids[: len(x)], labels, ids[len(x) :], labels_y)
    return layout if peers else replace(layout, labelled=False)


def forward(x: Tensor, y: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """mean_peer, lse_peer, lse_other, n_peer, n_other of the anchors x (N, D) against y (M, D)."""
    _, *counts = layout.counts()
    sums = chunked.forward_tiles(x[layout.x.order], y[layout.y.order], layout, counts)
    return tuple(layout.x.restore(v) for v in (*sums, *counts))


def backward(
    x: Tensor, y: Tensor, layout: Layout, lse: tuple[Tensor, Tensor], grads: tuple[Tensor, ...], theirs: Tensor | None
) -> Tensor:
    """Gradient of x (N, D), as anchors and as candidates.

    Args:
        lse: lse_peer, lse_other of the forward pass.
        grads: gradients of mean_peer, lse_peer, lse_other; (N,) each.
        theirs: (5, M) of y's rows as anchors: lse_peer, lse_other, then the gradients of mean_peer divided by the
            number of peers, of lse_peer and of lse_other. None: y's rows are no anchors.
    """
    a, b = layout.x, layout.y
    grads = tuple(g[a.order] for g in grads)
    scale, others = chunked.largest(*grads, *(() if theirs is None else theirs[2:])), None
    if theirs is not None:
        lse_peer, lse_other, mean, peer, other = theirs[:, b.order]
        lse_peer, lse_other = (v.masked_fill(v == -torch.inf, torch.inf) for v in (lse_peer, lse_other))
        others = Anchors(LogSums(lse_other, other / scale), LogSums(lse_peer, peer / scale), mean / scale)
    xs, ys = x[a.order], y[b.order]
    dx = torch.zeros_like(xs)
    chunked.backward_tiles(xs, ys, layout, (chunked.anchors_of(layout, lse, grads, scale), others), dx, None)
    return a.restore(dx * scale)


def dense_forward(
    x: Tensor, y: Tensor, labels: Tensor | None, labels_y: Tensor | None, peers: bool
) -> tuple[Tensor, ...]:
    """The same as `forward`, from the matrix of logits and two masks."""
    s = x @ y.T
    peer = _peers(x, y, labels, labels_y)
    n_peer, n_other = peer.sum(1), (~peer).sum(1)
    lse_other = s.masked_fill(peer, -torch.inf).logsumexp(1)
    if not peers:
        return torch.zeros_like(lse_other), torch.full_like(lse_other, -torch.inf), lse_other, n_peer, n_other
    mean_peer = s.masked_fill(~peer, 0).sum(1) / n_peer.clamp(min=1)
    return mean_peer, s.masked_fill(~peer, -torch.inf).logsumexp(1), lse_other, n_peer, n_other


def dense_backward(
    x: Tensor, y: Tensor, labels: Tensor | None, labels_y: Tensor | None, lse: tuple[Tensor, Tensor],
    grads: tuple[Tensor, ...], theirs: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same as `backward`: (G + G') y from the matrix G of derivatives by logits."""
    s = x @ y.T
    peer = _peers(x, y, labels, labels_y)
    n_peer = peer.sum(1).clamp(min=1)
    anchors = [torch.stack([*lse, grads[0] / n_peer, *grads[1:]])[:, :, None]]
    anchors += [] if theirs is None else [theirs[:, None]]
    pull = torch.zeros_like(s)
    for lse_peer, lse_other, g_mean, g_peer, g_other in anchors:
        pull += torch.where(peer, g_mean + _weighted(s, lse_peer, g_peer), _weighted(s, lse_other, g_other))
    return pull @ y


def _weighted(s: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    return (s - lse.masked_fill(lse == -torch.inf, torch.inf)).exp() * grad


def _peers(x: Tensor, y: Tensor, labels: Tensor | None, labels_y: Tensor | None) -> Tensor:
    """(N, M) mask of rows of the same class."""
    if labels is None or labels_y is None:
        return torch.zeros(len(x), len(y), dtype=torch.bool, device=x.device)
    return (labels[:, None] == labels_y) & (labels_y != UNLABELLED)
