"""Two models on the same samples: row statistics of both and a comparison of their similarities, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcl.checks import check_positive, check_rows, describe
from fastcl.choices import Precision
from fastcl.dispatch import choose
from fastcl.errors import FastclError
from fastcl.exchange import Ranks, gathers
from fastcl.rowstats.agreement import Request, agreed
from fastcl.rowstats.api import RowStats, statistics
from fastcl.rowstats.fields import unpack
from fastcl.rowstats.meeting import Options
from fastcl.rowstats.pair_sums import PairSums
from fastcl.rowstats.registration import call, keep_order, refuse_second, register
from fastcl.rowstats.request import Batch
from fastcl.rowstats.sharded import sharded_statistics
from fastcl.rowstats.triton import two_models_operator  # noqa: F401  (registers its operator)
from fastcl.rowstats.triton.operator import operator_arguments
from fastcl.similarity import PairStats
from fastcl.similarity.sums.features import NARROW_ROUNDING, multiplied_narrow
from fastcl.similarity.sums.rows import mapped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TwinStats:
    """The result of `twin_stats`.

    Attributes:
        a: row statistics of the first model, differentiable.
        b: row statistics of the second model, differentiable.
        sums: (18,) float64 on the device of the rows, without gradient: the input of `pairs`.
        n: number of rows; int64 tensor () in compiled code over several ranks.
        rounding: relative rounding error of the products behind the sums; 0 for float64 products.
    """

    a: RowStats
    b: RowStats
    sums: Tensor
    n: int | Tensor
    rounding: float

    def pairs(self) -> PairStats:
        """Statistics of the two cosine Gram matrices (n x n, over rows); one transfer from the device.

        Raises:
            FastclError: a row is not finite.
        """
        return PairStats.unpacked(int(self.n), "cosine", self.sums.tolist(), self.rounding)


def twin_stats(
    za: Tensor,
    zb: Tensor,
    sample: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor,
    precision: Precision | None = None,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
) -> TwinStats:
    """Row statistics of two models' embeddings of the same rows, and the statistics of their cosine Gram matrices.

    Args:
        za: (N, Da) embeddings by the first model, float16, bfloat16, float32 or float64.
        zb: (N, Db) embeddings of the same N rows by the second, of za's dtype and device. Rows of both are normalised.
        sample: (N,) integer ids; rows with the same id are views of one sample.
        labels: (N,) integer classes, -1 for unlabelled rows; None: no classes.
        temperature: of both models' logits: a positive number, or a differentiable tensor with one element.
        precision: of the Triton backend's products, as in `fastcl.row_stats`.
        gather_distributed, group: as in `fastcl.row_stats`: `a` and `b` cover this rank's anchors, `n` and `sums` the
            rows of all ranks, from moments in float64.

    Returns:
        TwinStats. The row statistics equal those of `fastcl.row_stats(za, ...)` and `fastcl.row_stats(zb, ...)`:
        bitwise on the torch backends, and up to the order of summation on the Triton backend.

        On the Triton backend one program forms the tiles of both models and also uses them for the sums of the
        matrices. Its matrices are those of the rows as the tiles see them (in half precision, or split half precision
        for "fp32"), with entries summed in float32. A matrix whose entries vary by less than 2^-21 of their mean (root
        mean square) counts as constant; one whose entries vary by a fraction s of the mean has a relative error of
        2^-22 / s, since the tiles include the mean.

        The torch backends form the sums of the matrices from moments of the rows: with float32 products if both models
        are narrower than float64 and have the same width (a drift is accurate if the rows themselves are close,
        otherwise it is resolved as `PairStats.drift` says), else in float64.

        Both models' statistics share one graph: take both gradients in one backward pass. If za and zb are equal, all
        correlations are exactly 1 and all drifts exactly 0 (over several ranks up to rounding).

    Raises:
        FastclError: as `fastcl.row_stats`; za and zb differ in their number of rows, dtype or device.

    Source: the measures of `fastcl.PairStats` (arXiv 2510.08852, Theorem 1 and Corollaries 1 and 2).
    """
    checked = partial(_checked, za, zb, sample, labels)
    if gather_distributed is not False and gathers(gather_distributed):
        return _gathered(checked, zb, Options(temperature, True, False, precision), group)
    return _alone(checked(), zb, temperature, precision)


def _checked(za: Tensor, zb: Tensor, sample: Tensor, labels: Tensor | None) -> Batch:
    check_rows(za, "za")
    check_rows(zb, "zb")
    if (len(zb), zb.dtype, zb.device) != (len(za), za.dtype, za.device):
        raise FastclError(
            f"za and zb must have the same number of rows, dtype and device, got {describe(za)} and {describe(zb)}"
        )
    return Batch.of(za, None, sample, labels, None, None)


def _with_rows(batch: Batch, z: Tensor) -> Batch:
    return Batch(z, sample=batch.sample, labels=batch.labels)


def _alone(batch: Batch, zb: Tensor, temperature: float | Tensor, precision: str | None) -> TwinStats:
    """The statistics of checked rows without ranks."""
    za = batch.x
    check_positive(temperature, "temperature")
    if choose(za, zb) == "triton":
        given, *options = operator_arguments(temperature, precision, za, zb)
        stats_a, stats_b, counts, sums, *_ = call("twin", (za, zb, given, batch.sample, batch.labels), tuple(options))
        return TwinStats(unpack(stats_a, counts), unpack(stats_b, counts), sums, len(za), NARROW_ROUNDING)
    a, b = (statistics(one, temperature, True, False, precision)[0] for one in (batch, _with_rows(batch, zb)))
    narrow = multiplied_narrow(za, zb) and za.shape[1] == zb.shape[1]
    sums = PairSums.of_rows(mapped(za.detach(), "cosine"), mapped(zb.detach(), "cosine"), narrow)
    return TwinStats(a, b, sums.packed(), len(za), NARROW_ROUNDING if narrow else 0.0)


def _gathered(checked: Callable[[], Batch], zb: Tensor, given: Options, group: ProcessGroup | None) -> TwinStats:
    """The statistics of the rows of all ranks."""
    facts: dict[str, object] = {"function": "twin_stats"}

    def request() -> Request:
        batch = checked()
        columns = zb.shape[1]
        if torch.compiler.is_compiling():  # where it may be a symbol, of which no text can be made
            columns = torch.full((), columns, dtype=torch.float64, device="cpu")
        facts["number of columns of zb"] = columns
        facts["need of a gradient of zb"] = torch.is_grad_enabled() and zb.requires_grad
        return batch, given.checked()

    found = agreed(request, facts, group)
    if isinstance(found, Tensor):  # refused
        nothing = unpack([found] * 5, [found] * 3)
        return TwinStats(nothing, nothing, found, found, 0.0)
    batch, options, (ranks,) = found
    if ranks.world == 1:
        return _alone(batch, zb, options.temperature, options.precision)
    a, b = (sharded_statistics(one, options, (ranks,))[0] for one in (batch, _with_rows(batch, zb)))
    rows = (mapped(z.detach(), "cosine") for z in (batch.x, zb))
    sums, n = torch.ops.fastcl.pair_sums(*rows, ranks.table, ranks.rank, ranks.group)
    return TwinStats(a, b, sums, n if torch.compiler.is_compiling() else ranks.total, 0.0)


def _sums(ua: Tensor, ub: Tensor, sizes: Tensor, rank: int, group: str) -> tuple[Tensor, Tensor]:
    """The numbers of `TwinStats.sums` over the rows of all ranks, and their number."""
    return PairSums.of_ranks(ua, ub, Ranks(group, rank, len(sizes), tuple(sizes.tolist()))).packed(), sizes.sum()


def _sums_fake(ua: Tensor, _ub: Tensor, sizes: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return ua.new_empty(18), sizes.new_empty(())


_library = torch.library.Library("fastcl", "FRAGMENT")
_library.define("pair_sums(Tensor ua, Tensor ub, Tensor sizes, int rank, str group) -> (Tensor, Tensor)")
register(_library, "pair_sums", _sums, _sums_fake, refuse_second)
keep_order(_library, "pair_sums")
