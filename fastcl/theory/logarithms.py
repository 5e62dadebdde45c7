"""Arithmetic in natural logarithms, and the recurrence that all drifts obey. Zero is -inf."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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


def log_drifts(rates: Sequence[float], log_factor: Callable[[float], float], log_gap: float) -> list[float]:
    """Logarithms of d_0 = 0 and d_{t+1} = f(eta_t) d_t + eta_t h: T + 1 values.

    Args:
        rates: the learning rates eta_t.
        log_factor: log f as a function of log eta, how a step changes an earlier drift.
        log_gap: log h, the drift that a step of rate 1 adds.
    """
    log_d, found = -math.inf, [-math.inf]
    for log_rate in map(log, rates):
        log_d = log_sum(log_d + log_factor(log_rate), log_rate + log_gap)
        found.append(log_d)
    return found


def log_smooth(log_smoothness: float) -> Callable[[float], float]:
    """log(1 + L eta), by which a gradient step on any L-smooth function can increase distances, of log eta."""
    return lambda log_rate: log_sum(0.0, log_rate + log_smoothness)


def log_convex(log_smoothness: float) -> Callable[[float], float]:
    """log max(1, L eta - 1), by which one on a convex L-smooth function can, of log eta: 0 up to eta = 2 / L."""

    def factor(log_rate: float) -> float:
        rate = log_rate + log_smoothness
        return rate + math.log1p(-math.exp(-rate)) if rate > math.log(2) else 0.0

    return factor
