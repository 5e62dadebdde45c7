"""How much a value may ask of the machine: processes, threads, batches ahead, pixels of an image."""

from __future__ import annotations

import logging
import os
from functools import lru_cache

from PIL import Image

from fastcl.data.philox import check_integer
from fastcl.errors import FastclError

log = logging.getLogger("fastcl")
_PER_CORE = 16  # processes or threads a core, beyond which a number can only be a mistake
_DEPTH = 1000
_FILE_BYTES = 8  # a pixel: four channels of 16 bits, not packed
_FILE_REST = 1 << 24  # bytes of profiles, thumbnails and other things that a file may hold beside its pixels


def check_workers(workers: int, name: str = "data.workers", *, ranks: int = 1) -> None:
    """Warn of more processes or threads than this rank's share of the cores.

    Args:
        workers: of this rank.
        name: what they are called.
        ranks: that share the cores, where the launcher does not tell (LOCAL_WORLD_SIZE).

    Raises:
        FastclError: no integer, below 0, or above 16 times the cores.
    """
    check_integer(workers, name)
    cores = len(os.sched_getaffinity(0))
    if not 0 <= workers <= _PER_CORE * cores:
        raise FastclError(f"{name} must lie in [0, {_PER_CORE * cores}] on {cores} cores, got {workers}")
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    share = max(1, cores // max(1, int(told) if told.isdecimal() else ranks))
    if workers > share:
        _warn(f"{name} is {workers}, more than the {share} cores a rank: they will stand in each other's way")


def check_depth(depth: int) -> None:
    """Raise FastclError unless this is an integer in [1, 1000]."""
    check_integer(depth, "depth")
    if not 1 <= depth <= _DEPTH:
        raise FastclError(f"depth must lie in [1, {_DEPTH}], got {depth}")


def check_max_pixels(max_pixels: int) -> None:
    """Raise FastclError unless this is a positive integer up to which Pillow opens images."""
    check_integer(max_pixels, "data.max_pixels")
    # Pillow's own limit, for the whole process: it warns above MAX_IMAGE_PIXELS and refuses above twice that.
    most = max_pixels if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS
    if not 1 <= max_pixels <= most:
        raise FastclError(
            f"data.max_pixels must lie in [1, {most}] (Pillow refuses more; see PIL.Image.MAX_IMAGE_PIXELS), "
            f"got {max_pixels}"
        )


def check_pixels(picture: Image.Image, max_pixels: int) -> None:
    """Raise FastclError if an opened, not yet decoded picture has more pixels than allowed."""
    pixels = picture.width * picture.height
    if pixels > max_pixels:
        raise FastclError(
            f"{picture.height} x {picture.width} is {pixels:,} pixels, and data.max_pixels allows {max_pixels:,}"
        )


def most_bytes(max_pixels: int) -> int:
    """The unpacked size up to which a file can be an image of so many pixels."""
    return _FILE_BYTES * max_pixels + _FILE_REST


@lru_cache(maxsize=64)
def _warn(message: str) -> None:
    """Once a process: every loader of a run would say the same."""
    log.warning(message)
