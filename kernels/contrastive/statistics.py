"""What is computed per row between the two passes over tiles.

`finish_kernel` turns partial sums into statistics and these into losses; `derivatives_kernel` and `weights_kernel` turn
upstream gradients into what the tiles of the gradient need: a weight per row and relation, all on one scale. The latter
are two launches, because the scale is the largest derivative over all rows. In a converged run that is far below the
upstream gradients; weights scaled by those would vanish in half precision.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.arguments import Sums
from ..common.numerics import (
    LN2,
    LOG2E,
    SAFE_INVERSE_T,
    SMALLEST_SUM,
    WEIGHT_SCALE,
    begin,
    inverse_temperature,
    shift_log2,
)
from .objective import objective_rows

_SMALLEST = tl.constexpr(1e-30)  # lower bound of the scale: WEIGHT_SCALE divided by it stays in float32's range


class Wave(NamedTuple):
    """Constants of `finish_kernel`."""

    BLOCK_N: int  # alignment of the class ranges
    BLOCK_R: int  # resident rows of a tile
    SLOTS: int
    SYMMETRIC: bool
    PEERS: bool
    FIRST: bool  # the first wave
    LAST: bool  # the last wave


class Losses(NamedTuple):
    """The upstream gradients of the losses."""

    grad: Any  # (objectives, n) float32 in source order, any strides
    stride_k: int
    stride_n: int


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
def _streamed_sum(parts, layout_5N, o_n, m_n, n, rows, WAVE):
    """Sums that the rows received as streamed rows, from this wave's resident blocks."""
    start = 0
    if WAVE.SYMMETRIC:  # only blocks whose class range starts after these rows have streamed them
        last = tl.minimum(tl.program_id(0) * WAVE.BLOCK_N + WAVE.BLOCK_N, n) - 1
        hi = tl.load(layout_5N + 2 * n + last)
        begins = (hi + WAVE.BLOCK_N - 1) // WAVE.BLOCK_N * WAVE.BLOCK_N // WAVE.BLOCK_R
        start = tl.maximum(begins - parts.first_block, 0)
    o_c = tl.arange(0, 16)
    b_sum = tl.zeros([WAVE.BLOCK_N], tl.float32)
    for i_c in range(start, parts.n_blocks, 16):
        p_part = parts.streamed + (i_c + o_c).to(tl.int64)[:, None] * rows + o_n[None, :]
        m_part = (i_c + o_c < parts.n_blocks)[:, None] & m_n[None, :]
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
def finish_kernel(
    parts,  # Parts, with the slots of all waves; no sums in it: stats is already complete
    layout_5N,
    stats,  # (5, n) float32 in source order: mean_view, spread_view, mean_peer, lse_peer, lse_other
    counts,  # (3, n) int64 in source order: n_view, n_peer, n_other; None: not requested
    losses,  # (objectives, n) float32 in source order
    flag, temperature, n, n_s, rows,
    WAVE, CODES,  # constants: Wave; the objectives' codes
):  # fmt: skip
    o_n = tl.program_id(0) * WAVE.BLOCK_N + tl.arange(0, WAVE.BLOCK_N)
    m_n = o_n < n
    b_src = tl.load(layout_5N + o_n, mask=m_n, other=0)
    b_n_v, b_n_p, b_n_o = relation_counts(layout_5N, o_n, m_n, n, n_s, WAVE.SYMMETRIC)
    if parts.resident is not None or parts.streamed is not None:
        run = n > 0
        if flag is not None:
            run = tl.load(flag) == 0
        if run:
            p_other = stats + 4 * n + b_src  # holds the running sum between waves
            b_sum = tl.zeros([WAVE.BLOCK_N], tl.float32)
            if not WAVE.FIRST:
                b_sum += tl.load(p_other, mask=m_n, other=0.0)
            if parts.streamed is not None:
                b_sum += _streamed_sum(parts, layout_5N, o_n, m_n, n, rows, WAVE)
            if WAVE.LAST:
                own = _resident_sums(parts, o_n, m_n, rows, WAVE.SLOTS, WAVE.PEERS)
                sums = Sums(b_sum + own.other, own.peer, own.linear)
                inverse_t = inverse_temperature(temperature)
                _store_stats(stats, flag, b_src, m_n, sums, b_n_p, b_n_o, inverse_t, n, WAVE.PEERS)
            else:
                tl.store(p_other, b_sum, mask=m_n)
            tl.debug_barrier()
    if counts is not None:
        tl.store(counts + b_src, b_n_v.to(tl.int64), mask=m_n)
        tl.store(counts + n + b_src, b_n_p.to(tl.int64), mask=m_n)
        tl.store(counts + 2 * n + b_src, b_n_o.to(tl.int64), mask=m_n)
    b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o = load_stats(stats, b_src, m_n, n)
    for i_k in tl.static_range(len(CODES)):
        b_loss, _, _, _, _, _ = objective_rows(
            b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o, b_n_v, b_n_p, b_n_o, CODES[i_k]
        )
        tl.store(losses + i_k * n + b_src, b_loss, mask=m_n)


