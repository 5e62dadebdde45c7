"""Products of a resident block of rows and streamed tiles on sm_90, warp-specialised, for rows of any width.

One warp copies blocks of COLUMNS columns by TMA: of streamed rows into a ring of stages in shared memory, of resident
rows once, as far as there is room, the rest beside the streamed ones. Consumers, a warpgroup each, multiply ROWS
resident rows by every tile. While one turns its product into results, the other goes on for as long as stages last, so
that the tensor cores stay busy. Written in Gluon, which Triton's interpreter does not run.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .ring import filled, released, stage


class Columns(NamedTuple):
    """Constants: how rows are cut into blocks of columns."""

    STEPS: int  # blocks
    KEPT: int  # those of the resident rows that stay in shared memory: the first
    WIDTH: int  # columns of a block


class Factors(NamedTuple):
    """Inside a kernel: shared memory and its barriers."""

    kept: Any  # resident rows, CONSUMERS for each block of columns that is kept
    r: Any  # others, CONSUMERS for each stage
    s: Any  # streamed rows, by stage
    here: Any  # the barrier of what is kept
    full: Any  # barriers by stage
    empty: Any


@gluon.jit
def factors_of(z_r, z_s, RING, COLUMNS):
    """Shared memory for blocks as these TMA descriptors copy them, and its barriers."""
    block: gl.constexpr = z_r.block_type.shape
    if COLUMNS.KEPT > 0:
        kept = gl.allocate_shared_memory(z_r.dtype, [COLUMNS.KEPT * RING.CONSUMERS] + block, z_r.layout)
    if COLUMNS.KEPT < COLUMNS.STEPS:
        passing = gl.allocate_shared_memory(z_r.dtype, [RING.STAGES * RING.CONSUMERS] + block, z_r.layout)
    factors = Factors(
        kept if COLUMNS.KEPT > 0 else passing,
        passing if COLUMNS.KEPT < COLUMNS.STEPS else kept,
        gl.allocate_shared_memory(z_s.dtype, [RING.STAGES] + z_s.block_type.shape, z_s.layout),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [RING.STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [RING.STAGES, 1], mbarrier.MBarrierLayout()),
    )
    mbarrier.init(factors.here, count=1)
    for i in gl.static_range(RING.STAGES):
        mbarrier.init(factors.full.index(i), count=1)
        mbarrier.init(factors.empty.index(i), count=RING.CONSUMERS)
    return factors


@gluon.jit
def _copy_resident(z_r, start_r, column, barrier, into, at, CONSUMERS: gl.constexpr):
    ROWS: gl.constexpr = z_r.block_type.shape[0]
    for k in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(z_r, [start_r + k * ROWS, column], barrier, into.index(at * CONSUMERS + k))


@gluon.jit
def feed_kept(z_r, factors, start_r, RING, COLUMNS):
    """Copy what is kept of the resident rows from start_r on."""
    mbarrier.expect(factors.here, COLUMNS.KEPT * RING.CONSUMERS * z_r.block_type.nbytes)
    for i in range(COLUMNS.KEPT):
        _copy_resident(z_r, start_r, i * COLUMNS.WIDTH, factors.here, factors.kept, i, RING.CONSUMERS)


@gluon.jit
def feed(z_r, z_s, factors, first, start_r, start_s, RING, COLUMNS):
    """Copy a tile of streamed rows, and what is not kept of the resident ones, in turns from `first` on."""
    for i in range(COLUMNS.STEPS):
        at = stage(first + i, RING)
        mbarrier.wait(factors.empty.index(at), released(first + i, RING))
        if i < COLUMNS.KEPT:
            mbarrier.expect(factors.full.index(at), z_s.block_type.nbytes)
        else:
            mbarrier.expect(factors.full.index(at), z_s.block_type.nbytes + RING.CONSUMERS * z_r.block_type.nbytes)
            _copy_resident(z_r, start_r, i * COLUMNS.WIDTH, factors.full.index(at), factors.r, at, RING.CONSUMERS)
        tma.async_copy_global_to_shared(z_s, [start_s, i * COLUMNS.WIDTH], factors.full.index(at), factors.s.index(at))


@gluon.jit
def _step(b_p, s_r, factors, turn, RING):
    at = stage(turn, RING)
    mbarrier.wait(factors.full.index(at), filled(turn, RING))
    b_p = warpgroup_mma(s_r, factors.s.index(at).permute([1, 0]), b_p, is_async=True)
    b_p = warpgroup_mma_wait(0, [b_p])
    mbarrier.arrive(factors.empty.index(at), count=1)
    return b_p


@gluon.jit
def multiplied(b_p, WHICH: gl.constexpr, factors, first, RING, COLUMNS):
    """b_p, zeros (ROWS, S), plus the product of a consumer's resident rows and the tile that is copied in turns from
    `first` on."""
    for i in range(COLUMNS.KEPT):
        b_p = _step(b_p, factors.kept.index(i * RING.CONSUMERS + WHICH), factors, first + i, RING)
    for i in range(COLUMNS.KEPT, COLUMNS.STEPS):
        s_r = factors.r.index(stage(first + i, RING) * RING.CONSUMERS + WHICH)
        b_p = _step(b_p, s_r, factors, first + i, RING)
    return b_p
