"""Two models on the same samples: row statistics of both and a comparison of their similarities, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.checks import check_positive, check_rows, describe
from fastcl.choices import Precision
from fastcl.dispatch import choose
from fastcl.errors import FastclError
from fastcl.rowstats.api import RowStats, operator_arguments, statistics, unpack
from fastcl.rowstats.pair_sums import PairSums
from fastcl.rowstats.request import Batch
from fastcl.similarity import PairStats
from fastcl.similarity.sums.features import NARROW_ROUNDING, multiplied_narrow
from fastcl.similarity.sums.rows import mapped


@dataclass(frozen=True)
class TwinStats:
    """The result of `twin_stats`.

    Attributes:
        a: row statistics of the first model, differentiable.
        b: row statistics of the second model, differentiable.
        sums: (18,) float64 on the device of the rows, without gradient: the input of `pairs`.
        n: number of rows.
        rounding: relative rounding error of the products behind the sums; 0 for float64 products.
    """

    a: RowStats
    b: RowStats
    sums: Tensor
    n: int
    rounding: float

    def pairs(self) -> PairStats:
        """Statistics of the two cosine Gram matrices (n x n, over rows); one transfer from the device.

        Raises:
            FastclError: a row is not finite.
        """
        return PairStats.unpacked(self.n, "cosine", self.sums.tolist(), self.rounding)


def twin_stats(
    za: Tensor,
    zb: Tensor,
    sample: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor,
    precision: Precision | None = None,
) -> TwinStats:
    """Row statistics of two models' embeddings of the same rows, and the statistics of their cosine Gram matrices.

    Args:
        za: (N, Da) embeddings by the first model, float16, bfloat16, float32 or float64.
        zb: (N, Db) embeddings of the same N rows by the second, of za's dtype and device. Rows of both are normalised.
        sample: (N,) integer ids; rows with the same id are views of one sample.
        labels: (N,) integer classes, -1 for unlabelled rows; None: no classes.
        temperature: of both models' logits: a positive number, or a differentiable tensor with one element.
        precision: of the Triton backend's products, as in `fastcl.row_stats`.

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
        correlations are exactly 1 and all drifts exactly 0.

    Raises:
        FastclError: as `fastcl.row_stats`; za and zb differ in their number of rows, dtype or device.

    Source: the measures of `fastcl.PairStats` (arXiv 2510.08852, Theorem 1 and Corollaries 1 and 2).
    """
    check_rows(za, "za")
    check_rows(zb, "zb")
    if (len(zb), zb.dtype, zb.device) != (len(za), za.dtype, za.device):
        raise FastclError(
            f"za and zb must have the same number of rows, dtype and device, got {describe(za)} and {describe(zb)}"
        )
    batch = Batch.of(za, None, sample, labels, None, None)
    check_positive(temperature, "temperature")
    if choose(za, zb) == "triton":
        arguments = operator_arguments(temperature, precision, za, zb)
        stats_a, stats_b, counts, sums, *_ = torch.ops.fastcl.twin(za, zb, batch.sample, batch.labels, *arguments)
        return TwinStats(unpack(stats_a, counts), unpack(stats_b, counts), sums, len(za), NARROW_ROUNDING)
    batches = batch, Batch(zb, sample=batch.sample, labels=batch.labels)
    a, b = (statistics(one, temperature, True, False, precision)[0] for one in batches)
    narrow = multiplied_narrow(za, zb) and za.shape[1] == zb.shape[1]
    sums = PairSums.of_rows(mapped(za.detach(), "cosine"), mapped(zb.detach(), "cosine"), narrow)
    return TwinStats(a, b, sums.packed(), len(za), NARROW_ROUNDING if narrow else 0.0)
