"""What a run writes: atomic files, append-only records with a known length, and checkpoints that prove themselves."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastcl.errors import FastclError

log = logging.getLogger("fastcl")
_KEPT = 2  # checkpoints: the latest, and one to fall back on


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into one clear error."""
    try:
        yield
    except OSError as error:
        raise FastclError(
            f"cannot write {path}: {error.strerror or error}. What was complete before is intact; "
            "the same command continues from the last checkpoint"
        ) from error


def write_atomic(path: Path, payload: bytes) -> None:
    """Write a file that is either whole or absent, also after a crash: temporary file, sync, rename, sync."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a run's folder to one process; the lock ends with the process, however it ends.

    Raises:
        FastclError: another process holds it.
    """
    path = folder / ".lock"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "w", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FastclError(f"another process is training in {folder}") from None
        yield


class JsonLines:
    """One JSON object a line, appended; can be cut back to where a checkpoint left it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records and sync them to disk; NaN is refused, since it is not JSON."""
        text = "".join(json.dumps(r, allow_nan=False) + "\n" for r in records)
        with writing(self.path), open(self.path, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def length(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, length: int) -> None:
        """Drop what was written after a checkpoint. Raises FastclError if the file is shorter than it was then."""
        if self.length() < length:
            raise FastclError(f"{self.path} has {self.length()} bytes, the checkpoint was written at {length}")
        if self.length() > length:
            with writing(self.path):
                os.truncate(self.path, length)


def save_checkpoint(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    """Write `epoch_NNNNNN-DIGEST.pt`, whose name carries the SHA-256 of its bytes, and drop all but the last two."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write_atomic(folder / f"epoch_{epoch:06d}-{hashlib.sha256(payload).hexdigest()[:16]}.pt", payload)
    for path in sorted(folder.glob("epoch_*.pt"))[:-_KEPT]:
        path.unlink(missing_ok=True)


def drop_checkpoints(folder: Path) -> None:
    """Remove all checkpoints."""
    for path in folder.glob("epoch_*.pt"):
        path.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state of the latest whole checkpoint; None where there is none.

    Raises:
        FastclError: every checkpoint there is damaged.
    """
    paths = sorted(folder.glob("epoch_*.pt"), reverse=True)
    for path in paths:
        payload = path.read_bytes()
        if hashlib.sha256(payload).hexdigest()[:16] == path.stem.partition("-")[2]:
            log.info("resuming from %s", path)
            return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        log.warning("checkpoint %s is damaged (%d bytes, wrong digest); trying the one before", path, len(payload))
    if paths:
        raise FastclError(f"every checkpoint in {folder} is damaged: {', '.join(p.name for p in paths)}")
    return None
