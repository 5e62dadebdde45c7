"""Whole files: read if they are there, written atomically."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from fastcl import interrupts
from fastcl.errors import FastclError, shown


def cause(error: OSError | ValueError) -> str:
    """The system's description of an error, without the path."""
    return getattr(error, "strerror", None) or str(error)


def read_if_there(path: Path) -> bytes | None:
    """The contents of a file; None if there is no such file.

    Raises:
        FastclError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise FastclError(f"{shown(path)} cannot be read ({cause(error)})") from error


def temporary(folder: Path) -> Path:
    """A new path `.fastcl-*.part` in the folder; its name is short, however long the final name is."""
    return folder / f".fastcl-{secrets.token_hex(8)}.part"


def write_atomic(path: Path, payload: bytes) -> None:
    """Write a file so that it is either complete or unchanged, even after a crash; missing folders are created.

    The bytes go into a new `.fastcl-*.part` in the same folder, which then replaces the file. If `path` is a link, the
    link is replaced, never followed.

    Raises:
        FastclError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = temporary(path.parent)
        try:
            with interrupts.removing(part), open(part, "xb") as file:  # x: create a new file, do not follow a link
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:  # also clean up after an interrupt
            with suppress(OSError):
                part.unlink()
            raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise FastclError(f"{shown(path)} cannot be written ({cause(error)})") from error
    with suppress(OSError):  # the file is in place; not every system can open or sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
