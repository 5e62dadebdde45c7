"""Rendering of views: one launch if a view fits in a program, otherwise two; blur takes two more.

    small views: `view_kernel`                         read the crop, write 4 C SIZE SIZE bytes
    large views: `levels_kernel`, `colour_kernel`      in addition, C SIZE SIZE bytes written and read
    blur:        `blur_kernel` along x, then along y   2 times 4 C SIZE SIZE bytes read and written, blurred views only

Large views are cut into square tiles, and each tile stores the sum of its luma before contrast. A view depends only on
its image and its row of parameters: no program reads data of another view.
"""

import triton
import triton.language as tl

from . import colour
from . import parameters as p
from .geometry import levels


@triton.jit
def _tile(i_t, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Rows, columns and mask of the i-th tile of a view."""
    across: tl.constexpr = (SIZE + TILE - 1) // TILE
    o_y = i_t // across * TILE + tl.arange(0, TILE)
    o_x = i_t % across * TILE + tl.arange(0, TILE)
    return o_y, o_x, (o_y[:, None] < SIZE) & (o_x[None, :] < SIZE)


@triton.jit
def view_kernel(
    images,  # (n, height, width, C) uint8
    table,  # (views, COLUMNS) int32
    statistics,  # (2, 3) float32: means, standard deviations
    views,  # (views, C, SIZE, SIZE) float32
    height, width,
    SIZE: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """One view per program, SIZE <= TILE."""
    i_v = tl.program_id(0)
    row = table + i_v * p.COLUMNS
    o_y, o_x, m_in = _tile(0, SIZE, TILE)
    b_r, b_g, b_b = levels(images, row, o_y, o_x, height, width, SIZE, C, TURNS)
    b_r = colour.from_levels(b_r)
    b_g = colour.from_levels(b_g)
    b_b = colour.from_levels(b_b)
    b_r, b_g, b_b = colour.jitter(b_r, b_g, b_b, row, 0, p.whole(row, p.BEFORE), C)
    total = colour.luma_sum(b_r, b_g, b_b, m_in, C)
    b_r, b_g, b_b = colour.from_contrast_on(b_r, b_g, b_b, row, total, SIZE, C)
    colour.store(views, b_r, b_g, b_b, row, statistics, i_v, o_y, o_x, m_in, SIZE, C)


@triton.jit
def levels_kernel(
    images, table,  # as in view_kernel
    pixels,  # (views, C, SIZE, SIZE) uint8
    sums,  # (views, TILES) int64
    height, width,
    SIZE: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, TURNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Geometry of a tile, and the sum of its luma before contrast."""
    i_v = tl.program_id(0)
    i_t = tl.program_id(1)
    row = table + i_v * p.COLUMNS
    o_y, o_x, m_in = _tile(i_t, SIZE, TILE)
    b_r, b_g, b_b = levels(images, row, o_y, o_x, height, width, SIZE, C, TURNS)
    p_x = pixels + i_v.to(tl.int64) * (C * SIZE * SIZE) + o_y[:, None] * SIZE + o_x[None, :]
    tl.store(p_x, b_r.to(tl.uint8), mask=m_in)
    if C == 3:
        tl.store(p_x + SIZE * SIZE, b_g.to(tl.uint8), mask=m_in)
        tl.store(p_x + 2 * SIZE * SIZE, b_b.to(tl.uint8), mask=m_in)
    b_r = colour.from_levels(b_r)
    b_g = colour.from_levels(b_g)
    b_b = colour.from_levels(b_b)
    b_r, b_g, b_b = colour.jitter(b_r, b_g, b_b, row, 0, p.whole(row, p.BEFORE), C)
    tl.store(sums + i_v * TILES + i_t, colour.luma_sum(b_r, b_g, b_b, m_in, C))


@triton.jit
def colour_kernel(
    pixels, sums, table,  # as in levels_kernel
    statistics, views,  # as in view_kernel
    SIZE: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The whole colour chain of a tile."""
    i_v = tl.program_id(0)
    row = table + i_v * p.COLUMNS
    o_y, o_x, m_in = _tile(tl.program_id(1), SIZE, TILE)
    p_x = pixels + i_v.to(tl.int64) * (C * SIZE * SIZE) + o_y[:, None] * SIZE + o_x[None, :]
    b_r = colour.from_levels(tl.load(p_x, mask=m_in, other=0).to(tl.float32))
    b_g = b_r
    b_b = b_r
    if C == 3:
        b_g = colour.from_levels(tl.load(p_x + SIZE * SIZE, mask=m_in, other=0).to(tl.float32))
        b_b = colour.from_levels(tl.load(p_x + 2 * SIZE * SIZE, mask=m_in, other=0).to(tl.float32))
    o_t = tl.arange(0, BLOCK_T)
    total = tl.sum(tl.load(sums + i_v * TILES + o_t, mask=o_t < TILES, other=0), 0)
    b_r, b_g, b_b = colour.jitter(b_r, b_g, b_b, row, 0, p.whole(row, p.BEFORE), C)
    b_r, b_g, b_b = colour.from_contrast_on(b_r, b_g, b_b, row, total, SIZE, C)
    colour.store(views, b_r, b_g, b_b, row, statistics, i_v, o_y, o_x, m_in, SIZE, C)


@triton.jit
def blur_kernel(
    blurred,  # (programs / C,) int32: indices of the views to blur
    table, statistics, views,  # as in view_kernel
    rows,  # (programs / C, C, SIZE, SIZE) float32: blurred along x
    SIZE: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, KERNEL: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Blur a tile of a channel along one axis, reflecting at the border: x from views to rows, LAST: y and back."""
    i_p = tl.program_id(0)
    i_c = i_p % C
    i_v = tl.load(blurred + i_p // C)
    row = table + i_v * p.COLUMNS
    o_y, o_x, m_in = _tile(tl.program_id(1), SIZE, TILE)
    sigma = p.real(row, p.SIGMA)
    p_views = views + (i_v.to(tl.int64) * C + i_c) * (SIZE * SIZE)
    p_rows = rows + i_p.to(tl.int64) * (SIZE * SIZE)
    b_v = tl.zeros([TILE, TILE], tl.float32)
    total = 0.0
    for k in range(-(KERNEL // 2), KERNEL // 2 + 1):
        distance = k / sigma
        weight = tl.exp(-0.5 * distance * distance)
        o_k = tl.abs((o_y if LAST else o_x) + k)
        o_k = tl.where(o_k < SIZE, o_k, 2 * (SIZE - 1) - o_k)
        if LAST:
            b_k = tl.load(p_rows + o_k[:, None] * SIZE + o_x[None, :], mask=m_in, other=0.0)
        else:
            b_k = tl.load(p_views + o_y[:, None] * SIZE + o_k[None, :], mask=m_in, other=0.0)
        b_v += weight * b_k
        total += weight
    b_v = b_v / total
    o_p = o_y[:, None] * SIZE + o_x[None, :]
    if LAST:
        tl.store(p_views + o_p, colour.finish(b_v, row, statistics, i_c), mask=m_in)
    else:
        tl.store(p_rows + o_p, b_v, mask=m_in)
