"""Upstream gradients into what the backward tiles need: a weight per row and relation, all within one scale."""

import triton
import triton.language as tl

from .finish import _counts, _load_stats, objective_rows
from .numerics import LOG2E, WEIGHT_SCALE, inverse_temperature, shift_log2


@triton.jit
def largest_gradient(grad_stats, grad_losses, n, stride_k, stride_n, K: tl.constexpr, HAS_STATS: tl.constexpr):
    """An upper bound of what the gradients of a row's statistics can be; 1 where all are zero."""
    BLOCK: tl.constexpr = 4096
    o_n = tl.arange(0, BLOCK)
    b_bound = tl.zeros([BLOCK], tl.float32)
    for i_n in range(0, n, BLOCK):
        m_n = i_n + o_n < n
        b_row = tl.zeros([BLOCK], tl.float32)
        for i_k in tl.static_range(K):  # the derivative of a loss by a statistic is at most 1
            p_grad = grad_losses + i_k * stride_k + (i_n + o_n).to(tl.int64) * stride_n
            b_row += tl.abs(tl.load(p_grad, mask=m_n, other=0.0))
        if HAS_STATS:
            for i_k in tl.static_range(5):
                b_row += tl.abs(tl.load(grad_stats + i_k * n + i_n + o_n, mask=m_n, other=0.0))
        b_bound = tl.maximum(b_bound, b_row)
    bound = tl.max(b_bound, 0)
    return tl.where(bound > 0, bound, 1.0)


@triton.jit
def weights_kernel(
    layout_5N,
    stats,  # (5, n) in source order, as in finish_kernel
    grad_stats,  # (5, n) float32 in source order, contiguous
    grad_losses,  # (K, n) float32 in source order, any strides
    weights,  # (5, rows) in working order: of others and of peers, peers' mean; gradients of the views' mean and spread
    bound,  # (1,) float32: what the weights were divided by
    flag, t, t_value, n, n_s, rows, stride_k, stride_n,
    BLOCK_N: tl.constexpr, SYMMETRIC: tl.constexpr, K: tl.constexpr, CODES: tl.constexpr, HAS_STATS: tl.constexpr,
    HAS_T: tl.constexpr, HAS_FLAG: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    b_src = tl.load(layout_5N + o_n, mask=m_n, other=0)
    b_n_v, b_n_p, b_n_o = _counts(layout_5N, o_n, m_n, n, n_s, SYMMETRIC)
    b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o = _load_stats(stats, b_src, m_n, n)
    b_mean = tl.zeros([BLOCK_N], tl.float32)
    b_spread = b_mean
    b_linear = b_mean
    b_peer = b_mean
    b_other = b_mean
    if HAS_STATS:
        b_mean, b_spread, b_linear, b_peer, b_other = _load_stats(grad_stats, b_src, m_n, n)
    for i_k in tl.static_range(K):
        p_grad = grad_losses + i_k * stride_k + b_src.to(tl.int64) * stride_n
        b_grad = tl.load(p_grad, mask=m_n, other=0.0)
        _, b_1, b_2, b_3, b_4, b_5 = objective_rows(
            b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o, b_n_v, b_n_p, b_n_o, (CODES >> (6 * i_k)) & 63
        )
        b_mean += b_grad * b_1
        b_spread += b_grad * b_2
        b_linear += b_grad * b_3
        b_peer += b_grad * b_4
        b_other += b_grad * b_5
    largest = largest_gradient(grad_stats, grad_losses, n, stride_k, stride_n, K, HAS_STATS)
    if tl.program_id(0) == 0:
        tl.store(bound, largest)
    shift = shift_log2(inverse_temperature(t, t_value, HAS_T))
    b_power_o = tl.exp2(shift - b_lse_o * LOG2E)
    b_power_p = tl.exp2(shift - b_lse_p * LOG2E)
    if HAS_FLAG:
        if tl.load(flag) != 0:  # the tiles subtract each row's own log-sum-exp there
            b_power_o = tl.full([BLOCK_N], 1.0, tl.float32)
            b_power_p = b_power_o
    unit = WEIGHT_SCALE / largest
    p_weights = weights + o_n
    m_rows = o_n < rows  # padding has weight 0
    m_o = m_n & (b_n_o > 0)
    m_p = m_n & (b_n_p > 0)
    tl.store(p_weights, tl.where(m_o, b_other * unit * b_power_o, 0.0), mask=m_rows)
    tl.store(p_weights + rows, tl.where(m_p, b_peer * unit * b_power_p, 0.0), mask=m_rows)
    b_linear = b_linear * unit / tl.maximum(b_n_p, 1).to(tl.float32)
    tl.store(p_weights + 2 * rows, tl.where(m_p, b_linear, 0.0), mask=m_rows)
    tl.store(p_weights + 3 * rows, tl.where(m_n & (b_n_v > 0), b_mean / largest, 0.0), mask=m_rows)
    tl.store(p_weights + 4 * rows, tl.where(m_n & (b_n_v > 0), b_spread / largest, 0.0), mask=m_rows)
