"""Launches: the single function that starts kernels, and the table of tile sizes.

The table (table.json in this folder) has a row per kernel, architecture, mode and range of widths and rows;
`python -m bench.gpu.tune` writes it. Nothing is tuned at run time: the same shapes give the same launches, and hence
the same bits, whatever the number of multiprocessors.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TABLE = Path(__file__).with_name("table.json")
# Multiprocessors of an architecture's usual large card.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}
# Programs at a time where nothing more is known. Fixed, so that results do not depend on the card.
_SLOTS = 528
_SPLITS = (
    1,
    2,
    3,
    4,
    6,
    8,
    12,
    16,
)  # programs that share a block of resident rows; few, as kernels are compiled for it
_START = 4  # tiles in whose time a program starts and ends


@dataclass(frozen=True)
class Config:
    """Tile sizes of a launch (resident rows, streamed rows, columns at a time), warps and pipeline stages; how many of
    its programs a card runs at a time."""

    block_r: int
    block_s: int
    block_d: int
    warps: int
    stages: int
    slots: int = _SLOTS
    consumers: int = 0  # warpgroups that multiply in a warp-specialised kernel


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded."""

    kernel: Any
    grid: tuple[int, ...]
    warps: int
    stages: int
    arguments: dict[str, Any]


# What is called in place of launches; other threads keep launching.
_recorder: ContextVar[Callable[[Launch], None] | None] = ContextVar("recorder", default=None)
_architecture: int | None = None


def launch(kernel: Any, grid: tuple[int, ...], warps: int, stages: int, **arguments: Any) -> None:
    """Start a kernel on the current device; pass arguments by parameter name, in the kernel's order."""
    recorder = _recorder.get()
    if recorder is None:
        start(kernel, grid, warps, stages, arguments)
    else:
        recorder(Launch(kernel, grid, warps, stages, arguments))


