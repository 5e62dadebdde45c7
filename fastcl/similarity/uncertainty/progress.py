"""A progress bar for repeats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from fastcl.errors import FastclError

T = TypeVar("T")


def counted(items: Iterable[T], total: int, what: str, progress: bool) -> Iterable[T]:
    """The items, with a tqdm bar if it is asked for and standard error is a terminal.

    Raises:
        FastclError: a bar is asked for and tqdm is not installed.
    """
    if not progress:
        return items
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        raise FastclError("progress=True needs tqdm, which is not installed") from None
    return tqdm(items, desc=what, total=total, disable=None)
