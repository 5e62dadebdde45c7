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
from .objective import objective_rows


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


class Losses(NamedTuple):
    """Where the losses go: each row's own, or their sum over the rows of all launches that share these fields."""

    rows: Any  # (objectives, n) float32 in source order; None: the losses are reduced
    sums: Any  # (objectives, programs, BLOCKS) float32: each program's part of the total; None: not reduced
    total: Any  # (objectives,) float32, written by the program that comes last
    arrived: Any  # (2,) int32: programs of `finish_kernel` and of `forward_online_kernel` that are done; 0 at first
    maxima: (
        Any  # (programs, BLOCKS) float32 as `maxima_kernel` writes them, at an upstream gradient of 1; None: not needed
    )
    factor: float  # of a row's loss in the total
    first: int  # number of this launch's first program
    programs: int  # of all launches


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
def _streamed_sum(side, program, o_n, m_n, WAVE):
    """Sums that the rows received as streamed rows, from this wave's resident blocks."""
    start = 0
    if WAVE.SYMMETRIC:  # only blocks whose class range starts after these rows have streamed them
        last = tl.minimum(program * WAVE.BLOCK_N + WAVE.BLOCK_N, side.n) - 1
        hi = tl.load(side.layout_5N + 2 * side.n + last)
        begins = (hi + WAVE.BLOCK_N - 1) // WAVE.BLOCK_N * WAVE.BLOCK_N // WAVE.BLOCK_R
        start = tl.maximum(begins - side.parts.first_block, 0)
    o_c = tl.arange(0, 16)
    b_sum = tl.zeros([WAVE.BLOCK_N], tl.float32)
    for i_c in range(start, side.parts.n_blocks, 16):
        p_part = side.parts.streamed + (i_c + o_c).to(tl.int64)[:, None] * side.rows + o_n[None, :]
        m_part = (i_c + o_c < side.parts.n_blocks)[:, None] & m_n[None, :]
        b_sum += tl.sum(tl.load(p_part, mask=m_part, other=0.0), 0)
    return b_sum


@triton.jit
def _resident_sums(parts, o_n, m_n, rows, SLOTS: tl.constexpr, PEERS: tl.constexpr):
    """Sums that the rows received as resident rows."""
    b_other = tl.zeros(o_n.shape, tl.float32)
    b_peer = b_other
    b_linear = b_other
    if parts.resident is not None:
        for i_k in tl.static_range(SLOTS):
            p_part = parts.resident + i_k * 3 * rows.to(tl.int64) + o_n
            b_other += tl.load(p_part, mask=m_n, other=0.0)
            if PEERS:
                b_peer += tl.load(p_part + rows, mask=m_n, other=0.0)
                b_linear += tl.load(p_part + 2 * rows, mask=m_n, other=0.0)
    return Sums(b_other, b_peer, b_linear)


@triton.jit
def _store_stats(stats, flag, b_src, m_n, sums, b_n_p, b_n_o, inverse_t, n, PEERS: tl.constexpr):
    if flag is not None:
        m_lost = (b_n_o > 0) & (sums.other < SMALLEST_SUM)
        if PEERS:
            m_lost = m_lost | ((b_n_p > 0) & (sums.peer < SMALLEST_SUM))
        if tl.max((m_lost & m_n).to(tl.int32), 0) > 0 and inverse_t > SAFE_INVERSE_T:
            tl.atomic_max(flag, 1)
    shift = shift_log2(inverse_t) * LN2
    b_none = tl.full(b_src.shape, float("-inf"), tl.float32)
    b_lse_p = tl.where(b_n_p > 0, tl.log(sums.peer) + shift, b_none) if PEERS else b_none
    tl.store(stats + 2 * n + b_src, sums.linear / tl.maximum(b_n_p, 1).to(tl.float32), mask=m_n)
    tl.store(stats + 3 * n + b_src, b_lse_p, mask=m_n)
    tl.store(stats + 4 * n + b_src, tl.where(b_n_o > 0, tl.log(sums.other) + shift, b_none), mask=m_n)


@triton.jit
def largest_of(b_linear, b_peer, b_other, b_n_p, b_n_o, m_n):
    """Derivatives by mean_peer / n_peer, lse_peer and lse_other, 0 where empty; the largest absolute value of all."""
    m_p = m_n & (b_n_p > 0)
    b_other = tl.where(m_n & (b_n_o > 0), b_other, 0.0)
    b_peer = tl.where(m_p, b_peer, 0.0)
    b_linear = tl.where(m_p, b_linear / tl.maximum(b_n_p, 1).to(tl.float32), 0.0)
    b_largest = tl.maximum(tl.maximum(tl.abs(b_other), tl.abs(b_peer)), tl.abs(b_linear))
    return b_linear, b_peer, b_other, tl.max(b_largest, 0)


