"""Passes over all images of a split before training: find images that cannot be decoded, keep small splits decoded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from tqdm import tqdm

from fastcl.data.deferred import held
from fastcl.errors import FastclError

if TYPE_CHECKING:
    from fastcl.data.sources.load import Split

T = TypeVar("T")
DECODED_LIMIT = 1 << 30  # bytes: largest decoded split that is kept in memory
_AT_ONCE = 64  # images per task of a thread


def unreadable(split: Split, what: str) -> dict[int, str]:
    """Decode every image once, in threads (decoders release the GIL).

    Args:
        split: the images.
        what: the split's name, for the progress bar.

    Returns:
        Position -> error message (which names the image), for each image that cannot be decoded.
    """

    def check(i: int) -> str | None:
        try:
            split.read(i)
        except FastclError as error:
            return str(error)
        return None

    with closing(_each(len(split), check, f"checking {what} images")) as errors:
        return {i: error for i, error in enumerate(errors) if error}


def keep_decoded(split: Split, channels: int, limit: int = DECODED_LIMIT) -> Split:
    """The same split with its images decoded now and kept in memory as uint8, or the split unchanged if they take more
    than `limit` bytes. Forked processes share the memory.

    Raises:
        FastclError: an image that cannot be decoded (named), or whose size differs from its header's.
    """
    ends = np.cumsum(split.sizes.prod(1) * channels)
    if ends[-1] > limit:
        return split
    pixels = np.empty(ends[-1], np.uint8)
    starts = np.concatenate([[0], ends[:-1]])

    def store(i: int) -> None:
        image, shape = split.image(i), (*split.sizes[i].tolist(), channels)
        if image.shape != shape:
            raise FastclError(f"image of sample id {split.ids[i]} has shape {image.shape}, but its header says {shape}")
        pixels[starts[i] : ends[i]] = image.ravel()

    with closing(_each(len(split), store, "decoding images")) as stored:
        for _ in stored:
            pass
    return dataclasses.replace(split, read=partial(_stored, pixels, starts, split.sizes, channels))


def _each(count: int, job: Callable[[int], T], what: str) -> Generator[T, None, None]:
    """job(i) for each i below count, in order; on a terminal a progress bar appears after a second."""
    cores = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(cores)

    def some(start: int) -> list[T]:
        return [job(i) for i in range(start, min(start + _AT_ONCE, count))]

    try:
        with tqdm(total=count, desc=what, unit="img", disable=None, delay=1) as bar:
            for results in pool.map(some, range(0, count, _AT_ONCE)):
                yield from results
                bar.update(len(results))
    finally:
        with held():
            pool.shutdown(cancel_futures=True)


def _stored(pixels: np.ndarray, starts: np.ndarray, sizes: np.ndarray, channels: int, i: int) -> np.ndarray:
    height, width = sizes[i].tolist()
    return pixels[starts[i] : starts[i] + height * width * channels].reshape(height, width, channels).copy()
