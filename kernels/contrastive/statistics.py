"""After the tiles of the forward pass: partial sums to statistics, these to losses, and the losses to their mean."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.arguments import Sums
from ..common.numerics import (
    LN2,
    SAFE_INVERSE_T,
    SMALLEST_SUM,
    begin,
    inverse_temperature,
    shift_log2,
)
from .totals import Found, complete, evaluate

STREAMED = tl.constexpr(16)  # blocks whose sums of streamed rows are added at a time
MASKED_COST = tl.constexpr(3)  # of a masked tile, in plain ones


class Wave(NamedTuple):
    """Constants of `finish_kernel`."""

    BLOCK_N: int  # alignment of the class ranges
    BLOCK_R: int  # resident rows of a tile
    SLOTS: int
    SYMMETRIC: bool
    PEERS: bool
    FIRST: bool  # the first wave
    LAST: bool  # the last wave
    BLOCKS: int  # blocks of `forward_online_kernel`, if it may follow, for one of this kernel
    MANY: bool  # more than `AT_ONCE` programs of either kernel
    FOLDED: int  # programs that share two blocks, as `programs_of` divides them; 0: all blocks have SLOTS programs


class Finished(NamedTuple):
    """A side of `finish_kernel`."""

    parts: Any  # Parts, with the slots of all waves
    layout_5N: Any
    stats: Any  # (5, n) float32 in source order: mean_view, spread_view, mean_peer, lse_peer, lse_other
    counts: Any  # (3, n) int64 in source order: n_view, n_peer, n_other; None: not requested
    losses: Any  # Losses
    n: int
    n_s: int
    rows: int


@triton.jit
def relation_counts(layout_5N, o_n, m_n, n, n_s, SYMMETRIC: tl.constexpr):
    """Numbers of views, peers and others of each row, from its intervals."""
    b_lo = begin(tl.load(layout_5N + n + o_n, mask=m_n, other=0))
    b_hi = tl.load(layout_5N + 2 * n + o_n, mask=m_n, other=0)
    b_first = begin(tl.load(layout_5N + 3 * n + o_n, mask=m_n, other=0))
    b_last = tl.load(layout_5N + 4 * n + o_n, mask=m_n, other=0)
    return b_last - b_first - (1 if SYMMETRIC else 0), b_hi - b_lo - (b_last - b_first), n_s - (b_hi - b_lo)


@triton.jit
def load_stats(stats, b_src, m_n, n):
    return (
        tl.load(stats + b_src, mask=m_n, other=0.0),
        tl.load(stats + n + b_src, mask=m_n, other=0.0),
        tl.load(stats + 2 * n + b_src, mask=m_n, other=0.0),
        tl.load(stats + 3 * n + b_src, mask=m_n, other=0.0),
        tl.load(stats + 4 * n + b_src, mask=m_n, other=0.0),
    )


@triton.jit
def programs_of(block, n_blocks, both):
    """How many of `both` programs a resident block takes, if blocks k and n_blocks - 1 - k of a symmetric wave share
    them: in proportion to the tiles before them and, counted as three each, the masked tiles, of which each block has
    one on its diagonal."""
    other = n_blocks - 1 - block
    whole = n_blocks + 2 * MASKED_COST - 1
    longer = tl.minimum(((tl.maximum(block, other) + MASKED_COST) * (2 * both) + whole) // (2 * whole), both - 1)
    return tl.where(block == other, both, tl.where(block > other, longer, longer * -1 + both))


@triton.jit
def _loaded(p_first, step, there, COUNT: tl.constexpr):
    """COUNT rows of partial sums, `step` elements apart, in a tuple; in place of those that are not there, the last one
    that is. A thread holds an element of each, so that adding them needs no exchange, and they are requested before the
    first one is waited for: without masks, because ptxas has few predicates."""
    b_all = (tl.load(p_first),)
    for i_k in tl.static_range(1, COUNT):
        b_all = b_all + (tl.load(p_first + tl.minimum(there - 1, i_k) * step),)
    return b_all


@triton.jit
def _first_streamed(side, program, WAVE):
    """The first of this wave's resident blocks that have streamed a program's rows."""
    first = 0
    if WAVE.SYMMETRIC and side.parts.streamed is not None:  # only blocks whose class range starts after these rows
        hi = tl.minimum(program * WAVE.BLOCK_N + WAVE.BLOCK_N, side.n)
        if WAVE.FOLDED == 0:  # folded blocks are those of rows without labels: their classes end within a block
            hi = tl.load(side.layout_5N + 2 * side.n + hi - 1)
        begins = (hi + WAVE.BLOCK_N - 1) // WAVE.BLOCK_N * WAVE.BLOCK_N // WAVE.BLOCK_R
        first = tl.maximum(begins - side.parts.first_block, 0)
    return first


@triton.jit
def _streamed_sum(side, first, o_n, WAVE):
    """Sums that the rows received as streamed rows, from this wave's resident blocks; meaningless past the last row."""
    b_sum = tl.zeros([WAVE.BLOCK_N], tl.float32)
    rows = side.rows.to(tl.int64)
    for i_c in range(first, side.parts.n_blocks, STREAMED):
        p_part = side.parts.streamed + tl.cast(i_c, tl.int64) * rows + o_n
        b_parts = _loaded(p_part, rows, side.parts.n_blocks - i_c, STREAMED)
        tl.debug_barrier()  # as in `complete`
        for i_k in tl.static_range(STREAMED):
            m_k = i_c + i_k < side.parts.n_blocks
            b_sum += tl.where(m_k, b_parts[i_k], 0.0)
    return b_sum


