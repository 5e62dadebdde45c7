"""Files that are written whole."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from fastcl import interrupts
from fastcl.errors import FastclError, shown


def cause(error: OSError | ValueError) -> str:
    """Why the system refused a path: its words for the error, without the path."""
    return getattr(error, "strerror", None) or str(error)


def temporary(folder: Path) -> Path:
    """A name, `.fastcl-*.part`, that no file in the folder has; as short as any, however long the final name is."""
    return folder / f".fastcl-{secrets.token_hex(8)}.part"


def write_atomic(path: Path, payload: bytes) -> None:
    """Write a file that is either whole or as it was before, even after a crash; missing folders are made.

    The bytes go into a new `.fastcl-*.part` in the same folder, which then takes the file's place: a link of that name
    is replaced and never followed.

    Raises:
        FastclError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = temporary(path.parent)
        try:
            with interrupts.removing(part), open(part, "xb") as file:  # x: a new file, not one that a link leads to
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:  # an interrupt leaves nothing behind either
            with suppress(OSError):
                part.unlink()
            raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise FastclError(f"{shown(path)} cannot be written ({cause(error)})") from error
    with suppress(OSError):  # the file is there; not every system syncs, or lets us open, its folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
