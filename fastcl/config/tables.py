"""Reads a config from TOML tables and checks the type and range of every value before any work begins."""

from __future__ import annotations

import dataclasses
import math
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastcl.config.settings import PRECISIONS, Config, tables_of
from fastcl.config.view_spec import ViewSpec
from fastcl.errors import FastclError, brief, one_of, shown, suggest
from fastcl.io.files import cause

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LARGEST = 2**63 - 1  # TOML integers have 64 bits
_DEEPEST = 8  # most nesting levels in model.options
_WIDEST = 1 << 20  # widest layer
_LONGEST = 1e6  # seconds of a timeout
_TEMPERATURES = (1e-30, 1e30)  # range that the losses accept
_POSITIVE = (
    "train.epochs", "train.eval_every", "train.checkpoint_every", "optim.lr", "model.hidden", "model.projection",
    "train.timeout", "train.log_every",
)  # fmt: skip
_FORMS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "a table"}


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file.

    Args:
        path: the file, in UTF-8 with or without a byte order mark, whatever the locale. Its tables are data, views
            (with `preset = NAME` to start from a known recipe), model, optim and train.
        overrides: "table.key=value" items, which take precedence; the value is TOML, or a bare string.

    Raises:
        FastclError: a file that cannot be read or parsed, an unknown key (the message suggests the nearest known one),
            or a value of the wrong type or out of range.
    """
    try:
        tables = tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise FastclError(f"cannot read config {shown(path)}: {cause(error)}") from None
    except UnicodeDecodeError as error:
        raise FastclError(f"config {shown(path)} is not UTF-8, as TOML must be: {error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: also an integer with more digits than Python converts
        raise FastclError(f"config {shown(path)} is not valid TOML: {_toml_fault(error)}") from None
    return parse_config(overridden(tables, overrides or []))


def overridden(tables: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Nested tables with "table.key=value" items put in, as for `load_config`, which also says what it raises."""
    for item in overrides:
        _override(tables, item)
    return tables


def parse_config(tables: dict[str, Any]) -> Config:
    """A Config from nested tables. Raises FastclError as `load_config` does."""
    sections = tables_of()
    _check_known(tables, sections, "")
    parts: dict[str, Any] = {}
    for name, kind in sections.items():
        table = tables.get(name, {})
        if not isinstance(table, dict):
            raise FastclError(f"{name} must be a table, got {brief(table)}")
        table = dict(table)
        preset = table.pop("preset", None) if kind is ViewSpec else None
        if not isinstance(preset, str | None):
            raise FastclError(f"views.preset must be a name, got {brief(preset)}")
        hints = typing.get_type_hints(kind)
        _check_known(table, hints, f"{name}.")
        values = {key: _convert(value, hints[key], f"{name}.{key}") for key, value in table.items()}
        parts[name] = kind(**values) if preset is None else ViewSpec.preset(preset, **values)
    config = Config(**parts)
    _check_ranges(config)
    return config


def _toml_fault(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error) if isinstance(error, tomllib.TOMLDecodeError) else "an integer has too many digits"


