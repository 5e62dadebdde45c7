"""Statistics of the few view pairs, computed in float32 from the original rows.

They never go through a half-precision tile. In a converged run a view's softmax weight and its mean nearly cancel;
half-precision rounding would be all that is left.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.numerics import begin, inverse_temperature, unit_rows


class View(NamedTuple):
    """Inside a kernel: one view of each row."""

    m: Any  # rows that have it
    b: Any  # (N, D) unit rows
    src: Any  # their source rows
    logit: Any


@triton.jit
def view(b_x, y, b_j, b_last, o_n, m_n, o_d, m_d, inverse_t, SYMMETRIC: tl.constexpr):
    """The views at working positions b_j of the candidates; rows without one have b_j >= b_last."""
    m_j = m_n & (b_j < b_last)
    if SYMMETRIC:
        m_j = m_j & (b_j != o_n)
    b_y, b_src, _ = unit_rows(y, b_j, m_j, o_d, m_d)
    return View(m_j, b_y, b_src, tl.sum(b_x * b_y, 1) * inverse_t)


@triton.jit
def views_kernel(
    x,  # Rows: the anchors
    y,  # Rows: the candidates; in the symmetric case the anchors again
    first_N, last_N,  # (n,) int32: each anchor's views among the candidates
    stats,  # (5, n) float32 in source order; rows 0 and 1 are written: mean_view, spread_view
    temperature,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < x.n
    o_d = tl.arange(0, BLOCK_D)
    inverse_t = inverse_temperature(temperature)
    m_d = o_d < x.d
    b_x, b_src, _ = unit_rows(x, o_n, m_n, o_d, m_d)
    b_first = begin(tl.load(first_N + o_n, mask=m_n, other=0))
    b_last = tl.load(last_N + o_n, mask=m_n, other=0)
    most = tl.max(b_last - b_first, 0)
    b_count = b_last - b_first - (1 if SYMMETRIC else 0)
    b_n = tl.maximum(b_count, 1).to(tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    b_mean = b_sum
    b_rest = b_sum
    b_total = b_sum
    # Two passes over the views: first their mean and largest logit, then exponentials relative to the largest. b_rest
    # corrects the rounding of the mean: equal logits have a spread of log n, a single one a spread of exactly 0.
    for i in range(0, 2 * most):
        i_k = tl.where(i < most, i, i - most)
        one = view(b_x, y, b_first + i_k, b_last, o_n, m_n, o_d, m_d, inverse_t, SYMMETRIC)
        if i < most:
            b_sum += tl.where(one.m, one.logit, 0.0)
            b_max = tl.where(one.m, tl.maximum(b_max, one.logit), b_max)
            b_mean = b_sum / b_n
        else:
            b_rest += tl.where(one.m, one.logit - b_mean, 0.0)
            b_total += tl.where(one.m, tl.exp(one.logit - b_max), 0.0)
    b_spread = (b_max - b_mean) + tl.log(b_total) - b_rest / b_n
    # A single view has spread 0 by definition; a NaN then shows only in the mean.
    b_spread = tl.where(b_count > 1, b_spread, 0.0)
    tl.store(stats + b_src, b_mean, mask=m_n)
    tl.store(stats + x.n + b_src, b_spread, mask=m_n)
