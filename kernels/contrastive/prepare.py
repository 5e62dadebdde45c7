"""The rows as the other kernels see them: a working copy in working order; and the view pairs.

`prepare_kernel` normalises rows in float32, pads them and rounds them to half precision. Squares of float32 overflow
above 1.8e19 and vanish below 1e-23, so each row is first multiplied by a power of two s that brings its largest
absolute value into [1, 2). That product is exact, the sum of squares q of s x lies in [1, 4 d), and the unit row is
(s x) / sqrt(q).

    row                        working copy    inverse norm
    zero                       0               0, so that its gradient is zero
    with a NaN or an infinity  NaN             NaN
    norm below about 2^-128    the unit row    would overflow float32: 2^126 / sqrt(q) is stored as -1 / sqrt(q)

If the order follows from the call (two views, two towers), a program also finds where its rows stand in it, by counting
labels, and writes their part of it; see order.py for what an order is.

The few view pairs are computed here in float32, from the original rows. They never go through a half-precision tile: in
a converged run a view's softmax weight and its mean nearly cancel; half-precision rounding would be all that is left.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.numerics import (
    FLOAT_MAX,
    LAST_INVERSE_T,
    SCALE,
    begin,
    finite_rows,
    inverse_temperature,
    load_rows,
    power_of_two_scale,
    split_half,
)


class Prepared(NamedTuple):
    """A side of `prepare_kernel`."""

    x: Any  # Rows; inv_N is written
    y: Any  # Rows of the candidates
    layout_5N: Any  # (5, n) int32: source row, lo, hi, first, last
    labels_B: Any  # (batch,) int64; None: no labels, or the order is given
    z: Any  # (2 or 1, rows, D) half precision: the working copy, and with LOW its remainder
    rows: int
    scale: Any  # (1,) float32: factor of rows that are not normalised
    stats: Any  # (5, n) float32 in source order; rows 0 and 1 are written: mean_view, spread_view; None: not requested


class Initial(NamedTuple):
    """What the first program of `prepare_kernel` initialises for later kernels."""

    flag: Any  # (1,) int32: 1 if exponentials with a fixed shift would leave float32's range; None: they cannot
    arrived: Any  # (2,) int32, as `Losses.arrived`; None: losses are not reduced
    later: Any  # (1,) int32, as `Degree.arrived`; None: not needed, or initialised by the backward pass


class Preparation(NamedTuple):
    """Constants of `prepare_kernel`."""

    D: int
    BLOCK_N: int
    BLOCK_D: int
    LOW: bool
    # 2: rows k and k + batch are views of sample k; 1: rows k of both towers are pair k. The order then follows from
    # the labels of the samples, and is written. 0: it is given.
    VIEWS: int
    SYMMETRIC: bool
    CHUNK: int  # labels compared at a time


@triton.jit
def _unit(b_x, NORMALIZE: tl.constexpr):
    """Rows divided by their norms, and inverse norms as stored; without NORMALIZE the rows, and zeros."""
    if NORMALIZE:
        b_s = power_of_two_scale(tl.max(tl.abs(b_x), 1))
        b_u = b_x * b_s[:, None]
        b_q = tl.sum(b_u * b_u, 1)
        b_r = tl.where(b_q == 0.0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(b_q)))
        # q < inf is false for a NaN as for an infinity (maxima skip NaN, sums do not).
        b_r = tl.where(b_q < float("inf"), b_r, float("nan"))
        b_inv = tl.where(b_r * b_s > FLOAT_MAX, -b_r, b_r * b_s)
        b_z = b_u * b_r[:, None]
    else:
        b_z = finite_rows(b_x)
        b_inv = tl.zeros([b_x.shape[0]], tl.float32)
    return b_z, b_inv


@triton.jit
def _logits(b_z, y, b_src, m_n, o_d, m_d, inverse_t):
    """Logits of rows b_z and the candidates' source rows b_src, one each."""
    b_y, _ = _unit(load_rows(y, b_src, m_n, o_d, m_d), y.inv_N is not None)
    return tl.sum(b_z * b_y, 1) * inverse_t