def start(kernel: Any, grid: tuple[int, ...], warps: int, stages: int, arguments: dict[str, Any]) -> Any:
    """Start a kernel, whether or not launches are recorded; what Triton compiled for it, or None in the interpreter."""
    # Request fused multiply-add explicitly: from Triton 3.10 on it is off by default.
    return kernel[grid](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def launch_sides(
    kernel: Any, sides: Sequence[tuple[Any, ...]], programs: Sequence[int], warps: int, stages: int, splits: int = 1,
    **arguments: Any,
) -> None:  # fmt: skip
    """Start a kernel over one side or over two at once: one launch instead of two.

    Args:
        sides: the argument `one` and, if there are two, `two`.
        programs: of each; those of the second follow those of the first, whose number is the argument `first`. It is
            None for one side: Triton 3.6 cannot compare a tuple with None.
        splits: programs along the second axis of the grid.
    """
    one, two = sides if len(sides) == 2 else (*sides, None)
    grid = (sum(programs),) if splits == 1 else (sum(programs), splits)
    first = None if two is None else programs[0]
    launch(kernel, grid, warps, stages, one=one, two=two, first=first, **arguments)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches within the block instead of starting them; their outputs stay undefined."""
    launches: list[Launch] = []
    with recorded_by(launches.append):
        yield launches


@contextmanager
def recorded_by(recorder: Callable[[Launch], None]) -> Iterator[None]:
    """Within the block, call a function in place of every launch."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def is_recording() -> bool:
    """Whether launches are recorded here instead of started."""
    return _recorder.get() is not None


@contextmanager
def on_architecture(sm: int) -> Iterator[None]:
    """Within the block, choose launches for this architecture, for example 90, whatever the device."""
    global _architecture
    previous, _architecture = _architecture, sm
    try:
        yield
    finally:
        _architecture = previous


def forced_architecture() -> int | None:
    """What the enclosing `on_architecture` says; None: there is none."""
    return _architecture


def architecture(capability: tuple[int, int] | None) -> int:
    """The table's architecture for a compute capability: the newest one that is not newer. None: 90."""
    sm = _architecture or (90 if capability is None else 10 * capability[0] + capability[1])
    return max((known for known in ARCHITECTURES if known <= sm), default=ARCHITECTURES[0])


@lru_cache(maxsize=4096)
def config(kernel: str, sm: int, mode: str, d: int, n: int) -> Config | None:
    """Tile sizes for rows of width d and n streamed rows; None if the table has no such row.

    The first row counts whose `max_d` and `max_n` are not exceeded and whose `min_d`, if it has one, is reached. A
    missing "backward" row means that no tile of that width fits in registers: the wide route is used instead.

    Args:
        kernel: "forward", "online", "backward", "backward_online", "weights", "weights_online", "product", "twin" or
            "twin_masked" (the plain and the masked tiles of `twin_kernel`, by the larger of both widths). A row
            "weights_peers" takes the place of "weights" if sums over peers have gradients. If there are
            rows "forward_plain" and "forward_masked", or "backward_masked", masked tiles have launches of their own;
            not if there is a row "forward_joint" or "backward_joint" as well, for few rows. "forward_hopper",
            "backward_hopper" and "weights_hopper" are rows for warp-specialised kernels, which are off by default.
        sm: a member of ARCHITECTURES.
        mode: which tiles use split half precision: "none", "peers" (those of one class) or "all".
    """
    for row in _rows():
        if (row["kernel"], row["arch"], row["mode"]) != (kernel, f"sm_{sm}", mode):
            continue
        if row.get("min_d", 0) <= d <= (row["max_d"] or d) and n <= (row["max_n"] or n):
            sizes = {key: row[key] for key in ("block_r", "block_s", "block_d", "warps", "stages")}
            programs = row.get("programs")  # on a multiprocessor, where known
            slots = programs * MULTIPROCESSORS[sm] if programs else _SLOTS
            return Config(**sizes, slots=slots, consumers=row.get("consumers", 0))
    return None


def cdiv(n: int, size: int) -> int:
    """Number of blocks of `size` that hold n. `triton.cdiv` is slow on the host."""
    return -(-n // size)


def splits(blocks: int, tiles: int) -> int:
    """Number of programs that share a block of tiles, for kernels that are compiled for it: a power of two."""
    wanted = min(_SLOTS // max(blocks, 1), tiles // 2, _SPLITS[-1])
    return 1 << max(wanted.bit_length() - 1, 0)


@lru_cache(maxsize=4096)
def shares(blocks: int, tiles: int, slots: int, falling: bool = False) -> int:
    """Number of programs that share a block of resident rows: the smallest with which a launch ends nearly as soon as
    with any.

    Args:
        tiles: of the first block.
        falling: whether later blocks have fewer, down to none, instead of as many.
    """

    def end(count: int) -> float:
        if not falling:
            return _rounds(blocks, tiles, slots, count)
        busy = [0.0] * slots  # until when, if each slot takes the next program as soon as it is free
        for one in range(blocks * count):
            heapq.heapreplace(busy, busy[0] + tiles / count * (1 - one % blocks / blocks) + _START)
        return max(busy)

    return _fewest({count: end(count) for count in _SPLITS if count <= max(tiles // 2, 1)})


def folded(blocks: int, tiles: int, slots: int) -> int:
    """Number of programs that share two resident blocks, the k-th and the k-th from the end, with as many tiles as the
    longest: all that run at a time."""
    pairs = cdiv(blocks, 2)
    return max((count for count in _SPLITS if 2 <= count <= min(slots // pairs, tiles)), default=0)


@lru_cache(maxsize=4096)
def square(r: int, s: int | None, most: int, each: int, slots: int) -> int:
    """Blocks of rows of a square block of pairs, at most `most`: the largest with which the products of all of them end
    nearly as soon as with any.

    Args:
        r, s: blocks of rows of both sides; s None: of one, whose pairs are taken once.
        each: programs that multiply for a block of rows.
    """
    rows = max(r, s or 0)
    if rows <= most:
        return rows

    def product(x: int, y: int) -> int:
        """When the launch ends for x and y blocks of rows, each multiplied by the other; y 0: by themselves."""
        return cdiv((x + y) * each, slots) * max(x, y)

    def end(size: int) -> float:
        pieces = [((size, n // size), (n % size, min(n % size, 1))) for n in (r, r if s is None else s)]
        pairs = sum(k * m * product(x, y) for x, k in pieces[0] for y, m in pieces[1])
        if s is not None:
            return pairs
        return pairs / 2 + sum(k * (product(x, 0) - product(x, x) / 2) for x, k in pieces[0])

    return _fewest({size: end(size) for size in range(most, most // 2, -1)})


def _rounds(blocks: int, tiles: float, slots: int, count: int) -> float:
    """When a launch ends whose blocks of so many tiles are each shared by `count` programs."""
    return -(-blocks * count // slots) * (tiles / count + _START)


def _fewest(ends: dict[int, float]) -> int:
    """The first number that is nearly the best one."""
    return next(count for count, end in ends.items() if end <= 1.03 * min(ends.values()))


@lru_cache(maxsize=4096)
def waves(blocks: int, most: int, tiles: int, slots: int, falling: bool) -> tuple[int, int]:
    """Number of resident blocks in a wave, at most `most`, and of programs that share a block.

    Args:
        tiles, falling: as in `shares`.
    """
    if blocks <= most:
        return blocks, shares(blocks, tiles, slots, falling)
    mean = tiles / 2 if falling else tiles

    def end(wave: int, count: int) -> float:
        whole, rest = divmod(blocks, wave)
        return whole * _rounds(wave, mean, slots, count) + _rounds(rest, mean, slots, count)

    sizes = range(most, most * 3 // 4, -1)
    best = {count: min(end(wave, count) for wave in sizes) for count in _SPLITS if count <= max(tiles // 2, 1)}
    count = _fewest(best)
    return min(sizes, key=lambda wave: end(wave, count)), count


@lru_cache(maxsize=1)
def _rows() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))
