"""The statistics of a call by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.errors import FastclError, type_of


@dataclass(frozen=True)
class RowStats:
    """Statistics of N anchors; every field is an (N,) tensor, float32 (float64 for float64 rows) or int64 for counts.

    If a relation is empty, its lse is -inf, its mean and spread are 0, and it gets no gradient. `union` joins the
    statistics of the same anchors against further candidates.
    """

    lse_view: Tensor
    spread_view: Tensor  # lse_view - mean_view, computed without cancellation: exactly 0 for a single view
    mean_view: Tensor
    lse_peer: Tensor
    mean_peer: Tensor
    lse_other: Tensor
    n_view: Tensor
    n_peer: Tensor
    n_other: Tensor

    @property
    def valid(self) -> Tensor:
        """(N,) bool: the row has a view and an other, so it is valid for every objective of the table."""
        return (self.n_view > 0) & (self.n_other > 0)

    def union(self, other: RowStats) -> RowStats:
        """Statistics of the same anchors against the candidates of both, with gradients to both.

        Raises:
            FastclError: something else than RowStats, numbers of anchors that differ.
        """
        if not isinstance(other, RowStats):
            raise FastclError(f"other must be RowStats, got {type_of(other)}")
        if len(self.n_view) != len(other.n_view):
            raise FastclError(f"anchors must be the same, got {len(self.n_view)} and {len(other.n_view)}")
        mean_view, spread_view, n_view = _joined_views(self, other)
        mean_peer, n_peer = _joined_means(self.mean_peer, self.n_peer, other.mean_peer, other.n_peer)
        n_other = self.n_other + other.n_other
        lse_peer = _joined_log_sums(self.lse_peer, other.lse_peer, n_peer > 0)
        lse_other = _joined_log_sums(self.lse_other, other.lse_other, n_other > 0)
        return unpack((mean_view, spread_view, mean_peer, lse_peer, lse_other), (n_view, n_peer, n_other))


def unpack(stats: Tensor | Sequence[Tensor], counts: Tensor | Sequence[Tensor]) -> RowStats:
    """RowStats from (N,) tensors: mean_view, spread_view, mean_peer, lse_peer, lse_other; then the three counts."""
    mean_view, spread_view, mean_peer, lse_peer, lse_other = stats
    n_view, n_peer, n_other = counts
    lse_view = (mean_view + spread_view).masked_fill(n_view == 0, -torch.inf)
    return RowStats(lse_view, spread_view, mean_view, lse_peer, mean_peer, lse_other, n_view, n_peer, n_other)


def _joined_log_sums(a: Tensor, b: Tensor, there: Tensor) -> Tensor:
    """log(exp(a) + exp(b)) where there is something to sum; elsewhere -inf without a gradient, not NaN."""
    joined = torch.logaddexp(a.where(there, 0), b.where(there, 0))
    return joined.masked_fill(~there, -torch.inf)


def _joined_means(a: Tensor, n_a: Tensor, b: Tensor, n_b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of n_a numbers of mean a and n_b of mean b, exactly one of them if the other has none; their number."""
    n = n_a + n_b
    return a + (b - a) * (n_b.to(a.dtype) / n.clamp(min=1)), n


def _joined_views(a: RowStats, b: RowStats) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, spread and number of the views of both; each spread is taken relative to the joint mean, so that close
    views cancel nothing."""
    mean, n = _joined_means(a.mean_view, a.n_view, b.mean_view, b.n_view)
    one, two = ((s.spread_view + (s.mean_view - mean)).masked_fill(s.n_view == 0, -torch.inf) for s in (a, b))
    return mean, _joined_log_sums(one, two, n > 0).masked_fill(n == 0, 0), n