@triton.jit
def _resident_sums(side, o_n, WAVE):
    """Sums that the rows received as resident rows; meaningless past the last row."""
    b_other = tl.zeros(o_n.shape, tl.float32)
    b_peer = b_other
    b_linear = b_other
    if side.parts.resident is not None and WAVE.LAST:
        rows = side.rows.to(tl.int64)
        b_programs = tl.full(o_n.shape, WAVE.SLOTS, tl.int32)
        if WAVE.FOLDED:
            b_programs = programs_of(o_n // WAVE.BLOCK_R, side.parts.n_blocks, WAVE.FOLDED)
        p_part = side.parts.resident + o_n
        b_others = _loaded(p_part, 3 * rows, WAVE.SLOTS, WAVE.SLOTS)
        b_peers = b_others
        b_linears = b_others
        if WAVE.PEERS:
            b_peers = _loaded(p_part + rows, 3 * rows, WAVE.SLOTS, WAVE.SLOTS)
            b_linears = _loaded(p_part + 2 * rows, 3 * rows, WAVE.SLOTS, WAVE.SLOTS)
        tl.debug_barrier()  # as in `complete`
        for i_k in tl.static_range(WAVE.SLOTS):
            m_k = b_programs > i_k
            b_other += tl.where(m_k, b_others[i_k], 0.0)
            if WAVE.PEERS:
                b_peer += tl.where(m_k, b_peers[i_k], 0.0)
                b_linear += tl.where(m_k, b_linears[i_k], 0.0)
    return Sums(b_other, b_peer, b_linear)


@triton.jit
def _power(b_sum):
    return tl.where(b_sum == 0.0, 0.0, 1.0 / b_sum)


@triton.jit
def _store_stats(stats, flag, b_src, m_n, b_view, sums, b_n_p, b_n_o, inverse_t, n, PEERS: tl.constexpr):
    """Store what follows from the sums of rows; returns all that is found of them. b_view: their view statistics."""
    if flag is not None:
        m_lost = (b_n_o > 0) & (sums.other < SMALLEST_SUM)
        if PEERS:
            m_lost = m_lost | ((b_n_p > 0) & (sums.peer < SMALLEST_SUM))
        if tl.max((m_lost & m_n).to(tl.int32), 0) > 0 and inverse_t > SAFE_INVERSE_T:
            tl.atomic_max(flag, 1)
    shift = shift_log2(inverse_t) * LN2
    b_none = tl.full(b_src.shape, float("-inf"), tl.float32)
    b_mean_p = sums.linear / tl.maximum(b_n_p, 1).to(tl.float32)
    b_lse_p = tl.where(b_n_p > 0, tl.log(sums.peer) + shift, b_none) if PEERS else b_none
    b_lse_o = tl.where(b_n_o > 0, tl.log(sums.other) + shift, b_none)
    tl.store(stats + 2 * n + b_src, b_mean_p, mask=m_n)
    tl.store(stats + 3 * n + b_src, b_lse_p, mask=m_n)
    tl.store(stats + 4 * n + b_src, b_lse_o, mask=m_n)
    b_power_p = _power(sums.peer) if PEERS else sums.peer
    return Found(b_view[0], b_view[1], b_mean_p, b_lse_p, b_lse_o, b_power_p, _power(sums.other))


@triton.jit
def _finish(side, program, flag, temperature, WAVE, CODES):
    """Whether this program of the last wave came last."""
    n = side.n
    o_n = program * WAVE.BLOCK_N + tl.arange(0, WAVE.BLOCK_N)
    m_n = o_n < n
    # What depends on nothing is requested first, so that it arrives together.
    b_src = tl.load(side.layout_5N + o_n, mask=m_n, other=0)
    b_n_v, b_n_p, b_n_o = relation_counts(side.layout_5N, o_n, m_n, n, side.n_s, WAVE.SYMMETRIC)
    first = _first_streamed(side, program, WAVE)
    own = _resident_sums(side, o_n, WAVE)
    b_streamed = tl.zeros([WAVE.BLOCK_N], tl.float32)
    if side.parts.streamed is not None:
        b_streamed = _streamed_sum(side, first, o_n, WAVE)
    run = n > 0
    if flag is not None:
        run = tl.load(flag) == 0
    b_none = tl.zeros([WAVE.BLOCK_N], tl.float32)
    found = Found(b_none, b_none, b_none, b_none, b_none, b_none, b_none)
    if run:
        b_view = (b_none, b_none)
        if WAVE.LAST:
            b_view = (tl.load(side.stats + b_src, mask=m_n, other=0.0), b_none)
            b_view = (b_view[0], tl.load(side.stats + n + b_src, mask=m_n, other=0.0))
        p_other = side.stats + 4 * n + b_src  # holds the running sum between waves
        b_sum = own.other
        if not WAVE.FIRST:
            b_sum += tl.load(p_other, mask=m_n, other=0.0)
        b_sum += b_streamed
        if WAVE.LAST:
            sums = Sums(b_sum, own.peer, own.linear)
            inverse_t = inverse_temperature(temperature)
            found = _store_stats(
                side.stats, flag, b_src, m_n, b_view, sums, b_n_p, b_n_o, inverse_t, n, WAVE.PEERS
            )  # fmt: skip
        else:
            tl.store(p_other, b_sum, mask=m_n)
    if side.counts is not None:
        tl.store(side.counts + b_src, b_n_v.to(tl.int64), mask=m_n)
        tl.store(side.counts + n + b_src, b_n_p.to(tl.int64), mask=m_n)
        tl.store(side.counts + 2 * n + b_src, b_n_o.to(tl.int64), mask=m_n)
    i_p = side.losses.start // WAVE.BLOCK_N + program
    programs = side.losses.end // WAVE.BLOCK_N
    counts = (b_n_v, b_n_p, b_n_o)
    return evaluate(
        side.losses, i_p, programs, o_n, b_src, m_n, counts, found, n, WAVE.BLOCKS, False, CODES
    )  # fmt: skip


@triton.jit
def finish_kernel(
    one, two, first,  # Finished; as `launch_sides` passes them
    flag, temperature,
    WAVE, CODES,  # constants: Wave; the objectives' codes
):  # fmt: skip
    program = tl.program_id(0)
    if first is None:
        last = _finish(one, program, flag, temperature, WAVE, CODES)
    else:
        if program < first:
            last = _finish(one, program, flag, temperature, WAVE, CODES)
        else:
            last = _finish(two, program - first, flag, temperature, WAVE, CODES)
    if len(CODES) > 0 and one.losses.sums is not None:
        if last:
            if first is None:
                complete(one.losses, one.losses, False, WAVE.BLOCKS, False, WAVE.MANY, WAVE.BLOCK_N, WAVE.PEERS, CODES)
            else:
                complete(one.losses, two.losses, True, WAVE.BLOCKS, False, WAVE.MANY, WAVE.BLOCK_N, WAVE.PEERS, CODES)
