"""Computes Corollaries 1 and 2 of arXiv 2510.08852: what a relative drift says about CKA and RSA.

Two vectors u, v with ||u - v|| <= x ||u|| have a cosine of at least (1 - x) / (1 + x), and even of sqrt(1 - x^2), if
x < 1. For x >= 1 any cosine is possible; the printed form would claim more than -1. CKA is the cosine of HKH and HLH,
RSA that of the centred entries of K and L off the diagonal:

    rho = ||HKH - HLH||_F / ||HKH||_F           <= d / ||HKH||_F
    r   = ||K~ - L~||_F / (sqrt(n(n-1)) sigma)  <= d / (sqrt(n(n-1)) sigma)

K is CL's similarity matrix, L is NSCL's, d >= ||K - L||_F, and sigma the standard deviation of K_ij, i != j. With d
from Theorem 1 the two are predictions. With measured rho and r they are certificates: `PairStats.cka_bound`,
`PairStats.rsa_bound` and their tight forms, which take their formulas from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastcl.errors import FastclError
from fastcl.theory.ranges import LARGEST, SMALLEST, check_count, check_range, is_number


def cosine_floor(relative: float) -> float:
    """(1 - x) / (1 + x), the least cosine of u and v with ||u - v|| <= x ||u|| as printed; -1, which is trivial, for
    x >= 1."""
    return (1 - relative) / (1 + relative) if relative < 1 else -1.0


def cosine_floor_tight(relative: float) -> float:
    """sqrt(1 - x^2), the least cosine of u and v with ||u - v|| <= x ||u||; -1 for x >= 1."""
    return math.sqrt(1 - relative**2) if relative < 1 else -1.0


@dataclass(frozen=True)
class AlignmentBound:
    """A lower bound of CKA or RSA.

    Attributes:
        log10_relative: logarithm to base 10 of the bound on rho or r.
        least: what the measure never falls below: 0 for CKA, -1 for RSA.
    """

    log10_relative: float
    least: float

    @property
    def printed(self) -> float:
        """(1 - x) / (1 + x) of the relative drift x; `least` if vacuous."""
        return self.least if self.vacuous else cosine_floor(10**self.log10_relative)

    @property
    def tight(self) -> float:
        """sqrt(1 - x^2), which holds as well and is never smaller; `least` if vacuous."""
        return self.least if self.vacuous else cosine_floor_tight(10**self.log10_relative)

    @property
    def vacuous(self) -> bool:
        """Whether the relative drift may reach 1, so that the corollary says nothing."""
        return self.log10_relative >= 0


def cka_coupling_bound(log10_drift: float, centred_norm: float) -> AlignmentBound:
    """A lower bound of CL and NSCL's CKA with the cosine kernel (Corollary 1, arXiv 2510.08852).

    Args:
        log10_drift: logarithm to base 10 of a bound on ||K - L||_F, for example `CouplingBound.log10[t]`.
        centred_norm: ||HKH||_F of CL's similarity matrix at that step, in (0, 1e30]. It is no more than n.

    Raises:
        FastclError: a value out of range.
    """
    check_range("centred_norm", centred_norm, SMALLEST, LARGEST, includes="both")
    return AlignmentBound(_log10(log10_drift) - math.log10(centred_norm), 0.0)


def rsa_coupling_bound(log10_drift: float, n: int, spread: float) -> AlignmentBound:
    """A lower bound of CL and NSCL's RSA (Corollary 2, arXiv 2510.08852).

    The paper divides by sqrt(n (n - 1) / 2), the pairs i < j; the drift counts each of them twice, so that r is
    sqrt(2) times smaller than that, as here and in `PairStats.r`.

    Args:
        log10_drift: logarithm to base 10 of a bound on ||K - L||_F, for example `CouplingBound.log10[t]`.
        n: number of rows, at least 3.
        spread: population standard deviation of K_ij, i != j, of CL's similarity matrix at that step, in (0, 1e30].

    Raises:
        FastclError: a value out of range.
    """
    check_count("n", n, 3)
    check_range("spread", spread, SMALLEST, LARGEST, includes="both")
    return AlignmentBound(_log10(log10_drift) - math.log10(spread) - (math.log10(n) + math.log10(n - 1)) / 2, -1.0)


def _log10(value: float) -> float:
    if not is_number(value) or math.isnan(value):
        raise FastclError(f"log10_drift must be a number, got {value!r}")
    return value
