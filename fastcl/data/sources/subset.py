"""Some of the images of a split: for one, so many that runs on different classes are evaluated on equally many."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fastcl.data.philox import Stream, words
from fastcl.data.sources.load import Split


def subsample(split: Split, count: int, seed: int) -> Split:
    """At most `count` images of a split, in the split's order, with each class's share of them kept.

    Which images depends on the seed and their sample ids; a larger count contains the images of a smaller one. Every
    class keeps an image if the classes are of one size and count is at least their number.

    Args:
        split: the images.
        count: how many to keep, positive; the split itself is returned if it has no more.
        seed: 0 <= seed < 2**64.
    """
    if count >= len(split):
        return split
    high, low = words(2, seed=seed, stream=Stream.SPLIT, index=split.ids).astype(np.uint64).T
    order = np.lexsort((high << np.uint64(32) | low, split.labels))
    sizes = np.bincount(split.labels)
    ranks = np.arange(len(split)) - (np.cumsum(sizes) - sizes)[split.labels[order]]
    place = (ranks + 0.5) / sizes[split.labels[order]]  # of an image within its class, from 0 to 1
    kept = np.sort(order[np.argsort(place, kind="stable")[:count]])
    return part(split, kept)


def part(split: Split, positions: np.ndarray) -> Split:
    """The images of a split at (n,) positions, in that order."""
    at, read = positions, partial(_at, split.read, positions)
    encoded = None if split.encoded is None else partial(_at, split.encoded, positions)
    return Split(split.ids[at], split.labels[at], split.sizes[at], read, encoded)


def _at(read: Callable[[int], Any], positions: np.ndarray, i: int) -> Any:
    return read(int(positions[i]))
