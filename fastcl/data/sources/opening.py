"""Opens files with other libraries: restricts the image formats, and turns their failures into FastclErrors."""

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
    """Turns any exception of a decoder or other library into a FastclError that names the file or item."""
    try:
        yield
    except Exception as error:
        raise FastclError(f"{shown(what)}: {error if isinstance(error, FastclError) else _reason(error)}") from error


def open_image(file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Open an image, not yet decoded, in one of the accepted formats only. Pillow guesses by content, whatever the
    file's extension, and some other formats start an external program (PostScript does)."""
    return Image.open(file, formats=formats())


def check_zip(file: BinaryIO) -> None:
    """Raise FastclError unless the file is a zip; rewinds it."""
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
