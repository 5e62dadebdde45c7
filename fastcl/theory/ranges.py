"""Checks of the numbers that bounds take."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import TypeVar

from fastcl.errors import FastclError, brief

T = TypeVar("T")

SMALLEST, LARGEST = 1e-30, 1e30  # temperatures, learning rates, norms: results stay in float64's range


def is_number(value: object) -> bool:
    """Whether a value is a real number, not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(name: str, value: int, least: int) -> None:
    """Raise FastclError unless the value is an integer of at least `least` and at most 1e30."""
    if not _is_count(value) or value < least:
        raise FastclError(f"{name} must be an integer >= {least}, at most {LARGEST:g}, got {brief(value)}")


def _is_count(value: object) -> bool:
    """Whether a value is an integer in [0, 1e30]; more would leave float64's range."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= int(value) <= LARGEST


def check_range(name: str, value: float, low: float, high: float, includes: str = "") -> None:
    """Raise FastclError unless low < value < high; `includes` may name ends that are allowed: "low", "high", "both"."""
    from_low, to_high = includes in ("low", "both"), includes in ("high", "both")
    found = _as_float(value) if is_number(value) else math.nan
    if not (low < found < high or (from_low and found == low) or (to_high and found == high)):
        opening, closing = "[" if from_low else "(", "]" if to_high else ")"
        raise FastclError(f"{name} must be in {opening}{low:g}, {high:g}{closing}, got {brief(value)}")


def _as_float(value: float) -> float:
    """The value as float64; infinite where an integer is larger than any."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_temperature(value: float) -> None:
    """Raise FastclError unless the value is above 1e-30 and finite."""
    check_range("temperature", value, SMALLEST, math.inf)


def checked_rates(learning_rates: Iterable[float]) -> list[float]:
    """The learning rates as a list. Raises FastclError unless all are in [0, 1e30]."""
    rates = _listed("learning_rates", learning_rates)
    for t, rate in enumerate(rates):
        if not is_number(rate) or not 0 <= rate <= LARGEST:
            raise FastclError(f"learning_rates must be in [0, {LARGEST:g}], got {rate!r} at step {t}")
    return rates


def checked_counts(class_counts: Iterable[int]) -> list[int]:
    """The positive counts as a list. Raises FastclError unless all are integers in [0, 1e30] of sum 2 or more."""
    counts = _listed("class_counts", class_counts)
    for k, count in enumerate(counts):
        if not _is_count(count):
            raise FastclError(f"class_counts must be integers in [0, {LARGEST:g}], got {brief(count)} at {k}")
    counts = [int(count) for count in counts if count > 0]
    if sum(counts) < 2:
        raise FastclError(f"class_counts must have a sum of at least 2, got {sum(counts)}")
    return counts


def _listed(name: str, values: Iterable[T]) -> list[T]:
    try:
        return list(values)
    except TypeError:
        raise FastclError(f"{name} must be a list of numbers, got {brief(values)}") from None
