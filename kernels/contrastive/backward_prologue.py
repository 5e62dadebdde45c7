"""Before the tiles of the gradient: upstream gradients to what these need, a weight per row and relation.

All weights are on one scale, the largest derivative over all rows. In a converged run that is far below the upstream
gradients; weights scaled by those would vanish in half precision. The scale follows from maxima over blocks of rows,
which `maxima_kernel` finds. The weights of a single reduced loss, whose upstream gradient is one number, come from
`finish_kernel`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.numerics import LEAST_DIVISOR, LOG2E, WEIGHT_SCALE, inverse_temperature, shift_log2
from .objective import objective_rows
from .statistics import load_stats, relation_counts
from .totals import largest_of


class Upstream(NamedTuple):
    """The rows of a side, their statistics, and upstream gradients."""

    layout_5N: Any
    stats: Any  # (5, n) in source order, as in finish_kernel
    grad_stats: Any  # (5, n) float32 in source order, contiguous; None: no gradient
    grad: Any  # of the losses: (objectives, n) float32 in source order, any strides; None: no gradient
    stride_k: int
    stride_n: int
    factor: float  # of a row's loss in the loss that `grad` belongs to
    n: int
    n_s: int
    rows: int
    # (5, rows) in working order, of lse_other, lse_peer, mean_peer / n_peer, mean_view, spread_view; `weights_kernel`
    # writes them.
    weights: Any


class Scale(NamedTuple):
    """The common scale of the weights."""

    maxima: Any  # (n,) float32 of all sides with an upstream gradient
    n: int
    bound: Any  # (1,) float32, written: the divisor of the first three weights
    arrived: Any  # (1,) int32, as `Degree.arrived`: set to 0; None: not needed


@triton.jit
def _derivatives(side, o_n, m_n, SYMMETRIC: tl.constexpr, CODES):
    """Derivatives of the total loss by a side's statistics, with mean_peer divided by n_peer; and the largest."""
    n = side.n
    b_src = tl.load(side.layout_5N + o_n, mask=m_n, other=0)
    b_n_v, b_n_p, b_n_o = relation_counts(side.layout_5N, o_n, m_n, n, side.n_s, SYMMETRIC)
    b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o = load_stats(side.stats, b_src, m_n, n)
    b_mean = tl.zeros(o_n.shape, tl.float32)
    b_spread = b_mean
    b_linear = b_mean
    b_peer = b_mean
    b_other = b_mean
    if side.grad_stats is not None:
        b_mean, b_spread, b_linear, b_peer, b_other = load_stats(side.grad_stats, b_src, m_n, n)
    for i_k in tl.static_range(len(CODES)):
        p_grad = side.grad + i_k * side.stride_k + b_src.to(tl.int64) * side.stride_n
        b_grad = tl.load(p_grad, mask=m_n, other=0.0) * side.factor
        _, b_1, b_2, b_3, b_4, b_5 = objective_rows(
            b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o, b_n_v, b_n_p, b_n_o, CODES[i_k]
        )
        b_mean += b_grad * b_1
        b_spread += b_grad * b_2
        b_linear += b_grad * b_3
        b_peer += b_grad * b_4
        b_other += b_grad * b_5
    b_linear, b_peer, b_other, largest = largest_of(b_linear, b_peer, b_other, b_n_p, b_n_o, m_n)
    m_v = m_n & (b_n_v > 0)
    return tl.where(m_v, b_mean, 0.0), tl.where(m_v, b_spread, 0.0), b_linear, b_peer, b_other, largest


@triton.jit
def maxima_kernel(
    side,  # Upstream
    maxima,  # (programs,) float32: the largest absolute derivative by lse_other, lse_peer and mean_peer / n_peer
    BLOCK_N: tl.constexpr, SYMMETRIC: tl.constexpr, CODES,
):  # fmt: skip
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    _, _, _, _, _, largest = _derivatives(side, o_n, o_n < side.n, SYMMETRIC, CODES)
    tl.store(maxima + tl.program_id(0), largest)


@triton.jit
def _inverse_sum(stats, b_src, m_n, n, shift, ROW: tl.constexpr):
    """exp(c - lse); 0 if the relation is empty."""
    b_lse = tl.load(stats + ROW * n + b_src, mask=m_n, other=float("inf"))
    return tl.where(b_lse == float("-inf"), 0.0, tl.exp2(shift - b_lse * LOG2E))


@triton.jit
def _weigh(side, program, largest, flag, temperature, BLOCK_N: tl.constexpr, SYMMETRIC: tl.constexpr, CODES):
    o_n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < side.n
    m_rows = o_n < side.rows  # padding has weight 0
    b_mean, b_spread, b_linear, b_peer, b_other, _ = _derivatives(side, o_n, m_n, SYMMETRIC, CODES)
    b_src = tl.load(side.layout_5N + o_n, mask=m_n, other=0)
    shift = shift_log2(inverse_temperature(temperature))
    b_power_o = _inverse_sum(side.stats, b_src, m_n, side.n, shift, 4)
    b_power_p = _inverse_sum(side.stats, b_src, m_n, side.n, shift, 3)
    if flag is not None:
        if tl.load(flag) != 0:  # online: the tiles subtract each row's own log-sum-exp
            b_power_o = tl.full([BLOCK_N], 1.0, tl.float32)
            b_power_p = b_power_o
    unit = WEIGHT_SCALE / largest
    p_weights = side.weights + o_n
    tl.store(p_weights, b_other * unit * b_power_o, mask=m_rows)
    tl.store(p_weights + side.rows, b_peer * unit * b_power_p, mask=m_rows)
    tl.store(p_weights + 2 * side.rows, b_linear * unit, mask=m_rows)
    tl.store(p_weights + 3 * side.rows, b_mean, mask=m_rows)
    tl.store(p_weights + 4 * side.rows, b_spread, mask=m_rows)


@triton.jit
def weights_kernel(
    one, two, first,  # Upstream; as `launch_sides` passes them
    scale,  # Scale
    flag, temperature,
    BLOCK_N: tl.constexpr, SYMMETRIC: tl.constexpr, CODES,
):  # fmt: skip
    o_m = tl.arange(0, 512)
    b_largest = tl.zeros([512], tl.float32)
    for i_m in range(0, scale.n, 512):
        b_largest = tl.maximum(b_largest, tl.load(scale.maxima + i_m + o_m, mask=i_m + o_m < scale.n, other=0.0))
    largest = tl.max(b_largest, 0)
    largest = tl.where(largest > 0, tl.maximum(largest, LEAST_DIVISOR), 1.0)
    if tl.program_id(0) == 0:
        tl.store(scale.bound, largest)
        if scale.arrived is not None:
            tl.store(scale.arrived, 0)
    program = tl.program_id(0)
    if first is None:
        _weigh(one, program, largest, flag, temperature, BLOCK_N, SYMMETRIC, CODES)
    else:
        if program < first:
            _weigh(one, program, largest, flag, temperature, BLOCK_N, SYMMETRIC, CODES)
        else:
            _weigh(two, program - first, largest, flag, temperature, BLOCK_N, SYMMETRIC, CODES)