@triton.jit
def _views(b_z, y, layout_5N, n, o_n, m_n, o_d, m_d, inverse_t, SYMMETRIC: tl.constexpr):
    """mean_view and spread_view of rows with any number of views."""
    b_first = begin(tl.load(layout_5N + 3 * n + o_n, mask=m_n, other=0))
    b_last = tl.load(layout_5N + 4 * n + o_n, mask=m_n, other=0)
    most = tl.max(b_last - b_first, 0)
    b_count = b_last - b_first - (1 if SYMMETRIC else 0)
    b_n = tl.maximum(b_count, 1).to(tl.float32)
    b_sum = tl.zeros(o_n.shape, tl.float32)
    b_max = tl.full(o_n.shape, float("-inf"), tl.float32)
    b_mean = b_sum
    b_rest = b_sum
    b_total = b_sum
    # Two passes over the views: first their mean and largest logit, then exponentials relative to the largest. b_rest
    # corrects the rounding of the mean: equal logits have a spread of log n, a single one a spread of exactly 0.
    for i in range(0, 2 * most):
        b_j = b_first + tl.where(i < most, i, i - most)
        m_j = m_n & (b_j < b_last)
        if SYMMETRIC:
            m_j = m_j & (b_j != o_n)
        b_logit = _logits(b_z, y, tl.load(y.src_N + b_j, mask=m_j, other=0), m_j, o_d, m_d, inverse_t)
        if i < most:
            b_sum += tl.where(m_j, b_logit, 0.0)
            b_max = tl.where(m_j, tl.maximum(b_max, b_logit), b_max)
            b_mean = b_sum / b_n
        else:
            b_rest += tl.where(m_j, b_logit - b_mean, 0.0)
            b_total += tl.where(m_j, tl.exp(b_logit - b_max), 0.0)
    b_spread = (b_max - b_mean) + tl.log(b_total) - b_rest / b_n
    # A single view has spread 0 by definition; a NaN then shows only in the mean.
    return b_mean, tl.where(b_count > 1, b_spread, 0.0)


@triton.jit
def store_layout(p_layout, n, b_src, b_lo, b_hi, b_first, b_last, m_n):
    """Write the columns of a layout (5, n) that p_layout points to."""
    tl.store(p_layout, b_src, mask=m_n)
    tl.store(p_layout + n, b_lo, mask=m_n)
    tl.store(p_layout + 2 * n, b_hi, mask=m_n)
    tl.store(p_layout + 3 * n, b_first, mask=m_n)
    tl.store(p_layout + 4 * n, b_last, mask=m_n)


@triton.jit
def _count_labels(labels_B, b_label, b_k, batch, CHUNK: tl.constexpr):
    """Of all labels, how many are less than b_label (N,), how many are equal, and how many of these are before b_k."""
    o_j = tl.arange(0, CHUNK)
    b_less = tl.zeros([b_label.shape[0], CHUNK], tl.int32)
    b_same = b_less
    b_before = b_less
    for start in range(0, batch, CHUNK):
        m_j = start + o_j < batch
        b_j = tl.load(labels_B + start + o_j, mask=m_j, other=0)
        m_same = (b_j[None, :] == b_label[:, None]) & m_j[None, :]
        b_less += ((b_j[None, :] < b_label[:, None]) & m_j[None, :]).to(tl.int32)
        b_same += m_same.to(tl.int32)
        b_before += (m_same & (start + o_j[None, :] < b_k[:, None])).to(tl.int32)
    return tl.sum(b_less, 1), tl.sum(b_same, 1), tl.sum(b_before, 1)


