"""Rows into their working copy: normalised in float32, in working order, padded, rounded to half precision.

Squares of float32 overflow above 1.8e19 and vanish below 1e-23, so each row is first multiplied by a power of two s
that brings its largest absolute value into [1, 2). That product is exact, the sum of squares q of s x lies in [1, 4 d),
and the unit row is (s x) / sqrt(q).

    row                        working copy    inverse norm
    zero                       0               0, so that its gradient is zero
    with a NaN or an infinity  NaN             NaN
    norm below about 2^-126    the unit row    its float32 would overflow: minus 1 / sqrt(q) stands for 2^126 / sqrt(q)
"""

import triton
import triton.language as tl

from ..common.numerics import (
    FLOAT_MAX,
    LAST_INVERSE_T,
    SCALE,
    inverse_temperature,
    load_rows,
    power_of_two_scale,
    split_half,
    unit_rows,
)


@triton.jit
def prepare_kernel(
    x,  # (., d) source rows; with x2 the first `half` of them
    x2,
    src_N,  # (n,) int32: source row of each working row
    z,  # (2 or 1, rows, D) half precision: the working copy, and with LOW its remainder
    inv_N,  # (n,) float32
    scale,  # (1,) float32: factor of rows that are not normalised
    flag,  # (1,) int32: 1 where exponentials with a fixed shift would leave float32's range
    t,
    t_value,
    n,
    rows,
    d,
    half,
    stride,
    stride2,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LOW: tl.constexpr,
    HAS_TWO: tl.constexpr,
    HAS_T: tl.constexpr,
    HAS_FLAG: tl.constexpr,
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    o_d = tl.arange(0, BLOCK_D)
    b_src = tl.load(src_N + o_n, mask=m_n, other=0)
    b_x = load_rows(x, x2, b_src, m_n, o_d, d, half, stride, stride2, HAS_TWO)
    if NORMALIZE:
        b_s = power_of_two_scale(tl.max(tl.abs(b_x), 1))
        b_u = b_x * b_s[:, None]
        b_q = tl.sum(b_u * b_u, 1)
        b_r = tl.where(b_q == 0.0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(b_q)))
        # Written as q < inf so that a NaN falls on the same side as an infinity (maxima skip NaN, sums do not).
        b_r = tl.where(b_q < float("inf"), b_r, float("nan"))
        b_inv = tl.where(b_r * b_s > FLOAT_MAX, -b_r, b_r * b_s)
        tl.store(inv_N + o_n, b_inv, mask=m_n)
        b_z = b_u * b_r[:, None] * SCALE
    else:
        b_z = unit_rows(b_x, b_src, NORMALIZE) * tl.load(scale)
    b_high, b_low = split_half(b_z, z.dtype.element_ty)
    p_z = z + o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    m_z = (o_n[:, None] < rows) & (o_d[None, :] < D)
    tl.store(p_z, b_high, mask=m_z)
    if LOW:
        tl.store(p_z + rows.to(tl.int64) * D, b_low, mask=m_z)
    if HAS_FLAG:
        if tl.program_id(0) == 0:
            unbounded = inverse_temperature(t, t_value, HAS_T) > LAST_INVERSE_T
            tl.store(flag, tl.where(unbounded, 1, 0) if NORMALIZE else 1)
