"""Reference implementation of the row statistics: the N x M matrix of logits, three masks, plain autograd.

Deliberately slow and memory-hungry: every other backend is tested against this one, and this one against formulas
written out in the tests. It is twice differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNLABELLED = -1


def row_stats(
    x: Tensor,
    y: Tensor | None,
    sample: Tensor,
    labels: Tensor | None,
    sample_y: Tensor | None,
    labels_y: Tensor | None,
) -> tuple[Tensor, ...]:
    """Statistics of the logits <x_i, y_j> of each row i per relation.

    Args:
        x: (N, D) anchors, scaled so that logits are inner products.
        y: (M, D) candidates; None means x itself, and j = i then has no relation.
        sample: (N,) integers; rows with the same id are views of one sample.
        labels: (N,) integers, -1 for unlabelled rows; None if no row is labelled.
        sample_y: (M,), only with y.
        labels_y: (M,), only with y and labels.

    Returns:
        mean_view, spread_view, mean_peer, lse_peer, lse_other: (N,) of x's dtype; n_view, n_peer, n_other: (N,) int64.
        If a relation is empty, its mean and spread are 0 and its lse is -inf, with zero gradient.
    """
    s = x @ (x if y is None else y).T
    view, peer, other = _relations(sample, labels, sample_y, labels_y)
    mean_view, mean_peer = _mean(s, view), _mean(s, peer)
    counts = view.sum(1), peer.sum(1), other.sum(1)
    return mean_view, _spread(s, view), mean_peer, _lse(s, peer), _lse(s, other), *counts


def views_without_self(x: Tensor, y: Tensor, sample: Tensor, sample_y: Tensor, self_y: Tensor) -> tuple[Tensor, Tensor]:
    """mean_view and spread_view as of `row_stats`, without the candidates (N,) that are the anchors themselves."""
    s = x @ y.T
    candidates = torch.arange(len(y), dtype=torch.int64, device=y.device)
    view = (sample[:, None] == sample_y) & (self_y[:, None] != candidates)
    return _mean(s, view), _spread(s, view)


def _relations(
    sample: Tensor, labels: Tensor | None, sample_y: Tensor | None, labels_y: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, M) masks of the relations view, peer and other."""
    same_sample = sample[:, None] == (sample if sample_y is None else sample_y)
    same_class = same_sample
    if labels is not None:
        candidates = labels if labels_y is None else labels_y
        same_class = same_sample | ((labels[:, None] == candidates) & (candidates != UNLABELLED))
    view = same_sample
    if sample_y is None:
        view = same_sample & ~torch.eye(len(sample), dtype=torch.bool, device=sample.device)
    return view, same_class & ~same_sample, ~same_class


def _lse(s: Tensor, mask: Tensor) -> Tensor:
    """Row-wise log-sum-exp over a mask; -inf with zero gradient (torch's own is NaN) for an empty row."""
    empty = ~mask.any(1)
    return s.masked_fill(~mask, -torch.inf).masked_fill(empty[:, None], 0).logsumexp(1).masked_fill(empty, -torch.inf)


def _spread(s: Tensor, mask: Tensor) -> Tensor:
    """Row-wise log-sum-exp minus mean; 0 for an empty row.

    Computed relative to the mean, so that a single entry has a spread of exactly 0 with exactly zero gradient; cloned,
    so that autograd adds the two gradients that cancel there before any other.
    """
    own = s.clone()
    centred = own - _mean(own, mask)[:, None]
    spread = _lse(centred, mask) - _mean(centred, mask)  # the mean of centred is rounding error
    return spread.masked_fill(~mask.any(1), 0)


def _mean(s: Tensor, mask: Tensor) -> Tensor:
    """Row-wise mean over a mask; 0 for an empty row."""
    return s.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)
