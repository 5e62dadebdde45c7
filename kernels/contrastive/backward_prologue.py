"""Turns upstream gradients into what the backward tiles need: a weight per row and relation, all on one scale.

This takes two launches, because the scale is the largest derivative over all rows. In a converged run that is far below
the upstream gradients; weights scaled by those would vanish in half precision.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.numerics import LOG2E, WEIGHT_SCALE, inverse_temperature, shift_log2
from .forward_epilogue import load_stats, relation_counts
from .objective import objective_rows

_SMALLEST = tl.constexpr(1e-30)  # lower bound of the scale: WEIGHT_SCALE divided by it stays in float32's range


class Losses(NamedTuple):
    """The upstream gradients of the losses."""

    grad: Any  # (objectives, n) float32 in source order, any strides
    stride_k: int
    stride_n: int


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
