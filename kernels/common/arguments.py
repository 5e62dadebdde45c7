"""Arguments that are things: named tuples that the host builds once and kernels take whole.

A field that a call has nothing for is None, and the kernel is compiled without it: `if rows.x2 is None`. Constants have
tuples of their own, with names in capitals; the host passes them through `fixed`. A tuple that is built inside a kernel
holds no constants and no None: what a kernel assigns becomes a value of the device.
"""

from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import triton.language as tl

_Constants = TypeVar("_Constants", bound=tuple)


@lru_cache(maxsize=4096, typed=True)  # by the class too: tuples of different classes may be equal
def fixed(constants: _Constants) -> _Constants:
    """A tuple of constants as a kernel takes it: each of them is compiled in."""
    return getattr(constants, "_make", tuple)(map(tl.constexpr, constants))


class Temperature(NamedTuple):
    """The temperature of a call: a tensor on the device, or a number of the host."""

    tensor: Any  # one element; None: the number counts
    value: float


class Rows(NamedTuple):
    """One side's rows [x; x2] as the caller gave them, and the order in which they are worked on."""

    x: Any  # (., d)
    x2: Any  # row `half` and those behind it; None: x holds all
    src_N: Any  # (n,) int32: source row of each working row
    inv_N: Any  # (n,) float32 inverse norms as `prepare_kernel` writes them; None: rows are not normalised
    n: int
    d: int
    stride: int
    half: int  # 0 without x2
    stride2: int


class Resident(NamedTuple):
    """Working rows of which a program keeps a block: where their classes and samples are among the streamed rows."""

    z: Any  # (2 or 1, rows, D) half precision: the working copy, and in split precision its remainder
    scale: Any  # (1,) float32: factor of rows that are not normalised; None: SCALE
    lo_N: Any  # (n,) int32: the interval of each row's class begins
    hi_N: Any  # and ends
    first_N: Any  # (n,) int32: the interval of its sample begins
    n: int
    rows: int  # n in whole blocks


class Streamed(NamedTuple):
    """Working rows that stream past the resident ones."""

    z: Any
    scale: Any
    class_N: Any  # (n,) int32: where each row's own class begins among these rows
    sample_N: Any  # and its sample
    n: int
    rows: int


class Tile(NamedTuple):
    """Constants of the kernels over tiles of S streamed by R resident rows."""

    D: int  # width of the working copies
    BLOCK_R: int
    BLOCK_S: int
    BLOCK_D: int  # columns taken at a time
    ALIGN: int  # rows that class ranges are cut to
    SPLITS: int  # programs that share the tiles of a resident block
    PEERS: bool  # sums over peers are wanted
    SPLIT_PLAIN: bool  # products in split half precision: of plain tiles
    SPLIT_MASKED: bool  # and of masked ones


class Parts(NamedTuple):
    """Partial sums of a wave of resident blocks, as `forward_kernel` stores them."""

    resident: Any  # (slots, 3, rows) float32: what resident rows got; None: the rows in question were not resident
    streamed: Any  # (blocks, rows) float32: what streamed rows got from each block; None: nothing is kept for them
    first_block: int
    n_blocks: int
    first_slot: int  # of this launch


class Block(NamedTuple):
    """Inside a kernel: a block of rows from `start` on that stays in registers, where its width fits."""

    z: Any  # the working copy that it comes from
    rows: Any
    b: Any  # (R, D)
    b_low: Any  # its remainder; in half precision the block again
    start: Any


class Logits(NamedTuple):
    """Inside a kernel: products of working copies times `factor` are logits in units of log2; exponentials are of those
    less `shift`."""

    factor: Any
    shift: Any


class Sums(NamedTuple):
    """Inside a kernel: sums of resident rows, (R,) each."""

    other: Any  # of exponentials over others
    peer: Any  # and over peers
    linear: Any  # of peers' products
