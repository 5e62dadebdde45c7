"""Sums over two Gram matrices, and a bilinear form of them with its rounding floor."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fastcl.errors import FastclError

# A form is a difference of sums; below this fraction of them it is only rounding error. The same holds for the spread
# of a Gram matrix's entries below this fraction of their mean.
ROUNDING = 256 * sys.float_info.epsilon

CONSTANT = "the {which} representation is constant over the samples"
EQUAL = "all similarities of distinct samples are equal in the {which} representation"
ADDITIVE = "HSIC_1 of the {which} representation with itself is zero"


@dataclass(frozen=True)
class GramSums:
    """Sums over two n x n matrices K and L with row sums k = K1 and l = L1."""

    kl: float  # <K, L>_F
    kk: float
    ll: float
    row_kl: float  # <k, l>
    row_kk: float
    row_ll: float
    total_k: float  # 1'K1
    total_l: float


def ratio(kl: float, kk: float, ll: float) -> float:
    """kl / sqrt(kk ll) of positive kk and ll."""
    # Two ratios instead of sqrt(kk * ll): no overflow at any scale, symmetric, and exactly 1 if kl == kk == ll.
    # Rounding can exceed the 1 of Cauchy-Schwarz.
    return math.copysign(min(1.0, math.sqrt((kl / kk) * (kl / ll))), kl)


def ratio_table(cross: Tensor, self_a: Tensor, self_b: Tensor) -> Tensor:
    """`ratio` of (n, m) cross terms with (n,) and (m,) self-terms."""
    return ((cross / self_a[:, None]) * (cross / self_b)).sqrt().clamp_max(1.0).copysign(cross)


class Form(NamedTuple):
    """One bilinear form at (K, L), (K, K) and (L, L), with rounding floors for the last two."""

    kl: float
    kk: float
    ll: float
    floor_k: float
    floor_l: float

    def self_term(self, which: str, measure: str, reason: str) -> float:
        """B(K, K) ("first") or B(L, L) ("second"). Raises FastclError with `reason` if it is only rounding."""
        value, floor = (self.kk, self.floor_k) if which == "first" else (self.ll, self.floor_l)
        if not value > floor:
            raise FastclError(
                f"{measure} is undefined: {reason.format(which=which)} "
                f"(self-term {value:.3g} is not above its rounding error {floor:.3g})"
            )
        return value

    def self_terms(self, measure: str, reason: str) -> tuple[float, float]:
        """B(K, K) and B(L, L). Raises FastclError if either is only rounding."""
        return self.self_term("first", measure, reason), self.self_term("second", measure, reason)

    def correlation(self, measure: str, reason: str) -> float:
        """B(K, L) / sqrt(B(K, K) B(L, L))."""
        return ratio(self.kl, *self.self_terms(measure, reason))
