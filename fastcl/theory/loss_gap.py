"""Computes Theorem 1 of arXiv 2506.04411: how much larger than NSCL's the CL loss of the same model can be.

It holds for every model and labels, on a batch or on a data set of B samples with K views each. An anchor of class c
has n_c - 1 samples of its class and B - n_c others, and

    CL - NSCL = log(1 + P / Q) <= log(1 + x_c),    x_c = e^{2 / tau} (n_c - 1) / (B - n_c)

with P and Q the sums of exp(s / tau) over the K (n_c - 1) and K (B - n_c) candidates, all s in [-1, 1]. If both losses
have the anchor's K - 1 other views in the denominator too, x_c = e^{2 / tau} K (n_c - 1) / (K (B - n_c) + K - 1). As
printed, with temperature: log(1 + e^{2 / tau} n_max / (B - n_max)) for all anchors. All in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastcl.theory.logarithms import log_sum
from fastcl.theory.ranges import check_count, check_temperature, checked_counts
from fastcl.theory.softmax_gap import log_odds


@dataclass(frozen=True)
class LossGapBound:
    """Upper bounds on the mean of CL - NSCL over the anchors, in nats; the mean is never negative.

    All are inf where one class is the whole batch (NSCL has no negatives), but not `mean` and `largest` with positives
    in the denominator.

    Attributes:
        mean: the mean over the anchors of log(1 + x_c), the smallest of the three.
        largest: log(1 + x_c) of the largest class, with n_max - 1 in the numerator.
        printed: as printed, with n_max in the numerator.
        uninformed: CL's loss if all similarities are equal.
    """

    mean: float
    largest: float
    printed: float
    uninformed: float

    @property
    def vacuous(self) -> bool:
        """Whether `mean` reaches `uninformed`: NSCL may then be 0 or less where CL has learned nothing."""
        return self.mean >= self.uninformed


def loss_gap_bound(
    class_counts: Sequence[int], temperature: float, views: int = 2, positive_in_denominator: bool = False
) -> LossGapBound:
    """Bounds the difference of CL's and NSCL's loss (Theorem 1, arXiv 2506.04411; with temperature, n_max - 1 and the
    mean over anchors by the same proof).

    Args:
        class_counts: samples of each class, in the batch or in the data set that the losses are computed on; zeros are
            ignored. A sample without a label is a class of its own.
        temperature: tau, above 1e-30.
        views: K, of each sample.
        positive_in_denominator: False compares "dcl" with "nscl", True "ntxent" with "nscl_with_positive".

    Raises:
        FastclError: counts that are not integers >= 0 or sum to less than 2, or a value out of range.
    """
    check_temperature(temperature)
    check_count("views", views, 1)
    counts = checked_counts(class_counts)
    total, own = sum(counts), views - 1 if positive_in_denominator else 0

    def gap(count: int) -> float:
        return log_sum(0.0, log_odds(views * (count - 1), views * (total - count) + own, temperature))

    most = max(counts)
    return LossGapBound(
        mean=math.fsum(count * gap(count) for count in counts) / total,
        largest=gap(most),
        printed=log_sum(0.0, log_odds(most, total - most, temperature)),
        uninformed=math.log(views * (total - 1) + own),
    )
