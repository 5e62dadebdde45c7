"""The gradient's last step: view pairs, scales, the Jacobian of the normalisation, rows back into their own order.

    dz = (tiles + view pairs) / T        dx = (dz - z <z, dz>) / |x|

and, for the gradient of the temperature, the products <z, dz>: dL/dT is minus their sum over T, or half of it where
candidates and rows are the same.
"""

import triton
import triton.language as tl

from ..common.numerics import FLOAT_MAX, SCALE, WEIGHT_SCALE, begin, inverse_temperature, load_rows, unit_rows


@triton.jit
def _pull(b_s, stats, b_src, w, rows, o_n, m_n, b_count, n):
    """Derivative of a row's view mean and spread by the logit b_s of one of its views."""
    b_lse = tl.load(stats + b_src, mask=m_n, other=0.0) + tl.load(stats + n + b_src, mask=m_n, other=0.0)
    b_mean = tl.load(w + 3 * rows + o_n, mask=m_n, other=0.0)
    b_spread = tl.load(w + 4 * rows + o_n, mask=m_n, other=0.0)
    b_share = 1.0 / tl.maximum(b_count, 1).to(tl.float32)
    # The softmax of a single view is 1 whatever its logit's rounding.
    b_softmax = tl.where(b_count > 1, tl.exp(b_s - b_lse), 1.0)
    return b_mean * b_share + b_spread * (b_softmax - b_share)


@triton.jit
def _view_pairs(
    b_x, b_inv, b_src, first_x, last_x, w_x, stats_x, y, y2, inv_y, src_y, first_y, last_y, w_y, stats_y, o_n, m_n,
    o_d, n, n_y, d, rows_x, rows_y, half_y, stride_y, stride_y2, inverse_t,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SYMMETRIC: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_TWO: tl.constexpr,
):  # fmt: skip
    """(N, D) part of the gradient that comes from the views of a row, in float32 from the rows themselves."""
    b_first = begin(tl.load(first_x + o_n, mask=m_n, other=0))
    b_last = tl.load(last_x + o_n, mask=m_n, other=0)
    b_count = b_last - b_first - (1 if SYMMETRIC else 0)
    b_dz = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i_k in range(0, tl.max(b_last - b_first, 0)):
        b_j = b_first + i_k
        m_j = m_n & (b_j < b_last)
        if SYMMETRIC:
            m_j = m_j & (b_j != o_n)
        b_src_j = tl.load(src_y + b_j, mask=m_j, other=0)
        b_inv_j = tl.load(inv_y + b_j, mask=m_j, other=0.0) if NORMALIZE else b_inv
        b_y = load_rows(y, y2, b_src_j, m_j, o_d, d, half_y, stride_y, stride_y2, HAS_TWO)
        b_y = unit_rows(b_y, b_inv_j, NORMALIZE)
        b_s = tl.sum(b_x * b_y, 1) * inverse_t
        b_g = tl.zeros([BLOCK_N], tl.float32)
        if OWN:
            b_g += _pull(b_s, stats_x, b_src, w_x, rows_x, o_n, m_j, b_count, n)
        if OTHER:
            b_count_j = tl.load(last_y + b_j, mask=m_j, other=0) - begin(tl.load(first_y + b_j, mask=m_j, other=0))
            b_count_j -= 1 if SYMMETRIC else 0
            b_g += _pull(b_s, stats_y, b_src_j, w_y, rows_y, b_j, m_j, b_count_j, n_y)
        b_dz += tl.where(m_j, b_g, 0.0)[:, None] * b_y
    return b_dz


@triton.jit
def finalize_kernel(
    acc,  # (SLOTS, acc_rows, stride_acc) float32: what the tiles gave; IN_ORDER: (n, .) in source order
    x, x2, inv_x, src_x, first_x, last_x, w_x, stats_x,  # the rows whose gradient this is
    y, y2, inv_y, src_y, first_y, last_y, w_y, stats_y,  # their candidates
    dx,  # (n, d) in source order; may be acc
    dot_N,  # (n,) float32 in source order: <z, dz>
    bound, scale_y, t, t_value,
    n, n_y, d, first_row, acc_rows, stride_acc, rows_x, rows_y,
    half_x, half_y, stride_x, stride_x2, stride_y, stride_y2,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr, IN_ORDER: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,  # the rows' own statistics have a gradient; those of their candidates have
    NORMALIZE: tl.constexpr, NEED_DOT: tl.constexpr,
    HAS_TWO: tl.constexpr, HAS_T: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_n = first_row + i_n
    m_n = (o_n < n) & (i_n < acc_rows)
    o_d = tl.arange(0, BLOCK_D)
    m_nd = m_n[:, None] & (o_d < d)[None, :]
    inverse_t = inverse_temperature(t, t_value, HAS_T)
    b_src = tl.load(src_x + o_n, mask=m_n, other=0)
    b_inv = tl.load(inv_x + o_n, mask=m_n, other=0.0) if NORMALIZE else tl.zeros([BLOCK_N], tl.float32)
    b_x = unit_rows(load_rows(x, x2, b_src, m_n, o_d, d, half_x, stride_x, stride_x2, HAS_TWO), b_inv, NORMALIZE)

    b_row = (b_src if IN_ORDER else i_n).to(tl.int64)
    b_dz = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i_k in tl.static_range(SLOTS):
        p_acc = acc + (i_k * acc_rows + b_row)[:, None] * stride_acc + o_d[None, :]
        b_dz += tl.load(p_acc, mask=m_nd, other=0.0)
    if HAS_SCALE:
        b_dz = b_dz * (tl.load(bound) / WEIGHT_SCALE / tl.load(scale_y))
    else:
        b_dz = b_dz * (tl.load(bound) / (SCALE * WEIGHT_SCALE))

    b_dz += _view_pairs(
        b_x, b_inv, b_src, first_x, last_x, w_x, stats_x, y, y2, inv_y, src_y, first_y, last_y, w_y, stats_y, o_n, m_n,
        o_d, n, n_y, d, rows_x, rows_y, half_y, stride_y, stride_y2, inverse_t,
        BLOCK_N, BLOCK_D, SYMMETRIC, OWN, OTHER, NORMALIZE, HAS_TWO,
    )  # fmt: skip
    b_dz = b_dz * inverse_t
    if NORMALIZE or NEED_DOT:
        b_dot = tl.sum(b_x * b_dz, 1)
        if NEED_DOT:
            tl.store(dot_N + b_src, b_dot, mask=m_n)
        if NORMALIZE:
            b_power = tl.where(b_inv < 0, 8.507059173023462e37, 1.0)
            # The gradient keeps its direction where an inverse norm exceeds float32.
            b_inv = tl.minimum(b_power * tl.abs(b_inv), FLOAT_MAX)
            b_dz = b_inv[:, None] * (b_dz - b_x * b_dot[:, None])
    p_dx = dx + b_src.to(tl.int64)[:, None] * d + o_d[None, :]
    tl.store(p_dx, b_dz.to(dx.dtype.element_ty), mask=m_nd)
