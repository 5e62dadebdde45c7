"""Launches of the kernels written by hand for sm_90, in Gluon. They are off until a card has confirmed them.

They take plain tiles in half precision of rows whose working copy is 128, 256 or more columns wide, at a temperature
that is known on the host; everything else stays with the kernels in Triton. What switches them on, the first that says
anything:

    using(True), using(False)       for a block of code, whatever the number of rows
    FASTCL_HOPPER=1, =0             for a process, from LEAST rows on
    CONFIRMED                       for a version of Triton, by default, from LEAST rows on
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import triton

from fastcl.kernels.common.arguments import Parts, fixed
from fastcl.kernels.common.launch import Config, cdiv, launch, shares
from fastcl.kernels.common.ring import Ring
from fastcl.kernels.contrastive.backward import Accumulator, Weights
from fastcl.kernels.contrastive.wide import Pairs
from fastcl.rowstats.triton.operand import NARROW, Call, Operand
from fastcl.rowstats.triton.replay import forget

# Versions of Triton for which the static gate finds the compiled kernels clean, and those of them with which a card
# has confirmed results and times (`bench.gpu`).
COMPILED = ("3.6", "3.8")
CONFIRMED: tuple[str, ...] = ()
WIDTHS = (128, 256)  # and all above NARROW
LEAST = 8192  # streamed rows from which a loss of any width is predicted to be faster with them
_WARPS = 4  # of the first consumer; Triton adds those of the others

_forced: bool | None = None  # not a context variable: autograd runs the backward pass in a thread of its own


@contextmanager
def using(on: bool) -> Iterator[None]:
    """Within the block, use the kernels wherever they fit, or nowhere."""
    global _forced
    previous, _forced = _forced, on
    forget()
    try:
        yield
    finally:
        _forced = previous
        forget()


def enabled() -> bool:
    """Whether the kernels are used wherever they fit."""
    return _by_default() if _forced is None else _forced


@lru_cache(maxsize=1)
def _by_default() -> bool:
    version = ".".join(triton.__version__.split(".")[:2])
    if os.environ.get("TRITON_INTERPRET") == "1" or version not in COMPILED:
        return False
    asked = os.environ.get("FASTCL_HOPPER")
    return asked == "1" if asked else version in CONFIRMED


def chosen(kernel: str, s: Operand, call: Call) -> Config | None:
    """Tiles of "forward_hopper", "backward_hopper" or "weights_hopper" for plain tiles against these rows; None if it
    does not fit them or is off."""
    width = s.width in WIDTHS or s.width > NARROW
    fits = (call.split, call.term) == ("none", "exponential") and not call.may_overflow and width
    return s.tabled(kernel, call.split) if fits and enabled() and (_forced or s.n >= LEAST) else None


def bands(chosen: Config, s: Operand) -> tuple[int, int]:
    """Slots of sums of resident rows that a program of the forward pass fills, and sums of streamed rows for a block.

    Consumers of narrow rows take tiles in turn, those of wide rows take each its share of the resident rows.
    """
    return (1, chosen.consumers) if s.width > NARROW else (chosen.consumers, 1)


def _described(r: Operand, rows: int, width: int):
    """A TMA descriptor of the working copy, in blocks of so many rows and columns."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(r.z[0], [r.rows, r.width], [r.width, 1], [rows, width], _layout(width))


@lru_cache(maxsize=16)
def _layout(width: int):
    """Shared memory as TMA writes it and WGMMA reads it, for rows of so many 16-bit numbers."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=2)


def _ring(config: Config, width: int) -> Ring:
    # A multiprocessor has 512 registers for a thread of each of its warpgroups together; a producer's keep 24, and wide
    # rows have none.
    registers = 168 if width > NARROW else 240 if config.consumers == 2 else 160
    return fixed(Ring(config.stages, config.consumers, registers))


def _columns(width: int, config: Config):
    from fastcl.kernels.common.multiply_hopper import Columns

    return fixed(Columns(width // config.block_d, config.block_d))


def forward(
    r: Operand, s: Operand, call: Call, config: Config, n_splits: int, symmetric: bool, made: Parts
) -> None:  # fmt: skip
    """Sums over plain tiles, as `forward_kernel` stores them, but with slots as `bands` says."""
    if r.width > NARROW:
        from fastcl.kernels.contrastive.wide_forward_hopper import wide_forward_hopper_kernel as kernel

        rows, width = config.block_r // config.consumers, config.block_d
        columns = {"COLUMNS": _columns(r.width, config)}
    else:
        from fastcl.kernels.contrastive.forward_hopper import forward_hopper_kernel as kernel

        rows, width, columns = config.block_r, r.width, {}
    launch(
        kernel, (made.n_blocks, n_splits), _WARPS, 1,
        r=r.resident, s=s.streamed, z_r=_described(r, rows, width), z_s=_described(s, config.block_s, width),
        parts=made, temperature=call.degree, TILE=fixed(call.tile(r, config)), RING=_ring(config, r.width), **columns,
        SYMMETRIC=symmetric,
    )  # fmt: skip


def backward(
    r: Operand, s: Operand, weights: tuple[Weights, Weights], call: Call, config: Config, grid: tuple[int, int],
    acc: Accumulator,
) -> None:  # fmt: skip
    """The gradient over plain tiles, as `backward_kernel` stores it.

    Args:
        weights: of r's and of s's statistics.
    """
    from fastcl.kernels.contrastive.backward_hopper import backward_hopper_kernel

    launch(
        backward_hopper_kernel, grid, _WARPS, 1,
        r=r.resident, s=s.streamed, z_r=_described(r, config.block_r // config.consumers, r.width),
        z_s=_described(s, config.block_s, r.width), w_r=weights[0], w_s=weights[1], acc=acc, temperature=call.degree,
        TILE=fixed(call.tile(r, config)), RING=_ring(config, r.width),
    )  # fmt: skip


def pair_weights(
    r: Operand, s: Operand, weights: tuple[Weights, Weights], call: Call, config: Config, pairs: Pairs
) -> None:  # fmt: skip
    """The weights of a block of pairs, as `pair_weights_kernel` stores them, as if all its tiles were plain.

    Args:
        weights: of r's and of s's statistics.
        pairs: the block, whose side is a multiple of both sides of a tile.
    """
    from fastcl.kernels.contrastive.weights_hopper import weights_hopper_kernel

    blocks = cdiv(min(pairs.size, s.rows - pairs.first_s), config.block_s)
    tiles = cdiv(min(pairs.size, r.rows - pairs.first_r), config.block_r)
    launch(
        weights_hopper_kernel, (blocks, shares(blocks, tiles, config.slots)), _WARPS, 1,
        r=r.resident, s=s.streamed, z_r=_described(r, config.block_r, config.block_d),
        z_s=_described(s, config.block_s // config.consumers, config.block_d), w_r=weights[0], w_s=weights[1],
        pairs=pairs, temperature=call.degree, TILE=fixed(call.tile(r, config)), RING=_ring(config, r.width),
        COLUMNS=_columns(r.width, config),
    )  # fmt: skip
