"""Row statistics in torch, tile by tile: O(N x tile) memory, backward by recomputation.

Rows are sorted by (class, sample). Then the views of a row are neighbours, its class is one interval, and a tile whose
row and column classes do not meet holds the relation `other` alone: no mask, one exponential per element. When the
candidates are the anchors themselves the matrix is symmetric, and each tile above the diagonal serves its rows and its
columns, forward and backward.

The few view pairs are computed apart from the tiles: there softmax weight and mean are subtracted from each other, and
only the difference may meet the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.backends.layout import Layout, Side

# Rows and columns of a tile: 2 MiB of float32 stay in a CPU's cache, other devices need more to be busy. Few rows keep
# the diagonal blocks small, whose lower half is computed in vain.
TILE = {"cpu": (256, 2048)}
TILE_ELSEWHERE = (2048, 8192)
VIEW_ELEMENTS = 1 << 20  # of gathered candidates at a time
EXP_LIMIT = 60.0  # |logit| up to which N exponentials can be summed in float32 without overflow or underflow


@dataclass(frozen=True)
class _Rows:
    """One relation's log-sum-exps and upstream gradients of a set of rows, ready for exp(s - lse) * grad."""

    lse: Tensor
    grad: Tensor

    def __getitem__(self, block: slice) -> _Rows:
        return _Rows(self.lse[block], self.grad[block])


def forward(x: Tensor, y: Tensor | None, layout: Layout) -> tuple[Tensor, ...]:
    """Statistics as `dense.row_stats` returns them, for ids in the form of a `Layout`."""
    a, b = layout.x, layout.y
    xs = x[a.order]
    ys = xs if y is None else y[b.order]
    bounded = _is_bounded(xs, ys)
    empty = 0.0 if bounded else -torch.inf
    other, peer = x.new_full((len(x),), empty), x.new_full((len(x),), empty)
    peer_sum = x.new_zeros(len(x))
    for i, j, mixed in _tiles(layout, x.device):
        s = xs[i] @ ys[j].T
        # On the diagonal the tile holds both triangles already: its columns are its rows.
        columns = j if y is None and i != j else None
        if mixed and layout.labelled:
            is_peer = _peers(a, b, i, j)
            linear = s.masked_fill(~is_peer, 0)
            peer_sum[i] += linear.sum(1)
            if columns is not None:
                peer_sum[columns] += linear.sum(0)
            _add_exponentials(peer, s, ~is_peer, i, columns, bounded)
        _add_exponentials(other, s, _same_class(a, b, i, j) if mixed else None, i, columns, bounded)
    if bounded:
        other, peer = other.log_(), peer.log_()
    n_view, n_peer, n_other = layout.counts()
    mean_view, spread_view = _forward_views(xs, ys, layout)
    mean_peer = peer_sum / n_peer.clamp(min=1)
    # A sum of exponentials cannot tell "no pair" from NaN or underflow; the counts can.
    other, peer = other.masked_fill_(n_other == 0, -torch.inf), peer.masked_fill_(n_peer == 0, -torch.inf)
    return tuple(a.restore(v) for v in (mean_view, spread_view, mean_peer, peer, other, n_view, n_peer, n_other))


