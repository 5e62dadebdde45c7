"""Which run a folder holds and how far it got: run.json, the checkpoints, and the other outputs of trained epochs."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastcl.config.settings import Config
from fastcl.errors import FastclError, brief, shown
from fastcl.io.files import read_if_there
from fastcl.io.json_text import parse_json
from fastcl.io.run_names import EVALUATION, RECORDS, REPORT
from fastcl.train.run_folder.checkpoints import drop_checkpoints, last_epoch, load_checkpoint
from fastcl.train.run_folder.records import JsonLines, remove_leftovers, write_atomic

log = logging.getLogger("fastcl")
# Settings that do not change results, by table (images excluded by max_pixels are listed in `skipped`). The requested
# renderer is ignored, since the one that was used is compared.
_FREE = {"data": ("workers", "renderer", "max_pixels"), "train": ("timeout", "log_every")}


def settings(config: Config) -> dict[str, Any]:
    """A config as read back from run.json: tuples become lists, names that are not UTF-8 are escaped."""
    return escaped(json.loads(json.dumps(dataclasses.asdict(config))))


def escaped(tree: Any) -> Any:
    """Escape the strings of a tree of JSON values so that any program can read them: Python represents bytes of a name
    that are not UTF-8 as lone surrogates, which other programs reject."""
    if isinstance(tree, dict):
        return {escaped(key): escaped(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [escaped(value) for value in tree]
    return tree if not isinstance(tree, str) or tree.isprintable() else shown(tree)


def identity(run: dict[str, Any]) -> dict[str, Any]:
    """The part of a run.json that identifies the run: its config (without _FREE), data and renderer."""
    return {"config": _fixed(run.get("config")), **{key: escaped(run.get(key)) for key in ("data", "renderer")}}


def read_run(out: Path) -> dict[str, Any] | None:
    """The run.json of a folder, or None if there is none. Raises FastclError if it cannot be read."""
    path = out / "run.json"
    text = read_if_there(path)
    if text is None:
        return None
    run = parse_json(text, shown(path))
    if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
        raise FastclError(f"{shown(path)} does not describe a run")
    return run


def same_data(run: dict[str, Any], config: Config) -> bool:
    """Whether a run used the same data settings and seed as a config."""
    theirs, mine = _fixed(run.get("config")), _fixed(settings(config))
    return theirs["data"] == mine["data"] and run.get("seed") == config.train.seed


def claim_folder(out: Path, mine: dict[str, Any]) -> None:
    """Write run.json, or verify that the folder holds this run. The caller must hold the folder's lock.

    Another run without a finished epoch, for example because an image could not be decoded, is replaced. One with
    finished epochs is never touched, even if some of its files are missing.

    Raises:
        FastclError: the folder holds another run (the message says what differs), or trained epochs of a run that
            neither run.json nor a checkpoint describes.
    """
    theirs, found = read_run(out), traces(out)
    there = identity(theirs) if theirs is not None else None
    if there is None and found:
        checkpoint = load_checkpoint(out / "checkpoints")
        there = checkpoint.run if checkpoint else None
        if there is None:
            raise FastclError(
                f"{shown(out)} contains {found}, but neither run.json nor a checkpoint tells which run they belong to; "
                "choose another --out, or restore run.json"
            )
    difference = differences(there, identity(mine)) if there is not None else ""
    if difference and found:
        raise FastclError(
            f"{shown(out)} contains another run, which differs in {difference}; "
            "choose another --out, or use that run's settings to resume it"
        )
    if theirs is not None or found:
        remove_leftovers(out)
    if theirs is None or difference:
        if not found:
            drop_checkpoints(out / "checkpoints")  # at most those of the initial weights
            (out / EVALUATION).unlink(missing_ok=True)  # and what was measured of them
        write_atomic(out / "run.json", (json.dumps(mine, indent=1) + "\n").encode())
        if difference:
            log.warning(
                "%s contained another run without a trained epoch, which is replaced (%s)", shown(out), difference
            )
        elif found:
            log.warning("run.json was missing from %s and is written again", shown(out))


def warn_if_elsewhere(out: Path, mine: dict[str, Any]) -> None:
    """Warn if a claimed folder's run was started with other versions or on another device."""
    there, here = ({key: run.get(key) for key in ("versions", "device")} for run in (read_run(out) or mine, mine))
    if there != here:
        log.warning("resuming a run made elsewhere: %s; the rest will not be bit-identical to it",
                    differences(there, here))  # fmt: skip


