"""Row statistics of few rows with any number of views: the whole matrix, one mask for each relation.

As `whole`, whose pairs need no mask of views. The spread of the views is taken about their mean, and
softmax minus 1 / n before anything else meets it: exactly 0 for a single view.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.rowstats.chunked import EXP_LIMIT
from fastcl.rowstats.dense import UNLABELLED
from fastcl.rowstats.small import whole
from fastcl.rowstats.small.whole import MaybeNone, Way

LIMIT = EXP_LIMIT / 1.5  # of |logit|: two views' logits may differ by twice that


class Kept(NamedTuple):
    """What gradients need: (N, N) unless stated otherwise, of v's dtype."""

    v: Tensor  # (N, D) rows, normalised where asked for
    norm: Tensor  # (N, 1) of the rows as they were
    e_other: Tensor  # exponentials of the logits of others, else 0
    other: Tensor  # (N,) their sums, more than 0
    view: Tensor  # mask over the number of views
    softmax: Tensor  # of the views, less `view`
    e_peer: Tensor | MaybeNone  # as `e_other`; None without labels
    peer: Tensor | MaybeNone
    mask: Tensor | None  # of peers, over their number


def forward(
    x: Tensor, sample: Tensor, labels: Tensor | None, way: Way
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Kept] | None:
    """Five statistics and three counts as `dense.row_stats` returns them, and what `backward` needs; None where rows or
    logits leave the range in which this way is exact."""
    if (rows := whole.unit_rows(x, way)) is None:
        return None
    v, norm, high = rows
    s = torch.addmm(norm.new_empty(1), v, v.t(), beta=0, alpha=1 / way.temperature)
    s.fill_diagonal_(0)
    if high * high > LIMIT * way.temperature:
        low, top = s.aminmax()
        if not (-LIMIT <= low.item() and top.item() <= LIMIT):
            return None
    tiny = torch.finfo(v.dtype).tiny  # the sum of no exponentials is no divisor
    same = sample[:, None] == sample
    same_class = same if labels is None else same | ((labels[:, None] == labels) & (labels != UNLABELLED))
    e = s.exp()
    e_other = e * (~same_class).to(v.dtype)  # a bool mask takes longer
    view = same.to(v.dtype).fill_diagonal_(0)
    n_view, n_class = view.sum(1), same_class.sum(1)
    n_peer, n_other = n_class - 1 - n_view.long(), len(v) - n_class
    mean_view, spread, view, softmax = _views(s, view, n_view)
    other = e_other.sum(1)
    lse_other, other = other.log(), other.clamp(min=tiny)
    counts = n_view.long(), n_peer, n_other
    if labels is None:
        none = torch.zeros_like(other), torch.full_like(other, -torch.inf)
        kept = Kept(v, norm, e_other, other, view, softmax, None, None, None)
        return (mean_view, spread, *none, lse_other), counts, kept
    peers = (same_class ^ same).to(v.dtype)
    e_peer, peer = e.mul_(peers), e.sum(1)
    lse_peer, peer = peer.log(), peer.clamp(min=tiny)
    mask = peers / n_peer.clamp(min=1)[:, None]
    kept = Kept(v, norm, e_other, other, view, softmax, e_peer, peer, mask)
    return (mean_view, spread, (s * mask).sum(1), lse_peer, lse_other), counts, kept


def _views(s: Tensor, view: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean_view and spread_view, the mask over its number, softmax less that; the mask is overwritten."""
    share = view / n.clamp(min=1)[:, None]
    mean = (s * view).sum(1).div_(n.clamp(min=1))  # the logit itself for a single view
    centred = (s - mean[:, None]).mul_(view)
    rest = (centred * share).sum(1)  # what the rounding of the mean left behind
    e = centred.exp_().mul_(view)
    total = e.sum(1).clamp_(min=torch.finfo(s.dtype).tiny)
    spread = total.log().sub_(rest).masked_fill_(n == 0, 0)
    return mean, spread, share, e.div_(total[:, None]).sub_(share)


def backward(kept: Kept, grads: tuple[Tensor, ...]) -> Tensor:
    """(N, D) gradients of `Kept.v`, times the temperature, from those of the five statistics."""
    g_mean, g_spread, g_mean_peer, g_peer, g_other = grads
    pull = whole.weights(g_other / kept.other, False).mul_(kept.e_other)
    rows = kept.softmax * g_spread[:, None]
    rows.addcmul_(kept.view, g_mean[:, None])
    if kept.mask is not None:
        pull.addcmul_(whole.weights(g_peer / kept.peer, False), kept.e_peer)
        rows.addcmul_(kept.mask, g_mean_peer[:, None])
    return torch.mm(pull, kept.v).addmm_(rows, kept.v).addmm_(rows.t(), kept.v)
