"""Crop, antialiased bilinear resize, flip and rotation of a tile of pixels, in grey levels.

Output pixel o has its centre at c = (o + 1/2) scale in the crop, and weights input pixels j of the crop by
1 - |j + 1/2 - c| / s, s = max(scale, 1), normalised to sum to one. As in torchvision and Pillow, rows are resized first
and both passes round to whole levels; a rotated view then interpolates between the results.

    read  up to (2 s + 1)^2 pixels for each output pixel, four times as many if views are rotated
"""

import triton
import triton.language as tl

from . import parameters as p


@triton.jit
def _round(b_v):
    return tl.floor(b_v + 0.5)


@triton.jit
def _axis(b_o, length, SIZE: tl.constexpr):
    """Centres, first taps, reciprocal of the support, and number of taps along one axis."""
    scale = tl.div_rn(length.to(tl.float32), float(SIZE))
    support = tl.maximum(scale, 1.0)
    b_centre = (b_o.to(tl.float32) + 0.5) * scale
    b_first = tl.maximum((b_centre - support + 0.5).to(tl.int32), 0)
    return b_centre, b_first, 1.0 / support, tl.ceil(2.0 * support).to(tl.int32)


@triton.jit
def _tap(b_first, i, b_centre, inverse, length):
    """Position and weight of the i-th tap; the weight is zero outside the crop."""
    b_j = b_first + i
    b_w = tl.maximum(1.0 - tl.abs(b_j.to(tl.float32) + 0.5 - b_centre) * inverse, 0.0)
    return tl.minimum(b_j, length - 1), tl.where(b_j < length, b_w, 0.0)


@triton.jit
def _resized(image, row, b_y, b_x, width, SIZE: tl.constexpr, C: tl.constexpr):
    """Levels of the cropped, resized and flipped image at rows b_y and columns b_x, which broadcast to a tile."""
    crop_h = p.whole(row, p.HEIGHT)
    crop_w = p.whole(row, p.WIDTH)
    corner = image + (p.whole(row, p.TOP) * width + p.whole(row, p.LEFT)) * C
    b_x = tl.where(p.whole(row, p.FLIP) != 0, SIZE - 1 - b_x, b_x)
    b_cy, b_y0, inverse_y, taps_y = _axis(b_y, crop_h, SIZE)
    b_cx, b_x0, inverse_x, taps_x = _axis(b_x, crop_w, SIZE)
    b_r = (b_cy + b_cx) * 0.0
    b_g = b_r
    b_b = b_r
    b_total_y = b_cy * 0.0
    for i_y in range(0, taps_y):
        b_jy, b_wy = _tap(b_y0, i_y, b_cy, inverse_y, crop_h)
        b_r1 = (b_cy + b_cx) * 0.0
        b_g1 = b_r1
        b_b1 = b_r1
        b_total_x = b_cx * 0.0
        for i_x in range(0, taps_x):
            b_jx, b_wx = _tap(b_x0, i_x, b_cx, inverse_x, crop_w)
            p_x = corner + (b_jy * width + b_jx) * C
            b_r1 += b_wx * tl.load(p_x).to(tl.float32)
            if C == 3:
                b_g1 += b_wx * tl.load(p_x + 1).to(tl.float32)
                b_b1 += b_wx * tl.load(p_x + 2).to(tl.float32)
            b_total_x += b_wx
        b_r += b_wy * _round(b_r1 / b_total_x)
        if C == 3:
            b_g += b_wy * _round(b_g1 / b_total_x)
            b_b += b_wy * _round(b_b1 / b_total_x)
        b_total_y += b_wy
    return _round(b_r / b_total_y), _round(b_g / b_total_y), _round(b_b / b_total_y)


@triton.jit
def _turned(image, row, b_y, b_x, width, SIZE: tl.constexpr, C: tl.constexpr):
    """Levels of the rotated image; pixels from outside are zero."""
    middle: tl.constexpr = (SIZE - 1) / 2
    b_dy = b_y.to(tl.float32) - middle
    b_dx = b_x.to(tl.float32) - middle
    cos = p.real(row, p.COS)
    sin = p.real(row, p.SIN)
    b_sx = cos * b_dx - sin * b_dy + middle
    b_sy = sin * b_dx + cos * b_dy + middle
    b_left = tl.floor(b_sx)
    b_top = tl.floor(b_sy)
    b_r = b_sx * 0.0
    b_g = b_r
    b_b = b_r
    for i in range(0, 4):
        b_cx = b_left + (i & 1)
        b_cy = b_top + (i >> 1)
        b_w = (1.0 - tl.abs(b_sx - b_cx)) * (1.0 - tl.abs(b_sy - b_cy))
        m_in = (b_cx >= 0) & (b_cx < SIZE) & (b_cy >= 0) & (b_cy < SIZE)
        b_w = tl.where(m_in, b_w, 0.0)
        b_cy = tl.minimum(tl.maximum(b_cy, 0.0), SIZE - 1.0).to(tl.int32)
        b_cx = tl.minimum(tl.maximum(b_cx, 0.0), SIZE - 1.0).to(tl.int32)
        b_r1, b_g1, b_b1 = _resized(image, row, b_cy, b_cx, width, SIZE, C)
        b_r += b_w * b_r1
        b_g += b_w * b_g1
        b_b += b_w * b_b1
    return _round(b_r), _round(b_g), _round(b_b)


@triton.jit
def levels(images, row, o_y, o_x, height, width, SIZE: tl.constexpr, C: tl.constexpr, TURNS: tl.constexpr):
    """Whole grey levels 0 .. 255 of a view, float32 (Y, X) per channel; for C = 1 only the first is valid.

    Rows and columns from SIZE on repeat the last one.
    """
    image = images + p.whole(row, p.IMAGE).to(tl.int64) * height * width * C
    b_y = tl.minimum(o_y, SIZE - 1)[:, None]
    b_x = tl.minimum(o_x, SIZE - 1)[None, :]
    if TURNS:
        b_r, b_g, b_b = _turned(image, row, b_y, b_x, width, SIZE, C)
    else:
        b_r, b_g, b_b = _resized(image, row, b_y, b_x, width, SIZE, C)
    return b_r, b_g, b_b
