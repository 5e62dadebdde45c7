"""Symmetric product [V_1 | V_2 | ... | E]' [V_1 | V_2 | ... | E] of a chunk of stacked rows; half of its tiles.

V_m: model m's shifted rows, padded to whole blocks of columns. E: columns for all models, |v|^2 and <pilot, v> of each,
and 1. So a single product gives the cross-moments of all pairs of models and every sum with the columns of E. Sums are
float32 within a chunk; the one program of a tile adds it to the float64 sums.

    rows r of the chunk are streamed past a tile of columns (A, B); 3 products in split half precision
    read  (2 A + 2 B) rows half-precision numbers per tile, read and write A B float64

Models with equal features have bitwise equal moments: a tile of columns (a, b) of two models is computed as it would be
for one model with itself, from the lower block of columns to the higher, and stored transposed if that swaps the two.
"""

import triton
import triton.language as tl

from ..common.numerics import split_dot


@triton.jit
def _columns(z, start_n, start_d, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    o_n = tl.cast(start_n, tl.int64) + tl.arange(0, BLOCK_N)
    o_d = start_d + tl.arange(0, BLOCK_D)
    return tl.load(z + o_n[:, None] * width + o_d[None, :])


@triton.jit
def _halves(b_tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right halves of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(b_tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _add(sums, unscale, a, b, stride_a, stride_b, b_sum, BLOCK: tl.constexpr):
    """Add a (BLOCK, BLOCK // 4) block to the sums at columns a and b of the stack."""
    o_a = tl.arange(0, BLOCK)
    o_b = tl.arange(0, BLOCK // 4)
    b_unscaled = b_sum.to(tl.float64) * tl.load(unscale + a + o_a)[:, None] * tl.load(unscale + b + o_b)[None, :]
    p_sums = sums + a.to(tl.int64) * stride_a + b.to(tl.int64) * stride_b
    p_sums += o_a[:, None] * stride_a + o_b[None, :] * stride_b
    tl.store(p_sums, tl.load(p_sums) + b_unscaled)


@triton.jit
def moments_kernel(
    z,  # (2, rows, width) half precision: working copy and remainder
    unscale,  # (width,) float64: reciprocal of each column's scale
    tiles,  # (programs, 2) int32: first columns of the two blocks
    turned,  # (programs,) int32: 1 if the tile is stored transposed
    sums,  # (width, width) float64
    rows, width,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0)
    a = tl.multiple_of(tl.load(tiles + 2 * i_t), BLOCK)
    b = tl.multiple_of(tl.load(tiles + 2 * i_t + 1), BLOCK)
    low = rows.to(tl.int64) * width
    b_sum = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i_n in tl.range(0, rows, BLOCK_N):
        b_a = _columns(z, i_n, a, width, BLOCK_N, BLOCK)
        b_b = _columns(z, i_n, b, width, BLOCK_N, BLOCK)
        b_b_low = _columns(z + low, i_n, b, width, BLOCK_N, BLOCK)
        b_a_low = _columns(z + low, i_n, a, width, BLOCK_N, BLOCK)
        b_sum = split_dot(tl.trans(b_a), tl.trans(b_a_low), b_b, b_b_low, b_sum, True)
    is_turned = tl.load(turned + i_t) != 0
    stride_a = tl.where(is_turned, 1, width)
    stride_b = tl.where(is_turned, width, 1)
    # A quarter of the tile at a time: in float64 it takes twice as many registers.
    b_left, b_right = _halves(b_sum, BLOCK, BLOCK)
    b_1, b_2 = _halves(b_left, BLOCK, BLOCK // 2)
    b_3, b_4 = _halves(b_right, BLOCK, BLOCK // 2)
    _add(sums, unscale, a, b, stride_a, stride_b, b_1, BLOCK)
    _add(sums, unscale, a, b + BLOCK // 4, stride_a, stride_b, b_2, BLOCK)
    _add(sums, unscale, a, b + BLOCK // 2, stride_a, stride_b, b_3, BLOCK)
    _add(sums, unscale, a, b + 3 * BLOCK // 4, stride_a, stride_b, b_4, BLOCK)
