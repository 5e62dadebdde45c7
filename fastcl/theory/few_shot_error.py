"""Computes Proposition 1 of arXiv 2506.04411: few-shot error from the geometry of the classes.

The nearest class centre, with the centres of C' classes estimated from m samples each, errs with probability at most

    (C' - 1) [ (1/2 - c/a)^{-2} V~ + a/4 (2 / sqrt(m) (V^s + V) + V / m) ],    c = 2 + 2^{3/2} / m

for every a >= 5, if m >= 10. V is the CDNV, V~ the directional CDNV and V^s the mean of sqrt(V_ij), each a mean over
ordered pairs i != j of classes, of V_ij = v_i / |mu_i - mu_j|^2 and the like. For a = 16, with rounded constants:

    (C' - 1) [ 8 V~ + 8 / sqrt(m) (V^s + V) + 4 V / m ]

Three normalisations of the CDNV are in use. `fastcl.metrics.cdnv` averages (v_i + v_j) / 2 / |mu_i - mu_j|^2 over
i < j, which is the same number as the mean of v_i / |mu_i - mu_j|^2 over i != j: it is V as it stands. Without the
half, (v_i + v_j) / |mu_i - mu_j|^2, it would be 2 V. `fastcl.metrics.directional_cdnv` is V~.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastcl.errors import FastclError
from fastcl.theory.ranges import LARGEST, check_count, check_range

_FEWEST_SHOTS, _LEAST_A, _LARGEST_A = 10, 5.0, 1e15


@dataclass(frozen=True)
class FewShotBound:
    """Upper bounds on a probability of error; not clamped, so that a vacuous one says by how much.

    Attributes:
        error: the bound with `a`.
        a: the trade-off, as given or the one with the smallest bound.
        printed: the version with a = 16 and rounded constants.
        chance: 1 - 1 / C', the error of a guess.
    """

    error: float
    a: float
    printed: float
    chance: float

    @property
    def vacuous(self) -> bool:
        """Whether `error` is no better than a guess."""
        return self.error >= self.chance


def few_shot_bound(
    cdnv: float, directional_cdnv: float, shots: int, ways: int, a: float | None = None, root_cdnv: float | None = None
) -> FewShotBound:
    """Bounds the error of the nearest class centre with few samples per class (Proposition 1, arXiv 2506.04411).

    CDNVs are those of the distribution that shots and queries come from: on a data set, shots drawn from it with
    replacement. The error is the mean over choices of C' of its classes, shots and queries.

    Args:
        cdnv: V >= 0, as `fastcl.metrics.cdnv`.
        directional_cdnv: V~ in [0, V], as `fastcl.metrics.directional_cdnv`.
        shots: m, samples per class, at least 10.
        ways: C', number of classes, at least 2.
        a: at least 5; the best one by default.
        root_cdnv: V^s, the mean of sqrt(V_ij); by default its bound sqrt(V) (Jensen), as in the authors' code.

    Raises:
        FastclError: a value out of range.
    """
    check_range("cdnv", cdnv, 0.0, LARGEST, includes="both")
    check_range("directional_cdnv", directional_cdnv, 0.0, LARGEST, includes="both")
    if directional_cdnv > cdnv * (1 + 1e-9):
        raise FastclError(f"directional_cdnv is at most cdnv, got {directional_cdnv!r} and {cdnv!r}")
    check_count("shots", shots, _FEWEST_SHOTS)
    check_count("ways", ways, 2)
    root = math.sqrt(cdnv)
    if root_cdnv is not None:
        check_range("root_cdnv", root_cdnv, 0.0, root * (1 + 1e-9), includes="both")
        root = root_cdnv
    c = 2 + 2**1.5 / shots
    spread = 2 / math.sqrt(shots) * (root + cdnv) + cdnv / shots
    if a is None:
        a = _best_a(directional_cdnv, spread, c)
    check_range("a", a, _LEAST_A, _LARGEST_A, includes="both")
    return FewShotBound(
        error=(ways - 1) * (directional_cdnv / (0.5 - c / a) ** 2 + a / 4 * spread),
        a=a,
        printed=(ways - 1) * (8 * directional_cdnv + 4 * spread),
        chance=1 - 1 / ways,
    )


def _best_a(along: float, spread: float, c: float) -> float:
    """The a >= 5 that minimises V~ / (1/2 - c/a)^2 + a W / 4, which is convex in a > 2 c.

    With y = a / 2 - c the derivative vanishes where y^3 = p (y + c), p = 16 c V~ / W, which has one positive root.
    """
    if spread == 0 or along == 0:
        return _LEAST_A
    p = 16 * c * along / spread
    third, half = p / 3, p * c / 2  # Cardano: y^3 - 3 third y - 2 half = 0
    inner = half * half - third**3
    if inner >= 0:
        root = (half + math.sqrt(inner)) ** (1 / 3)
        y = root + third / root
    else:
        y = 2 * math.sqrt(third) * math.cos(math.acos(half / third**1.5) / 3)
    return min(max(_LEAST_A, 2 * (y + c)), _LARGEST_A)
