"""Sorting rows by (class, sample), and what follows from it: relation counts, class intervals, view intervals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.rowstats.dense import UNLABELLED


@dataclass(frozen=True)
class Sorted:
    """The rows of one operand, sorted by key = (group, sample)."""

    order: Tensor  # (N,) source row of the k-th row
    group: Tensor  # (N,) class of the k-th row; an unlabelled row's class is its sample
    sample: Tensor  # (N,) sample of the k-th row
    key: Tensor  # (N,) ascending

    def restore(self, values: Tensor) -> Tensor:
        """Put values of sorted rows back in source order."""
        return values.new_empty(values.shape).index_copy_(0, self.order, values)


@dataclass(frozen=True)
class Layout:
    """The order of both operands. `symmetric`: the candidates y are the anchors x themselves."""

    x: Sorted
    y: Sorted
    symmetric: bool
    labelled: bool  # without labels there are no peers

    @classmethod
    def of(cls, sample: Tensor, labels: Tensor | None, sample_y: Tensor | None, labels_y: Tensor | None) -> Layout:
        """Sort ids of any values: dense ranks over both operands give one integer key per row."""
        samples = sample if sample_y is None else torch.cat([sample, sample_y])
        group = sample_rank = _dense_rank(samples)
        if labels is not None:
            both = labels if labels_y is None else torch.cat([labels, labels_y])
            group = torch.where(both == UNLABELLED, sample_rank, len(samples) + _dense_rank(both))
        n = len(sample)
        x = _sorted(group[:n], sample_rank[:n], len(samples))
        y = x if sample_y is None else _sorted(group[n:], sample_rank[n:], len(samples))
        return cls(x, y, sample_y is None, labels is not None)

    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """n_view, n_peer, n_other of the sorted anchors; (N,) int64."""
        same_sample = _matches(self.y.key, self.x.key)
        same_class = _matches(self.y.group, self.x.group)
        return same_sample - int(self.symmetric), same_class - same_sample, len(self.y.key) - same_class

    def samples(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(start, stop) of each anchor sample's rows among the anchors and among the candidates, (S,) each."""
        key = self.x.key
        first = torch.ones_like(key, dtype=torch.bool)
        first[1:] = key[1:] != key[:-1]
        (start,) = first.nonzero(as_tuple=True)
        stop = torch.cat([start[1:], start.new_full((1,), len(key))])
        if self.symmetric:
            return (start, stop), (start, stop)
        wanted = key[start]
        candidates = torch.searchsorted(self.y.key, wanted), torch.searchsorted(self.y.key, wanted, right=True)
        return (start, stop), candidates

    def class_intervals(self, size: int) -> list[tuple[slice, slice]]:
        """Blocks of anchors, each with the interval of candidates that contains every row of their classes."""
        anchors, candidates = self.x.group, self.y.group
        blocks = [slice(k, min(k + size, len(anchors))) for k in range(0, len(anchors), size)]
        low = torch.searchsorted(candidates, anchors[::size].contiguous()).tolist()
        high = torch.searchsorted(candidates, anchors[[b.stop - 1 for b in blocks]], right=True).tolist()
        return [(b, slice(lo, hi)) for b, lo, hi in zip(blocks, low, high, strict=True)]


def _dense_rank(values: Tensor) -> Tensor:
    """Ranks 0, 1, ... of the distinct values. Avoids `unique`, whose output size depends on the data."""
    ordered, order = values.sort(stable=True)
    steps = torch.zeros_like(order)
    steps[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).index_copy_(0, order, steps.cumsum(0))


def _sorted(group: Tensor, sample: Tensor, n_total: int) -> Sorted:
    key, order = (group * n_total + sample).sort(stable=True)
    return Sorted(order, group[order], sample[order], key)


def _matches(ordered: Tensor, values: Tensor) -> Tensor:
    """Number of occurrences of each value in an ascending tensor."""
    return torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)
