"""Sorts the files of a folder or zip into images and others; everything left out is counted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from PIL import Image, features

from fastcl.errors import FastclError, shown

# Used if this Pillow decodes them, by itself or with an imported plugin (pillow-heif).
_PHOTOS = tuple(
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm .tga .jp2 .j2k .avif "
    ".heic .heif .jxl .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf".split()
)
_FEATURES = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000"}  # a plugin may be registered without its library
_SHOWN = 3
HIDDEN, OTHER = "hidden files or folders", "files that are not images"
UNREAD = "images that this Pillow cannot decode"
_LOST = "folders without a usable image, which are no classes"
_QUIET = (HIDDEN, OTHER)


def extensions() -> tuple[str, ...]:
    """Extensions of the files treated as images, in lower case."""
    known = Image.registered_extensions()
    return tuple(e for e in _PHOTOS if known.get(e) in Image.OPEN and features.check(_FEATURES.get(known[e], "pil")))


def formats() -> list[str]:
    """Pillow's names of the formats of `extensions`, in the order in which it tries them."""
    known = Image.registered_extensions()
    wanted = {known.get(e) for e in _PHOTOS}
    return [name for name in Image.ID if name in wanted]


class LeftOut:
    """Files and folders that are left out, by reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count a file or folder."""
        self._names.setdefault(reason, []).append(name)

    def add_lost(self, folders: Iterable[str], taken: Iterable[str]) -> None:
        """Count the innermost visible folders that hold no used image."""
        folders = set(folders) - {""}
        inner = folders - {parent for name in folders for parent in _parents(name)}
        for name in inner - {parent for image in taken for parent in _parents(image)}:
            self.add(_LOST, name)

    def lines(self) -> dict[str, bool]:
        """Each reason with its count and the first names -> whether to warn about it."""
        return {self._line(reason, sorted(names)): reason not in _QUIET for reason, names in self._names.items()}

    def _line(self, reason: str, names: list[str]) -> str:
        most = len(names) if reason == _LOST else _SHOWN  # each may be a missing class, so name them all
        more = ", ..." if len(names) > most else ""
        return f"{len(names)} {reason} ({', '.join(shown(name) for name in names[:most])}{more})"


def hidden(name: str) -> bool:
    """Whether any part of a path is hidden, including macOS's resource forks (._name; __MACOSX in zips)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _parents(name: str) -> Iterator[str]:
    """The parent folders of a path, innermost first."""
    while name := name.rpartition("/")[0]:
        yield name


def images(names: Iterable[str], left_out: LeftOut, what: str) -> list[str]:
    """The image files among visible names, sorted; counts the others.

    Raises:
        FastclError: a folder whose images are all in formats that this Pillow cannot decode; its class would be
            missing.
    """
    taken, lost, known = [], [], extensions()
    for name in sorted(names):
        ending = PurePosixPath(name).suffix.lower()
        if ending in known:
            taken.append(name)
        elif ending in _PHOTOS:
            lost.append(name)
            left_out.add(UNREAD, name)
        else:
            left_out.add(OTHER, name)
    folders = {name.rpartition("/")[0] for name in taken}
    gone = [name for name in lost if name.rpartition("/")[0] not in folders]
    if gone:
        endings = ", ".join(sorted({PurePosixPath(name).suffix for name in gone}))
        classes = ", ".join(f"'{shown(folder)}'" for folder in sorted({name.rpartition("/")[0] for name in gone}))
        raise FastclError(
            f"{shown(what)}: all images of {classes} are {endings}, which this Pillow "
            f"cannot decode ({len(gone)} such images): convert them to .jpg or .png"
        )
    return taken


def mode_of(path: Path, wanted: str = "file") -> int:
    """A path's `st_mode`; `wanted` is what the error message calls the missing file.

    Raises:
        FastclError: the path does not exist or cannot be accessed.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FastclError(f"data.source: no such {wanted}: {shown(path)}") from None
    except (OSError, ValueError) as error:  # no permission for a parent folder, a name too long, a null byte
        raise FastclError(f"cannot open {shown(path)}: {getattr(error, 'strerror', None) or error}") from None


def check_file(path: Path, wanted: str) -> None:
    """Raise FastclError unless a path is a regular file; opening another kind (a pipe) could block."""
    mode = mode_of(path)
    if not stat.S_ISREG(mode):
        raise FastclError(f"{shown(path)} is {'a folder' if stat.S_ISDIR(mode) else 'a special file'}, not {wanted}")
