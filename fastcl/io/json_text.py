"""Parses JSON that may have been edited by hand: any fault gives one clear error."""

from __future__ import annotations

import json
from typing import Any

from fastcl.errors import FastclError

_DEEPEST = 32  # levels of nesting; JSON written by fastcl has fewer than ten
_DIGITS = 19  # digits of an integer, as many as 2**63 has


def parse_json(text: bytes, where: str) -> Any:
    """Parse a JSON text in UTF-8.

    Args:
        text: the bytes of the text.
        where: its name in messages, such as a path and a line.

    Raises:
        FastclError: text that is not JSON, is nested deeper than 32 levels, or contains an integer of more than 19
            digits.
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
