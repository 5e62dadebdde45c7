"""`forward_kernel` for plain tiles of rows wider than 256 columns on sm_90, warp-specialised: see `multiply_hopper`.

A tile is (R, S): the sums of streamed rows are down its columns, so each consumer stores its own, from its band of the
program's resident rows. Written in Gluon, which Triton's interpreter does not run.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..common.multiply_hopper import factors_of, feed, feed_kept, multiplied
from ..common.numerics import class_range, logits_of, share


class _Way(NamedTuple):
    """Inside a kernel: tiles `first` to `last` - 1 of those before row lo and, from tile n_before on, of those from row
    hi to `end`. The last of either may reach beyond."""

    lo: Any
    hi: Any
    end: Any
    n_before: Any
    first: Any
    last: Any


@gluon.jit
def _way_of(r, s, start_r, split, TILE, SYMMETRIC: gl.constexpr):
    """Whole blocks of ALIGN rows that are outside the class range; SYMMETRIC: none behind it."""
    lo, hi = class_range(r, start_r, TILE.ALIGN)
    end = s.n // TILE.ALIGN * TILE.ALIGN
    n_before = gl.cdiv(lo, TILE.BLOCK_S)
    n_tiles = n_before
    if not SYMMETRIC:
        n_tiles += gl.cdiv(gl.maximum(end - hi, 0), TILE.BLOCK_S)
    first, last = share(n_tiles, split)
    return _Way(lo, hi, end, n_before, first, last)


@gluon.jit
def _tile_of(way, i, TILE):
    """First row and end of a program's tile i."""
    at = way.first + i
    start = gl.where(at < way.n_before, at * TILE.BLOCK_S, way.hi + (at - way.n_before) * TILE.BLOCK_S)
    return start, gl.where(at < way.n_before, way.lo, way.end)


@gluon.jit
def _produce(z_r, z_s, factors, way, start_r, TILE, RING, COLUMNS):
    feed_kept(z_r, factors, start_r, RING, COLUMNS)
    for i in range(way.last - way.first):
        start_s, _ = _tile_of(way, i, TILE)
        feed(z_r, z_s, factors, i * COLUMNS.STEPS, start_r, start_s, RING, COLUMNS)


class _Band(NamedTuple):
    """Inside a kernel: the resident rows of all consumers from `start` on, and their sums."""

    start: Any
    n: Any
    rows: Any
    sums: Any  # pointer, of all resident rows
    streamed: Any  # pointer, of the sums of streamed rows for the first consumer
    rows_s: Any


@gluon.jit
def _halved(b, KEPT: gl.constexpr, GIVEN: gl.constexpr, LANES: gl.constexpr, ROWS: gl.constexpr, PAIRS: gl.constexpr):
    """Sums (4, PAIRS, 256) of pairs of rows of each warp's (4, 2 PAIRS, 256).

    Every thread gives half of its columns to the one that has the other row of its pairs, and gets that one's other
    half: a shuffle for every second value.

    Args:
        KEPT, GIVEN: bits of the columns that tell a thread's values apart: those that stay, and that of the halves.
        LANES: bits of the columns that tell threads apart. ROWS: of the rows that do.
    """
    warps: gl.constexpr = [[1, 0, 0], [2, 0, 0]]
    before: gl.constexpr = gl.DistributedLinearLayout(KEPT + [GIVEN], LANES + ROWS, warps, [], [4, 2 * PAIRS, 256])
    after: gl.constexpr = gl.DistributedLinearLayout(
        KEPT + [[0, 1, 0]], LANES + [GIVEN] + ROWS[1:], warps, [], [4, 2 * PAIRS, 256]
    )
    b = gl.convert_layout(gl.convert_layout(b, before), after)
    return gl.sum(b.reshape([4, PAIRS, 2, 256]), 2)


