"""Image files under a folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from fastcl.data.limits import most_bytes
from fastcl.data.sources.trees.listing import HIDDEN, LeftOut, hidden, images
from fastcl.errors import FastclError, shown

_TWICE = "links to files or folders that are already included"
_SPECIAL = "special files (pipes, sockets, devices)"
_Key = tuple[int, int]  # identifies a file or folder: device and inode number


class Tree:
    """Image files under a folder. Holds paths only, so threads, forked workers and pickled copies share no open file.

    Symbolic links are followed, but no file is used twice: a real folder or file has priority over links to it, and
    of several links the first in sorted order is used. Everything else is counted in `left_out`.

    Args:
        root: the folder.
        max_pixels: limit per image.

    Raises:
        FastclError: a folder that cannot be listed, or none of whose images can be decoded here.
    """

    def __init__(self, root: Path, max_pixels: int) -> None:
        self.root, self.left_out, self._max_bytes = root, LeftOut(), most_bytes(max_pixels)
        walk = _Walk(str(root), self.left_out)
        names = images([*walk.files, *walk.links], self.left_out, str(root))
        seen = {walk.files[name] for name in names if name in walk.files}
        self.names = []
        for name in names:
            if (key := walk.links.get(name)) is not None:
                if key in seen:
                    self.left_out.add(_TWICE, name)
                    continue
                seen.add(key)
            self.names.append(name)
        self.left_out.add_lost(walk.folders, self.names)

    def label(self, i: int) -> str:
        """Name of image i in error messages."""
        return shown(self.root / self.names[i])

    def open(self, i: int) -> BinaryIO:
        """Image i as a file."""
        # Non-blocking: since the listing, the file may have been replaced by a pipe.
        number = os.open(self.root / self.names[i], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise FastclError("not a regular file")
        return open(number, "rb")

    def whole(self, i: int) -> BinaryIO:
        """Image i as a file. The counterpart of `Zip.whole`; here the decoder reads only what it needs."""
        return self.open(i)

    def data(self, i: int) -> bytes:
        """Image i's bytes. Raises FastclError if there are more than an image can have."""
        with self.open(i) as file:
            size = os.fstat(file.fileno()).st_size
            if size > self._max_bytes:
                raise FastclError(f"{size:,} bytes are more than an image of data.max_pixels needs")
            return file.read()


class _Walk:
    """All visible files below a folder, as paths relative to it with forward slashes.

    Attributes:
        files: real files.
        folders: real folders, and links to folders that no earlier path leads to.
        links: links to files; a broken link has no key (reading it raises).
    """

    def __init__(self, root: str, left_out: LeftOut) -> None:
        self.files: dict[str, _Key] = {}
        self.links: dict[str, _Key | None] = {}
        self.folders: list[str] = []
        self._root, self._left_out = root, left_out
        folders, linked, seen = [""], [], set()
        while folders or linked:
            if not folders:
                linked.sort(reverse=True)
            base = (folders or linked).pop()
            try:
                here = os.stat(os.path.join(root, base))
                if (here.st_dev, here.st_ino) in seen:
                    left_out.add(_TWICE, base)
                    continue
                seen.add((here.st_dev, here.st_ino))
                self.folders.append(base)
                with os.scandir(os.path.join(root, base)) as entries:
                    for entry in entries:
                        self._sort(entry, f"{base}/{entry.name}" if base else entry.name, here.st_dev, folders, linked)
            except OSError as error:
                raise FastclError(f"cannot list {shown(error.filename or root)}: {error.strerror}") from error

    def _sort(self, entry: os.DirEntry[str], name: str, device: int, folders: list[str], linked: list[str]) -> None:
        if hidden(entry.name):
            self._left_out.add(HIDDEN, name)
        elif entry.is_dir(follow_symlinks=False):
            folders.append(name)
        elif entry.is_file(follow_symlinks=False):
            self.files[name] = device, entry.inode()
        elif not entry.is_symlink():
            self._left_out.add(_SPECIAL, name)
        else:
            try:
                target = entry.stat()
            except OSError:
                self.links[name] = None
                return
            if stat.S_ISDIR(target.st_mode):
                linked.append(name)
            elif stat.S_ISREG(target.st_mode):
                self.links[name] = target.st_dev, target.st_ino
            else:
                self._left_out.add(_SPECIAL, name)