def traces(out: Path) -> str:
    """Describes the outputs of trained epochs in a folder; "" if there are none.

    The evaluation before the first epoch does not count: the same command repeats it.
    """
    found = []
    if (epoch := last_epoch(out / "checkpoints")) > 0:
        found.append(f"a checkpoint of epoch {epoch}")
    for name in RECORDS:
        lines = JsonLines(out / f"{name}.jsonl")
        if lines.length() and not (name == "metrics" and _untrained(lines.path)):
            found.append(lines.path.name)
    found += [f"{name}/" for name in ("weights", "features") if any((out / name).glob("*"))]
    found += [name for name in ("layers.json", REPORT) if os.path.lexists(out / name)]
    return ", ".join(found)


def missing_files(out: Path, models: Sequence[str], of: Sequence[str] = ("weights", "features")) -> dict[str, str]:
    """Final weights and features (or one of them) that a folder lacks: {"weights/dcl.safetensors": why}.

    Files are opened, since an empty or truncated file is not a result.
    """
    names = [f"{folder}/{model}.safetensors" for folder in of for model in models]
    return {name: why for name in names if (why := _unreadable(out / name))}


def lacks(out: Path, epochs: int, models: Sequence[str]) -> list[str]:
    """Describes what a finished run would have and a folder lacks: last evaluation, final weights and features."""
    if found := missing_files(out, models):
        return [f"{name} ({why})" for name, why in found.items()]
    measured = {row.get("model") for row in _rows(out / "metrics.jsonl") if row.get("epoch") == epochs}
    return [] if measured >= set(models) else [f"the evaluation of epoch {epochs} in metrics.jsonl"]


def _unreadable(path: Path) -> str:
    if not os.path.lexists(path):
        return "missing"
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            return "" if opened.keys() else "it contains no tensor"
    except (SafetensorError, OSError):
        return f"damaged, {path.stat().st_size} bytes" if path.is_file() else "no file"


def _untrained(path: Path) -> bool:
    """Whether all records are of epoch 0. Ignores an incomplete last line, left by an interrupted write."""
    try:
        return all(row.get("epoch") == 0 for row in _rows(path))
    except FastclError:  # not a file of a run
        return False


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = (read_if_there(path) or b"").split(b"\n")[:-1]
    rows = [parse_json(line, f"{shown(path)}, line {n}") for n, line in enumerate(lines, 1)]
    if not all(isinstance(row, dict) for row in rows):
        raise FastclError(f"{shown(path)} must contain one JSON object per line")
    return rows


def _fixed(config: Any) -> dict[str, dict[str, Any]]:
    """A config without the _FREE keys. Keys that an earlier version did not have get their defaults."""
    found = {}
    for name, defaults in settings(Config()).items():
        table = config.get(name) if isinstance(config, dict) else None
        found[name] = defaults | escaped(table) if isinstance(table, dict) else {}
    for name, free in _FREE.items():
        found[name] = {key: value for key, value in found[name].items() if key not in free}
    return found


def differences(theirs: Any, mine: Any, prefix: str = "") -> str:
    """The keys whose values differ, with both values; "" if none do."""
    if theirs == mine:
        return ""
    if not isinstance(theirs, dict) or not isinstance(mine, dict):
        return f"{prefix.removeprefix('config.') or 'run.json'} ({brief(theirs)} there, {brief(mine)} here)"
    keys = [key for key in dict.fromkeys([*theirs, *mine]) if theirs.get(key) != mine.get(key)]
    return ", ".join(differences(theirs.get(key), mine.get(key), f"{prefix}.{key}".strip(".")) for key in keys)
