"""Products of a resident block of rows and streamed tiles on sm_90, for rows of any width.

Blocks of WIDTH columns of both are copied by TMA into a ring of stages in shared memory. CONSUMERS warpgroups each
multiply their band of the resident rows by every tile. While one turns its product into results, the others go on for
as long as stages last, so that the tensor cores stay busy. The first of them copies as well: a warp of its own, as in
`ring`, would cost a warpgroup's registers, and then a tile could not be as large. Written in Gluon, which Triton's
interpreter does not run.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .ring import filled, released, stage


class Columns(NamedTuple):
    """Constants: the blocks of columns of a row, and their width."""

    STEPS: int
    WIDTH: int


class Tiles(NamedTuple):
    """Inside a kernel: the tiles of a program. Tile i begins at streamed row start + i S, or `gap` rows later from tile
    n_before on."""

    start_r: Any  # the first resident row
    start: Any
    n_before: Any
    gap: Any
    count: Any


class Factors(NamedTuple):
    """Inside a kernel: TMA descriptors, and shared memory with its barriers."""

    z_r: Any  # in blocks of a consumer's band of the resident rows
    z_s: Any
    r: Any  # CONSUMERS blocks for each stage
    s: Any  # by stage
    full: Any  # barriers by stage
    empty: Any


@gluon.jit
def factors_of(z_r, z_s, RING):
    """Shared memory for blocks as these TMA descriptors copy them, and its barriers."""
    factors = Factors(
        z_r,
        z_s,
        gl.allocate_shared_memory(z_r.dtype, [RING.STAGES * RING.CONSUMERS] + z_r.block_type.shape, z_r.layout),
        gl.allocate_shared_memory(z_s.dtype, [RING.STAGES] + z_s.block_type.shape, z_s.layout),
        gl.allocate_shared_memory(gl.int64, [RING.STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [RING.STAGES, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(RING.STAGES):
        mbarrier.init(factors.full.index(i), count=1)
        mbarrier.init(factors.empty.index(i), count=RING.CONSUMERS)
    return factors


@gluon.jit
def start_of(tiles, i, S: gl.constexpr):
    """The first streamed row of tile i."""
    return tiles.start + i * S + gl.where(i < tiles.n_before, 0, tiles.gap)


@gluon.jit
def _copy(factors, tiles, turn, RING, COLUMNS):
    """Copy the blocks of a turn."""
    at = stage(turn, RING)
    column = turn % COLUMNS.STEPS * COLUMNS.WIDTH
    start_s = start_of(tiles, turn // COLUMNS.STEPS, factors.z_s.block_type.shape[0])
    SIZE: gl.constexpr = factors.z_s.block_type.nbytes + RING.CONSUMERS * factors.z_r.block_type.nbytes
    mbarrier.wait(factors.empty.index(at), released(turn, RING))
    mbarrier.expect(factors.full.index(at), SIZE)
    tma.async_copy_global_to_shared(factors.z_s, [start_s, column], factors.full.index(at), factors.s.index(at))
    for k in gl.static_range(RING.CONSUMERS):
        start_r = tiles.start_r + k * factors.z_r.block_type.shape[0]
        into = factors.r.index(at * RING.CONSUMERS + k)
        tma.async_copy_global_to_shared(factors.z_r, [start_r, column], factors.full.index(at), into)


@gluon.jit
def begin_copies(factors, tiles, RING, COLUMNS):
    """The copies that come before the first product; the first consumer has to make them."""
    for i in range(gl.minimum(RING.STAGES - 1, tiles.count * COLUMNS.STEPS)):
        _copy(factors, tiles, i, RING, COLUMNS)


@gluon.jit
def multiplied(b_p, WHICH: gl.constexpr, factors, tiles, i_tile, RING, COLUMNS):
    """b_p, zeros (R / CONSUMERS, S), plus the product of a consumer's band and a tile."""
    for turn in range(i_tile * COLUMNS.STEPS, (i_tile + 1) * COLUMNS.STEPS):
        if WHICH == 0:  # into the stage of the turn before
            if turn + RING.STAGES - 1 < tiles.count * COLUMNS.STEPS:
                _copy(factors, tiles, turn + RING.STAGES - 1, RING, COLUMNS)
        at = stage(turn, RING)
        mbarrier.wait(factors.full.index(at), filled(turn, RING))
        s_r = factors.r.index(at * RING.CONSUMERS + WHICH)
        b_p = warpgroup_mma(s_r, factors.s.index(at).permute([1, 0]), b_p, is_async=True)
        b_p = warpgroup_mma_wait(0, [b_p])
        mbarrier.arrive(factors.empty.index(at), count=1)
    return b_p