@triton.jit
def _place(labels_B, layout_5N, o_n, m_n, n, VIEWS: tl.constexpr, CHUNK: tl.constexpr):
    """Working positions of rows o_n, counted sample by sample, and their samples; writes their part of the order."""
    b_k = o_n // VIEWS
    b_first = b_k * VIEWS
    b_lo = b_first
    b_hi = b_first + VIEWS
    batch = n // VIEWS
    if labels_B is not None:
        b_label = tl.load(labels_B + b_k, mask=m_n, other=0)
        b_less, b_same, b_before = _count_labels(labels_B, b_label, b_k, batch, CHUNK)
        b_first = (b_less + b_before) * VIEWS
        # -1 means unlabelled: such a sample is a class of its own.
        b_lo = tl.where(b_label == -1, b_first, b_less * VIEWS)
        b_hi = tl.where(b_label == -1, b_first + VIEWS, (b_less + b_same) * VIEWS)
    b_pos = tl.where(m_n, b_first + o_n % VIEWS, o_n)
    b_src = b_k + o_n % VIEWS * batch
    store_layout(layout_5N + b_pos, n, b_src, b_lo, b_hi, b_first, b_first + VIEWS, m_n)
    return b_pos, b_k


@triton.jit
def _prepare(side, program, inverse_t, CONSTANTS):
    o_n = program * CONSTANTS.BLOCK_N + tl.arange(0, CONSTANTS.BLOCK_N)
    n = side.x.n
    m_n = o_n < n
    o_d = tl.arange(0, CONSTANTS.BLOCK_D)
    m_d = o_d < side.x.d
    NORMALIZE: tl.constexpr = side.x.inv_N is not None
    b_pos = o_n
    b_k = o_n
    if CONSTANTS.VIEWS > 0:
        b_pos, b_k = _place(side.labels_B, side.layout_5N, o_n, m_n, n, CONSTANTS.VIEWS, CONSTANTS.CHUNK)
        b_src = b_k + o_n % CONSTANTS.VIEWS * (n // CONSTANTS.VIEWS)
    else:
        b_src = tl.load(side.layout_5N + o_n, mask=m_n, other=0)
    b_z, b_inv = _unit(load_rows(side.x, b_src, m_n, o_d, m_d), NORMALIZE)
    b_scaled = b_z
    if NORMALIZE:
        tl.store(side.x.inv_N + b_pos, b_inv, mask=m_n)
        b_scaled = b_z * SCALE
    else:
        b_scaled = b_z * tl.load(side.scale)
    b_high, b_low = split_half(b_scaled, side.z.dtype.element_ty)
    p_z = side.z + b_pos.to(tl.int64)[:, None] * CONSTANTS.D + o_d[None, :]
    m_z = (o_n[:, None] < side.rows) & (o_d[None, :] < CONSTANTS.D)
    tl.store(p_z, b_high, mask=m_z)
    if CONSTANTS.LOW:
        tl.store(p_z + side.rows.to(tl.int64) * CONSTANTS.D, b_low, mask=m_z)
    if side.stats is not None:
        if CONSTANTS.VIEWS > 0:  # each row has a single view
            b_other = b_k + (1 - o_n % CONSTANTS.VIEWS) * (n // CONSTANTS.VIEWS) if CONSTANTS.SYMMETRIC else b_k
            b_mean = _logits(b_z, side.y, b_other, m_n, o_d, m_d, inverse_t)
            b_spread = tl.zeros(o_n.shape, tl.float32)
        else:
            b_mean, b_spread = _views(
                b_z, side.y, side.layout_5N, n, o_n, m_n, o_d, m_d, inverse_t, CONSTANTS.SYMMETRIC
            )
        tl.store(side.stats + b_src, b_mean, mask=m_n)
        tl.store(side.stats + n + b_src, b_spread, mask=m_n)


@triton.jit
def prepare_kernel(
    one, two, first,  # Prepared; as `launch_sides` passes them
    initial,  # Initial
    temperature,
    CONSTANTS,  # Preparation
):  # fmt: skip
    inverse_t = inverse_temperature(temperature)
    program = tl.program_id(0)
    if first is None:
        _prepare(one, program, inverse_t, CONSTANTS)
    else:
        if program < first:
            _prepare(one, program, inverse_t, CONSTANTS)
        else:
            _prepare(two, program - first, inverse_t, CONSTANTS)
    if program == 0:
        if initial.flag is not None:
            tl.store(initial.flag, 1 if one.x.inv_N is None else tl.where(inverse_t > LAST_INVERSE_T, 1, 0))
        if initial.arrived is not None:
            tl.store(initial.arrived + tl.arange(0, 2), 0)
        if initial.later is not None:
            tl.store(initial.later, 0)
