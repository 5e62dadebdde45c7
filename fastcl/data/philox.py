"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised in numpy.

A counter-based generator has no state: every number is a pure function of a key and a counter. So a view depends
only on (seed, epoch, sample, view), not on what was drawn before it.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from fastcl.errors import FastclError

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


class Stream(IntEnum):
    """Purpose of the random numbers. Different streams of one seed never share a counter."""

    VIEW = 0
    ORDER = 1
    CLASSES = 2
    SPLIT = 3
    BATCH = 4


def check_integer(value: object, name: str) -> None:
    """Raise FastclError unless value is an integer; booleans do not count."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise FastclError(f"{name} must be an integer, got {value!r}")


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32.

    Args:
        counter: (..., 4) uint32 counters.
        key: two 32-bit words.

    Returns:
        (..., 4) uint32 random words, identical to those of `tl.philox` and the Random123 library.
    """
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW
        c2, c3 = (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def words(count: int, *, seed: int, stream: Stream, index: np.ndarray, epoch: int = 0, view: int = 0) -> np.ndarray:
    """Random 32-bit words for each index.

    Args:
        count: words per index.
        seed: 0 <= seed < 2**64; the key.
        stream: purpose of the numbers.
        index: (n,) integers in [0, 2**32): sample ids, or positions.
        epoch: 0 <= epoch < 2**32.
        view: 0 <= view < 2**16.

    Returns:
        (n, count) uint32.

    Raises:
        FastclError: a value that is not an integer, or is outside its range (it would alias another counter).
    """
    index = np.asarray(index)
    for name, value, bound in (("seed", seed, 64), ("epoch", epoch, 32), ("view", view, 16)):
        check_integer(value, name)
        if not 0 <= value < 1 << bound:
            raise FastclError(f"{name} must be in [0, 2**{bound}), got {value}")
    if index.size and index.dtype.kind not in "iu":
        raise FastclError(f"sample ids must be integers, got {index.dtype}")
    if index.size and not (0 <= index.min() and index.max() < 1 << 32):
        raise FastclError(f"sample ids must be in [0, 2**32), got {index.min()} to {index.max()}")
    seed, epoch, view = int(seed), int(epoch), int(view)
    blocks = -(-count // 4)
    counter = np.empty((len(index), blocks, 4), np.uint32)
    counter[..., 0] = index[:, None]
    counter[..., 1] = epoch
    counter[..., 2] = view | int(stream) << 16
    counter[..., 3] = np.arange(blocks)
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(len(index), blocks * 4)[:, :count]


def uniforms(count: int, *, seed: int, stream: Stream, index: np.ndarray, epoch: int = 0, view: int = 0) -> np.ndarray:
    """(n, count) float64 uniforms in [0, 1), multiples of 2**-24 (exact in float32 too). Arguments as for `words`."""
    return (words(count, seed=seed, stream=stream, index=index, epoch=epoch, view=view) >> 8) * 2.0**-24


def keys(n: int, *, seed: int, stream: Stream, epoch: int = 0, view: int = 0) -> np.ndarray:
    """(n,) uint64: one random 64-bit key per position, so ties are negligible. Arguments as for `words`."""
    pair = words(2, seed=seed, stream=stream, index=np.arange(n), epoch=epoch, view=view).astype(np.uint64)
    return pair[:, 0] << _SHIFT | pair[:, 1]


def permutation(n: int, *, seed: int, stream: Stream, epoch: int = 0) -> np.ndarray:
    """(n,) int64 permutation of range(n), by sorting random keys. Arguments as for `words`."""
    return np.argsort(keys(n, seed=seed, stream=stream, epoch=epoch), kind="stable")
