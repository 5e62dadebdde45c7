"""Decides which calls use the whole matrix at once: small batches on a CPU, where tiles cost more than they save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastcl.rowstats import chunked
from fastcl.rowstats.request import Batch
from fastcl.rowstats.small import autograd
from fastcl.rowstats.small.autograd import Pairs
from fastcl.rowstats.small.closed import has_slopes

_PLAIN = (Tensor, torch.nn.Parameter)
_transforms, _modes = torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack
_trace = torch._C._get_tracing_state


class Group(NamedTuple):
    """Objectives, which are computed together."""

    forms: tuple[Any, ...]
    labelled: bool  # classes matter to one of them; without classes, peers count as others
    peers: bool  # statistics of peers are needed where there are labels


def losses(
    batch: Batch, group: Group, temperature: float | Tensor, inverted: bool, normalize: bool, columns: bool,
    reduction: str,
) -> Sequence[Tensor] | None:  # fmt: skip
    """Reduced row losses of each objective; None if tiles must be used.

    Args:
        group: `group_of` the objectives. The rows must be supported (`supports`), and few (`is_few`).
        inverted: the temperature is given by its reciprocal.
        columns: the candidates are anchors too, whose losses are reduced together with the others'.
    """
    if (pairs := _pairs(batch, group.labelled, columns)) is None:
        return None
    peers = group.peers and pairs.labels is not None
    return autograd.losses(pairs, temperature, inverted, normalize, group.forms, peers, reduction)


def group_of(objectives: Sequence[Any]) -> Group | None:
    """The objectives as a group; None if one of them has no closed form."""
    if not all(map(has_slopes, objectives)):
        return None
    labelled = any(o.needs_labels for o in objectives)
    peers = any("peer" in (*o.positives, *o.denominator) for o in objectives)
    return Group(tuple(objectives), labelled, labelled and peers)


def row_stats(batch: Batch, temperature: float | Tensor, normalize: bool):
    """The five statistics and three counts of each row; None if tiles must be used."""
    if not _is_small(batch):
        return None
    if (pairs := _pairs(batch, True, False)) is not None:
        return autograd.row_stats(pairs, temperature, normalize, pairs.labels is not None)
    if batch.sample is None or batch.y is not None or len(batch.x) ** 2 > chunked.WHOLE // 4:
        return None
    return autograd.any_row_stats(batch.x, batch.sample, batch.labels, temperature, normalize)


def _pairs(batch: Batch, needs_labels: bool, columns: bool) -> Pairs | None:
    x, x2, y = batch.x, batch.x2, batch.y
    labels = batch.labels if needs_labels else None
    if batch.sample is None:
        return Pairs(x, y, None, None, True, columns) if x2 is None else Pairs(x, x2, None, labels, False)
    if y is not None:
        return _one_way(batch) if labels is None else None
    if batch.stacked:
        return Pairs(x, None, None, None if labels is None else labels[: len(x) // 2], False)
    return _sorted_pairs(x, batch.sample, labels)


def _one_way(batch: Batch) -> Pairs | None:
    """Anchors and candidates if candidate k is the one view of anchor k and all ids ascend; otherwise None."""
    sample, sample_y = batch.sample, batch.sample_y
    if batch.y is None or sample is None or sample_y is None or len(sample) > len(sample_y):
        return None
    if not torch.equal(sample, sample_y[: len(sample)]) or not bool((sample_y[1:] > sample_y[:-1]).all()):
        return None
    return Pairs(batch.x, batch.y, None, None, True, False)


def _is_small(batch: Batch) -> bool:
    x, y = batch.x, batch.y
    n = x.shape[0] if batch.x2 is None else 2 * x.shape[0]
    return n >= 4 and supports(x) and is_few(n * (n if y is None else y.shape[0]))


def is_few(entries: int) -> bool:
    """Whether a whole matrix of so many entries may be computed now: it is small, and no transform or dispatch mode has
    to see the registered operator instead."""
    return entries <= chunked.WHOLE and untransformed()


def untransformed() -> bool:
    """Whether no transform, dispatch mode or trace is active: values of tensors may be read."""
    return forward_ad._current_level < 0 and not _transforms() and not _modes() and _trace() is None


def supports(x: Tensor) -> bool:
    """Whether rows of this kind may be computed here, if they are few; not while compiling."""
    return not torch.compiler.is_compiling() and type(x) in _PLAIN and x.device.type == "cpu"


def _sorted_pairs(x: Tensor, sample: Tensor, labels: Tensor | None) -> Pairs | None:
    """Pairs in sample order if each sample has exactly two rows; otherwise None."""
    half = len(sample) // 2
    if len(sample) % 2:
        return None
    ids, order = sample.sort(stable=True)
    if not torch.equal(ids[::2], ids[1::2]) or bool((ids[2::2] == ids[1:-1:2]).any()):
        return None
    order = torch.cat([order[::2], order[1::2]])
    return Pairs(x, None, order, None if labels is None else labels[order[:half]], False)