@gluon.jit
def _down(b_e):
    """(256,) sums down the columns of a consumer's tile (64, 256), by 56 shuffles; a plain sum takes 192."""
    rows: gl.constexpr = [[0, 1, 0], [0, 2, 0], [0, 4, 0]]
    kept: gl.constexpr = [[0, 0, 1], [0, 0, 8], [0, 0, 16]]
    lanes: gl.constexpr = [[0, 0, 2], [0, 0, 4]]
    b = gl.sum(b_e.reshape([4, 2, 8, 256]), 1)
    b = _halved(b, kept + [[0, 0, 32], [0, 0, 64]], [0, 0, 128], lanes, rows, 4)
    b = _halved(b, kept + [[0, 0, 32]], [0, 0, 64], lanes + [[0, 0, 128]], rows[:2], 2)
    b = _halved(b, kept, [0, 0, 32], lanes + [[0, 0, 128], [0, 0, 64]], rows[:1], 1)
    return gl.sum(gl.sum(b, 1), 0)


@gluon.jit
def _consume(WHICH: gl.constexpr, factors, way, band, logits, TILE, RING, COLUMNS, STREAMED: gl.constexpr):
    ROWS: gl.constexpr = TILE.BLOCK_R // RING.CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE.BLOCK_S, 16])
    o_r = band.start + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    o_s = gl.arange(0, TILE.BLOCK_S, gl.SliceLayout(0, layout))
    m_r = o_r < band.n
    b_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    p_part = band.streamed + WHICH * band.rows_s.to(gl.int64)
    mbarrier.wait(factors.here, 0)
    for i in range(way.last - way.first):
        start, end = _tile_of(way, i, TILE)
        b_p = gl.zeros([ROWS, TILE.BLOCK_S], gl.float32, layout)
        b_p = multiplied(b_p, WHICH, factors, i * COLUMNS.STEPS, RING, COLUMNS)
        m_s = start + o_s < end
        b_e = gl.where(m_r[:, None] & m_s[None, :], gl.exp2(b_p * logits.factor - logits.shift), 0.0)
        b_sum += gl.sum(b_e, 1)
        if STREAMED:
            b_down = _down(b_e)
            o_down = start + gl.arange(0, TILE.BLOCK_S, b_down.type.layout)
            gl.store(p_part + o_down, b_down, mask=o_down < end)
    gl.store(band.sums + o_r, b_sum, mask=m_r)
    if TILE.PEERS:
        b_none = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
        gl.store(band.sums + band.rows + o_r, b_none, mask=m_r)
        gl.store(band.sums + 2 * band.rows + o_r, b_none, mask=m_r)


@gluon.jit
def wide_forward_hopper_kernel(
    r, s,  # Resident, Streamed
    z_r, z_s,  # TMA descriptors of their working copies, in blocks of BLOCK_R / CONSUMERS and of BLOCK_S rows
    parts,  # Parts, with CONSUMERS bands of sums of streamed rows for each block
    temperature,
    TILE,
    RING,
    COLUMNS,
    SYMMETRIC: gl.constexpr,
):  # fmt: skip
    # Start the blocks with the most tiles first, so that only short ones run at the end.
    block_r = parts.n_blocks - 1 - gl.program_id(0)
    split = gl.program_id(1)
    start_r = (parts.first_block + block_r) * TILE.BLOCK_R
    logits = logits_of(temperature, r, s)
    way = _way_of(r, s, start_r, split, TILE, SYMMETRIC)
    STREAMED: gl.constexpr = parts.streamed is not None
    p_part = parts.resident
    if STREAMED:
        p_part = parts.streamed + block_r.to(gl.int64) * RING.CONSUMERS * s.rows
    p_sum = parts.resident + (parts.first_slot + split).to(gl.int64) * 3 * r.rows
    band = _Band(start_r, r.n, r.rows, p_sum, p_part, s.rows)
    factors = factors_of(z_r, z_s, RING, COLUMNS)
    gl.warp_specialize(
        [
            (_consume, (0, factors, way, band, logits, TILE, RING, COLUMNS, STREAMED)),
            (_consume, (1, factors, way, band, logits, TILE, RING, COLUMNS, STREAMED)),
            (_produce, (z_r, z_s, factors, way, start_r, TILE, RING, COLUMNS)),
        ],
        [4, 1],
        [RING.REGISTERS, 24],
    )
