"""Row statistics, the building blocks of every contrastive loss, as one differentiable operation.

To an anchor row i every candidate row j has one relation: `view` (same sample), `peer` (another sample of the same
class) or `other`. With s_ij = <x_i, y_j> / temperature, each relation r has lse_r[i] = log sum_j exp(s_ij) and a mean
of s_ij. The losses are a few lines of plain PyTorch on these (N,) vectors; see `fastcl.losses.objectives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from fastcl.checks import check_positive, check_precision, check_transforms
from fastcl.choices import Precision
from fastcl.dispatch import choose
from fastcl.errors import FastclError
from fastcl.exchange import gathers
from fastcl.rowstats import dense
from fastcl.rowstats.fields import RowStats, unpack
from fastcl.rowstats.request import Batch
from fastcl.rowstats.small import route as small
from fastcl.rowstats.small.whole import norms
from fastcl.rowstats.triton.operator import fused

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def row_stats(
    x: Tensor, y: Tensor | None = None, *, sample: Tensor, labels: Tensor | None = None,
    sample_y: Tensor | None = None, labels_y: Tensor | None = None, self_y: Tensor | None = None,
    temperature: float | Tensor, normalize: bool = True, columns: Literal[False] = False,
    precision: Precision | None = None, gather_distributed: bool | None = None, group: ProcessGroup | None = None,
) -> RowStats: ...  # fmt: skip
@overload
def row_stats(
    x: Tensor, y: Tensor, *, sample: Tensor, labels: Tensor | None = None, sample_y: Tensor,
    labels_y: Tensor | None = None, temperature: float | Tensor, normalize: bool = True, columns: Literal[True],
    precision: Precision | None = None, gather_distributed: bool | None = None, group: ProcessGroup | None = None,
) -> tuple[RowStats, RowStats]: ...  # fmt: skip
@overload
def row_stats(
    x: Tensor, y: Tensor | None = None, *, sample: Tensor, labels: Tensor | None = None,
    sample_y: Tensor | None = None, labels_y: Tensor | None = None, self_y: Tensor | None = None,
    temperature: float | Tensor, normalize: bool = True, columns: bool, precision: Precision | None = None,
    gather_distributed: bool | None = None, group: ProcessGroup | None = None,
) -> RowStats | tuple[RowStats, RowStats]: ...  # fmt: skip
def row_stats(
    x: Tensor, y: Tensor | None = None, *, sample: Tensor, labels: Tensor | None = None,
    sample_y: Tensor | None = None, labels_y: Tensor | None = None, self_y: Tensor | None = None,
    temperature: float | Tensor, normalize: bool = True, columns: bool = False, precision: Precision | None = None,
    gather_distributed: bool | None = None, group: ProcessGroup | None = None,
) -> RowStats | tuple[RowStats, RowStats]:  # fmt: skip
    """Row statistics of anchors x against candidates y, differentiable in x, y and the temperature.

    Args:
        x: (N, D) float16, bfloat16, float32 or float64; statistics are float32, float64 for float64.
        y: (M, D) of x's dtype and device. None: the candidates are x itself, and j = i has no relation.
        sample: (N,) integer ids; rows with the same id are views of one sample.
        labels: (N,) integer classes, -1 for unlabelled rows (`other` to all but their own views); None: no classes.
            Views of one sample share a label.
        sample_y: (M,) ids of y's rows, in the same numbering as `sample`; required with y.
        labels_y: (M,) classes of y's rows; required with y and labels.
        self_y: (N,) integers: the position in y of each anchor itself, -1 if it is not there; it has no relation then.
            Without it, such a candidate is a view of the anchor: it has the same sample. Not with columns. On a GPU it
            costs the views a second pass, which waits for the device.
        temperature: positive number, or a tensor with one element, which then gets a gradient.
        normalize: divide each row by its Euclidean norm first. A zero row stays zero and gets zero gradient; finite
            rows neither overflow nor underflow, whatever their size.
        columns: also return the statistics of y's rows against x; the Triton backend computes them in the same pass if
            there are no labels.
        precision: of the Triton backend's products, accumulated in float32: "fp16", "bf16", or "fp32" for products in
            split half precision, as accurate as float32. None: "fp32" for float32 rows, unless autocast is on or
            `torch.get_float32_matmul_precision()` is below "highest"; otherwise "fp16". The other backends ignore it
            and compute in float32, float64 for float64.
        gather_distributed: compare this rank's anchors with the candidates of all ranks (docs/distributed.md); views
            are found on one rank. None: False, with a warning in a process group of several ranks.
        group: the ranks, a group of torch.distributed; None: all.

    Returns:
        RowStats of the N anchors; with columns, a pair: those of the anchors and those of the M candidates.

    Raises:
        FastclError: wrong rank, shape, dtype or device, an empty batch, ids that are not integers, a temperature that
            is not positive and finite, views of one sample with different labels, columns without y, self_y with
            columns, without y, outside of y or of another sample, an unknown precision; input that the Triton backend
            does not support if that backend was requested by name. Tensor values are checked on the CPU only: on other
            devices a check would have to synchronise. With gather_distributed also no group that holds this process
            and, on every rank, arguments that differ.

    Source: the relations generalise arXiv 2510.08852, section 3. A NaN or an infinity in a row gives NaN in every row
    that it is compared with. In float32 a logit of size L is known to 2^-24 L: gradients have relative errors up to
    1e-5 + 2^-24 L, those of `spread_view` up to 1e-5 + 2^-24 / f if the logits of views differ by a fraction f of L.
    """
    ids, options = (sample, labels, sample_y, labels_y), (temperature, normalize)
    checked = partial(_batch, x, y, ids, columns, self_y)
    if gather_distributed is not False and gathers(gather_distributed):
        anchors, *candidates = _gathered(checked, *options, columns, precision, group)
    else:
        anchors, *candidates = statistics(checked(), *options, columns, precision)
    if self_y is not None and anchors.n_other.ndim:  # compiled code that refuses has no statistics
        from fastcl.rowstats import selves  # which uses this module

        anchors = selves.left_out(anchors, (x, y), (sample, sample_y, self_y), *options)
    return (anchors, candidates[0]) if columns else anchors


def _gathered(
    checked: Callable[[], Batch], temperature: float | Tensor, normalize: bool, columns: bool, precision: str | None,
    group: ProcessGroup | None,
) -> tuple[RowStats, ...]:  # fmt: skip
    from fastcl.rowstats import meeting, sharded  # which use this module

    options = meeting.Options(temperature, normalize, columns, precision)
    return sharded.row_stats(checked, options, "row_stats", group)


def _batch(x: Tensor, y: Tensor | None, ids: tuple[Any, ...], columns: bool, self_y: Tensor | None) -> Batch:
    batch = Batch.of(x, y, *ids)
    if self_y is not None:
        from fastcl.rowstats import selves

        selves.check(self_y, batch, columns)
    if columns and y is None:
        raise FastclError("columns=True requires y: without y, rows and columns have the same statistics")
    return batch


def statistics(
    batch: Batch, temperature: float | Tensor, normalize: bool, columns: bool, precision: str | None
) -> tuple[RowStats, ...]:
    """RowStats of the anchors and, with columns, of the candidates; arguments as `row_stats`."""
    check_positive(temperature, "temperature")
    check_precision(precision)
    chosen = choose(batch.x)
    if chosen == "triton":
        if columns and batch.labels is not None:
            batches = batch, batch.transposed()
            return tuple(statistics(b, temperature, normalize, False, precision)[0] for b in batches)
        stats, counts, _, stats_y, counts_y, _ = fused(batch, temperature, normalize, columns, precision, ())
        return tuple(unpack(*found) for found in ((stats, counts), (stats_y, counts_y))[: 1 + columns])
    if chosen == "chunked" and not columns and (few := small.row_stats(batch, temperature, normalize)) is not None:
        return (unpack(*few),)
    with torch.autocast(batch.x.device.type, enabled=False):
        batch = batch.spelled_out()
        x = scaled(batch.x, temperature, normalize)
        y = None if batch.y is None else scaled(batch.y, temperature, normalize)
        batch = Batch(x, None, y, batch.sample, batch.labels, batch.sample_y, batch.labels_y)
        return tuple(_on_torch(b, chosen) for b in ((batch, batch.transposed()) if columns else (batch,)))


def _on_torch(batch: Batch, chosen: str) -> RowStats:
    assert batch.sample is not None
    arguments = batch.x, batch.y, batch.sample, batch.labels, batch.sample_y, batch.labels_y
    if chosen == "dense":
        mean_view, spread_view, mean_peer, *rest = dense.row_stats(*arguments)
    else:
        check_transforms(chosen, batch.x, batch.y)
        mean_view, spread_view, mean_peer, *rest = torch.ops.fastcl.row_stats(*arguments)
    lse_peer, lse_other, *counts = rest
    return unpack((mean_view, spread_view, mean_peer, lse_peer, lse_other), counts)


def normalize_rows(x: Tensor) -> Tensor:
    """Rows of unit Euclidean norm.

    Dividing by the largest entry first keeps the squares of any finite row in range. That entry is detached, because
    the direction does not depend on it.

    Args:
        x: (N, D) floating point.

    Returns:
        (N, D) float32, float64 for float64. Zero rows stay zero, with zero gradient; non-finite rows become NaN.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if _is_readable(x):
        own = x.clone() if x.requires_grad else x  # autograd keeps it, and the caller may change x
        if (found := norms(own)) is not None:
            return own / found[0]
    peak = x.detach().abs().amax(dim=1, keepdim=True)
    is_zero = peak == 0
    u = (x / peak.masked_fill(is_zero, 1)).masked_fill(is_zero, 0)
    # The largest entry of u is 1, so the sum of squares is at least 1 except in zero rows.
    return u / u.square().sum(1, keepdim=True).masked_fill(is_zero, 1).sqrt()


def scaled(x: Tensor, temperature: float | Tensor, normalize: bool) -> Tensor:
    """Rows in working precision, normalised if requested, divided by sqrt(temperature): logits are then inner products,
    and autograd provides the gradient of the temperature."""
    return prepared(x, normalize) / _square_root(temperature, x.dtype)


def _square_root(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Square root of the temperature; in float64 if rows or temperature are, where float32 would round the root."""
    if not isinstance(temperature, Tensor):
        return math.sqrt(temperature)
    wide = torch.float64 in (temperature.dtype, dtype)
    return temperature.to(torch.float64 if wide else torch.float32).reshape(()).sqrt()


def prepared(x: Tensor, normalize: bool) -> Tensor:
    """Rows in working precision, normalised if requested. Infinities become NaN."""
    if normalize:
        return normalize_rows(x)
    x = x if x.dtype == torch.float64 else x.float()
    if _is_readable(x) and norms(x.detach()) is not None:
        return x.clone()
    return x * x.new_ones(()).where(~x.isinf(), torch.nan)


def _is_readable(x: Tensor) -> bool:
    """Whether a choice may depend on values, so that norms in range save steps."""
    return small.supports(x) and small.untransformed()
