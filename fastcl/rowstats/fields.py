"""The statistics of a call by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowStats:
    """Statistics of N anchors; every field is an (N,) tensor, float32 (float64 for float64 rows) or int64 for counts.

    If a relation is empty, its lse is -inf, its mean and spread are 0, and it gets no gradient.
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


def unpack(stats: Tensor | Sequence[Tensor], counts: Tensor | Sequence[Tensor]) -> RowStats:
    """RowStats from (N,) tensors: mean_view, spread_view, mean_peer, lse_peer, lse_other; then the three counts."""
    mean_view, spread_view, mean_peer, lse_peer, lse_other = stats
    n_view, n_peer, n_other = counts
    lse_view = (mean_view + spread_view).masked_fill(n_view == 0, -torch.inf)
    return RowStats(lse_view, spread_view, mean_view, lse_peer, mean_peer, lse_other, n_view, n_peer, n_other)