@triton.jit
def is_last(arrived, programs):
    """Whether all other programs of the launches that share a counter have stored what is to be added up."""
    tl.debug_barrier()
    return tl.atomic_add(arrived, 1) == programs - 1


@triton.jit
def added_up(sums, n):
    """Sum of n numbers that other programs have stored, in a fixed order."""
    o_p = tl.arange(0, 1024)
    b_sum = tl.zeros([1024], tl.float32)
    for i_p in range(0, n, 1024):
        # Past the first-level cache, which does not see what other multiprocessors have written.
        b_sum += tl.load(sums + i_p + o_p, mask=i_p + o_p < n, other=0.0, cache_modifier=".cg")
    return tl.sum(b_sum, 0)


@triton.jit
def evaluate(losses, i_p, b_src, m_n, counts, stats, n, BLOCKS: tl.constexpr, ONLINE: tl.constexpr, CODES):
    """Losses of rows whose statistics are complete, and program i_p's part of their total.

    With ONLINE, repeated by BLOCKS programs for each one of `finish_kernel`, which are counted apart.
    """
    b_n_v, b_n_p, b_n_o = counts
    b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o = load_stats(stats, b_src, m_n, n)
    programs = losses.programs * BLOCKS if ONLINE else losses.programs
    for i_k in tl.static_range(len(CODES)):
        b_loss, _, _, b_linear, b_peer, b_other = objective_rows(
            b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o, b_n_v, b_n_p, b_n_o, CODES[i_k]
        )
        if losses.rows is not None:
            tl.store(losses.rows + i_k * n + b_src, b_loss, mask=m_n)
        if losses.sums is not None:
            total = tl.sum(tl.where(m_n, b_loss, 0.0), 0)
            tl.store(losses.sums + i_k * programs + i_p, total * losses.factor)
        if losses.maxima is not None:
            _, _, _, largest = largest_of(b_linear, b_peer, b_other, b_n_p, b_n_o, m_n)
            for i_b in tl.static_range(1 if ONLINE else BLOCKS):
                p_maxima = losses.maxima + (i_p if ONLINE else i_p * BLOCKS + i_b)
                tl.store(p_maxima, largest * losses.factor)
    if len(CODES) > 0 and losses.sums is not None:
        if is_last(losses.arrived + (1 if ONLINE else 0), programs):
            for i_k in tl.static_range(len(CODES)):
                tl.store(losses.total + i_k, added_up(losses.sums + i_k * programs, programs))


@triton.jit
def _finish(side, program, flag, temperature, WAVE, CODES):
    n = side.n
    o_n = program * WAVE.BLOCK_N + tl.arange(0, WAVE.BLOCK_N)
    m_n = o_n < n
    b_src = tl.load(side.layout_5N + o_n, mask=m_n, other=0)
    b_n_v, b_n_p, b_n_o = relation_counts(side.layout_5N, o_n, m_n, n, side.n_s, WAVE.SYMMETRIC)
    run = n > 0
    if flag is not None:
        run = tl.load(flag) == 0
    if run:
        p_other = side.stats + 4 * n + b_src  # holds the running sum between waves
        b_sum = tl.zeros([WAVE.BLOCK_N], tl.float32)
        if not WAVE.FIRST:
            b_sum += tl.load(p_other, mask=m_n, other=0.0)
        if side.parts.streamed is not None:
            b_sum += _streamed_sum(side, program, o_n, m_n, WAVE)
        if WAVE.LAST:
            own = _resident_sums(side.parts, o_n, m_n, side.rows, WAVE.SLOTS, WAVE.PEERS)
            sums = Sums(b_sum + own.other, own.peer, own.linear)
            inverse_t = inverse_temperature(temperature)
            _store_stats(side.stats, flag, b_src, m_n, sums, b_n_p, b_n_o, inverse_t, n, WAVE.PEERS)
        else:
            tl.store(p_other, b_sum, mask=m_n)
        tl.debug_barrier()
    if side.counts is not None:
        tl.store(side.counts + b_src, b_n_v.to(tl.int64), mask=m_n)
        tl.store(side.counts + n + b_src, b_n_p.to(tl.int64), mask=m_n)
        tl.store(side.counts + 2 * n + b_src, b_n_o.to(tl.int64), mask=m_n)
    counts_of = (b_n_v, b_n_p, b_n_o)
    i_p = side.losses.first + program
    evaluate(side.losses, i_p, b_src, m_n, counts_of, side.stats, n, WAVE.BLOCKS, False, CODES)


@triton.jit
def finish_kernel(
    one, two, first,  # Finished; as `launch_sides` passes them
    flag, temperature,
    WAVE, CODES,  # constants: Wave; the objectives' codes
):  # fmt: skip
    program = tl.program_id(0)
    if first is None:
        _finish(one, program, flag, temperature, WAVE, CODES)
    else:
        if program < first:
            _finish(one, program, flag, temperature, WAVE, CODES)
        else:
            _finish(two, program - first, flag, temperature, WAVE, CODES)
