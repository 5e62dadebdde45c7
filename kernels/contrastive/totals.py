"""After the statistics of rows: their losses, the weights of the backward pass, and totals by the last program."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.numerics import LEAST_DIVISOR, WEIGHT_SCALE
from .objective import objective_rows

# Parts that are added up at once. A kernel for no more has no loop over them: ptxas would unroll it.
AT_ONCE = tl.constexpr(1024)


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
    # Rows before this launch and of all launches, whole programs of `finish_kernel` each. Not numbers of programs:
    # behind a branch Triton 3.6 takes a 1 in a tuple of tuples for None.
    start: int
    end: int


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
def _store_weights(losses, i_p, o_n, m_n, b_n_p, b_n_o, slopes, found, BLOCKS: tl.constexpr, ONLINE: tl.constexpr):
    """Weights of rows, on a scale of their own; `complete` brings all to one. slopes: derivatives of their losses."""
    b_mean, b_spread, b_linear, b_peer, b_other = slopes
    b_linear, b_peer, b_other, largest = largest_of(b_linear, b_peer, b_other, b_n_p, b_n_o, m_n)
    ready = losses.ready
    largest = tl.maximum(largest * losses.factor, LEAST_DIVISOR)
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
    losses, i_p, programs, o_n, b_src, m_n, counts, found, n, BLOCKS: tl.constexpr, ONLINE: tl.constexpr, CODES
):  # fmt: skip
    """Losses of rows whose statistics are found, and the part of program i_p of so many in their total; returns whether
    it came last, to `complete` them.

    With ONLINE, repeated by BLOCKS programs for each one of `finish_kernel`, which are counted apart.
    """
    b_n_v, b_n_p, b_n_o = counts
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
            _store_weights(losses, i_p, o_n, m_n, b_n_p, b_n_o, slopes, found, BLOCKS, ONLINE)
    last = tl.program_id(0) < 0
    if len(CODES) > 0 and losses.sums is not None:
        last = is_last(losses.arrived + (1 if ONLINE else 0), programs)
    return last


@triton.jit
def _requested(losses, first, ROWS: tl.constexpr, BLOCKS: tl.constexpr, ALIGN: tl.constexpr, PEERS: tl.constexpr):
    """What `_rescale` needs of ROWS rows from block `first` on: their weights, and each block's divisor."""
    ready = losses.ready
    EACH: tl.constexpr = ALIGN // BLOCKS
    o_b = first + tl.arange(0, ROWS // EACH)
    m_b = o_b < ready.rows // EACH
    p_weights = ready.weights + o_b[:, None] * EACH + tl.arange(0, EACH)[None, :]
    b_weights = (tl.load(p_weights, mask=m_b[:, None], other=0.0, cache_modifier=".cg"),)
    for RELATION in tl.static_range(1, 3 if PEERS else 1):  # without peers their weights are 0
        p_relation = p_weights + RELATION * ready.rows
        b_weights = b_weights + (tl.load(p_relation, mask=m_b[:, None], other=0.0, cache_modifier=".cg"),)
    return b_weights, tl.load(ready.maxima + losses.start // EACH + o_b, mask=m_b, other=0.0, cache_modifier=".cg")


@triton.jit
def _rescale(
    losses, requested, largest, ROWS: tl.constexpr, BLOCKS: tl.constexpr, ALIGN: tl.constexpr, PEERS: tl.constexpr
):  # fmt: skip
    """Bring the weights of a side to the divisor `largest`, ROWS at a time. requested: of its first rows."""
    ready = losses.ready
    inverse = 1.0 / largest
    EACH: tl.constexpr = ALIGN // BLOCKS
    for first in range(0, ready.rows // EACH, ROWS // EACH):
        later = _requested(losses, first + ROWS // EACH, ROWS, BLOCKS, ALIGN, PEERS)
        b_weights, b_maxima = requested
        b_scale = b_maxima * inverse
        o_b = first + tl.arange(0, ROWS // EACH)
        m_b = o_b < ready.rows // EACH
        p_weights = ready.weights + o_b[:, None] * EACH + tl.arange(0, EACH)[None, :]
        for RELATION in tl.static_range(len(b_weights)):
            tl.store(p_weights + RELATION * ready.rows, b_weights[RELATION] * b_scale[:, None], mask=m_b[:, None])
        requested = later


@triton.jit
def complete(
    one, two, TWO: tl.constexpr, BLOCKS: tl.constexpr, ONLINE: tl.constexpr, MANY: tl.constexpr, ALIGN: tl.constexpr,
    PEERS: tl.constexpr, CODES,
):  # fmt: skip
    """The totals of one side or, with TWO, of two (Losses), and one scale for their weights, once all programs have
    stored their parts."""
    blocks = one.end // ALIGN * BLOCKS
    programs = blocks if ONLINE else one.end // ALIGN
    ROWS: tl.constexpr = 1024 if ONLINE else 4096  # running maxima leave few registers
    if one.ready is not None:
        b_maxima = _gathered(one.ready.maxima, blocks, MANY, True)
        requested = _requested(one, 0, ROWS, BLOCKS, ALIGN, PEERS)
        tl.debug_barrier()  # ptxas puts off requests until their results are needed, but not beyond a barrier
    for i_k in tl.static_range(len(CODES)):
        tl.store(one.total + i_k, added_up(one.sums + i_k * programs, programs, MANY))
    if one.ready is not None:
        largest = tl.max(b_maxima, 0)
        tl.store(one.ready.bound, largest)
        _rescale(one, requested, largest, ROWS, BLOCKS, ALIGN, PEERS)
        if TWO:
            _rescale(two, _requested(two, 0, ROWS, BLOCKS, ALIGN, PEERS), largest, ROWS, BLOCKS, ALIGN, PEERS)
