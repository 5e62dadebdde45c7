"""After the tiles of the forward pass: partial sums to statistics, these to losses, and the losses to their mean."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.arguments import Sums
from ..common.numerics import (
    LN2,
    SAFE_INVERSE_T,
    SMALLEST_SUM,
    WEIGHT_SCALE,
    begin,
    inverse_temperature,
    shift_log2,
)
from .objective import objective_rows

_SMALLEST = tl.constexpr(1e-30)  # lower bound of the weights' divisor: WEIGHT_SCALE divided by it stays in float32

# Parts that are added up at once. A kernel for no more has no loop over them: ptxas would unroll it.
AT_ONCE = tl.constexpr(1024)

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


class Ready(NamedTuple):
    """Weights of the backward pass, of one side, at an upstream gradient of 1: for a reduced loss, whose upstream
    gradient is one number."""

    weights: Any  # (5, rows) float32 in working order, as `weights_kernel` writes them
    rows: int
    bound: Any  # (1,) float32 of all sides: the divisor of the first three weights
    maxima: Any  # (programs, BLOCKS) float32 of all sides: the divisors of each program's rows


class Found(NamedTuple):
    """Inside a kernel: the statistics of some rows, and the factors exp(c - lse) of their weights; 0 where empty."""

    mean_view: Any
    spread_view: Any
    mean_peer: Any
    lse_peer: Any
    lse_other: Any
    power_peer: Any
    power_other: Any


class Losses(NamedTuple):
    """Where the losses go: each row's own, or their sum over the rows of all launches that share these fields."""

    rows: Any  # (objectives, n) float32 in source order; None: the losses are reduced
    sums: Any  # (objectives, programs, BLOCKS) float32: each program's part of the total; None: not reduced
    total: Any  # (objectives,) float32, written by the program that comes last
    arrived: Any  # (2,) int32: programs of `finish_kernel` and of `forward_online_kernel` that are done; 0 at first
    ready: Any  # Ready; None: the losses are not reduced, or there are several objectives
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
        last = tl.minimum(program * WAVE.BLOCK_N + WAVE.BLOCK_N, side.n) - 1
        hi = tl.load(side.layout_5N + 2 * side.n + last)
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
    parts = side.parts
    if parts.resident is not None and WAVE.LAST:
        rows = side.rows.to(tl.int64)
        b_programs = tl.full(o_n.shape, WAVE.SLOTS, tl.int32)
        if WAVE.FOLDED:
            b_programs = programs_of(o_n // WAVE.BLOCK_R, parts.n_blocks, WAVE.FOLDED)
        p_part = parts.resident + o_n
        b_others = _loaded(p_part, 3 * rows, WAVE.SLOTS, WAVE.SLOTS)
        b_peers = b_others
        b_linears = b_others
        if WAVE.PEERS:
            b_peers = _loaded(p_part + rows, 3 * rows, WAVE.SLOTS, WAVE.SLOTS)
            b_linears = _loaded(p_part + 2 * rows, 3 * rows, WAVE.SLOTS, WAVE.SLOTS)
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
def _gathered(parts, n, MANY: tl.constexpr, LARGEST: tl.constexpr):
    """(AT_ONCE,) sums, or with LARGEST maxima, of n numbers that other programs have stored, in a fixed order. Without
    MANY n is at most `AT_ONCE`."""
    o_p = tl.arange(0, AT_ONCE)
    # Past the first-level cache, which does not see what other multiprocessors have written.
    b_all = tl.load(parts + o_p, mask=o_p < n, other=0.0, cache_modifier=".cg")
    if MANY:
        for i_p in range(AT_ONCE, n, AT_ONCE):
            b_more = tl.load(parts + i_p + o_p, mask=i_p + o_p < n, other=0.0, cache_modifier=".cg")
            b_all = tl.maximum(b_all, b_more) if LARGEST else b_all + b_more
    return b_all


@triton.jit
def added_up(sums, n, MANY: tl.constexpr):
    """Sum of n numbers that other programs have stored; MANY: n may be more than `AT_ONCE`."""
    return tl.sum(_gathered(sums, n, MANY, False), 0)


@triton.jit
def _weigh(losses, i_p, o_n, m_n, b_n_p, b_n_o, slopes, found, BLOCKS: tl.constexpr, ONLINE: tl.constexpr):
    """Weights of rows, on a scale of their own; `complete` brings all to one. slopes: derivatives of their losses."""
    b_mean, b_spread, b_linear, b_peer, b_other = slopes
    b_linear, b_peer, b_other, largest = largest_of(b_linear, b_peer, b_other, b_n_p, b_n_o, m_n)
    ready = losses.ready
    largest = tl.maximum(largest * losses.factor, _SMALLEST)
    for i_b in tl.static_range(1 if ONLINE else BLOCKS):
        tl.store(ready.maxima + (i_p if ONLINE else i_p * BLOCKS + i_b), largest)
    unit = losses.factor * WEIGHT_SCALE / largest
    m_rows = o_n < ready.rows  # padding has weight 0
    p_weights = ready.weights + o_n
    tl.store(p_weights, tl.where(m_n, b_other * unit * found.power_other, 0.0), mask=m_rows)
    tl.store(p_weights + ready.rows, tl.where(m_n, b_peer * unit * found.power_peer, 0.0), mask=m_rows)
    tl.store(p_weights + 2 * ready.rows, b_linear * unit, mask=m_rows)
    tl.store(p_weights + 3 * ready.rows, tl.where(m_n, b_mean * losses.factor, 0.0), mask=m_rows)
    tl.store(p_weights + 4 * ready.rows, tl.where(m_n, b_spread * losses.factor, 0.0), mask=m_rows)


@triton.jit
def evaluate(
    losses, i_p, o_n, b_src, m_n, counts, found, n, BLOCKS: tl.constexpr, ONLINE: tl.constexpr, CODES
):  # fmt: skip
    """Losses of rows whose statistics are found, and program i_p's part of their total; returns whether it came last,
    to `complete` them.

    With ONLINE, repeated by BLOCKS programs for each one of `finish_kernel`, which are counted apart.
    """
    b_n_v, b_n_p, b_n_o = counts
    programs = losses.programs * BLOCKS if ONLINE else losses.programs
    for i_k in tl.static_range(len(CODES)):
        b_loss, b_mean, b_spread, b_linear, b_peer, b_other = objective_rows(
            found.mean_view, found.spread_view, found.mean_peer, found.lse_peer, found.lse_other, b_n_v, b_n_p, b_n_o,
            CODES[i_k],
        )  # fmt: skip
        if losses.rows is not None:
            tl.store(losses.rows + i_k * n + b_src, b_loss, mask=m_n)
        if losses.sums is not None:
            total = tl.sum(tl.where(m_n, b_loss, 0.0), 0)
            tl.store(losses.sums + i_k * programs + i_p, total * losses.factor)
        if losses.ready is not None:
            b_mean = tl.where(b_n_v > 0, b_mean, 0.0)
            b_spread = tl.where(b_n_v > 0, b_spread, 0.0)
            slopes = (b_mean, b_spread, b_linear, b_peer, b_other)
            _weigh(losses, i_p, o_n, m_n, b_n_p, b_n_o, slopes, found, BLOCKS, ONLINE)
    last = tl.program_id(0) < 0
    if len(CODES) > 0 and losses.sums is not None:
        last = is_last(losses.arrived + (1 if ONLINE else 0), programs)
    return last


@triton.jit
def _rescale(losses, largest, BLOCKS: tl.constexpr, ALIGN: tl.constexpr, PEERS: tl.constexpr):
    ready = losses.ready
    inverse = 1.0 / largest
    EACH: tl.constexpr = ALIGN // BLOCKS
    AT_A_TIME: tl.constexpr = 4096 // EACH
    for first in range(0, ready.rows // EACH, AT_A_TIME):
        o_b = first + tl.arange(0, AT_A_TIME)
        m_b = o_b < ready.rows // EACH
        p_maxima = ready.maxima + losses.first * BLOCKS + o_b
        b_scale = tl.load(p_maxima, mask=m_b, other=0.0, cache_modifier=".cg") * inverse
        o_n = o_b[:, None] * EACH + tl.arange(0, EACH)[None, :]
        for RELATION in tl.static_range(3 if PEERS else 1):  # without peers their weights are 0
            p_weights = ready.weights + RELATION * ready.rows + o_n
            b_weights = tl.load(p_weights, mask=m_b[:, None], other=0.0, cache_modifier=".cg")
            tl.store(p_weights, b_weights * b_scale[:, None], mask=m_b[:, None])


@triton.jit
def complete(
    one, two, BLOCKS: tl.constexpr, ONLINE: tl.constexpr, MANY: tl.constexpr, ALIGN: tl.constexpr, PEERS: tl.constexpr,
    CODES,
):  # fmt: skip
    """The totals of one side or two (Losses), and one scale for their weights, once all programs have stored their
    parts."""
    programs = one.programs * BLOCKS if ONLINE else one.programs
    if one.ready is not None:  # requested before the sums are waited for
        b_maxima = _gathered(one.ready.maxima, one.programs * BLOCKS, MANY, True)
    for i_k in tl.static_range(len(CODES)):
        tl.store(one.total + i_k, added_up(one.sums + i_k * programs, programs, MANY))
    if one.ready is not None:
        largest = tl.max(b_maxima, 0)
        tl.store(one.ready.bound, largest)
        _rescale(one, largest, BLOCKS, ALIGN, PEERS)
        if two is not None:
            _rescale(two, largest, BLOCKS, ALIGN, PEERS)


@triton.jit
def _finish(side, program, flag, temperature, WAVE, CODES):
    """Whether this program of the last wave came last."""
    n = side.n
    o_n = program * WAVE.BLOCK_N + tl.arange(0, WAVE.BLOCK_N)
    m_n = o_n < n
    # What depends on nothing is requested first, so that it arrives together.
    first = _first_streamed(side, program, WAVE)
    own = _resident_sums(side, o_n, WAVE)
    b_src = tl.load(side.layout_5N + o_n, mask=m_n, other=0)
    b_n_v, b_n_p, b_n_o = relation_counts(side.layout_5N, o_n, m_n, n, side.n_s, WAVE.SYMMETRIC)
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
        if side.parts.streamed is not None:
            b_sum += _streamed_sum(side, first, o_n, WAVE)
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
    i_p = side.losses.first + program
    return evaluate(
        side.losses, i_p, o_n, b_src, m_n, (b_n_v, b_n_p, b_n_o), found, n, WAVE.BLOCKS, False, CODES
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
            others = None if first is None else two.losses
            complete(one.losses, others, WAVE.BLOCKS, False, WAVE.MANY, WAVE.BLOCK_N, WAVE.PEERS, CODES)
