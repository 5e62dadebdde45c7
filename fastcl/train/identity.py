"""Which run a folder holds: run.json, and whether it is the same run as another."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from fastcl.errors import FastclError
from fastcl.train.config import Config
from fastcl.train.files import JsonLines, drop_checkpoints, write_atomic

log = logging.getLogger("fastcl")
# What changes no number of a run; and the renderer asked for, since the one that ran is compared.
_FREE = ("workers", "renderer")


def settings(config: Config) -> dict[str, Any]:
    """A config as it is read back from run.json: tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def read_run(out: Path) -> dict[str, Any] | None:
    """The run.json of a folder; None where there is none. Raises FastclError if it cannot be read."""
    path = out / "run.json"
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastclError(f"{path} cannot be read: {error}") from None
    if not isinstance(run, dict):
        raise FastclError(f"{path} holds no description of a run")
    return run


def same_data(run: dict[str, Any], config: Config) -> bool:
    """Whether a run read the images that a config asks for, split by the same seed."""
    theirs, mine = _fixed(run.get("config")), _fixed(settings(config))
    return isinstance(theirs, dict) and theirs.get("data") == mine["data"] and run.get("seed") == config.train.seed


def claim_folder(out: Path, mine: dict[str, Any]) -> None:
    """Write run.json, or make sure that the folder holds this very run; for who holds the folder's lock.

    Another run that has not finished an epoch, for example since an image could not be decoded, gives way.

    Raises:
        FastclError: it holds another run (names what differs).
    """
    theirs, payload = read_run(out), (json.dumps(mine, indent=1) + "\n").encode()
    if theirs is None:
        write_atomic(out / "run.json", payload)
        return
    there, here = ({"config": _fixed(r.get("config")), **{k: r.get(k) for k in ("data", "renderer")}}
                   for r in (theirs, mine))  # fmt: skip
    for key in here:
        if there[key] != here[key]:
            difference = _differences(there[key], here[key], "" if key == "config" else key)
            if not JsonLines(out / "timing.jsonl").length():
                drop_checkpoints(out / "checkpoints")
                write_atomic(out / "run.json", payload)
                log.warning("%s held another run, without a finished epoch; it gives way (%s)", out, difference)
                return
            raise FastclError(
                f"{out} holds another run, which differs in {difference}; "
                "choose another --out, or repeat that run's settings to continue it"
            )
    there, here = ({key: run.get(key) for key in ("versions", "device")} for run in (theirs, mine))
    if there != here:
        log.warning("continuing a run made elsewhere: %s; the rest will not be bit-identical to it",
                    _differences(there, here))  # fmt: skip


def _fixed(config: Any) -> Any:
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
        return config
    return config | {"data": {k: v for k, v in config["data"].items() if k not in _FREE}}


def _differences(theirs: Any, mine: Any, prefix: str = "") -> str:
    """Keys whose values differ, with both values."""
    if not isinstance(theirs, dict) or not isinstance(mine, dict):
        return f"{prefix or 'run.json'} ({theirs!r} there, {mine!r} here)"
    keys = [k for k in dict.fromkeys([*theirs, *mine]) if theirs.get(k) != mine.get(k)]
    return ", ".join(_differences(theirs.get(k), mine.get(k), f"{prefix}.{k}".strip(".")) for k in keys)
