"""The cells of a sweep: every combination of the swept values and the seeds, each with the config of its run."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcl.config.settings import Config
from fastcl.config.tables import load_config, meant_keys
from fastcl.config.written import toml
from fastcl.errors import FastclError, brief, shown, suggest

# A key of --over that is none of the config: how the learning rate follows the batch size. A rule multiplies
# `optim.lr` by the ratio of the cell's batch size to the config's, to this power; at the config's batch size all agree.
RULE = "lr_rule"
RULES = {"constant": 0.0, "fourth-root": 0.25, "sqrt": 0.5, "linear": 1.0}
BATCH = "train.batch_size"
PRESET = "views.preset"
MOST_CELLS = 10_000
_LONGEST = 120  # letters of a cell's name before it is cut


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: its swept values and its seed, such as "batch_size=64,seed=0"; also the name of its folder, unless `run`
            names another.
        values: swept key -> value as text.
        seed: of the run.
        config: of the run.
        run: the cell whose run this is: itself, or another with the same config, which is trained once.
    """

    name: str
    values: Mapping[str, str]
    seed: int
    config: Config
    run: str


def make_cells(path: Path, over: Sequence[str], seeds: int) -> list[Cell]:
    """Every cell of a sweep, seeds innermost.

    Args:
        path: the config file.
        over: "KEY=V1,V2,..." items. KEY is a dotted key of the config, or "lr_rule"; the values are TOML or bare
            strings. Commas within quotes, brackets and braces separate nothing.
        seeds: how many seeds: the config's and those that follow it.

    Raises:
        FastclError: a config that cannot be read; an item without a key or a value; a key that is unknown, is given
            twice or cannot be swept; a value that is repeated or out of range; no seed, or nothing that varies.
    """
    if seeds < 1:
        raise FastclError(f"--seeds must be at least 1, got {seeds}")
    base = load_config(path)
    axes: dict[str, list[str]] = {}
    for item in over:
        key, texts = _parsed(item)
        if key in axes:
            raise FastclError(f"--over {shown(key)} is given twice; list all its values in one --over")
        axes[key] = texts
    if RULE in axes and BATCH not in axes:
        raise FastclError(
            f"--over {RULE} needs --over {BATCH}: a rule says how the learning rate follows the batch size"
        )
    count = seeds
    for texts in axes.values():
        count *= len(texts)
    if count == 1:
        raise FastclError("the sweep has a single cell: give --over KEY=V1,V2 or --seeds 2, or use fastcl train")
    if count > MOST_CELLS:
        raise FastclError(f"the sweep has {count:,} cells; at most {MOST_CELLS:,} are allowed")
    labels = {key: _labels(path, key, axes) for key in axes}
    names = [(cell_name(v, c.train.seed), v, c) for v, c in _combined(path, base, axes, labels, seeds)]
    return [Cell(name, values, config.train.seed, config, name) for name, values, config in names]


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key. Raises KeyError if the config holds no such value."""
    table, *names = key.split(".")
    found = getattr(config, table)
    for name in names:
        found = found[name] if isinstance(found, dict) else vars(found)[name]
    return found


def _parsed(item: str) -> tuple[str, list[str]]:
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key:
        raise FastclError(f"--over takes KEY=V1,V2,..., got {brief(item)}")
    texts = [part.strip() for part in _parts(text, key)]
    if not all(texts):
        what = "has no value" if texts == [""] else "has an empty value"
        raise FastclError(f"--over {shown(key)} {what}, got {brief(item)}")
    if key == "train.seed":
        raise FastclError("--over train.seed: use --seeds N for N seeds from the config's train.seed on")
    if key == RULE:
        for text in texts:
            if text not in RULES:
                raise FastclError(f"--over {RULE}: unknown rule {brief(text)}{suggest(text, RULES)}")
    elif "." not in key:
        what = f"--over takes a key of the config such as {BATCH}, or {RULE}, got {brief(key)}"
        raise FastclError(f"{what}{meant_keys(key)}")
    return key, texts


def _parts(text: str, key: str) -> Iterator[str]:
    """A text cut at its commas, but not within quotes, brackets and braces, which must be closed if they hold one."""
    start, depth, quote = 0, 0, ""
    for k, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == "," and depth <= 0:
            yield text[start:k]
            start = k + 1
        else:
            depth += (letter in "[{") - (letter in "]}")
    if (quote or depth > 0) and "," in text[start:]:
        raise FastclError(f"--over {shown(key)}: a {quote or 'bracket'} is not closed, got {brief(text)}")
    yield text[start:]


def _labels(path: Path, key: str, axes: Mapping[str, Sequence[str]]) -> list[str]:
    """The values of a key as the config holds them, so that 0.1 and 1e-1 are one; strings without quotes.

    They are read beside the first values of the other keys, since what one key may be can depend on another.
    """
    others = [f"{other}={texts[0]}" for other, texts in axes.items() if other not in (key, RULE)]
    found: list[str] = []
    seen: list[Any] = []
    for text in axes[key]:
        try:
            value = text if key == RULE else load_config(path, [*others, f"{key}={text}"])
        except FastclError as error:
            raise FastclError(f"--over {shown(key)}={shown(text)}: {error}") from error
        if value in seen:
            wins = "; the keys of [views] in the config win over a preset" if key == PRESET else ""
            raise FastclError(f"--over {shown(key)} repeats a value: {brief(text)}{wins}")
        seen.append(value)
        try:
            held = value_of(value, key) if isinstance(value, Config) else text
        except KeyError:  # PRESET, which stands for other keys
            held = text
        found.append(held if isinstance(held, str) else toml(held))
    return found


def _combined(
    path: Path, base: Config, axes: Mapping[str, Sequence[str]], labels: Mapping[str, Sequence[str]], seeds: int
) -> Iterator[tuple[dict[str, str], Config]]:
    for places in itertools.product(*(range(len(texts)) for texts in axes.values())):
        chosen = dict(zip(axes, places, strict=True))
        values = {key: labels[key][k] for key, k in chosen.items()}
        overrides = [f"{key}={axes[key][k]}" for key, k in chosen.items() if key != RULE]
        for seed in range(base.train.seed, base.train.seed + seeds):
            try:
                config = load_config(path, [*overrides, f"train.seed={seed}"])
            except FastclError as error:
                raise FastclError(f"{', '.join(overrides)}, seed {seed}: {error}") from error
            if RULE in values:
                ratio = config.train.batch_size / base.train.batch_size
                optim = dataclasses.replace(config.optim, lr=config.optim.lr * ratio ** RULES[values[RULE]])
                config = dataclasses.replace(config, optim=optim)
            yield values, config


def shortened(values: Mapping[str, str]) -> dict[str, str]:
    """Values by the last part of their key where that names one key alone."""
    last = {key: key.rpartition(".")[2] for key in values}
    names = [*last.values(), "seed"]
    return {last[key] if names.count(last[key]) == 1 else key: text for key, text in values.items()}


def cell_name(values: Mapping[str, str], seed: int) -> str:
    """A name of a cell that any file system takes; it does not depend on the other values in the sweep.

    A list of plain words is joined by "+". Whatever else cannot stand in a name, or is too long, is replaced, and a
    hash of the whole added.
    """
    joined = {key: _joined(text) for key, text in shortened(values).items()}
    exact = ",".join(f"{key}={text}" for key, text in joined.items())
    plain = re.sub(r"[^\w.+,=-]+", "-", exact, flags=re.ASCII)[:_LONGEST]
    if plain != exact:
        plain += f"-{hashlib.sha256(exact.encode('utf-8', 'surrogateescape')).hexdigest()[:6]}"
    return f"{plain},seed={seed}" if plain else f"seed={seed}"


def _joined(text: str) -> str:
    words = re.fullmatch(r'\[("[\w.-]+"(?:, "[\w.-]+")*)\]', text)
    return text if words is None else words[1].replace('"', "").replace(", ", "+")
