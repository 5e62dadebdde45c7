"""The files of a run: atomic writes, append-only records with a known length and digest, and the folder's lock.

Nothing is written through a link, so a run changes no file outside its folder, whoever prepared the folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastcl.errors import FastclError, shown
from fastcl.io import files, outputs
from fastcl.io.run_names import FILES, FOLDERS, REPORT

_CHUNK = 1 << 20
# Temporary files left by killed writes of this and earlier versions. In the folder itself only old names are listed: a
# report, which is written without the lock, may be in progress under a name of this version.
_LEFTOVERS = {
    ".": ("run.json.tmp", "layers.json.tmp"),
    "checkpoints": (".fastcl-*.part", "epoch_*.pt.tmp"),
    "weights": (".fastcl-*.part", "*.safetensors.tmp"),
    "features": (".fastcl-*.part", "*.safetensors.tmp"),
    "profile": (".fastcl-*.part",),
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into one clear error."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        if isinstance(error, FastclError):
            raise
        why = files.cause(error)
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            why = "it is a link, and a run writes only inside its own folder"
        raise FastclError(
            f"cannot write {shown(path)}: {why}. Earlier files are intact; "
            "the same command resumes from the last checkpoint"
        ) from error


def write_atomic(path: Path, payload: bytes) -> None:
    """Write a file of a run that is complete or absent, even after a crash. Raises FastclError as `writing` does."""
    try:
        files.write_atomic(path, payload)
    except FastclError as error:
        with writing(path):
            raise error.__cause__ from None


def check_run_folder(out: Path, inputs: Iterable[Path] = (), images: Iterable[Path] = ()) -> None:
    """Refuse a folder that a run could not write, or in which it would overwrite something that is not its own.

    Called before any work; creates nothing.

    Args:
        out: the folder of the run, which need not exist.
        inputs: files and folders that the run reads, such as its config file and its data.
        images: folders in which every file is read, so nothing may be written there.

    Raises:
        FastclError: out is not a folder or cannot be created or written; something that the run writes there is a
            link or of the wrong kind, or its records have a second hard link; one of the inputs is the folder itself or
            something that the run writes there; or out lies inside an image folder.
    """
    outputs.check_folder(out, "--out", inputs)
    for folder in images:
        if any(outputs.same(parent, folder) for parent in Path(os.path.realpath(out)).parents):
            raise FastclError(
                f"--out: {shown(out)} is inside {shown(folder)}, whose images the run reads; choose a folder outside"
            )
    for name in (*FOLDERS, *FILES, REPORT):
        path = out / name
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise FastclError(f"--out: {shown(path)} cannot be read ({files.cause(error)})") from error
        wanted, form = (stat.S_ISDIR, "folder") if name in FOLDERS else (stat.S_ISREG, "file")
        wrong = f"is not a regular {form}" if not wanted(found.st_mode) else ""
        if stat.S_ISLNK(found.st_mode):
            wrong = f"is a link to {shown(os.readlink(path))}"
        elif path.suffix == ".jsonl" and found.st_nlink > 1:  # appended to in place
            wrong = "has a second name (a hard link)"
        if wrong:
            raise FastclError(
                f"--out: {shown(path)} {wrong}; a run writes only inside its own folder. "
                "Remove it, or choose another folder"
            )
        for given in inputs:
            if any(outputs.same(place, path) for place in (given, *Path(os.path.abspath(given)).parents)):
                raise FastclError(f"--out: the run would overwrite {shown(given)}, which it reads")


class HeldElsewhere(FastclError):
    """Another process holds the lock of a folder."""


@contextmanager
def locked(folder: Path, doing: str = "training") -> Iterator[None]:
    """Lock a folder for one process. The lock ends with the process in any case, and children do not inherit it.

    Args:
        folder: of a run, or of a sweep; created if absent.
        doing: what a process does that holds the lock, for the message.

    Raises:
        HeldElsewhere: another process holds the lock.
        FastclError: it cannot be acquired.
    """
    path = folder / ".lock"
    # A file system without locks is an error: the fallback, a plain file, would outlive a killed run.
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise HeldElsewhere(f"another process is {doing} in {shown(folder)}") from None
    try:
        yield
    finally:
        lock.release()


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed writes left in a run's folder. The caller must hold its lock."""
    for name, patterns in _LEFTOVERS.items():
        for path in (path for pattern in patterns for path in (folder / name).glob(pattern)):
            with suppress(OSError):
                path.unlink()


def _open_own(path: Path, flags: int) -> int:
    """A descriptor of a regular file; does not follow a link or wait for a pipe. Raises OSError."""
    number = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return number


class JsonLines:
    """An append-only file with one JSON object per line, which can be truncated to its length at a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash, self._hashed = hashlib.sha256(), 0  # hash and count of the first bytes

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records and sync them to disk; NaN is refused, since it is not JSON."""
        text = "".join(json.dumps(r, allow_nan=False) + "\n" for r in records)
        with writing(self.path), open(_open_own(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def length(self) -> int:
        """Current length in bytes."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def digest(self, length: int) -> str:
        """SHA-256 of the first `length` bytes, hexadecimal. Each byte is read only once if lengths only grow."""
        if length < self._hashed:
            self._hash, self._hashed = hashlib.sha256(), 0
        if length > self._hashed:
            with writing(self.path), open(self.path, "rb") as file:
                file.seek(self._hashed)
                while self._hashed < length and (part := file.read(min(_CHUNK, length - self._hashed))):
                    self._hash.update(part)
                    self._hashed += len(part)
        return self._hash.hexdigest()

    def tail(self, length: int) -> bytes:
        """The bytes after the first `length` bytes."""
        if self.length() <= length:
            return b""
        with writing(self.path), open(self.path, "rb") as file:
            file.seek(length)
            return file.read()

    def cut(self, length: int) -> None:
        """Truncate to `length` bytes, dropping what was written after a checkpoint."""
        if self.length() > length:
            with writing(self.path):
                number = _open_own(self.path, os.O_WRONLY)
                try:
                    os.ftruncate(number, length)
                finally:
                    os.close(number)
