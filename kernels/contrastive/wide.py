"""Gradient of wide rows, whose float32 accumulator does not fit a program: weights to memory, then plain products.

Both passes run on square blocks of pairs, small enough for the workspace. Where the candidates are the rows themselves,
a block above the diagonal serves the rows of both sides: 3 N N D operations in place of 4.
"""

import triton
import triton.language as tl

from ..common.numerics import (
    LOG2E,
    class_range,
    dot,
    inverse_temperature,
    logit_scale,
    products,
    shift_log2,
    split_half,
)
from .backward_tile import tile_weights


@triton.jit
def pair_weights_kernel(
    zr, zs, lo_r, hi_r, first_r, cls_s, smp_s, w_r, w_s, stats_r, stats_s, src_r, src_s,
    w,  # (2 or 1, size, size) half precision: weights of rows first_s + . and columns first_r + ., and their remainder
    scale_r, scale_s, flag, t, t_value,
    n_r, n_s, rows_r, rows_s, first_r_row, first_s_row, size,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    PEERS: tl.constexpr, SPLIT_PLAIN: tl.constexpr, SPLIT_MASKED: tl.constexpr,
    ONLINE: tl.constexpr, HAS_T: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_FLAG: tl.constexpr,
):  # fmt: skip
    if HAS_FLAG:
        if (tl.load(flag) != 0) != ONLINE:
            return
    o_r = tl.program_id(0) * BLOCK_R
    o_s = tl.program_id(1) * BLOCK_S
    start_r = first_r_row + o_r
    start_s = first_s_row + o_s
    low_r = rows_r.to(tl.int64) * D
    low_s = rows_s.to(tl.int64) * D
    inverse_t = inverse_temperature(t, t_value, HAS_T)
    factor = logit_scale(inverse_t, scale_r, scale_s, HAS_SCALE) * LOG2E
    shift = shift_log2(inverse_t)
    lo, hi = class_range(lo_r, hi_r, start_r, n_r, ALIGN)
    # A width of more than BLOCK_D is taken from memory piece by piece: no rows stay resident.
    b_none = tl.zeros([BLOCK_R, BLOCK_D], zr.dtype.element_ty)
    # Padding is masked: a product of 0 may well have a weight that half precision does not hold.
    padded = (start_s + BLOCK_S > n_s) | (start_r + BLOCK_R > n_r)
    if ((start_s >= lo) & (start_s < hi)) | padded:
        b_p, _, _ = products(
            zs, zr, b_none, b_none, start_s, start_r, low_s, low_r, BLOCK_S, BLOCK_R, D, BLOCK_D, SPLIT_MASKED
        )
        b_w = tile_weights(
            b_p * factor, shift, w_r, w_s, rows_r, rows_s, start_r, start_s, n_r, n_s, stats_r, stats_s, src_r, src_s,
            lo_r, first_r, cls_s, smp_s, BLOCK_S, BLOCK_R, True, PEERS, ONLINE,
        )  # fmt: skip
    else:
        b_p, _, _ = products(
            zs, zr, b_none, b_none, start_s, start_r, low_s, low_r, BLOCK_S, BLOCK_R, D, BLOCK_D, SPLIT_PLAIN
        )
        b_w = tile_weights(
            b_p * factor, shift, w_r, w_s, rows_r, rows_s, start_r, start_s, n_r, n_s, stats_r, stats_s, src_r, src_s,
            lo_r, first_r, cls_s, smp_s, BLOCK_S, BLOCK_R, False, PEERS, ONLINE,
        )  # fmt: skip
    b_high, b_low = split_half(b_w, w.dtype.element_ty)
    p_w = w + (o_s + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None] * size + (o_r + tl.arange(0, BLOCK_R))[None, :]
    tl.store(p_w, b_high)
    if SPLIT_PLAIN or SPLIT_MASKED:
        tl.store(p_w + size.to(tl.int64) * size, b_low)


@triton.jit
def _load_weights(w, o_m, o_k, size, TRANSPOSED: tl.constexpr):
    """(M, K) weights; TRANSPOSED: the output rows are the streamed rows, along which w is stored row by row."""
    if TRANSPOSED:
        b_w = tl.load(w + o_m.to(tl.int64)[:, None] * size + o_k[None, :])
    else:
        b_w = tl.trans(tl.load(w + o_k.to(tl.int64)[:, None] * size + o_m[None, :]))
    return b_w


@triton.jit
def _load_rows(z, start, m_d, BLOCK_K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start .. of some columns of a working copy, whose last block of columns may be cut short."""
    o_z = tl.arange(0, BLOCK_K)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(z + tl.cast(start, tl.int64) * D + o_z, mask=m_d[None, :], other=0.0)


@triton.jit
def product_kernel(
    w,  # (2 or 1, size, size)
    z,  # (2 or 1, z_rows, D) working copy of the rows summed over
    src_N,  # (n,) int32: source row of each output row
    lo_N, hi_N,  # (n,) int32: class ranges of the output rows among the rows summed over
    acc,  # (n, d) float32 in source order
    n, d, z_rows, first_m, first_k, size_k, size,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    TRANSPOSED: tl.constexpr, SPLIT_PLAIN: tl.constexpr, SPLIT_MASKED: tl.constexpr,
    ADD: tl.constexpr,  # to what acc holds; False: overwrite it
):  # fmt: skip
    start_m = tl.program_id(0) * BLOCK_M
    start_d = tl.program_id(1) * BLOCK_D
    o_m = start_m + tl.arange(0, BLOCK_M)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    z += first_k.to(tl.int64) * D + start_d
    m_d = start_d + tl.arange(0, BLOCK_D) < D
    for i_k in tl.range(0, size_k, BLOCK_K):
        b_w = _load_weights(w, o_m, i_k + tl.arange(0, BLOCK_K), size, TRANSPOSED)
        b_acc = dot(b_w, _load_rows(z, i_k, m_d, BLOCK_K, D, BLOCK_D), b_acc)
    if SPLIT_MASKED:  # the remainders, everywhere or where classes are shared
        first = 0
        last = size_k
        if not SPLIT_PLAIN:
            lo, hi = class_range(lo_N, hi_N, first_m + start_m, n, ALIGN)
            first = tl.minimum(tl.maximum(lo - first_k, 0), size_k)
            last = tl.minimum(tl.maximum(hi - first_k, 0), size_k)
        w_low = w + size.to(tl.int64) * size
        z_low = z + z_rows.to(tl.int64) * D
        for i_k in tl.range(first, last, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            b_w = _load_weights(w, o_m, o_k, size, TRANSPOSED)
            b_acc = dot(b_w, _load_rows(z_low, i_k, m_d, BLOCK_K, D, BLOCK_D), b_acc)
            b_w = _load_weights(w_low, o_m, o_k, size, TRANSPOSED)
            b_acc = dot(b_w, _load_rows(z, i_k, m_d, BLOCK_K, D, BLOCK_D), b_acc)
    o_d = start_d + tl.arange(0, BLOCK_D)
    m_m = first_m + o_m < n
    b_src = tl.load(src_N + first_m + o_m, mask=m_m, other=0).to(tl.int64)
    p_acc = acc + b_src[:, None] * d + o_d[None, :]
    m_acc = m_m[:, None] & (o_d < d)[None, :]
    if ADD:
        # Each element has one writer in a launch, and launches follow each other: the order of additions is fixed. An
        # atomic one happens in the cache, and the old values take no registers.
        tl.atomic_add(p_acc, b_acc, mask=m_acc, sem="relaxed")
    else:
        tl.store(p_acc, b_acc, mask=m_acc)
