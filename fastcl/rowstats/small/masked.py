"""Row statistics of small batches with any number of views: the whole matrix, one mask per relation.

Like `whole`, whose pairs need no mask of views. The spread of the views is computed relative to their mean, and
softmax minus 1 / n comes before any other term: both are exactly 0 for a single view.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.rowstats.chunked import EXP_LIMIT
from fastcl.rowstats.dense import UNLABELLED
from fastcl.rowstats.small import whole
from fastcl.rowstats.small.whole import MaybeNone, Way

LIMIT = EXP_LIMIT / 1.5  # bound on |logit|: logits of two views may differ by twice as much


class Kept(NamedTuple):
    """Saved for the backward pass: (N, N) unless stated otherwise, of v's dtype."""

    v: Tensor  # (N, D) rows, normalised if requested
    norm: Tensor  # (N, 1) norms of the input rows
    e_other: Tensor  # exponentials of the logits of others, 0 elsewhere
    other: Tensor  # (N,) their sums, clamped to be positive
    view: Tensor  # mask of views divided by their number
    softmax: Tensor  # softmax over the views, minus `view`
    e_peer: Tensor | MaybeNone  # as `e_other`, for peers; None without labels
    peer: Tensor | MaybeNone
    mask: Tensor | None  # mask of peers divided by their number


def forward(
    x: Tensor, sample: Tensor, labels: Tensor | None, way: Way
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Kept] | None:
    """Five statistics and three counts as `dense.row_stats` returns them, and what `backward` needs; None if rows or
    logits are outside the range in which this method is exact."""
    if (rows := whole.unit_rows(x, way)) is None:
        return None
    v, norm, high = rows
    if v is x:
        v = v.clone()  # the caller may change x before the backward pass
    s = torch.addmm(norm.new_empty(1), v, v.t(), beta=0, alpha=1 / way.temperature)
    s.fill_diagonal_(0)
    if high * high > LIMIT * way.temperature:
        low, top = s.aminmax()
        if not (-LIMIT <= low.item() and top.item() <= LIMIT):
            return None
    tiny = torch.finfo(v.dtype).tiny  # avoids division by an empty sum of exponentials
    same = sample[:, None] == sample
    same_class = same if labels is None else same | ((labels[:, None] == labels) & (labels != UNLABELLED))
    e = s.exp()
    e_other = e * (~same_class).to(v.dtype)  # a bool mask is slower
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
    """mean_view, spread_view, the mask divided by the number of views, softmax minus that."""
    share = view / n.clamp(min=1)[:, None]
    mean = (s * view).sum(1).div_(n.clamp(min=1))  # the logit itself for a single view
    centred = (s - mean[:, None]).mul_(view)
    rest = (centred * share).sum(1)  # rounding error of the mean
    e = centred.exp_().mul_(view)
    total = e.sum(1).clamp_(min=torch.finfo(s.dtype).tiny)
    spread = total.log().sub_(rest).masked_fill_(n == 0, 0)
    return mean, spread, share, e.div_(total[:, None]).sub_(share)


def backward(kept: Kept, grads: tuple[Tensor, ...]) -> Tensor:
    """(N, D) gradient of `Kept.v`, times the temperature, from those of the five statistics."""
    g_mean, g_spread, g_mean_peer, g_peer, g_other = grads
    pull = whole.weights(g_other / kept.other, False).mul_(kept.e_other)
    rows = kept.softmax * g_spread[:, None]
    rows.addcmul_(kept.view, g_mean[:, None])
    if kept.mask is not None:
        pull.addcmul_(whole.weights(g_peer / kept.peer, False), kept.e_peer)
        rows.addcmul_(kept.mask, g_mean_peer[:, None])
    return torch.mm(pull, kept.v).addmm_(rows, kept.v).addmm_(rows.t(), kept.v)
