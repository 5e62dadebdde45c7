"""Launches: the single function that starts kernels, and the table of tile sizes.

The table (table.json in this folder) has a row per kernel, architecture, mode and range of widths and rows;
`python -m bench.gpu.tune` writes it. Nothing is tuned at run time: the same shapes give the same launches, and hence
the same bits, whatever the number of multiprocessors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TABLE = Path(__file__).with_name("table.json")
# Target number of programs per launch: two per multiprocessor of the largest cards. Fixed, so that results do not
# depend on the card.
_PROGRAMS = 528


@dataclass(frozen=True)
class Config:
    """Tile sizes of a launch (resident rows, streamed rows, columns at a time), warps and pipeline stages."""

    block_r: int
    block_s: int
    block_d: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of started."""

    kernel: Any
    grid: tuple[int, ...]
    warps: int
    stages: int
    arguments: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)  # other threads keep launching
_architecture: int | None = None


def launch(kernel: Any, grid: tuple[int, ...], warps: int, stages: int, **arguments: Any) -> None:
    """Start a kernel on the current device; pass arguments by parameter name, in the kernel's order."""
    if (recorded := _recorded.get()) is not None:
        recorded.append(Launch(kernel, grid, warps, stages, arguments))
        return
    # Request fused multiply-add explicitly: from Triton 3.10 on it is off by default.
    kernel[grid](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches within the block instead of starting them; their outputs stay undefined."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


@contextmanager
def on_architecture(sm: int) -> Iterator[None]:
    """Within the block, choose launches for this architecture, for example 90, whatever the device."""
    global _architecture
    previous, _architecture = _architecture, sm
    try:
        yield
    finally:
        _architecture = previous


def architecture(capability: tuple[int, int] | None) -> int:
    """The table's architecture for a compute capability: the newest one that is not newer. None: 90."""
    sm = _architecture or (90 if capability is None else 10 * capability[0] + capability[1])
    return max((known for known in ARCHITECTURES if known <= sm), default=ARCHITECTURES[0])


@lru_cache(maxsize=4096)
def config(kernel: str, sm: int, mode: str, d: int, n: int) -> Config | None:
    """Tile sizes for rows of width d and n streamed rows; None if the table has no such row.

    A missing "backward" row means that no tile of that width fits in registers: the wide route is used instead.

    Args:
        kernel: "forward", "online", "backward", "backward_online", "weights", "product", "twin" or "twin_masked" (the
            plain and the masked tiles of `twin_kernel`, by the larger of both widths).
        sm: a member of ARCHITECTURES.
        mode: which tiles use split half precision: "none", "peers" (those of one class) or "all".
    """
    for row in _rows():
        if (row["kernel"], row["arch"], row["mode"]) != (kernel, f"sm_{sm}", mode):
            continue
        if d <= (row["max_d"] or d) and n <= (row["max_n"] or n):
            return Config(*(row[key] for key in ("block_r", "block_s", "block_d", "warps", "stages")))
    return None


def splits(blocks: int, tiles: int) -> int:
    """Number of programs that share a block of resident rows: a power of two, so that few kernels are compiled."""
    wanted = min(_PROGRAMS // max(blocks, 1), tiles // 2, 16)
    return 1 << max(wanted.bit_length() - 1, 0)


@lru_cache(maxsize=1)
def _rows() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))
