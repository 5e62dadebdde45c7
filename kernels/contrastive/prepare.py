"""The rows as the other kernels see them: their working order, and a working copy in it.

Rows of a class are contiguous, and within a class so are the views of a sample. The candidates of a row's class are
then one interval [lo, hi) of positions, and those of its sample one interval [first, last) inside it. `layout_kernel`
finds the order if it follows from the call: two views of each sample, or paired towers.

`prepare_kernel` normalises rows in float32, pads them and rounds them to half precision. Squares of float32 overflow
above 1.8e19 and vanish below 1e-23, so each row is first multiplied by a power of two s that brings its largest
absolute value into [1, 2). That product is exact, the sum of squares q of s x lies in [1, 4 d), and the unit row is
(s x) / sqrt(q).

    row                        working copy    inverse norm
    zero                       0               0, so that its gradient is zero
    with a NaN or an infinity  NaN             NaN
    norm below about 2^-128    the unit row    would overflow float32: 2^126 / sqrt(q) is stored as -1 / sqrt(q)
"""

import triton
import triton.language as tl

from ..common.numerics import (
    FLOAT_MAX,
    LAST_INVERSE_T,
    SCALE,
    finite_rows,
    inverse_temperature,
    load_rows,
    power_of_two_scale,
    split_half,
)


@triton.jit
def bisect(sorted_N, b_value, n, RIGHT: tl.constexpr, STEPS: tl.constexpr):
    """Position of the first of n ascending int64 numbers that is not less (RIGHT: that is greater) than b_value."""
    b_lo = tl.zeros_like(b_value).to(tl.int32)
    b_hi = b_lo + n
    for _ in range(STEPS):
        b_mid = (b_lo + b_hi) // 2
        m_open = b_lo < b_hi
        b_at = tl.load(sorted_N + b_mid, mask=m_open, other=0)
        m_less = m_open & ((b_at <= b_value) if RIGHT else (b_at < b_value))
        b_lo = tl.where(m_less, b_mid + 1, b_lo)
        b_hi = tl.where(m_open & (m_less == 0), b_mid, b_hi)
    return b_lo


@triton.jit
def layout_kernel(
    order_B,  # (batch,) int64: samples sorted by label; unused without labels
    sorted_B,  # (batch,) int64: labels in that order
    layout_5N,  # (5, n) int32: source row, lo, hi, first, last
    batch,
    n,
    VIEWS: tl.constexpr,  # 2: rows k and k + batch are views of sample k; 1: row k is sample k, in both towers
    LABELLED: tl.constexpr,
    STEPS: tl.constexpr,  # steps of a binary search over the batch
    BLOCK_N: tl.constexpr,
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    b_k = o_n // VIEWS
    b_first = b_k * VIEWS
    b_sample = b_k
    b_lo = b_first
    b_hi = b_first + VIEWS
    if LABELLED:
        b_sample = tl.load(order_B + b_k, mask=m_n, other=0).to(tl.int32)
        b_label = tl.load(sorted_B + b_k, mask=m_n, other=0)
        # -1 means unlabelled: such a sample is a class of its own.
        b_lo = tl.where(b_label == -1, b_lo, bisect(sorted_B, b_label, batch, False, STEPS) * VIEWS)
        b_hi = tl.where(b_label == -1, b_hi, bisect(sorted_B, b_label, batch, True, STEPS) * VIEWS)
    p_layout = layout_5N + o_n
    tl.store(p_layout, b_sample + o_n % VIEWS * batch, mask=m_n)
    tl.store(p_layout + n, b_lo, mask=m_n)
    tl.store(p_layout + 2 * n, b_hi, mask=m_n)
    tl.store(p_layout + 3 * n, b_first, mask=m_n)
    tl.store(p_layout + 4 * n, b_first + VIEWS, mask=m_n)


@triton.jit
def prepare_kernel(
    x,  # Rows; inv_N is written
    z,  # (2 or 1, rows, D) half precision: the working copy, and with LOW its remainder
    rows,
    scale,  # (1,) float32: factor of rows that are not normalised
    flag,  # (1,) int32: 1 if exponentials with a fixed shift would leave float32's range; None: they cannot
    temperature,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOW: tl.constexpr,
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < x.n
    o_d = tl.arange(0, BLOCK_D)
    b_x = load_rows(x, tl.load(x.src_N + o_n, mask=m_n, other=0), m_n, o_d, o_d < x.d)
    if x.inv_N is None:
        b_z = finite_rows(b_x) * tl.load(scale)
    else:
        b_s = power_of_two_scale(tl.max(tl.abs(b_x), 1))
        b_u = b_x * b_s[:, None]
        b_q = tl.sum(b_u * b_u, 1)
        b_r = tl.where(b_q == 0.0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(b_q)))
        # q < inf is false for a NaN as for an infinity (maxima skip NaN, sums do not).
        b_r = tl.where(b_q < float("inf"), b_r, float("nan"))
        b_inv = tl.where(b_r * b_s > FLOAT_MAX, -b_r, b_r * b_s)
        tl.store(x.inv_N + o_n, b_inv, mask=m_n)
        b_z = b_u * b_r[:, None] * SCALE
    b_high, b_low = split_half(b_z, z.dtype.element_ty)
    p_z = z + o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    m_z = (o_n[:, None] < rows) & (o_d[None, :] < D)
    tl.store(p_z, b_high, mask=m_z)
    if LOW:
        tl.store(p_z + rows.to(tl.int64) * D, b_low, mask=m_z)
    if flag is not None:
        if tl.program_id(0) == 0:
            unbounded = inverse_temperature(temperature) > LAST_INVERSE_T
            tl.store(flag, 1 if x.inv_N is None else tl.where(unbounded, 1, 0))
