"""Resumes a run from its folder, and refuses to if finished work would be lost or misdescribed."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcl.errors import FastclError, shown
from fastcl.train.models import IDENTITY, Twin
from fastcl.train.run_folder.checkpoints import Checkpoint, load_checkpoint
from fastcl.train.run_folder.identity import differences, lacks, traces
from fastcl.train.run_folder.records import JsonLines, write_atomic

log = logging.getLogger("fastcl")
NOT_BEGUN = -1
_FREE = "timing"  # no result depends on these records, so they may be missing


def resume(
    out: Path, run: dict[str, Any], epochs: int, every: int, records: dict[str, JsonLines], twins: Sequence[Twin]
) -> int | None:
    """Restore models and records to the last checkpoint; later training is repeated.

    Args:
        out: the run's folder, whose lock the caller holds.
        run: the settings that identify the run (see `identity`).
        epochs: planned epochs.
        every: epochs between checkpoints.
        records: one for each of RECORDS.
        twins: the models, with their initial weights.

    Returns:
        Completed epochs; NOT_BEGUN if there is no checkpoint, not even of the initial weights; None if the run is
        finished but its last checkpoint is missing.

    Raises:
        FastclError: trained epochs without a checkpoint, a checkpoint of another run, or records that were changed or
            truncated since. Nothing is deleted then.
    """
    checkpoint = load_checkpoint(out / "checkpoints")
    missing: list[str] = []
    if checkpoint is None or checkpoint.epoch < epochs:
        missing = lacks(out, epochs, [twin.name for twin in twins])
        if not missing:
            if sum(twin.name != IDENTITY for twin in twins) > 1 and not (out / "layers.json").is_file():
                log.warning("%s has no layers.json: it was removed, or the CKA of all layers was undefined", shown(out))
            return None
    if checkpoint is None:
        if found := traces(out):
            raise FastclError(
                f"{shown(out)} contains {found}, but no checkpoint to resume from, and for a finished run it lacks "
                f"{', '.join(missing)}; restore the checkpoints, choose "
                "another --out, or move these files away to train from the start"
            )
        for lines in records.values():
            lines.cut(0)
        return NOT_BEGUN
    if checkpoint.run is not None and (other := differences(checkpoint.run, run)):
        raise checkpoint.foreign(f"it differs in {other}")
    if checkpoint.epoch > epochs:
        raise checkpoint.foreign(f"it is of epoch {checkpoint.epoch} of {epochs}")
    _check_records(checkpoint, records)
    checkpoint.restore(twins)
    _keep_finished(out, checkpoint, min(epochs, (checkpoint.epoch // every + 1) * every), records)
    for name, lines in records.items():
        lines.cut(checkpoint.lengths[name])
    if checkpoint.epoch < epochs:
        log.info("resuming from %s", shown(checkpoint.path))
    return checkpoint.epoch


def _keep_finished(out: Path, checkpoint: Checkpoint, upcoming: int, records: dict[str, JsonLines]) -> None:
    """Save copies of records beyond a checkpoint, unless a run killed before its next checkpoint can have left them."""
    tails = {name: lines.tail(checkpoint.lengths[name]) for name, lines in records.items()}
    finished = any((out / name).exists() for name in ("weights", "features", "layers.json"))
    if not any(tails.values()) or not finished and all(
        _is_begun(name, tail, checkpoint.epoch, upcoming) for name, tail in tails.items()
    ):  # fmt: skip
        return
    for name, tail in tails.items():
        if tail:
            aside = _free_name(records[name].path.with_name(f"{name}.jsonl.after-epoch-{checkpoint.epoch}"))
            write_atomic(aside, tail)
            log.warning("%s continues past %s; the rest is kept in %s",
                        records[name].path.name, checkpoint.path.name, shown(aside))  # fmt: skip


def _is_begun(name: str, tail: bytes, epoch: int, upcoming: int) -> bool:
    """Whether all lines are of the epochs between two checkpoints; an incomplete last line is ignored."""
    offset = name in ("steps", "pairs")  # these count epochs from 0
    try:
        rows = [json.loads(line) for line in tail.split(b"\n")[:-1]]
        return all(epoch < row["epoch"] + offset <= upcoming for row in rows)
    except (ValueError, TypeError, KeyError, RecursionError):  # not written by a run
        return False


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.{n}") for n in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not os.path.lexists(name))


def _check_records(checkpoint: Checkpoint, records: dict[str, JsonLines]) -> None:
    if checkpoint.digests is None:
        log.warning("%s was written by an earlier version: cannot tell whether the records were changed since",
                    checkpoint.path.name)  # fmt: skip
    for name, lines in records.items():
        length, there = checkpoint.lengths[name], lines.length()
        wrong = f"has {there} bytes, but had {length} when {checkpoint.path.name} was written" if there < length else ""
        if not wrong and checkpoint.digests is not None and lines.digest(length) != checkpoint.digests[name]:
            wrong = (
                f"was changed: its first {length} bytes are not as they were when {checkpoint.path.name} was written"
            )
        if wrong and name == _FREE:
            log.warning("%s %s", shown(lines.path), wrong)
        elif wrong:
            raise FastclError(f"{shown(lines.path)} {wrong}; restore the file, or choose another --out")
