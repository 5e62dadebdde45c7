"""Self-documenting config keys: the meaning of a key is written where the key is defined, and nowhere else."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any, NamedTuple

_FORMS = {str: "string", int: "integer", float: "number", bool: "true or false", dict: "table"}
_MEANING = "meaning"


def key(default: Any, meaning: str) -> Any:
    """A dataclass field with its meaning, one line of ASCII. A dict as default is copied for each object."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata={_MEANING: meaning})
    return dataclasses.field(default=default, metadata={_MEANING: meaning})


class Key(NamedTuple):
    """Attributes:
    name: name within its table.
    form: its TOML type in words.
    default: the field's default value.
    meaning: one line.
    """

    name: str
    form: str
    default: Any
    meaning: str


def keys_of(kind: type) -> list[Key]:
    """The keys of a dataclass, in order. Raises KeyError if a field was not made by `key`."""
    hints, defaults = typing.get_type_hints(kind), kind()
    return [
        Key(f.name, _form(hints[f.name]), getattr(defaults, f.name), f.metadata[_MEANING])
        for f in dataclasses.fields(kind)
    ]


def title_of(kind: type) -> str:
    """The title of a table: the first line of its dataclass's docstring."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _form(hint: Any) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        if Ellipsis in options:
            return f"list of {_FORMS[options[0]]}s"
        return f"list of {len(options)} {_FORMS[options[0]]}s"
    if type(None) in options:
        return f'{_form(options[0])} or "none"'
    return _FORMS[typing.get_origin(hint) or hint]
