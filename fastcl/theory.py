"""Computes Theorem 1 of arXiv 2510.08852: how far self-supervised and supervised similarities can drift apart.

The theorem is about similarity descent: gradient steps on the entries of the similarity matrix S itself, on shared
batches of B anchors, under CL and under NSCL (fastcl's "dcl" and "nscl"). With d_t = ||S_t^CL - S_t^NSCL||_F, d_0 = 0,
learning rates eta_t, temperature tau and largest class frequency pi_max, with probability at least 1 - delta

    d_{t+1} <= (1 + eta_t / (2 tau^2 B)) d_t + eta_t Delta / (tau sqrt(B))                                   (Lemma 7)
    Delta    = 2 e^{2 / tau} (pi_max + eps) / (1 - pi_max - eps),  eps = sqrt(log(T B / delta) / (2 B))
    d_T     <= exp(sum eta_t / (2 tau^2 B)) (sum eta_t) Delta / (tau sqrt(B))                            (as printed)

Delta bounds the L1 distance between two softmax distributions, which is never more than 2; if pi_max + eps >= 1, that 2
is the only bound. Everything is computed in logarithms: published settings reach 10^2783.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

from fastcl.errors import FastclError

_LN10 = math.log(10)
_SMALLEST, _LARGEST = 1e-30, 1e30  # temperature and learning rate: results stay in float64's range


@dataclass(frozen=True)
class CouplingBound:
    """The bounds of `similarity_coupling_bound`; every logarithm is to base 10.

    Attributes:
        epsilon: eps, the most by which a class can exceed its frequency in some batch.
        log10_gap: Delta as printed; inf if pi_max + eps >= 1.
        log10_recurrence: T + 1 values; entry t bounds d_t (-inf at t = 0) by the recurrence, with min(Delta, 2).
        log10_printed: the theorem's closed form at T, with Delta as printed; inf if Delta is.
        log10_largest: `largest_drift(n)`; inf without n.
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
        """The first t whose bound is no better than `largest_drift(n)`; None if all are better, or without n."""
        reached = (t for t, value in enumerate(self.log10_recurrence) if value >= self.log10_largest)
        return next(reached, None)


def similarity_coupling_bound(
    learning_rates: Sequence[float],
    batch_size: int,
    temperature: float,
    largest_class: float,
    delta: float = 0.01,
    n: int | None = None,
) -> CouplingBound:
    """Bounds on the drift after each step of similarity descent (Theorem 1 and Lemma 7, arXiv 2510.08852).

    The drift over a subset of the rows, such as one batch, is no larger than that over all rows.

    Args:
        learning_rates: T numbers in [0, 1e30].
        batch_size: B, the number of anchors in a batch.
        temperature: tau, above 1e-30.
        largest_class: pi_max in (0, 1], frequency of the most frequent class.
        delta: in (0, 1), probability with which the bound may fail.
        n: number of rows of the compared similarity matrices; adds the trivial bound `largest_drift(n)`.

    Raises:
        FastclError: a value out of range, or no learning rates.
    """
    _check_range("temperature", temperature, _SMALLEST, math.inf)
    _check_range("largest_class", largest_class, 0.0, 1.0, includes_high=True)
    rates = list(learning_rates)
    for t, rate in enumerate(rates):
        if not _is_number(rate) or not 0 <= rate <= _LARGEST:
            raise FastclError(f"learning_rates must be in [0, {_LARGEST:g}], got {rate!r} at step {t}")
    epsilon = sampling_error(len(rates), batch_size, delta)
    gap = _log_gap(temperature, largest_class, epsilon)
    per_rate = -math.log(temperature) - math.log(batch_size) / 2  # log of 1 / (tau sqrt(B)): its square is 1/(tau^2 B)
    log_d, recurrence = -math.inf, [-math.inf]
    for rate in rates:
        log_rate = math.log(rate) if rate > 0 else -math.inf
        growth = _log_sum(0.0, log_rate + 2 * per_rate - math.log(2))
        log_d = _log_sum(log_d + growth, log_rate + per_rate + min(gap, math.log(2)))
        recurrence.append(log_d)
    total = math.fsum(rates)
    printed = -math.inf
    if total > 0:
        printed = total / 2 * math.exp(2 * per_rate) + math.log(total) + per_rate + gap
    return CouplingBound(
        epsilon=epsilon,
        log10_gap=gap / _LN10,
        log10_recurrence=tuple(value / _LN10 for value in recurrence),
        log10_printed=printed / _LN10,
        log10_largest=math.inf if n is None else math.log10(largest_drift(n)),
    )


def sampling_error(steps: int, batch_size: int, delta: float = 0.01) -> float:
    """eps = sqrt(log(T B / delta) / (2 B)). With probability 1 - delta no class exceeds its frequency by more than eps
    in any of the T B anchors' batches (Hoeffding and a union bound; Theorem 1, arXiv 2510.08852).

    Raises:
        FastclError: steps or batch_size below 1, delta outside (0, 1).
    """
    _check_count("steps", steps, 1)
    _check_count("batch_size", batch_size, 1)
    _check_range("delta", delta, 0.0, 1.0)
    return math.sqrt((math.log(steps) + math.log(batch_size) - math.log(delta)) / (2 * batch_size))


def largest_drift(n: int) -> float:
    """sqrt(2) n, the largest ||K - L||_F of two cosine similarity matrices of n >= 2 rows.

    Both are positive semidefinite with entries in [-1, 1]: <K, L> >= 0 and ||K||_F, ||L||_F <= n. Attained for even n
    (all rows equal in K, two opposite halves in L). Entries alone would give 2 sqrt(n (n - 1)), which is larger.

    Raises:
        FastclError: n below 2.
    """
    _check_count("n", n, 2)
    return math.sqrt(2) * n


def _log_gap(temperature: float, largest_class: float, epsilon: float) -> float:
    """log Delta as printed; inf if its condition pi_max + eps < 1 does not hold."""
    share = largest_class + epsilon
    if share >= 1:
        return math.inf
    return math.log(2) + 2 / temperature + math.log(share) - math.log1p(-share)


def _log_sum(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    low, high = sorted((a, b))
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise FastclError(f"{name} must be an integer >= {least}, got {value!r}")


def _check_range(name: str, value: float, low: float, high: float, includes_high: bool = False) -> None:
    if not _is_number(value) or not (low < value < high or (includes_high and value == high)):
        bracket = "]" if includes_high else ")"
        raise FastclError(f"{name} must be in ({low:g}, {high:g}{bracket}, got {value!r}")
