"""A config as text: commented TOML, the list of keys for `fastcl train --help`, and the presets that are installed with
the package."""

from __future__ import annotations

import itertools
import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from fastcl.config.keys import keys_of, title_of
from fastcl.config.settings import Config, tables_of
from fastcl.config.view_spec import PRESETS, ViewSpec
from fastcl.errors import FastclError, suggest

DEMO = "digits"  # the preset that `fastcl demo` trains
_WIDTH = 116
_RECIPE = f"start from a known recipe: {', '.join(PRESETS)}; keys given here override it"
_ABOUT = """\
# Settings of a fastcl run. The comment above a key gives its meaning and type, and its default if the value below
# differs from it. Keys that are left out take their defaults.
"""


def preset_names() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml"))


@contextmanager
def preset_file(name: str) -> Iterator[Path]:
    """Path of a preset's file. Raises FastclError for an unknown name (and suggests the nearest one)."""
    if name not in preset_names():
        raise FastclError(f"--preset: unknown preset {name!r}{suggest(name, preset_names())}")
    with resources.as_file(_folder() / f"{name}.toml") as path:
        yield path


def commented(preset: str | None = None) -> str:
    """A TOML file with every key, its meaning in a comment above it.

    Args:
        preset: the preset whose values to write; None: the defaults.

    Raises:
        FastclError: an unknown preset.
    """
    about, config = _ABOUT, Config()
    if preset is not None:
        from fastcl.config.tables import load_config  # imported here: needs tomli on Python without tomllib

        with preset_file(preset) as path:
            config = load_config(path)
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        about = "".join(itertools.takewhile(lambda line: line.startswith("#"), lines)) + "#\n" + about
    return written(config, about)


def written(config: Config, about: str) -> str:
    """A config as a TOML file with every key, its meaning in a comment above it; `load_config` reads it back.

    Args:
        config: the values.
        about: comment lines at the top.
    """
    parts = [about]
    for table, kind in tables_of().items():
        parts.append(f"\n[{table}]  # {title_of(kind)}\n")
        if kind is ViewSpec:
            parts.append(_comment(f"preset = NAME: {_RECIPE}"))
        for one in keys_of(kind):
            value = getattr(getattr(config, table), one.name)
            other = f", default {toml(one.default)}" if value != one.default else ""
            parts.append(f"{_comment(f'{one.meaning} ({one.form}{other})')}{one.name} = {toml(value)}\n")
    return "".join(parts)


def listing() -> str:
    """Every key with its default, meaning and type, at most 120 columns wide."""
    parts = ["Keys of the file, by table, with their defaults:\n"]
    for table, kind in tables_of().items():
        parts.append(f"\n  [{table}]  {title_of(kind)}\n")
        if kind is ViewSpec:
            parts.append(_row("preset = NAME", f"{_RECIPE} (string)"))
        parts += [_row(f"{one.name} = {toml(one.default)}", f"{one.meaning} ({one.form})") for one in keys_of(kind)]
    return "".join(parts)


def toml(value: Any) -> str:
    """A config value as TOML; None becomes "none", which optional keys accept."""
    if value is None:
        return '"none"'
    if isinstance(value, dict):
        pairs = ", ".join(f"{_bare_or_quoted(name)} = {toml(inner)}" for name, inner in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value, ensure_ascii=False)  # same syntax as TOML for strings, numbers and booleans


def _bare_or_quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def _row(head: str, text: str) -> str:
    """A key and its meaning; after a long key the meaning starts on its own line, as in argparse."""
    column = 30
    lines = textwrap.wrap(text, _WIDTH - column)
    lines = [f"    {head:{column - 6}}  {lines.pop(0)}" if len(head) <= column - 6 else f"    {head}", *lines]
    return "\n".join([lines[0], *(f"{'':{column}}{line}" for line in lines[1:])]) + "\n"


def _comment(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="# ", subsequent_indent="# ") + "\n"


def _folder() -> Any:
    return resources.files("fastcl.config") / "presets"
