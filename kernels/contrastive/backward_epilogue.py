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
from .totals import added_up, is_last


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
    arrived: Any  # (1,) int32: programs that are done; 0 at first and in the end, for another backward pass
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


class Pull(NamedTuple):
    """Inside a kernel: what the derivative of a row's view mean and spread by the logit of a view needs."""

    mean: Any  # weights
    spread: Any
    lse: Any  # of the logits of all its views
    count: Any  # of these


class Epilogue(NamedTuple):
    """Constants of `finalize_kernel`."""

    BLOCK_N: int
    BLOCK_D: int
    SLOTS: int
    IN_ORDER: bool
    SYMMETRIC: bool
    MANY: bool  # more than `AT_ONCE` programs


@triton.jit
def _pull_of(views, o_n, b_src, m_n, b_count, n):
    """The pull of the views on working rows o_n, which are the source rows b_src."""
    b_mean = tl.load(views.weights + 3 * views.rows + o_n, mask=m_n, other=0.0)
    b_spread = tl.load(views.weights + 4 * views.rows + o_n, mask=m_n, other=0.0)
    b_lse = tl.load(views.stats + b_src, mask=m_n, other=0.0) + tl.load(views.stats + n + b_src, mask=m_n, other=0.0)
    return Pull(b_mean, b_spread, b_lse, b_count)


@triton.jit
def _pulled(pull, b_s):
    """Derivative of a row's view mean and spread by the logit b_s of one of its views."""
    b_share = 1.0 / tl.maximum(pull.count, 1).to(tl.float32)
    # The softmax of a single view is exactly 1, whatever the rounding of its logit.
    b_softmax = tl.where(pull.count > 1, tl.exp(b_s - pull.lse), 1.0)
    return pull.mean * b_share + pull.spread * (b_softmax - b_share)


@triton.jit
def _view_pairs(b_x, b_first, b_last, own, side, o_n, m_n, o_d, m_d, inverse_t, CONSTANTS):
    """(N, D) part of the gradient from the views of each row, in float32 from the original rows."""
    b_dz = tl.zeros([CONSTANTS.BLOCK_N, CONSTANTS.BLOCK_D], tl.float32)
    for i_k in range(0, tl.max(own.count, 0)):
        b_j = b_first + i_k
        if CONSTANTS.SYMMETRIC:  # without the row itself
            b_j += (b_j >= o_n).to(tl.int32)
        m_j = m_n & (b_j < b_last)
        other = own
        b_src = tl.load(side.y.src_N + b_j, mask=m_j, other=0)
        if side.y_views.weights is not None:
            b_count = tl.load(side.y_views.last_N + b_j, mask=m_j, other=0)
            b_count -= begin(tl.load(side.y_views.first_N + b_j, mask=m_j, other=0))
            b_count -= 1 if CONSTANTS.SYMMETRIC else 0
            other = _pull_of(side.y_views, b_j, b_src, m_j, b_count, side.y.n)
        b_y, _, _ = unit_rows(side.y, b_j, m_j, o_d, m_d)
        b_s = tl.sum(b_x * b_y, 1) * inverse_t
        b_g = tl.zeros([CONSTANTS.BLOCK_N], tl.float32)
        if side.x_views.weights is not None:
            b_g += _pulled(own, b_s)
        if side.y_views.weights is not None:
            b_g += _pulled(other, b_s)
        b_dz += tl.where(m_j, b_g, 0.0)[:, None] * b_y
    return b_dz


@triton.jit
def _finalize(side, program, bound, grad, temperature, CONSTANTS):
    i_n = program * CONSTANTS.BLOCK_N + tl.arange(0, CONSTANTS.BLOCK_N)
    o_n = side.tiles.first + i_n
    m_n = (o_n < side.x.n) & (i_n < side.tiles.rows)
    o_d = tl.arange(0, CONSTANTS.BLOCK_D)
    m_d = o_d < side.x.d
    m_nd = m_n[:, None] & m_d[None, :]
    inverse_t = inverse_temperature(temperature)
    upstream = 1.0 if grad is None else tl.load(grad)
    # What the view pairs need is requested before the loop over them, so that it arrives together with the rows.
    b_first = begin(tl.load(side.x_views.first_N + o_n, mask=m_n, other=0))
    b_last = tl.load(side.x_views.last_N + o_n, mask=m_n, other=0)
    b_count = b_last - b_first - (1 if CONSTANTS.SYMMETRIC else 0)
    b_x, b_src, b_inv = unit_rows(side.x, o_n, m_n, o_d, m_d)
    own = Pull(b_inv, b_inv, b_inv, b_count)
    if side.x_views.weights is not None:
        own = _pull_of(side.x_views, o_n, b_src, m_n, b_count, side.x.n)

    b_row = (b_src if CONSTANTS.IN_ORDER else i_n).to(tl.int64)
    b_dz = tl.zeros([CONSTANTS.BLOCK_N, CONSTANTS.BLOCK_D], tl.float32)
    for i_k in tl.static_range(CONSTANTS.SLOTS):
        p_sums = side.tiles.sums + (i_k * side.tiles.rows + b_row)[:, None] * side.tiles.stride + o_d[None, :]
        b_dz += tl.load(p_sums, mask=m_nd, other=0.0)
    if side.scale is None:
        b_dz = b_dz * (tl.load(bound) / (SCALE * WEIGHT_SCALE))
    else:
        b_dz = b_dz * (tl.load(bound) / WEIGHT_SCALE / tl.load(side.scale))

    b_dz += _view_pairs(b_x, b_first, b_last, own, side, o_n, m_n, o_d, m_d, inverse_t, CONSTANTS)
    b_dz = b_dz * inverse_t * upstream  # not by their product, which may overflow
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
            tl.store(side.degree.arrived, 0)
            total = added_up(side.degree.sums, side.degree.programs, CONSTANTS.MANY) * side.degree.factor
            tl.store(side.degree.total, total / inverse_t if temperature.scale is not None else -total * inverse_t)


@triton.jit
def finalize_kernel(
    one, two, first,  # Finalized; as `launch_sides` passes them
    bound,  # (1,) float32: the weights' divisor
    grad,  # (1,) float32: upstream gradient; None: the weights hold it
    temperature,
    CONSTANTS,  # Epilogue
):  # fmt: skip
    program = tl.program_id(0)
    if first is None:
        _finalize(one, program, bound, grad, temperature, CONSTANTS)
    else:
        if program < first:
            _finalize(one, program, bound, grad, temperature, CONSTANTS)
        else:
            _finalize(two, program - first, bound, grad, temperature, CONSTANTS)
