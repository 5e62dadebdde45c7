"""Computes Theorem 1 of arXiv 2510.08852: how far self-supervised and supervised similarities can drift apart.

The theorem is about similarity descent: gradient steps on the entries of the similarity matrix S itself, on shared
batches of B anchors, under CL and under NSCL (fastcl's "dcl" and "nscl"). With d_t = ||S_t^CL - S_t^NSCL||_F, d_0 = 0,
learning rates eta_t, temperature tau and largest class frequency pi_max, with probability at least 1 - delta

    d_{t+1} <= (1 + eta_t / (2 tau^2 B)) d_t + eta_t Delta / (tau sqrt(B))                                   (Lemma 7)
    d_T     <= exp(sum eta_t / (2 tau^2 B)) (sum eta_t) Delta / (tau sqrt(B))                            (as printed)

Delta (`softmax_gap.py`) bounds the L1 distance between two softmax distributions, which is never more than 2; if
pi_max + eps >= 1, that 2 is the only bound. Everything is computed in logarithms: published settings reach 10^2783.

The exponential comes from a step being allowed to increase an earlier drift by 1 + eta L, L = 1 / (2 tau^2 B). But the
batch losses are convex in S, and then no step with eta <= 2 / L increases it at all (co-coercivity); beyond, it grows
by eta L - 1 at most. With ||p - q||_2 <= sqrt(2) m <= sqrt(2) x / (1 + x) besides, under the same assumptions

    d_{t+1} <= max(1, eta_t L - 1) d_t + eta_t sqrt(2) x / ((1 + x) tau sqrt(B)),     x = Delta / 2          (convex)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastcl.theory.logarithms import LN10, log_convex, log_drifts, log_smooth, log_sum
from fastcl.theory.ranges import check_count, check_range, check_temperature, checked_rates
from fastcl.theory.softmax_gap import log_printed_gap, sampling_error


@dataclass(frozen=True)
class DriftBound:
    """A bound on a distance after each of T steps; every logarithm is to base 10.

    Attributes:
        epsilon: eps, the most by which a class can exceed its frequency in some batch.
        log10_gap: Delta as printed; inf if pi_max + eps >= 1.
        log10_recurrence: T + 1 values; entry t bounds the distance d_t (-inf at t = 0) by the recurrence, with
            min(Delta, 2).
        log10_printed: the closed form at T, with Delta as printed; inf if Delta is.
        log10_largest: a bound on d_t known otherwise, beyond which the theorem says nothing; inf if there is none.
    """

    epsilon: float
    log10_gap: float
    log10_recurrence: tuple[float, ...]
    log10_printed: float
    log10_largest: float

    @property
    def log10(self) -> tuple[float, ...]:
        """T + 1 values; the smaller of `log10_recurrence` and `log10_largest`."""
        return tuple(min(value, self.log10_largest) for value in self.log10_recurrence)

    @property
    def vacuous_from(self) -> int | None:
        """The first t whose bound is no better than `log10_largest`; None if all are better, or none is known."""
        reached = (t for t, value in enumerate(self.log10_recurrence) if value >= self.log10_largest)
        return next(reached, None)


@dataclass(frozen=True)
class CouplingBound(DriftBound):
    """The bounds of `similarity_coupling_bound`: those of `DriftBound` on d_t = ||S_t^CL - S_t^NSCL||_F.

    `log10_largest` is `largest_drift(n)`, or inf without n.

    Attributes:
        log10_convex: T + 1 values; entry t bounds d_t by convexity (see the module): not the paper's, never larger than
            `log10_recurrence`, and without its exponential.
    """

    log10_convex: tuple[float, ...]


def similarity_coupling_bound(
    learning_rates: Sequence[float],
    batch_size: int,
    temperature: float,
    largest_class: float,
    delta: float = 0.01,
    n: int | None = None,
    views: int = 1,
) -> CouplingBound:
    """Bounds on the drift after each step of similarity descent (Theorem 1 and Lemma 7, arXiv 2510.08852).

    The drift over a subset of the rows, such as one batch, is no larger than that over all rows. What is assumed: equal
    starts, the same batches without repetitions, similarities in [-1, 1], plain gradient steps on the mean loss over
    the anchors, one number of S for each anchor and candidate.

    Args:
        learning_rates: T numbers in [0, 1e30].
        batch_size: B, the number of samples in a batch.
        temperature: tau, above 1e-30.
        largest_class: pi_max in (0, 1], frequency of the most frequent class.
        delta: in (0, 1), probability with which the bound may fail.
        n: number of rows of the compared cosine similarity matrices; adds the trivial bound `largest_drift(n)`.
        views: of each sample. All are anchors, so that B views stand for B in Lemma 7, but B in eps. With the 1 of the
            paper the bound also holds for more views and is larger.

    Raises:
        FastclError: a value out of range, or no learning rates.
    """
    check_temperature(temperature)
    check_range("largest_class", largest_class, 0.0, 1.0, includes="high")
    check_count("views", views, 1)
    rates = checked_rates(learning_rates)
    epsilon = sampling_error(len(rates), batch_size, delta)
    gap = log_printed_gap(temperature, largest_class, epsilon)
    # log of 1 / (tau sqrt(anchors)); its square is 1 / (tau^2 anchors)
    per_rate = -math.log(temperature) - math.log(batch_size * views) / 2
    smoothness = 2 * per_rate - math.log(2)
    recurrence = log_drifts(rates, log_smooth(smoothness), per_rate + min(gap, math.log(2)))
    odds = gap - math.log(2)
    mass = -log_sum(0.0, -odds) if odds < math.inf else 0.0  # log of x / (1 + x)
    convex = log_drifts(rates, log_convex(smoothness), per_rate + math.log(2) / 2 + mass)
    total = math.fsum(rates)
    printed = -math.inf
    if total > 0:
        printed = total / 2 * math.exp(2 * per_rate) + math.log(total) + per_rate + gap
    return CouplingBound(
        epsilon=epsilon,
        log10_gap=gap / LN10,
        log10_recurrence=tuple(value / LN10 for value in recurrence),
        log10_printed=printed / LN10,
        log10_largest=math.inf if n is None else math.log10(largest_drift(n)),
        log10_convex=tuple(value / LN10 for value in convex),
    )


def largest_drift(n: int) -> float:
    """sqrt(2) n, the largest ||K - L||_F of two cosine similarity matrices of n >= 2 rows.

    Both are positive semidefinite with entries in [-1, 1]: <K, L> >= 0 and ||K||_F, ||L||_F <= n. Attained for even n
    (all rows equal in K, two opposite halves in L). Entries alone would give 2 sqrt(n (n - 1)), which is larger: that
    is the most in `similarity_descent`, whose matrices need not be those of any rows.

    Raises:
        FastclError: n below 2.
    """
    check_count("n", n, 2)
    return math.sqrt(2) * n
