"""The colour chain on float32 values in [0, 1]: jitter in its drawn order, grayscale, solarisation, normalisation.

Contrast needs the mean of the whole image after the operations before it; all others are elementwise. So the chain has
two parts, `jitter` before contrast and `jitter` after it, with a sum in between. The sum is of integers, so it depends
neither on the order of additions nor on the number of programs.
"""

import triton
import triton.language as tl

from . import parameters as p

_BRIGHTNESS = tl.constexpr(0)  # operation numbers of the view plan
_SATURATION = tl.constexpr(2)
_MEAN_STEPS = tl.constexpr(1048576.0)  # 2^20: fixed-point unit of the integer sum
_SOLARIZE_THRESHOLD = tl.constexpr(128 / 255)


@triton.jit
def from_levels(b_v):
    """Grey levels to [0, 1], rounded as on the CPU: solarisation compares with the exact value of a level."""
    return tl.div_rn(b_v, 255.0)


@triton.jit
def gray(b_r, b_g, b_b, C: tl.constexpr):
    """Luma."""
    if C == 1:
        b_luma = b_r
    else:
        b_luma = 0.2989 * b_r + 0.587 * b_g + 0.114 * b_b
    return b_luma


@triton.jit
def _unit(b_v):
    return tl.minimum(tl.maximum(b_v, 0.0), 1.0)


@triton.jit
def blend(b_v, other, factor):
    """Interpolate between `other` (factor 0) and b_v (factor 1), or extrapolate; clamped to [0, 1]."""
    return _unit(factor * b_v + (1.0 - factor) * other)


@triton.jit
def _channel(b_high, b_chroma, b_hue, SECTOR: tl.constexpr):
    """A channel for a hue in [0, 6): v - v s max(0, min(k, 4 - k, 1)) with k = (SECTOR + hue) mod 6."""
    b_k = b_hue + SECTOR
    b_k = tl.where(b_k >= 6.0, b_k - 6.0, b_k)
    return b_high - b_chroma * _unit(tl.minimum(b_k, 4.0 - b_k))


@triton.jit
def _turn_hue(b_r, b_g, b_b, shift):
    b_high = tl.maximum(tl.maximum(b_r, b_g), b_b)
    b_chroma = b_high - tl.minimum(tl.minimum(b_r, b_g), b_b)
    b_sector = tl.where(b_r == b_high, b_g - b_b, tl.where(b_g == b_high, b_b - b_r, b_r - b_g))
    b_base = tl.where(b_r == b_high, 0.0, tl.where(b_g == b_high, 2.0, 4.0))
    b_hue = b_base + b_sector / tl.where(b_chroma > 0.0, b_chroma, 1.0) + 6.0 * shift
    b_hue -= 6.0 * tl.floor(b_hue / 6.0)
    return (
        _channel(b_high, b_chroma, b_hue, 5),
        _channel(b_high, b_chroma, b_hue, 3),
        _channel(b_high, b_chroma, b_hue, 1),
    )


@triton.jit
def jitter(b_r, b_g, b_b, row, first, last, C: tl.constexpr):
    """Apply operations first .. last - 1 of a view, not counting contrast."""
    for i in range(first, last):
        number = p.whole(row + i, p.OPERATION)
        factor = p.real(row + i, p.FACTOR)
        if number == _BRIGHTNESS:
            b_r = _unit(b_r * factor)
            b_g = _unit(b_g * factor)
            b_b = _unit(b_b * factor)
        elif C == 3:
            if number == _SATURATION:
                b_luma = gray(b_r, b_g, b_b, C)
                b_r = blend(b_r, b_luma, factor)
                b_g = blend(b_g, b_luma, factor)
                b_b = blend(b_b, b_luma, factor)
            else:
                b_r, b_g, b_b = _turn_hue(b_r, b_g, b_b, factor)
    return b_r, b_g, b_b


@triton.jit
def luma_sum(b_r, b_g, b_b, m_in, C: tl.constexpr):
    """Sum of a tile's luma in steps of 2^-20, int64. Row sums are int32, enough for 2,047 pixels."""
    b_steps = (gray(b_r, b_g, b_b, C) * _MEAN_STEPS + 0.5).to(tl.int32)
    return tl.sum(tl.sum(tl.where(m_in, b_steps, 0), 1).to(tl.int64), 0)


@triton.jit
def from_contrast_on(b_r, b_g, b_b, row, total, SIZE: tl.constexpr, C: tl.constexpr):
    """Contrast, the operations after it, and grayscale. total: sum of the luma over the whole image."""
    steps: tl.constexpr = _MEAN_STEPS * SIZE * SIZE
    mean = (total.to(tl.float64) / steps).to(tl.float32)
    factor = p.real(row, p.CONTRAST)
    b_r = blend(b_r, mean, factor)
    b_g = blend(b_g, mean, factor)
    b_b = blend(b_b, mean, factor)
    b_r, b_g, b_b = jitter(b_r, b_g, b_b, row, p.whole(row, p.BEFORE), p.whole(row, p.COUNT), C)
    if p.whole(row, p.GRAYSCALE) != 0:
        b_luma = gray(b_r, b_g, b_b, C)
        b_r = b_luma
        b_g = b_luma
        b_b = b_luma
    return b_r, b_g, b_b


@triton.jit
def finish(b_v, row, statistics, i_c):
    """Solarise and normalise a channel. statistics (2, 3): means, standard deviations; a grey image uses the first."""
    m_flipped = (p.whole(row, p.SOLARIZE) != 0) & (b_v >= _SOLARIZE_THRESHOLD)
    b_v = tl.where(m_flipped, 1.0 - b_v, b_v)
    return (b_v - tl.load(statistics + i_c)) / tl.load(statistics + 3 + i_c)


@triton.jit
def store(views, b_r, b_g, b_b, row, statistics, i_v, o_y, o_x, m_in, SIZE: tl.constexpr, C: tl.constexpr):
    """Write a tile of a view, solarised and normalised unless a blur follows."""
    blurred = p.real(row, p.SIGMA) > 0.0
    p_v = views + i_v.to(tl.int64) * (C * SIZE * SIZE) + o_y[:, None] * SIZE + o_x[None, :]
    tl.store(p_v, tl.where(blurred, b_r, finish(b_r, row, statistics, 0)), mask=m_in)
    if C == 3:
        tl.store(p_v + SIZE * SIZE, tl.where(blurred, b_g, finish(b_g, row, statistics, 1)), mask=m_in)
        tl.store(p_v + 2 * SIZE * SIZE, tl.where(blurred, b_b, finish(b_b, row, statistics, 2)), mask=m_in)
