"""The folder of a sweep: what it holds, which sweep it is, and whether another one may go on in it.

sweep.json        the config, what is swept, and the cells
configs/          one config for each run; `fastcl train` takes it too
cells/            one folder for each run
logs/             what each run said
failed.json       the last error of each run that failed
table.csv         all measured values
sweep.html        figures and final numbers
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcl.config.settings import Config
from fastcl.errors import FastclError, brief, shown
from fastcl.io.files import read_if_there, write_atomic
from fastcl.io.json_text import parse_json
from fastcl.io.run_names import SWEEP
from fastcl.sweep.grid import Cell
from fastcl.train.run_folder.identity import differences, identity, lacks, read_run, settings

FAILED, PAGE = "failed.json", "sweep.html"
TABLE = "table"  # with .csv and .parquet
CELLS, CONFIGS, LOGS = "cells", "configs", "logs"
OTHERS = (SWEEP, FAILED, f"{TABLE}.csv", f"{TABLE}.parquet", CELLS, CONFIGS, LOGS)  # all but the page
_HEAD = {"config": dict, "over": dict, "seeds": list, "equal": str, "cells": list}
_CELL = {"name": str, "run": str, "values": dict, "seed": int}


def described(base: Config, cells: Sequence[Cell], equal: str, test_images: int | None) -> dict[str, Any]:
    """The sweep.json of a sweep.

    Args:
        base: the config of the sweep.
        cells: the cells, in order.
        equal: what is equal in all cells: "epochs" or "steps".
        test_images: held-out images of every cell that the sweep has set; None: it has set none.
    """
    over = {key: list(dict.fromkeys(cell.values[key] for cell in cells)) for key in cells[0].values}
    return {
        "config": settings(base), "over": over, "seeds": sorted({cell.seed for cell in cells}), "equal": equal,
        "test_images": test_images,
        "cells": [{"name": c.name, "run": c.run, "values": dict(c.values), "seed": c.seed} for c in cells],
    }  # fmt: skip


def read_sweep(out: Path) -> dict[str, Any] | None:
    """The sweep.json of a folder, or None if there is none.

    Raises:
        FastclError: it cannot be read, or the folder holds something else: a run, or cells without a sweep.json.
    """
    path = out / SWEEP
    found = _read(path)
    if found is None:
        strange = [name for name in ("run.json", CELLS) if os.path.lexists(out / name)]
        if strange:
            what = "a run" if strange[0] == "run.json" else f"{CELLS}/, but no {SWEEP}"
            raise FastclError(f"--out: {shown(out)} holds {what}; choose another folder")
        return None
    if wrong := _fault(found):
        raise FastclError(f"{shown(path)} does not describe a sweep: {wrong}")
    return found


def _fault(head: Mapping[str, Any]) -> str:
    """What is wrong with a sweep.json; "" if nothing is."""
    for key, kind in _HEAD.items():
        if not isinstance(head.get(key), kind):
            return f"'{key}' is missing or is no {kind.__name__}"
    members = {
        "config": (head["config"].values(), dict),
        "over": (head["over"].values(), list),
        "seeds": (head["seeds"], int),
    }
    for key, (values, kind) in members.items():
        for value in values:
            if not isinstance(value, kind):
                return f"{brief(value)} in '{key}' is no {kind.__name__}"
    names = [cell.get("name") for cell in head["cells"] if isinstance(cell, dict)]
    for cell in head["cells"]:
        fits = isinstance(cell, dict) and all(isinstance(cell.get(key), kind) for key, kind in _CELL.items())
        if not fits or list(cell["values"]) != list(head["over"]) or cell["run"] not in names:
            return f"{brief(cell)} is no cell of it"
        for key, value in cell["values"].items():
            if not isinstance(value, str) or value not in head["over"][key]:
                return f"{brief(value)} is no value of '{key}'"
    return ""


def check_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on in the folder of another sweep. More values and seeds of the same one may be added.

    Raises:
        FastclError: says what differs.
    """
    there, here = (identity({"config": one["config"]})["config"] for one in (before, now))
    found = [differences(there, here), differences({"--equal": before["equal"]}, {"--equal": now["equal"]})]
    if list(before["over"]) != list(now["over"]):
        found.append(f"the swept keys ({_listed(before['over'])} there, {_listed(now['over'])} here)")
    else:
        for key, values in before["over"].items():
            if gone := [value for value in values if value not in now["over"][key]]:
                found.append(f"the values of {key} (there also {', '.join(gone)})")
    if gone := [seed for seed in before["seeds"] if seed not in now["seeds"]]:
        found.append(f"the seeds (there also {', '.join(map(str, gone))})")
    if any(found):
        raise FastclError(
            f"{shown(out)} holds another sweep, which differs in {', '.join(filter(None, found))}; choose another "
            "--out, or repeat that sweep's values and seeds (more may be added)"
        )


def is_finished(folder: Path, config: Config) -> bool:
    """Whether a cell's folder holds its finished run.

    Raises:
        FastclError: it holds another run.
    """
    run = read_run(folder)
    if run is None:
        return False
    there, here = (identity({"config": one})["config"] for one in (run["config"], settings(config)))
    if different := differences(there, here):
        raise FastclError(f"{shown(folder)} contains another run, which differs in {different}; move it away")
    return not lacks(folder, config.train.epochs, (*config.train.models, *config.train.controls))


def read_failures(out: Path) -> dict[str, str]:
    """The last error of each run that failed when it was last tried, by the name of its cell."""
    found = _read(out / FAILED) or {}
    return {name: str(error) for name, error in found.items()}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _read(path: Path) -> dict[str, Any] | None:
    text = read_if_there(path)
    if text is None:
        return None
    found = parse_json(text, shown(path))
    if not isinstance(found, dict):
        raise FastclError(f"{shown(path)} must be a JSON object")
    return found


def _listed(keys: Mapping[str, Any]) -> str:
    return ", ".join(keys) or "none"