def _override(tables: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise FastclError(f"--set takes table.key=value, got {brief(item)}{meant_keys(key)}")
    table = tables
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise FastclError(f"--set {shown(item)}: {part!r} is not a table")
    table[parts[-1]] = _override_value(parts, text.strip(), item)


def meant_keys(name: str) -> str:
    """End of a message about a key without its table: suggests the keys of that name; "" if there are none."""
    meant = [f"'{key}=...'" for key in _keys() if key.partition(".")[2] == name.strip()]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def _keys() -> list[str]:
    """Every key, as "table.key"."""
    names = [f"{table}.{field.name}" for table, kind in tables_of().items() for field in dataclasses.fields(kind)]
    return [*names, "views.preset"]


def _override_value(parts: list[str], text: str, item: str) -> Any:
    """Parse the text as TOML. It is a bare string if it is not TOML, or if the key takes a string and the text merely
    looks like a number, a date or the like."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        found = {"value": text}
        if "\n" in text or "\r" in text:
            raise FastclError(f"--set takes one table.key=value without line breaks, got {brief(item)}") from None
    except (ValueError, RecursionError) as error:
        raise FastclError(f"--set {brief(item)}: {_toml_fault(error)}") from None
    if len(found) > 1:  # the text contained further lines
        raise FastclError(f"--set takes one table.key=value, got {brief(item)}; repeat --set for each key")
    kind = tables_of().get(parts[0])
    hints = typing.get_type_hints(kind) if kind is not None and len(parts) == 2 else {}
    named = parts[1] == "preset" or hints.get(parts[1]) in (str, str | None)
    return text if named and not isinstance(found["value"], str | list | dict) else found["value"]


def _check_known(table: dict[str, Any], known: dict[str, Any], prefix: str) -> None:
    for key in table:
        if key not in known:
            shown_key = shown(f"{prefix}{key}")
            raise FastclError(f"unknown key '{shown_key}'{suggest(key, known, prefix)}")


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Convert a TOML value to the field's type. Booleans are not accepted as numbers, nor strings as numbers."""
    options = typing.get_args(hint) if typing.get_origin(hint) not in (tuple, dict) else ()
    base = next((o for o in options if o is not type(None)), hint)
    if type(None) in options and typing.cast(object, value) == "none":
        return None
    plain = typing.get_origin(base) or base
    if plain is tuple:
        return _convert_list(value, base, name)
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= _LARGEST else math.inf
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        none = ' or "none"' if type(None) in options else ""
        raise FastclError(f"{name} must be {_FORMS[plain]}{none}, got {_described(value)}")
    if plain is dict:
        _check_plain(value, name, 0)
    if plain is int and abs(value) > _LARGEST:
        raise FastclError(f"{name} must fit in 64 bits, got an integer of {value.bit_length()} bits")
    if plain is float and not math.isfinite(value):
        raise FastclError(f"{name} must be finite, got {value}")
    return value


def _convert_list(value: Any, base: Any, name: str) -> tuple[Any, ...]:
    kinds = [kind for kind in typing.get_args(base) if kind is not Ellipsis]
    fixed = Ellipsis not in typing.get_args(base)
    example = '["first", "second"]' if kinds[0] is str else "[0.5, 1.0]"
    if not isinstance(value, list) or (fixed and len(value) != len(kinds)):
        count = f" of {len(kinds)}" if fixed else ""
        raise FastclError(f"{name} must be a list{count} such as {example}, got {_described(value)}")
    kinds = kinds if fixed else kinds * len(value)
    return tuple(_convert(v, k, f"{name}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))


def _described(value: Any) -> str:
    """A value as shown in messages; dates and times as TOML writes them."""
    kind = type(value).__name__
    if kind in ("date", "time", "datetime"):
        return f"the {kind} {value.isoformat()} (strings need quotes)"
    return brief(value)


def _check_plain(value: Any, name: str, depth: int) -> None:
    """Refuse what run.json cannot hold: dates, numbers that are not finite, deep nesting."""
    if depth > _DEEPEST:
        raise FastclError(f"{name[:60]}... is nested more than {_DEEPEST} levels deep")
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            _check_plain(inner, f"{name}.{key}", depth + 1)
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise FastclError(f"{name} must fit in 64 bits, got an integer of {value.bit_length()} bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise FastclError(f"{name} must be finite, got {value}")
    elif not isinstance(value, str | int | float):
        raise FastclError(f"{name} must be a string, a number, true, false, a list or a table, got {_described(value)}")


def _check_ranges(config: Config) -> None:
    train, optim, model = config.train, config.optim, config.model
    if train.batch_size < 2:  # one sample has no negatives
        raise FastclError(f"train.batch_size must be at least 2, got {train.batch_size}")
    for name, value in (("train.micro_batch", train.micro_batch), ("data.test_images", config.data.test_images)):
        if value is not None and value < 1:
            raise FastclError(f'{name} must be positive or "none", got {value}')
    for name in _POSITIVE:
        table, key = name.split(".")
        value = getattr(getattr(config, table), key)
        if not value > 0:
            raise FastclError(f"{name} must be positive, got {value}")
    if train.timeout > _LONGEST:
        raise FastclError(f"train.timeout must be at most {_LONGEST:g} s, got {train.timeout}")
    for name, value in (("hidden", model.hidden), ("projection", model.projection)):
        if value > _WIDEST:
            raise FastclError(f"model.{name} must be at most {_WIDEST}, got {value}")
    if not _TEMPERATURES[0] <= train.temperature <= _TEMPERATURES[1]:
        raise FastclError(f"train.temperature must be a positive number (1e-30 to 1e+30), got {train.temperature}")
    for key in ("warmup_epochs", "weight_decay", "momentum"):
        if getattr(optim, key) < 0:
            raise FastclError(f"optim.{key} must not be negative, got {getattr(optim, key)}")
    if train.precision not in PRECISIONS:
        raise FastclError(one_of("train.precision", PRECISIONS, train.precision))
    if not 0 <= train.seed < 1 << 32:
        raise FastclError(f"train.seed must be in [0, 2**32), got {train.seed}")
