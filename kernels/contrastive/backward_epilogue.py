"""Last step of the gradient: view pairs, scales, the Jacobian of the normalisation, rows back in source order.

    dz = (tiles + view pairs) / T        dx = (dz - z <z, dz>) / |x|

and the gradient of the temperature from the sum of the products <z, dz>: dL/dT is minus that sum divided by T, or half
of that if the candidates are the rows themselves. With the temperature given as a scale of the logits, s = 1 / T, dL/ds
is the sum divided by s.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.numerics import FLOAT_MAX, SCALE, WEIGHT_SCALE, begin, inverse_temperature, unit_rows
from .statistics import added_up, is_last


class Gradient(NamedTuple):
    """The tiles' part of the gradient, for the rows from working row `first` on."""

    sums: Any  # (SLOTS, rows, stride) float32; IN_ORDER: (1, n, .) in source order
    first: int
    rows: int
    stride: int


class Views(NamedTuple):
    """The view pairs of a side's rows, and the weights of their statistics."""

    first_N: Any  # (n,) int32: start of the interval of each row's views among the other side's rows
    last_N: Any  # (n,) int32: its end
    weights: Any  # (5, rows) as `weights_kernel` writes them; None: this side's statistics have no gradient
    stats: Any  # (5, n)
    rows: int


class Degree(NamedTuple):
    """Where the gradient of the temperature goes."""

    sums: Any  # (programs,) float32: each program's part of the sum of <z, dz>
    total: Any  # (1,) float32: the gradient, written by the program that comes last
    arrived: Any  # (1,) int32: programs that are done; 0 at first
    factor: float  # of the sum: 1, or 0.5 if each pair occurs in two rows
    programs: int  # of all launches


class Finalized(NamedTuple):
    """A side of `finalize_kernel`."""

    tiles: Any  # Gradient
    x: Any  # Rows of the rows whose gradient is computed
    x_views: Any  # Views of these
    y: Any  # Rows of their candidates
    y_views: Any
    dx: Any  # (n, d) in source order; may be tiles.sums
    scale: Any  # (1,) float32: scale of the candidates' working copy; None: they are normalised
    degree: Any  # Degree; None: not requested


class View(NamedTuple):
    """Inside a kernel: one view of each row."""

    m: Any  # rows that have it
    b: Any  # (N, D) unit rows
    src: Any  # their source rows
    logit: Any


class Epilogue(NamedTuple):
    """Constants of `finalize_kernel`."""

    BLOCK_N: int
    BLOCK_D: int
    SLOTS: int
    IN_ORDER: bool
    SYMMETRIC: bool


@triton.jit
def _view(b_x, y, b_j, b_last, o_n, m_n, o_d, m_d, inverse_t, SYMMETRIC: tl.constexpr):
    """The views at working positions b_j of the candidates; rows without one have b_j >= b_last."""
    m_j = m_n & (b_j < b_last)
    if SYMMETRIC:
        m_j = m_j & (b_j != o_n)
    b_y, b_src, _ = unit_rows(y, b_j, m_j, o_d, m_d)
    return View(m_j, b_y, b_src, tl.sum(b_x * b_y, 1) * inverse_t)


@triton.jit
def _pull(b_s, views, b_src, o_n, m_n, b_count, n):
    """Derivative of a row's view mean and spread by the logit b_s of one of its views."""
    b_lse = tl.load(views.stats + b_src, mask=m_n, other=0.0) + tl.load(views.stats + n + b_src, mask=m_n, other=0.0)
    b_mean = tl.load(views.weights + 3 * views.rows + o_n, mask=m_n, other=0.0)
    b_spread = tl.load(views.weights + 4 * views.rows + o_n, mask=m_n, other=0.0)
    b_share = 1.0 / tl.maximum(b_count, 1).to(tl.float32)
    # The softmax of a single view is exactly 1, whatever the rounding of its logit.
    b_softmax = tl.where(b_count > 1, tl.exp(b_s - b_lse), 1.0)
    return b_mean * b_share + b_spread * (b_softmax - b_share)