def backward(
    x: Tensor, y: Tensor | None, layout: Layout, lse: tuple[Tensor, Tensor], grads: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y from those of the statistics.

    Args:
        x, y, layout: as in `forward`.
        lse: lse_peer, lse_other of the forward pass.
        grads: gradients of mean_view, spread_view, mean_peer, lse_peer, lse_other; (N,) each.

    Returns:
        dx (N, D), and dy (M, D) where y is given, else an empty tensor (dx then holds both sides).
    """
    a, b = layout.x, layout.y
    xs = x[a.order]
    ys = xs if y is None else y[b.order]
    bounded = _is_bounded(xs, ys)
    g_mean_view, g_spread_view, g_mean_peer, g_peer, g_other = (g[a.order] for g in grads)
    # Largest upstream gradient 1: the products grad * exp(-lse) then stay in range whatever the reduction was.
    scale = torch.stack([g_mean_peer, g_peer, g_other]).abs().amax()
    scale = scale.where(scale > 0, 1)
    _, n_peer, n_other = layout.counts()
    other = _Rows(lse[1][a.order].masked_fill(n_other == 0, torch.inf), g_other / scale)
    peer = _Rows(lse[0][a.order].masked_fill(n_peer == 0, torch.inf), g_peer / scale)
    mean_peer = g_mean_peer / (scale * n_peer.clamp(min=1))
    dx = torch.zeros_like(xs)
    dy = dx if y is None else torch.zeros_like(ys)
    for i, j, mixed in _tiles(layout, x.device):
        s = xs[i] @ ys[j].T
        columns = j if y is None else None
        w = _softmax(s, other, i, columns, bounded)
        if mixed:
            w.masked_fill_(_same_class(a, b, i, j), 0)
        if mixed and layout.labelled:
            pull = _softmax(s, peer, i, columns, bounded).add_(mean_peer[i, None])
            if columns is not None:
                pull += mean_peer[columns]
            w += pull.masked_fill_(~_peers(a, b, i, j), 0)
        dx[i].addmm_(w, ys[j])
        if y is not None or i != j:
            dy[j].addmm_(w.T, xs[i])
    dx *= scale
    if y is not None:
        dy *= scale
    _backward_views(xs, ys, layout, g_mean_view, g_spread_view, dx, dy)
    return a.restore(dx), x.new_empty(0) if y is None else b.restore(dy)


def _is_bounded(xs: Tensor, ys: Tensor) -> bool:
    """Whether no logit can leave the range in which bare exponentials are exact (Cauchy-Schwarz). Reads one number."""
    bound = torch.linalg.vector_norm(xs, dim=1).amax() * torch.linalg.vector_norm(ys, dim=1).amax()
    return bool(bound <= EXP_LIMIT)


def _tiles(layout: Layout, device: torch.device) -> Iterator[tuple[slice, slice, bool]]:
    """(rows, columns, whether same-class pairs can occur in the tile); where the matrix is symmetric, the diagonal
    blocks and what lies right of them."""
    height, width = TILE.get(device.type, TILE_ELSEWHERE)
    n = len(layout.y.key)
    for i, same in layout.class_intervals(height):
        start = 0
        if layout.symmetric:
            yield i, i, True
            start, same = i.stop, slice(i.stop, max(same.stop, i.stop))
        for first, last, mixed in ((start, same.start, False), (same.start, same.stop, True), (same.stop, n, False)):
            for k in range(first, last, width):
                yield i, slice(k, min(k + width, last)), mixed


def _same_class(a: Side, b: Side, i: slice, j: slice) -> Tensor:
    """(rows, columns) mask of self, views and peers."""
    return a.group[i, None] == b.group[j]


def _peers(a: Side, b: Side, i: slice, j: slice) -> Tensor:
    return _same_class(a, b, i, j) & (a.sample[i, None] != b.sample[j])


def _add_exponentials(
    total: Tensor, s: Tensor, outside: Tensor | None, i: slice, columns: slice | None, bounded: bool
) -> None:
    """Add a tile's exponentials, less those of the mask `outside`, to the totals (sums if bounded, else lse)."""
    if bounded:
        e = s.exp()  # masked afterwards: exp(-inf) is 25 times slower than exp of a number on a CPU
        if outside is not None:
            e.masked_fill_(outside, 0)
        total[i] += e.sum(1)
        if columns is not None:
            total[columns] += e.sum(0)
        return
    if outside is not None:
        s = s.masked_fill(outside, -torch.inf)
    total[i] = torch.logaddexp(total[i], s.logsumexp(1))
    if columns is not None:
        total[columns] = torch.logaddexp(total[columns], s.logsumexp(0))


def _softmax(s: Tensor, rows: _Rows, i: slice, columns: slice | None, bounded: bool) -> Tensor:
    """grad_i exp(s_ij - lse_i), plus the column's share grad_j exp(s_ij - lse_j) where the matrix is symmetric."""
    r = rows[i]
    if bounded:
        weight = (r.grad * torch.exp(-r.lse))[:, None]
        if columns is not None:
            c = rows[columns]
            weight = weight + c.grad * torch.exp(-c.lse)
        return s.exp().mul_(weight)
    w = torch.exp(s - r.lse[:, None]).mul_(r.grad[:, None])
    if columns is not None:
        c = rows[columns]
        w += torch.exp(s - c.lse).mul_(c.grad)
    return w


@dataclass(frozen=True)
class _ViewStats:
    """Per-row numbers of the relation `view` and their upstream gradients, all (rows,)."""

    mean: Tensor
    spread: Tensor
    inverse_n: Tensor
    g_mean: Tensor
    g_spread: Tensor

    def pull(self, s: Tensor, at: slice | Tensor) -> Tensor:
        """Gradient of logits s (rows, pairs): the row's own where `at` is a slice, else that of the rows in `at`."""
        mean, spread, inverse_n, g_mean, g_spread = (
            v[at, None] if isinstance(at, slice) else v[at]
            for v in (self.mean, self.spread, self.inverse_n, self.g_mean, self.g_spread)
        )
        # Softmax minus 1/n before anything else meets it: exactly 0 for a single view.
        return torch.exp(s - mean - spread).sub_(inverse_n).mul_(g_spread).add_(g_mean * inverse_n)


def _view_pairs(
    xs: Tensor, ys: Tensor, a: Side, b: Side, symmetric: bool
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Blocks of rows, the (rows, pairs) positions of candidates of their samples, a mask of what is no view pair
    (padding, the row itself), those candidates (rows, pairs, D) and the logits."""
    low, high = torch.searchsorted(b.key, a.key), torch.searchsorted(b.key, a.key, right=True)
    widest = int((high - low).amax())
    if widest == 0:
        return
    size = max(1, VIEW_ELEMENTS // (widest * xs.shape[1]))
    for start in range(0, len(xs), size):
        i = slice(start, min(start + size, len(xs)))
        index = low[i, None] + torch.arange(widest, device=low.device)
        outside = index >= high[i, None]
        if symmetric:
            outside |= index == a.position[i, None]
        index.clamp_(max=len(ys) - 1)
        candidates = ys[index]
        yield i, index, outside, candidates, (xs[i, None] * candidates).sum(-1)


def _forward_views(xs: Tensor, ys: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """mean_view and spread_view; for a single view the mean is its logit and the spread exactly 0."""
    mean, spread = xs.new_zeros(len(xs)), xs.new_zeros(len(xs))
    for i, _, outside, _, s in _view_pairs(xs, ys, layout.x, layout.y, layout.symmetric):
        mean[i] = s.masked_fill(outside, 0).sum(1) / (~outside).sum(1).clamp_(min=1)
        s -= mean[i, None]
        peak = s.masked_fill(outside, -torch.inf).amax(1)
        peak.masked_fill_(peak == -torch.inf, 0)
        total = torch.exp(s - peak[:, None]).masked_fill_(outside, 0).sum(1)
        spread[i] = peak + total.masked_fill_(total == 0, 1).log_()
    return mean, spread


def _backward_views(
    xs: Tensor, ys: Tensor, layout: Layout, g_mean: Tensor, g_spread: Tensor, dx: Tensor, dy: Tensor
) -> None:
    """Each row collects from its own pairs, in the rectangular case each candidate too: no scattered additions."""
    n_view = layout.counts()[0].clamp_(min=1).to(xs.dtype)
    stats = _ViewStats(*_forward_views(xs, ys, layout), 1 / n_view, g_mean, g_spread)
    for i, index, outside, candidates, s in _view_pairs(xs, ys, layout.x, layout.y, layout.symmetric):
        w = stats.pull(s, i)
        if layout.symmetric:
            w += stats.pull(s, index)
        dx[i] += (w.masked_fill_(outside, 0)[..., None] * candidates).sum(1)
    if not layout.symmetric:
        for j, index, outside, anchors, s in _view_pairs(ys, xs, layout.y, layout.x, False):
            dy[j] += (stats.pull(s, index).masked_fill_(outside, 0)[..., None] * anchors).sum(1)