@triton.jit
def derivatives_kernel(
    layout_5N,
    stats,  # (5, n) in source order, as in finish_kernel
    grad_stats,  # (5, n) float32 in source order, contiguous; None: no gradient
    upstream,  # Losses; None: no gradient
    weights,  # (5, rows) in working order: dL by lse_other, lse_peer, mean_peer / n_peer, mean_view, spread_view
    maxima,  # (programs,) float32: the largest absolute value of the first three in each program's rows
    n, n_s, rows,
    BLOCK_N: tl.constexpr, SYMMETRIC: tl.constexpr, CODES,
):  # fmt: skip
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    b_src = tl.load(layout_5N + o_n, mask=m_n, other=0)
    b_n_v, b_n_p, b_n_o = relation_counts(layout_5N, o_n, m_n, n, n_s, SYMMETRIC)
    b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o = load_stats(stats, b_src, m_n, n)
    b_mean = tl.zeros([BLOCK_N], tl.float32)
    b_spread = b_mean
    b_linear = b_mean
    b_peer = b_mean
    b_other = b_mean
    if grad_stats is not None:
        b_mean, b_spread, b_linear, b_peer, b_other = load_stats(grad_stats, b_src, m_n, n)
    for i_k in tl.static_range(len(CODES)):
        p_grad = upstream.grad + i_k * upstream.stride_k + b_src.to(tl.int64) * upstream.stride_n
        b_grad = tl.load(p_grad, mask=m_n, other=0.0)
        _, b_1, b_2, b_3, b_4, b_5 = objective_rows(
            b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o, b_n_v, b_n_p, b_n_o, CODES[i_k]
        )
        b_mean += b_grad * b_1
        b_spread += b_grad * b_2
        b_linear += b_grad * b_3
        b_peer += b_grad * b_4
        b_other += b_grad * b_5
    m_p = m_n & (b_n_p > 0)
    m_v = m_n & (b_n_v > 0)
    b_other = tl.where(m_n & (b_n_o > 0), b_other, 0.0)
    b_peer = tl.where(m_p, b_peer, 0.0)
    b_linear = tl.where(m_p, b_linear / tl.maximum(b_n_p, 1).to(tl.float32), 0.0)
    b_largest = tl.maximum(tl.maximum(tl.abs(b_other), tl.abs(b_peer)), tl.abs(b_linear))
    tl.store(maxima + tl.program_id(0), tl.max(b_largest, 0))
    p_weights = weights + o_n
    m_rows = o_n < rows  # padding has weight 0
    tl.store(p_weights, b_other, mask=m_rows)
    tl.store(p_weights + rows, b_peer, mask=m_rows)
    tl.store(p_weights + 2 * rows, b_linear, mask=m_rows)
    tl.store(p_weights + 3 * rows, tl.where(m_v, b_mean, 0.0), mask=m_rows)
    tl.store(p_weights + 4 * rows, tl.where(m_v, b_spread, 0.0), mask=m_rows)


@triton.jit
def _inverse_sum(stats, b_src, m_n, n, shift, ROW: tl.constexpr):
    """exp(c - lse); 0 if the relation is empty."""
    b_lse = tl.load(stats + ROW * n + b_src, mask=m_n, other=float("inf"))
    return tl.where(b_lse == float("-inf"), 0.0, tl.exp2(shift - b_lse * LOG2E))


@triton.jit
def weights_kernel(
    layout_5N, stats, weights,  # as in derivatives_kernel; derivatives become weights in place
    maxima,  # (n_maxima,) float32 of both sides
    bound,  # (1,) float32: the weights' divisor
    flag, temperature, n, rows, n_maxima,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m = tl.arange(0, 1024)
    b_largest = tl.zeros([1024], tl.float32)
    for i_m in range(0, n_maxima, 1024):
        b_largest = tl.maximum(b_largest, tl.load(maxima + i_m + o_m, mask=i_m + o_m < n_maxima, other=0.0))
    largest = tl.max(b_largest, 0)
    largest = tl.where(largest > 0, tl.maximum(largest, _SMALLEST), 1.0)
    if tl.program_id(0) == 0:
        tl.store(bound, largest)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    m_rows = o_n < rows
    b_src = tl.load(layout_5N + o_n, mask=m_n, other=0)
    shift = shift_log2(inverse_temperature(temperature))
    b_power_o = _inverse_sum(stats, b_src, m_n, n, shift, 4)
    b_power_p = _inverse_sum(stats, b_src, m_n, n, shift, 3)
    if flag is not None:
        if tl.load(flag) != 0:  # online: the tiles subtract each row's own log-sum-exp
            b_power_o = tl.full([BLOCK_N], 1.0, tl.float32)
            b_power_p = b_power_o
    unit = WEIGHT_SCALE / largest
    p_weights = weights + o_n
    tl.store(p_weights, tl.load(p_weights, mask=m_rows, other=0.0) * unit * b_power_o, mask=m_rows)
    p_weights += rows
    tl.store(p_weights, tl.load(p_weights, mask=m_rows, other=0.0) * unit * b_power_p, mask=m_rows)
    p_weights += rows
    tl.store(p_weights, tl.load(p_weights, mask=m_rows, other=0.0) * unit, mask=m_rows)
