"""Statistics of the few view pairs, in float32 from the rows themselves.

They never meet a half-precision tile: in a converged run softmax weight and mean of a view cancel, and so would the
rounding errors' favour.
"""

import triton
import triton.language as tl

from ..common.numerics import begin, inverse_temperature, load_rows, unit_rows


@triton.jit
def views_kernel(
    x, x2, inv_x, src_x,  # the anchors, as in prepare_kernel
    y, y2, inv_y, src_y,  # the candidates; in the symmetric case the anchors again
    first_N, last_N,  # (n,) int32: each anchor's views among the candidates
    stats,  # (5, n) float32 in source order; rows 0 and 1 are written: mean_view, spread_view
    t, t_value,
    n, d, half_x, half_y, stride_x, stride_x2, stride_y, stride_y2,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SYMMETRIC: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_TWO: tl.constexpr, HAS_T: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    o_d = tl.arange(0, BLOCK_D)
    inverse_t = inverse_temperature(t, t_value, HAS_T)
    b_src = tl.load(src_x + o_n, mask=m_n, other=0)
    b_x = load_rows(x, x2, b_src, m_n, o_d, d, half_x, stride_x, stride_x2, HAS_TWO)
    b_x = unit_rows(b_x, tl.load(inv_x + o_n, mask=m_n, other=0.0) if NORMALIZE else b_src, NORMALIZE)
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
    # Twice over the views: their mean and largest logit, then exponentials about the largest. b_rest is what the
    # rounding of the mean left behind, so that equal logits have a spread of log n and one alone a spread of exactly 0.
    for i in range(0, 2 * most):
        i_k = tl.where(i < most, i, i - most)
        b_j = b_first + i_k
        m_j = m_n & (b_j < b_last)
        if SYMMETRIC:
            m_j = m_j & (b_j != o_n)
        b_src_j = tl.load(src_y + b_j, mask=m_j, other=0)
        b_y = load_rows(y, y2, b_src_j, m_j, o_d, d, half_y, stride_y, stride_y2, HAS_TWO)
        b_y = unit_rows(b_y, tl.load(inv_y + b_j, mask=m_j, other=0.0) if NORMALIZE else b_src, NORMALIZE)
        b_s = tl.sum(b_x * b_y, 1) * inverse_t
        if i < most:
            b_sum += tl.where(m_j, b_s, 0.0)
            b_max = tl.where(m_j, tl.maximum(b_max, b_s), b_max)
            b_mean = b_sum / b_n
        else:
            b_rest += tl.where(m_j, b_s - b_mean, 0.0)
            b_total += tl.where(m_j, tl.exp(b_s - b_max), 0.0)
    b_spread = (b_max - b_mean) + tl.log(b_total) - b_rest / b_n
    # A single view's spread is 0 by definition; a NaN must show in the mean alone then.
    b_spread = tl.where(b_count > 1, b_spread, 0.0)
    tl.store(stats + b_src, b_mean, mask=m_n)
    tl.store(stats + n + b_src, b_spread, mask=m_n)
