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
    """Inside a kernel: a program's tiles `first` to `last` - 1 of those before `lo` and, from n_before on, of those from
    `hi` to `end`. The last of either may reach beyond."""

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


@gluon.jit
def _halved(b, FROM: gl.constexpr, TO: gl.constexpr, PAIRS: gl.constexpr, COLUMNS: gl.constexpr):
    """Sums (4, PAIRS, COLUMNS) of pairs of rows (4, 2 PAIRS, COLUMNS). In layout TO a thread holds both rows of a pair;
    from layout FROM that takes a shuffle for half of its values."""
    b = gl.convert_layout(gl.convert_layout(b, FROM), TO)
    return gl.sum(b.reshape([4, PAIRS, 2, COLUMNS]), 2)


@gluon.jit
def _down(b_e):
    """(256,) sums down the columns of a consumer's tile (64, 256).

    Each step gives half of a warp's rows, and half of the columns that are left, to half of its threads: 56 shuffles,
    where a plain sum takes 192.
    """
    b = gl.sum(b_e.reshape([4, 2, 8, 256]), 1)
    ours: gl.constexpr = [[1, 0, 0], [2, 0, 0]]  # rows of a warp
    one: gl.constexpr = [[0, 0, 1], [0, 0, 8], [0, 0, 16]]  # columns of a thread, always
    lanes: gl.constexpr = [[0, 0, 2], [0, 0, 4]]
    b = _halved(
        b,
        gl.DistributedLinearLayout(
            one + [[0, 0, 32], [0, 0, 64], [0, 0, 128]], lanes + [[0, 1, 0], [0, 2, 0], [0, 4, 0]], ours, [], [4, 8, 256]
        ),
        gl.DistributedLinearLayout(
            one + [[0, 0, 32], [0, 0, 64], [0, 1, 0]], lanes + [[0, 0, 128], [0, 2, 0], [0, 4, 0]], ours, [], [4, 8, 256]
        ),
        4, 256,
    )  # fmt: skip
    b = _halved(
        b,
        gl.DistributedLinearLayout(
            one + [[0, 0, 32], [0, 0, 64]], lanes + [[0, 0, 128], [0, 1, 0], [0, 2, 0]], ours, [], [4, 4, 256]
        ),
        gl.DistributedLinearLayout(
            one + [[0, 0, 32], [0, 1, 0]], lanes + [[0, 0, 128], [0, 0, 64], [0, 2, 0]], ours, [], [4, 4, 256]
        ),
        2, 256,
    )  # fmt: skip
    b = _halved(
        b,
        gl.DistributedLinearLayout(one + [[0, 0, 32]], lanes + [[0, 0, 128], [0, 0, 64], [0, 1, 0]], ours, [], [4, 2, 256]),
        gl.DistributedLinearLayout(one + [[0, 1, 0]], lanes + [[0, 0, 128], [0, 0, 64], [0, 0, 32]], ours, [], [4, 2, 256]),
        1, 256,
    )  # fmt: skip
    return gl.sum(gl.sum(b, 1), 0)


@gluon.jit
def _consume(
    WHICH: gl.constexpr, factors, way, start_r, p_part, p_sum, n_r, rows_r, rows_s, logits, TILE, RING, COLUMNS,
    STREAMED: gl.constexpr,
):  # fmt: skip
    """p_part: sums of streamed rows, of the first band; p_sum: of all resident rows."""
    ROWS: gl.constexpr = TILE.BLOCK_R // RING.CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE.BLOCK_S, 16])
    o_r = start_r + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    o_s = gl.arange(0, TILE.BLOCK_S, gl.SliceLayout(0, layout))
    m_r = o_r < n_r
    b_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    if STREAMED:
        p_part += WHICH * rows_s.to(gl.int64)
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
            o_d = start + gl.arange(0, TILE.BLOCK_S, b_down.type.layout)
            gl.store(p_part + o_d, b_down, mask=o_d < end)
    gl.store(p_sum + o_r, b_sum, mask=m_r)
    if TILE.PEERS:
        b_none = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
        gl.store(p_sum + rows_r + o_r, b_none, mask=m_r)
        gl.store(p_sum + 2 * rows_r + o_r, b_none, mask=m_r)


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
    slot = parts.first_slot + split
    p_sum = parts.resident + slot.to(gl.int64) * 3 * r.rows
    factors = factors_of(z_r, z_s, RING, COLUMNS)
    gl.warp_specialize(
        [
            (_consume, (0, factors, way, start_r, p_part, p_sum, r.n, r.rows, s.rows, logits, TILE, RING, COLUMNS, STREAMED)),
            (_consume, (1, factors, way, start_r, p_part, p_sum, r.n, r.rows, s.rows, logits, TILE, RING, COLUMNS, STREAMED)),
            (_produce, (z_r, z_s, factors, way, start_r, TILE, RING, COLUMNS)),
        ],
        [4, 1],
        [RING.REGISTERS, 24],
    )
