"""Working copy of feature rows for the products: mapped, shifted by the pilot, scaled, in split half precision.

A row is mapped to u = (s x - m) r: s a power of two that brings its largest absolute value into [1, 2), so that nothing
overflows; m its mean times s for "correlation", else 0; r the reciprocal of its length. For "linear" u = x. The working
copy holds v = u - pilot times a power of two per model, so that the 22 bits of two halves reach down from the largest
entry.

All of this is float64: when rows are nearly equal, v keeps digits that float32 would have lost in u. These kernels take
a small share of the time; the products take most of it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.numerics import power_of_two_scale, split_half

# A row whose entries agree to this fraction of the largest counts as constant: the rest is rounding error.
_CONSTANT = tl.constexpr(64 * 2.0**-52)


class Features(NamedTuple):
    """A model's rows as the caller passed them."""

    x: Any  # (n, d), any dtype
    n: int
    d: int
    stride: int


@triton.jit
def _load(features, o_n, m_n, o_d):
    p_x = features.x + o_n.to(tl.int64)[:, None] * features.stride + o_d[None, :]
    return tl.load(p_x, mask=m_n[:, None] & (o_d[None, :] < features.d), other=0.0).to(tl.float64)


@triton.jit
def _factors(features, o_n, m_n, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CENTRE: tl.constexpr):
    """s, m and r of rows; r is 0 for a zero row and, with CENTRE, for a constant one."""
    o_d = tl.arange(0, BLOCK_D)
    d = features.d
    b_peak = tl.zeros([BLOCK_N], tl.float64)
    for i_d in range(0, d, BLOCK_D):
        b_peak = tl.maximum(b_peak, tl.max(tl.abs(_load(features, o_n, m_n, i_d + o_d)), 1))
    b_scale = power_of_two_scale(b_peak.to(tl.float32)).to(tl.float64)
    b_mean = tl.zeros([BLOCK_N], tl.float64)
    b_floor = b_mean
    if CENTRE:
        for i_d in range(0, d, BLOCK_D):
            b_mean += tl.sum(_load(features, o_n, m_n, i_d + o_d) * b_scale[:, None], 1)
        b_mean = b_mean / d
        b_floor += _CONSTANT
    b_square = tl.zeros([BLOCK_N], tl.float64)
    b_largest = b_square
    for i_d in range(0, d, BLOCK_D):
        b_u = _load(features, o_n, m_n, i_d + o_d) * b_scale[:, None] - b_mean[:, None]
        b_u = tl.where(i_d + o_d[None, :] < d, b_u, 0.0)
        b_square += tl.sum(b_u * b_u, 1)
        b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_u), 1))
    m_some = b_largest > b_floor
    b_inv = tl.where(m_some, 1.0 / tl.sqrt(tl.where(m_some, b_square, 1.0)), 0.0)
    return b_scale, b_mean, b_inv


@triton.jit
def measure_kernel(
    features,  # Features
    pilot,  # (d,) float64
    factors,  # (3, n) float64: s, m, r; None: rows are used as they are
    squares,  # (n,) float64: |v|^2
    margins,  # (n,) float64: <pilot, v>
    peaks,  # (programs,) float64: largest absolute entry of v in each program's rows
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    n = features.n
    d = features.d
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    if factors is not None:
        b_scale, b_mean, b_inv = _factors(features, o_n, m_n, BLOCK_N, BLOCK_D, CENTRE)
        tl.store(factors + o_n, b_scale, mask=m_n)
        tl.store(factors + n + o_n, b_mean, mask=m_n)
        tl.store(factors + 2 * n + o_n, b_inv, mask=m_n)
    o_d = tl.arange(0, BLOCK_D)
    b_square = tl.zeros([BLOCK_N], tl.float64)
    b_margin = b_square
    b_peak = b_square
    for i_d in range(0, d, BLOCK_D):
        b_p = tl.load(pilot + i_d + o_d, mask=i_d + o_d < d, other=0.0)
        b_v = _load(features, o_n, m_n, i_d + o_d)
        if factors is not None:
            b_v = (b_v * b_scale[:, None] - b_mean[:, None]) * b_inv[:, None]
        b_v = b_v - b_p[None, :]
        b_v = tl.where(i_d + o_d[None, :] < d, b_v, 0.0)
        b_square += tl.sum(b_v * b_v, 1)
        b_margin += tl.sum(b_v * b_p[None, :], 1)
        b_peak = tl.maximum(b_peak, tl.max(tl.abs(b_v), 1))
    tl.store(squares + o_n, b_square, mask=m_n)
    tl.store(margins + o_n, b_margin, mask=m_n)
    tl.store(peaks + tl.program_id(0), tl.max(tl.where(m_n, b_peak, 0.0), 0))


@triton.jit
def split_kernel(
    features, pilot, factors,  # as in measure_kernel
    scale,  # (1,) float64: power of two
    z,  # (2, rows, width) half precision: columns first .. first + columns are this model's
    rows, width, first, columns,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the working copy; rows from n on and columns from d on are zeros."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = features.n
    d = features.d
    m_n = o_n < n
    b_v = _load(features, o_n, m_n, o_d)
    if factors is not None:
        b_scale = tl.load(factors + o_n, mask=m_n, other=0.0)
        b_mean = tl.load(factors + n + o_n, mask=m_n, other=0.0)
        b_inv = tl.load(factors + 2 * n + o_n, mask=m_n, other=0.0)
        b_v = (b_v * b_scale[:, None] - b_mean[:, None]) * b_inv[:, None]
    b_p = tl.load(pilot + o_d, mask=o_d < d, other=0.0)
    b_v = b_v - b_p[None, :]
    b_v = tl.where(m_n[:, None] & (o_d[None, :] < d), b_v * tl.load(scale), 0.0)
    b_high, b_low = split_half(b_v.to(tl.float32), z.dtype.element_ty)
    p_z = z + o_n.to(tl.int64)[:, None] * width + (first + o_d)[None, :]
    m_z = (o_n[:, None] < rows) & (o_d[None, :] < columns)
    tl.store(p_z, b_high, mask=m_z)
    tl.store(p_z + rows.to(tl.int64) * width, b_low, mask=m_z)
