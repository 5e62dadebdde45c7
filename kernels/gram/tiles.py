"""Sums over two Gram matrices without their diagonals, from tiles of both computed together: <K, L>, <K, K>, <L, L>,
and for "rbf" row sums.

A program works on block row `i` and every SPLITS-th tile from the diagonal to the right; a tile off the diagonal counts
twice. Elements of a tile are summed in float32, tiles in float64. For "rbf" a tile contributes to the row sums of its
rows and of its columns. They are added atomically as integers in units of 2^-32, so that their order does not matter.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.numerics import LOG2E, pieces

FIXED_POINT = tl.constexpr(4294967296.0)  # 2^32: entries of at most 1, up to 2^31 of them


class Features(NamedTuple):
    """One model's rows. The last three are for "rbf"; if None, entries are inner products."""

    z: Any  # (2, rows, D) half precision; rows from n on are zeros
    exponent: Any  # (1,) float32: 1 / (2 sigma^2)
    squares: Any  # (n,) float32: |v|^2
    totals: Any  # (n,) int64 row sums; must be zero before the launch


@triton.jit
def _exponential_less_one(b_t):
    """exp(t) - 1 for t <= 0, also if exp(t) is nearly 1: the error of six terms of the series is 2^-24 at t = -1/4."""
    b_series = b_t * (1 + b_t * (1 / 2 + b_t * (1 / 6 + b_t * (1 / 24 + b_t * (1 / 120 + b_t * (1 / 720))))))
    return tl.where(b_t > -0.25, b_series, tl.exp2(b_t * LOG2E) - 1)


@triton.jit
def _entries(b_p, model, o_i, o_j, n, WIDE: tl.constexpr):
    """Entries of K (WIDE: of K - 1) from products of working copies; 0 on the diagonal and in padding.

    Inner products, |v|^2 and 1 / (2 sigma^2) are all in units of the working copy's scale.
    """
    if model.exponent is not None:
        m_i = o_i < n
        m_j = o_j < n
        b_i = tl.load(model.squares + o_i, mask=m_i, other=0.0)
        b_j = tl.load(model.squares + o_j, mask=m_j, other=0.0)
        b_distance = tl.maximum(b_i[:, None] + b_j[None, :] - 2.0 * b_p, 0.0)
        b_power = -tl.load(model.exponent) * b_distance
        if WIDE:
            b_p = _exponential_less_one(b_power)
        else:
            b_p = tl.exp2(b_power * LOG2E)
        b_p = tl.where(m_i[:, None] & m_j[None, :], b_p, 0.0)
    return tl.where(o_i[:, None] == o_j[None, :], 0.0, b_p)


@triton.jit
def _add_rows(totals, o_n, n, b_sum):
    tl.atomic_add(totals + o_n, tl.cast(b_sum * FIXED_POINT, tl.int64), mask=o_n < n, sem="relaxed")


@triton.jit
def gram_kernel(
    x, y,  # Features of DX and DY columns
    sums,  # (blocks, SPLITS, 3) float64
    n, rows, blocks,
    DX: tl.constexpr, DY: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)  # blocks with the most tiles start first
    split = tl.program_id(1)
    low_x = rows.to(tl.int64) * DX
    low_y = rows.to(tl.int64) * DY
    o_i = i * BLOCK + tl.arange(0, BLOCK)
    xy = tl.zeros([], tl.float64)
    xx = xy
    yy = xy
    for j in tl.range(i + split, blocks, SPLITS):
        o_j = j * BLOCK + tl.arange(0, BLOCK)
        b_x = pieces(x.z, low_x, i * BLOCK, x.z, low_x, j * BLOCK, BLOCK, BLOCK, DX, BLOCK_D, True)
        b_x = _entries(b_x, x, o_i, o_j, n, WIDE)
        b_y = pieces(y.z, low_y, i * BLOCK, y.z, low_y, j * BLOCK, BLOCK, BLOCK, DY, BLOCK_D, True)
        b_y = _entries(b_y, y, o_i, o_j, n, WIDE)
        weight = tl.where(i == j, 1.0, 2.0)
        xy += tl.sum(b_x * b_y).to(tl.float64) * weight
        xx += tl.sum(b_x * b_x).to(tl.float64) * weight
        yy += tl.sum(b_y * b_y).to(tl.float64) * weight
        if x.totals is not None:
            _add_rows(x.totals, o_i, n, tl.sum(b_x, 1))
            _add_rows(y.totals, o_i, n, tl.sum(b_y, 1))
            if i != j:
                _add_rows(x.totals, o_j, n, tl.sum(b_x, 0))
                _add_rows(y.totals, o_j, n, tl.sum(b_y, 0))
    p_sums = sums + (i * SPLITS + split) * 3
    tl.store(p_sums, xy)
    tl.store(p_sums + 1, xx)
    tl.store(p_sums + 2, yy)
