"""The gate's default cases: every launch of the losses, of pair statistics and of views."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bench.static import cases as pairs
from bench.static import view_cases as fused_cases
from fastcl.kernels.common.launch import Launch


def cases(sm: int) -> Iterator[tuple[str, Iterable[Launch]]]:
    """Name and launches of each case on an architecture such as 90."""
    yield from pairs.cases(sm)
    yield from fused_cases.cases(sm)
