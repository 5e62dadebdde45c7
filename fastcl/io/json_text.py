"""JSON that somebody may have edited: whatever is wrong with it is one clear error."""

from __future__ import annotations

import json
from typing import Any

from fastcl.errors import FastclError

_DEEPEST = 32  # levels; whatever fastcl writes has fewer than ten
_DIGITS = 19  # of an integer: those of 2**63


def parse_json(text: bytes, where: str) -> Any:
    """The value that a JSON text in UTF-8 holds.

    Args:
        text: as read.
        where: what messages call it, such as a path and a line.

    Raises:
        FastclError: text that is not JSON, is nested deeper than 32 levels, or holds an integer of more than 19 digits,
            which is no float64 either.
    """
    try:
        tree = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise FastclError(f"{where}: not valid JSON ({why})") from error
    level = [tree]
    for _ in range(_DEEPEST):
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return tree
    raise FastclError(f"{where}: not valid JSON (nested more than {_DEEPEST} levels deep)")


def _inside(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for one in values if isinstance(one, dict | list)]


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > _DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)
