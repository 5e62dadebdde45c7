"""Converts a picture of any mode to uint8 pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from fastcl.config.settings import MAX_PIXELS
from fastcl.data.limits import check_pixels
from fastcl.errors import FastclError

_BAND = 1 << 20  # pixels converted at a time
_QUARTER = 1 << 14  # of the 16-bit range
_PHOTOMETRIC = 262  # TIFF tag PhotometricInterpretation; 0: white is zero


def decode(picture: Image.Image, channels: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(H, W, channels) uint8 pixels of an opened picture in any mode.

    Transparent areas become white (their stored colour is arbitrary); 16-bit pixels keep their high byte, those of a
    .pgm after scaling by its stated maximum; white-is-zero TIFFs are inverted; the orientation tag is not applied, as
    in torchvision.

    Raises:
        FastclError: more pixels than allowed; 32-bit pixels, whose range no file states; or 16-bit pixels that use at
            most a quarter of their range (10- or 12-bit data, say), which would leave few grey levels.
    """
    check_pixels(picture, max_pixels)
    stored = [tile[3] for tile in getattr(picture, "tile", ())]  # Pillow's storage format (raw mode) of each tile
    # Pillow opens a .pgm of more than 8 bits in mode I, scaled to 16 bits.
    grey = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PPM", "PNG"))
    if picture.mode in ("I", "F") and not grey:
        raise FastclError(
            f"mode {picture.mode}: 32-bit pixels have no standard range; save the image with 8 or 16 bits"
        )
    twelve = "I;12" in str(stored)  # 12-bit TIFF
    # Pillow inverts white-is-zero TIFFs in 8 bits, but not in 16.
    negative = picture.format == "TIFF" and getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    colour = picture.mode in ("RGB", "RGBA") and any(map(_deep, stored))
    pixels = np.empty((picture.height, picture.width, channels), np.uint8)
    rows, peak = max(1, _BAND // picture.width), 0
    for top in range(0, picture.height, rows):  # in bands, since conversions take many bytes per pixel
        band = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        if grey:
            values = np.asarray(band)
            peak = max(peak, int(values.max()))
            values = (4095 if twelve else 65535) - values if negative else values
            band = Image.fromarray((values >> (4 if twelve else 8)).astype(np.uint8))
        elif colour:
            peak = max(peak, int(np.asarray(band)[..., :3].max()) << 8)
        pixels[top : top + rows] = _converted(band, channels)
    if 0 < peak < _QUARTER and not twelve:
        raise FastclError(
            f"16-bit pixels reach only {peak:,} of 65,535, which leaves {(peak >> 8) + 1} of 256 levels: scale 10- or "
            "12-bit data to the full range, or save the image with 8 bits if it is just dark"
        )
    return pixels


def _deep(stored: Any) -> bool:
    """Whether Pillow's storage format of a tile is one of 16-bit colours."""
    if isinstance(stored, tuple) and len(stored) == 2 and isinstance(stored[1], int):
        return stored[1] > 255  # a .ppm's stated maximum
    return ";16" in str(stored)


def _converted(picture: Image.Image, channels: int) -> np.ndarray:
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)
