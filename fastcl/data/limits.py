"""Limits on resources: worker processes, threads, prefetch depth, pixels per image."""

from __future__ import annotations

import logging
import os
from functools import lru_cache

from PIL import Image

from fastcl.data.philox import check_integer
from fastcl.errors import FastclError

log = logging.getLogger("fastcl")
_PER_CORE = 16  # processes or threads per core; more can only be a mistake
_DEPTH = 1000
_FILE_BYTES = 8  # per pixel: four 16-bit channels, uncompressed
_FILE_REST = 1 << 24  # bytes for profiles, thumbnails and other data besides the pixels


def check_workers(workers: int, name: str = "data.workers", *, ranks: int = 1) -> None:
    """Warn about more processes or threads than this rank's share of the cores.

    Args:
        workers: number of processes or threads of this rank.
        name: the setting's name, for messages.
        ranks: number of ranks that share the cores, if the launcher does not set LOCAL_WORLD_SIZE.

    Raises:
        FastclError: not an integer, below 0, or above 16 times the number of cores.
    """
    check_integer(workers, name)
    cores = len(os.sched_getaffinity(0))
    if not 0 <= workers <= _PER_CORE * cores:
        raise FastclError(f"{name} must be in [0, {_PER_CORE * cores}] on {cores} cores, got {workers}")
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    share = max(1, cores // max(1, int(told) if told.isdecimal() else ranks))
    if workers > share:
        _warn(f"{name} is {workers}, more than the {share} cores per rank: the workers will compete for them")


def check_depth(depth: int) -> None:
    """Raise FastclError unless depth is an integer in [1, 1000]."""
    check_integer(depth, "depth")
    if not 1 <= depth <= _DEPTH:
        raise FastclError(f"depth must be in [1, {_DEPTH}], got {depth}")


def check_max_pixels(max_pixels: int) -> None:
    """Raise FastclError unless max_pixels is a positive integer within Pillow's own limit."""
    check_integer(max_pixels, "data.max_pixels")
    # Pillow's limit applies to the whole process: it warns above MAX_IMAGE_PIXELS and refuses above twice that.
    most = max_pixels if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS
    if not 1 <= max_pixels <= most:
        raise FastclError(
            f"data.max_pixels must be in [1, {most}] (Pillow refuses more; see PIL.Image.MAX_IMAGE_PIXELS), "
            f"got {max_pixels}"
        )


def check_pixels(picture: Image.Image, max_pixels: int) -> None:
    """Raise FastclError if an opened but not yet decoded picture has more pixels than allowed."""
    pixels = picture.width * picture.height
    if pixels > max_pixels:
        raise FastclError(
            f"{picture.height} x {picture.width} is {pixels:,} pixels, more than data.max_pixels ({max_pixels:,})"
        )


def most_bytes(max_pixels: int) -> int:
    """The largest uncompressed file size, in bytes, for an image of up to max_pixels pixels."""
    return _FILE_BYTES * max_pixels + _FILE_REST


@lru_cache(maxsize=64)
def _warn(message: str) -> None:
    """Log a message once per process; otherwise every loader of a run would repeat it."""
    log.warning(message)
