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
        raise FastclError("the file is empty")
    if not zipfile.is_zipfile(file):
        raise FastclError(f"not a zip archive, or a truncated one ({size:,} bytes)")
    file.seek(0)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        return "cannot be decoded as an image"
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"has more than {most:,} pixels, the upper limit of data.max_pixels"
    if "MAX_TEXT_" in text:
        return "has more text metadata than Pillow decompresses; save it again without the text"
    if isinstance(error, zipfile.BadZipFile):
        return f"the archive is damaged ({text})"
    if "download=True" in text:
        return "files are missing from data.root or incomplete; set data.root to their folder, or data.download = true"
    return f"{type(error).__name__}: {text}"
