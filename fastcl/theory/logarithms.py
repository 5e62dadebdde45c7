"""Arithmetic in natural logarithms, and the recurrence that all drifts obey. Zero is -inf."""

from __future__ import annotations

import math
from collections.abc import Sequence

LN10 = math.log(10)


def log(value: float) -> float:
    """Natural logarithm of value >= 0; -inf for 0."""
    return math.log(value) if value > 0 else -math.inf


def log_sum(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    low, high = sorted((a, b))
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def log_expm1(x: float) -> float:
    """log(e^x - 1) for x >= 0; -inf for 0."""
    if x <= 0:
        return -math.inf
    return x + math.log(-math.expm1(-x))


def log_drifts(rates: Sequence[float], log_growth: float, log_gap: float) -> list[float]:
    """Logarithms of d_0 = 0 and d_{t+1} = (1 + g eta_t) d_t + eta_t h: T + 1 values.

    Args:
        rates: the learning rates eta_t.
        log_growth: log g, how fast an earlier drift grows.
        log_gap: log h, the drift that a step of rate 1 adds.
    """
    log_d, found = -math.inf, [-math.inf]
    for rate in rates:
        log_rate = log(rate)
        log_d = log_sum(log_d + log_sum(0.0, log_rate + log_growth), log_rate + log_gap)
        found.append(log_d)
    return found
