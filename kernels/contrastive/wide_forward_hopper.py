"""`forward_kernel` for plain tiles of rows wider than 256 columns on sm_90, warp-specialised: see `multiply_hopper`.

A tile is (R, S): the sums of streamed rows are down its columns, so each consumer stores its own, from its band of the
program's resident rows. Those of masked tiles, ALIGN rows each, are left out, and so is a last block with padding.
Written in Gluon, which Triton's interpreter does not run.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..common.multiply_hopper import Tiles, begin_copies, factors_of, multiplied, start_of
from ..common.numerics import class_range, logits_of, share


@gluon.jit
def _plain(r, s, start, TILE, SYMMETRIC: gl.constexpr):
    """Streamed rows with which a band from `start` on has plain tiles: before `lo`, and from hi to `end`. All are
    multiples of ALIGN. SYMMETRIC: none behind the class range."""
    lo, hi = class_range(r, gl.minimum(start, r.n - 1), TILE.ALIGN)
    end = s.n // TILE.ALIGN * TILE.ALIGN
    if SYMMETRIC:
        end = hi
    return lo, hi, end


@gluon.jit
def _tiles_of(r, s, start_r, split, TILE, RING, SYMMETRIC: gl.constexpr):
    """A split's share of the tiles that some band needs: those before the class range of the last one, and those behind
    that of the first one. Each band leaves out what is not its own."""
    ROWS: gl.constexpr = TILE.BLOCK_R // RING.CONSUMERS
    _, hi, end = _plain(r, s, start_r, TILE, SYMMETRIC)
    lo, _, _ = _plain(r, s, start_r + TILE.BLOCK_R - ROWS, TILE, SYMMETRIC)
    n_before = gl.cdiv(lo, TILE.BLOCK_S)
    first, last = share(n_before + gl.cdiv(gl.maximum(end - hi, 0), TILE.BLOCK_S), split)
    gap = hi - n_before * TILE.BLOCK_S
    return Tiles(start_r, first * TILE.BLOCK_S, n_before - first, gap, last - first)


class _Band(NamedTuple):
    """Inside a kernel: the resident rows of a consumer from `start` on."""

    start: Any
    lo: Any  # as `_plain` says
    hi: Any
    end: Any
    p_sum: Any  # their sums
    p_part: Any  # sums of the streamed rows


@gluon.jit
def _band_of(WHICH: gl.constexpr, r, s, parts, tiles, block_r, split, TILE, RING, SYMMETRIC: gl.constexpr):
    start = tiles.start_r + WHICH * (TILE.BLOCK_R // RING.CONSUMERS)
    lo, hi, end = _plain(r, s, start, TILE, SYMMETRIC)
    p_part = parts.resident
    if parts.streamed is not None:
        p_part = parts.streamed + (block_r * RING.CONSUMERS + WHICH).to(gl.int64) * s.rows
    return _Band(start, lo, hi, end, parts.resident + (parts.first_slot + split).to(gl.int64) * 3 * r.rows, p_part)


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
def _consume(
    WHICH: gl.constexpr, factors, tiles, band, n_r, rows_r, logits, TILE, RING, COLUMNS, STREAMED: gl.constexpr
):  # fmt: skip
    ROWS: gl.constexpr = TILE.BLOCK_R // RING.CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE.BLOCK_S, 16])
    o_r = band.start + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    m_r = o_r < n_r
    b_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    if WHICH == 0:
        begin_copies(factors, tiles, RING, COLUMNS)
    for i in range(tiles.count):
        b_p = gl.zeros([ROWS, TILE.BLOCK_S], gl.float32, layout)
        b_p = multiplied(b_p, WHICH, factors, tiles, i, RING, COLUMNS)
        start = start_of(tiles, i, TILE.BLOCK_S)
        last = gl.where(i < tiles.n_before, band.lo, band.end)
        first = gl.where(i < tiles.n_before, 0, band.hi)
        o_s = start + gl.arange(0, TILE.BLOCK_S, gl.SliceLayout(0, layout))
        m_s = (o_s >= first) & (o_s < last)
        b_e = gl.where(m_r[:, None] & m_s[None, :], gl.exp2(b_p * logits.factor - logits.shift), 0.0)
        b_sum += gl.sum(b_e, 1)
        if STREAMED:
            b_down = _down(b_e)
            o_down = start + gl.arange(0, TILE.BLOCK_S, b_down.type.layout)
            gl.store(band.p_part + o_down, b_down, mask=(o_down >= first) & (o_down < last))
    gl.store(band.p_sum + o_r, b_sum, mask=m_r)
    if TILE.PEERS:
        b_none = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
        gl.store(band.p_sum + rows_r + o_r, b_none, mask=m_r)
        gl.store(band.p_sum + 2 * rows_r + o_r, b_none, mask=m_r)


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
    tiles = _tiles_of(r, s, start_r, split, TILE, RING, SYMMETRIC)
    STREAMED: gl.constexpr = parts.streamed is not None
    one = _band_of(0, r, s, parts, tiles, block_r, split, TILE, RING, SYMMETRIC)
    two = _band_of(1, r, s, parts, tiles, block_r, split, TILE, RING, SYMMETRIC)
    three = _band_of(2, r, s, parts, tiles, block_r, split, TILE, RING, SYMMETRIC)
    factors = factors_of(z_r, z_s, RING)
    gl.warp_specialize(
        [
            (_consume, (0, factors, tiles, one, r.n, r.rows, logits, TILE, RING, COLUMNS, STREAMED)),
            (_consume, (1, factors, tiles, two, r.n, r.rows, logits, TILE, RING, COLUMNS, STREAMED)),
            (_consume, (2, factors, tiles, three, r.n, r.rows, logits, TILE, RING, COLUMNS, STREAMED)),
        ],
        [4, 4],
        [RING.REGISTERS, RING.REGISTERS],
    )
