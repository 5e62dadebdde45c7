"""A progress bar for what is repeated or read batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from fastcl.errors import FastclError

T = TypeVar("T")


def counted(items: Iterable[T], total: int | None, what: str, progress: bool, unit: str = "it") -> Iterable[T]:
    """The items, with a tqdm bar if it is asked for and standard error is a terminal.

    Args:
        total: number of items; None: their own length, if they have one.
        what: stands before the bar.
        unit: what one item is called.

    Raises:
        FastclError: a bar is asked for and tqdm is not installed.
    """
    if not progress:
        return items
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        raise FastclError("progress=True needs tqdm, which is not installed") from None
    return tqdm(items, desc=what, total=total, unit=unit, disable=None)
