"""Kernel arguments grouped into named tuples, which the host builds once and passes whole.

A field that a call does not need is None, and the code that uses it is not compiled: `if rows.x2 is None`. Compile-time
constants have tuples of their own, named in capitals; the host wraps them with `fixed`. A tuple built inside a kernel
holds no constants and no None, because everything a kernel assigns becomes a device value.
"""

from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import triton.language as tl

_Constants = TypeVar("_Constants", bound=tuple)


@lru_cache(maxsize=4096, typed=True)  # typed: tuples of different classes may compare equal
def fixed(constants: _Constants) -> _Constants:
    """Wrap each element in `tl.constexpr`, so that the kernel is compiled for these values."""
    return getattr(constants, "_make", tuple)(map(tl.constexpr, constants))


class Temperature(NamedTuple):
    """The temperature of a call: a tensor on the device, or a number on the host."""

    tensor: Any  # one element; None: use `scale` or `value`
    scale: Any  # one element, 1 / T
    value: float
    bias: Any = None  # one element, which is added to all logits of tiles; None: 0


class Rows(NamedTuple):
    """One side's rows [x; x2] as the caller passed them, and the working order."""

    x: Any  # (., d)
    x2: Any  # rows from `half` on; None: x holds all rows
    src_N: Any  # (n,) int32: source row of each working row
    inv_N: Any  # (n,) float32 inverse norms as `prepare_kernel` writes them; None: rows are not normalised
    n: int
    d: int
    stride: int
    half: int  # 0 without x2
    stride2: int


class Resident(NamedTuple):
    """Working rows of which a program keeps a block, and the intervals of their classes and samples among the streamed
    rows."""

    z: Any  # (2 or 1, rows, D) half precision: the working copy, and in split precision its remainder
    scale: Any  # (1,) float32: factor of rows that are not normalised; None: SCALE
    lo_N: Any  # (n,) int32: start of the interval of each row's class
    hi_N: Any  # (n,) int32: its end
    first_N: Any  # (n,) int32: start of the interval of its sample
    n: int
    rows: int  # n rounded up to whole blocks


class Streamed(NamedTuple):
    """Working rows that are streamed past the resident ones."""

    z: Any
    scale: Any
    class_N: Any  # (n,) int32: where each row's class starts among these rows
    sample_N: Any  # (n,) int32: where its sample starts
    n: int
    rows: int


class Tile(NamedTuple):
    """Constants of the kernels that work on tiles of S streamed by R resident rows."""

    D: int  # width of the working copies
    BLOCK_R: int
    BLOCK_S: int
    BLOCK_D: int  # columns processed at a time
    ALIGN: int  # class ranges are multiples of this many rows
    PEERS: bool  # sums over peers are needed
    SPLIT_PLAIN: bool  # products of plain tiles use split half precision
    SPLIT_MASKED: bool  # products of masked tiles use it
    TERM: str = "exponential"  # what pairs add to sums, or weigh in gradients (contrastive/terms.py)
    SKIPS: bool = False  # programs without masked tiles jump over their loop


class Parts(NamedTuple):
    """Partial sums of a wave of resident blocks, as `forward_kernel` stores them."""

    resident: Any  # (slots, 3, rows) float32: sums of resident rows; None: these rows were not resident
    streamed: Any  # (blocks, rows) float32: sums of streamed rows, per block; None: not kept
    first_block: int
    n_blocks: int
    first_slot: int  # of this launch


class Block(NamedTuple):
    """Inside a kernel: a block of rows from `start` on. It stays in registers if its width fits."""

    z: Any  # the working copy it was loaded from
    rows: Any
    b: Any  # (R, D)
    b_low: Any  # its remainder; without split precision, b again
    start: Any


class Logits(NamedTuple):
    """Inside a kernel: a product of working copies times `factor` is a logit in units of log2; `shift` is subtracted
    before it is exponentiated."""

    factor: Any
    shift: Any


class Sums(NamedTuple):
    """Inside a kernel: sums of resident rows, (R,) each."""

    other: Any  # exponentials over others
    peer: Any  # exponentials over peers
    linear: Any  # products with peers
