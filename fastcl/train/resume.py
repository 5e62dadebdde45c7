"""Going on from where a folder stands, and the refusals of what would lose or misdescribe finished work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcl.errors import FastclError, shown
from fastcl.train.checkpoints import Checkpoint, load_checkpoint
from fastcl.train.files import JsonLines
from fastcl.train.identity import differences, is_complete, traces
from fastcl.train.twins import Twin

log = logging.getLogger("fastcl")
NOT_BEGUN = -1
_FREE = "timing"  # no number depends on these records, which may be gone


def resume(
    out: Path, run: dict[str, Any], epochs: int, records: dict[str, JsonLines], twins: Sequence[Twin]
) -> int | None:
    """Bring models and records to where the last checkpoint left them; what was trained since is made again.

    Args:
        out: the run's folder, whose lock is held.
        run: what tells this run from others (see `identity`).
        epochs: planned.
        records: those of RECORDS.
        twins: the models, with their initial weights.

    Returns:
        Completed epochs; NOT_BEGUN where not even the initial weights were measured; None where the run is finished
        and its checkpoints are gone.

    Raises:
        FastclError: trained epochs without a checkpoint, a checkpoint of another run, records that were changed or cut
            since. Nothing is lost.
    """
    checkpoint = load_checkpoint(out / "checkpoints")
    if checkpoint is None or checkpoint.epoch < epochs:
        if is_complete(out, epochs, [twin.name for twin in twins]):
            return None
    if checkpoint is None:
        if found := traces(out):
            raise FastclError(
                f"{shown(out)} holds {found}, but no checkpoint to go on from; put the checkpoints back, choose "
                "another --out, or move these elsewhere to train anew"
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
    for name, lines in records.items():
        lines.cut(checkpoint.lengths[name])
    log.info("resuming from %s", shown(checkpoint.path))
    return checkpoint.epoch


def _check_records(checkpoint: Checkpoint, records: dict[str, JsonLines]) -> None:
    if checkpoint.digests is None:
        log.warning("%s is of an earlier version: whether the records were changed since cannot be told",
                    checkpoint.path.name)  # fmt: skip
    for name, lines in records.items():
        length, there = checkpoint.lengths[name], lines.length()
        wrong = f"has {there} bytes, {checkpoint.path.name} was written at {length}" if there < length else ""
        if not wrong and checkpoint.digests is not None and lines.digest(length) != checkpoint.digests[name]:
            wrong = f"was changed: its first {length} bytes are not those that {checkpoint.path.name} was written at"
        if wrong and name == _FREE:
            log.warning("%s %s", shown(lines.path), wrong)
        elif wrong:
            raise FastclError(f"{shown(lines.path)} {wrong}; put the file back as it was, or choose another --out")