@triton.jit
def _view_pairs(b_x, b_src, side, o_n, m_n, o_d, m_d, inverse_t, CONSTANTS):
    """(N, D) part of the gradient from the views of each row, in float32 from the original rows."""
    b_first = begin(tl.load(side.x_views.first_N + o_n, mask=m_n, other=0))
    b_last = tl.load(side.x_views.last_N + o_n, mask=m_n, other=0)
    b_count = b_last - b_first - (1 if CONSTANTS.SYMMETRIC else 0)
    b_dz = tl.zeros([CONSTANTS.BLOCK_N, CONSTANTS.BLOCK_D], tl.float32)
    for i_k in range(0, tl.max(b_last - b_first, 0)):
        b_j = b_first + i_k
        one = _view(b_x, side.y, b_j, b_last, o_n, m_n, o_d, m_d, inverse_t, CONSTANTS.SYMMETRIC)
        b_g = tl.zeros([CONSTANTS.BLOCK_N], tl.float32)
        if side.x_views.weights is not None:
            b_g += _pull(one.logit, side.x_views, b_src, o_n, one.m, b_count, side.x.n)
        if side.y_views.weights is not None:
            b_count_j = tl.load(side.y_views.last_N + b_j, mask=one.m, other=0)
            b_count_j -= begin(tl.load(side.y_views.first_N + b_j, mask=one.m, other=0))
            b_count_j -= 1 if CONSTANTS.SYMMETRIC else 0
            b_g += _pull(one.logit, side.y_views, one.src, b_j, one.m, b_count_j, side.y.n)
        b_dz += tl.where(one.m, b_g, 0.0)[:, None] * one.b
    return b_dz


@triton.jit
def _finalize(side, program, bound, temperature, CONSTANTS):
    i_n = program * CONSTANTS.BLOCK_N + tl.arange(0, CONSTANTS.BLOCK_N)
    o_n = side.tiles.first + i_n
    m_n = (o_n < side.x.n) & (i_n < side.tiles.rows)
    o_d = tl.arange(0, CONSTANTS.BLOCK_D)
    m_d = o_d < side.x.d
    m_nd = m_n[:, None] & m_d[None, :]
    inverse_t = inverse_temperature(temperature)
    b_x, b_src, b_inv = unit_rows(side.x, o_n, m_n, o_d, m_d)

    b_row = (b_src if CONSTANTS.IN_ORDER else i_n).to(tl.int64)
    b_dz = tl.zeros([CONSTANTS.BLOCK_N, CONSTANTS.BLOCK_D], tl.float32)
    for i_k in tl.static_range(CONSTANTS.SLOTS):
        p_sums = side.tiles.sums + (i_k * side.tiles.rows + b_row)[:, None] * side.tiles.stride + o_d[None, :]
        b_dz += tl.load(p_sums, mask=m_nd, other=0.0)
    if side.scale is None:
        b_dz = b_dz * (tl.load(bound) / (SCALE * WEIGHT_SCALE))
    else:
        b_dz = b_dz * (tl.load(bound) / WEIGHT_SCALE / tl.load(side.scale))

    b_dz += _view_pairs(b_x, b_src, side, o_n, m_n, o_d, m_d, inverse_t, CONSTANTS)
    b_dz = b_dz * inverse_t
    NORMALIZED: tl.constexpr = side.x.inv_N is not None
    if NORMALIZED or side.degree is not None:
        b_dot = tl.sum(b_x * b_dz, 1)
        if side.degree is not None:
            before = (
                side.tiles.first // side.tiles.rows * tl.cdiv(side.tiles.rows, CONSTANTS.BLOCK_N)
            )  # programs of earlier waves
            tl.store(side.degree.sums + before + program, tl.sum(tl.where(m_n, b_dot, 0.0), 0))
        if NORMALIZED:
            b_power = tl.where(b_inv < 0, 8.507059173023462e37, 1.0)
            # Clamped, so that the gradient keeps its direction if an inverse norm exceeds float32's range.
            b_inv = tl.minimum(b_power * tl.abs(b_inv), FLOAT_MAX)
            b_dz = b_inv[:, None] * (b_dz - b_x * b_dot[:, None])
    p_dx = side.dx + b_src.to(tl.int64)[:, None] * side.x.d + o_d[None, :]
    tl.store(p_dx, b_dz.to(side.dx.dtype.element_ty), mask=m_nd)
    if side.degree is not None:
        if is_last(side.degree.arrived, side.degree.programs):
            total = added_up(side.degree.sums, side.degree.programs) * side.degree.factor
            tl.store(side.degree.total, total / inverse_t if temperature.scale is not None else -total * inverse_t)


@triton.jit
def finalize_kernel(
    one, two, first,  # Finalized; as `launch_sides` passes them
    bound,  # (1,) float32: the weights' divisor
    temperature,
    CONSTANTS,  # Epilogue
):  # fmt: skip
    program = tl.program_id(0)
    if first is None:
        _finalize(one, program, bound, temperature, CONSTANTS)
    else:
        if program < first:
            _finalize(one, program, bound, temperature, CONSTANTS)
        else:
            _finalize(two, program - first, bound, temperature, CONSTANTS)
