"""Files opened by other libraries: which formats they may try, and each of their failures in words of our own."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from fastcl.data.sources.trees.listing import formats
from fastcl.errors import FastclError, shown


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turns whatever a decoder or another library raises into one error that says which file or item it was."""
    try:
        yield
    except Exception as error:
        raise FastclError(f"{shown(what)}: {error if isinstance(error, FastclError) else _reason(error)}") from error


def open_image(file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """An image of the formats whose files are taken, not yet decoded. Of others some start a program (PostScript does)
    whatever the file's name ends in, so Pillow is never asked to guess among all that it knows."""
    return Image.open(file, formats=formats())


def check_zip(file: BinaryIO) -> None:
    """Raise FastclError for a file that is no zip, and leave the others at their beginning."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        raise FastclError("it is empty")
    if not zipfile.is_zipfile(file):
        raise FastclError(f"its {size:,} bytes are no zip archive, or one that was cut short")
    file.seek(0)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        return "is no image that can be decoded"
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"has more than {most:,} pixels, the most that data.max_pixels can allow"
    if "MAX_TEXT_" in text:
        return "holds more text beside its pixels than Pillow unpacks: save it anew without"
    if isinstance(error, zipfile.BadZipFile):
        return f"the archive is damaged ({text})"
    if "download=True" in text:
        return "the files are not in data.root, or not complete: set data.root to their folder, or data.download = true"
    return f"{type(error).__name__}: {text}"
