"""Checks of output paths before work starts, so that neither inputs nor results are lost."""

from __future__ import annotations

import argparse
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastcl.errors import FastclError, shown
from fastcl.io.files import cause, temporary

_LONGEST = 255  # maximum bytes of a file name on all common file systems


def named_path(text: str) -> Path:
    """argparse `type` for a path that must not be empty: `Path("")` would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def check_output(path: Path, option: str, inputs: Iterable[Path] = ()) -> None:
    """Reject an output file that cannot be written, or that would overwrite something.

    Args:
        path: the file; its folder may be missing. Nothing is created.
        option: the user's name for it, such as "--json".
        inputs: files that the command reads (or writes for another option), and folders in which it must not write.

    Raises:
        FastclError: no name, a folder, a device, a link, a file without write permission, one of the inputs under any
            name (hard link, symbolic link, different case) or a path inside one, a folder that cannot be created or
            written to, or a name that is too long.
    """
    with _naming(path, option):
        if path == Path():
            raise FastclError(f"{option}: not a file name (an empty path, or '.')")
        info = _lstat(path)
        if info is not None:
            _check_plain(path, option, info)
        target = Path(os.path.realpath(path))
        for other in inputs:
            if same(target, other):
                raise FastclError(
                    f"{option}: {shown(path)} is an input or another output of this command; choose another file"
                )
            if any(same(folder, other) for folder in target.parents):
                raise FastclError(f"{option}: {shown(path)} is inside {shown(other)}, which this command reads")
        _check_room(path)


def check_folder(path: Path, option: str, inputs: Iterable[Path] = ()) -> None:
    """Reject an output folder in which no file can be written, or that is one of the inputs.

    Args:
        path: the folder, or a link to one; it may be missing. Nothing is created.
        option: the user's name for it, such as "--out".
        inputs: folders that the command reads.

    Raises:
        FastclError: a file, a dangling link, an input, a folder that cannot be created or written to, or a name that is
            too long.
    """
    with _naming(path, option):
        info = _lstat(path)
        if info is not None and stat.S_ISLNK(info.st_mode) and not path.exists():
            raise FastclError(f"{option}: {shown(path)} is a link to {shown(os.readlink(path))}, which does not exist")
        if info is not None and not path.is_dir():
            raise FastclError(f"{option}: {shown(path)} is a file; choose a folder")
        for other in inputs:
            if same(path, other):
                raise FastclError(f"{option}: {shown(path)} is read by this command; choose another folder")
        _check_room(path / "file")


def same(path: Path, other: Path) -> bool:
    """Whether both paths are the same file or folder, under any names, even if neither exists yet."""
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):  # one is missing or inaccessible: reading it will report that
        pass
    try:
        return os.path.realpath(path) == os.path.realpath(other)
    except (OSError, ValueError):
        return False


@contextmanager
def _naming(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except FastclError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise FastclError(f"{option}: {shown(path)} cannot be written ({cause(error)})") from error


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _check_plain(path: Path, option: str, info: os.stat_result) -> None:
    if stat.S_ISLNK(info.st_mode):
        raise FastclError(f"{option}: {shown(path)} is a link to {shown(os.readlink(path))}; give the file itself")
    if stat.S_ISDIR(info.st_mode):
        raise FastclError(f"{option}: {shown(path)} is a folder; choose a file name")
    if not stat.S_ISREG(info.st_mode):
        raise FastclError(f"{option}: {shown(path)} is a device, pipe or socket; choose a file name")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _check_room(path: Path) -> None:
    """Raise OSError unless a file can be created in the folder of `path`, or in its nearest existing ancestor."""
    names, folder = [path.name], path.parent
    while _lstat(folder) is None and folder != folder.parent:
        names.append(folder.name)
        folder = folder.parent
    if any(len(os.fsencode(name)) > _LONGEST for name in names):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    probe = temporary(folder)
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # permission bits are not enough: quotas, /proc, ...
    os.unlink(probe)
