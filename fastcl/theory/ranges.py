"""Checks of the numbers that bounds take."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

from fastcl.errors import FastclError

SMALLEST, LARGEST = 1e-30, 1e30  # temperatures, learning rates, norms: results stay in float64's range


def is_number(value: object) -> bool:
    """Whether a value is a real number, not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(name: str, value: int, least: int) -> None:
    """Raise FastclError unless the value is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise FastclError(f"{name} must be an integer >= {least}, got {value!r}")


def check_range(name: str, value: float, low: float, high: float, includes: str = "") -> None:
    """Raise FastclError unless low < value < high; `includes` may name ends that are allowed: "low", "high", "both"."""
    from_low, to_high = includes in ("low", "both"), includes in ("high", "both")
    inside = is_number(value) and (low < value < high or (from_low and value == low) or (to_high and value == high))
    if not inside:
        opening, closing = "[" if from_low else "(", "]" if to_high else ")"
        raise FastclError(f"{name} must be in {opening}{low:g}, {high:g}{closing}, got {value!r}")


def check_temperature(value: float) -> None:
    """Raise FastclError unless the value is above 1e-30 and finite."""
    check_range("temperature", value, SMALLEST, math.inf)


def checked_rates(learning_rates: Iterable[float]) -> list[float]:
    """The learning rates as a list. Raises FastclError unless all are in [0, 1e30]."""
    rates = list(learning_rates)
    for t, rate in enumerate(rates):
        if not is_number(rate) or not 0 <= rate <= LARGEST:
            raise FastclError(f"learning_rates must be in [0, {LARGEST:g}], got {rate!r} at step {t}")
    return rates


def checked_counts(class_counts: Iterable[int]) -> list[int]:
    """The positive counts as a list. Raises FastclError unless all are integers >= 0 with a sum of at least 2."""
    counts = list(class_counts)
    for k, count in enumerate(counts):
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 0:
            raise FastclError(f"class_counts must be integers >= 0, got {count!r} at {k}")
    counts = [int(count) for count in counts if count > 0]
    if sum(counts) < 2:
        raise FastclError(f"class_counts must have a sum of at least 2, got {sum(counts)}")
    return counts
