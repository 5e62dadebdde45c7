"""Gradient of the rows, by recomputation: a program owns R rows and sees all candidates once.

    acc = (G + G') Z    one product for S, one for the gradient: 4 N N D operations, and no element has two writers

It is kept transposed, acc' (D, R) += Z_s' (D, S) W (S, R), so that both operands of both products lie in shared memory:
WGMMA with its first operand in registers is miscompiled by some versions of ptxas and serialised by others.

The result is float32 in working order; `finalize_kernel` adds view pairs, undoes the scales and the normalisation.
"""

import triton
import triton.language as tl

from ..common.numerics import (
    LOG2E,
    class_range,
    dot,
    inverse_temperature,
    load_tile,
    logit_scale,
    products,
    shift_log2,
    split_half,
)
from .backward_tile import tile_weights


@triton.jit
def _accumulate(b_acc, b_s, b_s_low, b_w, SPLIT: tl.constexpr):
    if SPLIT:
        b_w_high, b_w_low = split_half(b_w, b_s.dtype)
        b_acc = dot(tl.trans(b_s), b_w_high, b_acc)
        b_acc = dot(tl.trans(b_s), b_w_low, b_acc)
        b_acc = dot(tl.trans(b_s_low), b_w_high, b_acc)
    else:
        b_acc = dot(tl.trans(b_s), b_w.to(b_s.dtype), b_acc)
    return b_acc


@triton.jit
def backward_kernel(
    zr, zs, lo_r, hi_r, first_r, cls_s, smp_s,  # as in forward_kernel
    w_r, w_s,  # (5, rows) weights of the resident and the streamed rows
    stats_r, stats_s, src_r, src_s,  # read where the flag is set only
    acc,  # (slots, acc_rows, D) float32: acc_rows rows from the first block of this launch on; a slot for each split
    scale_r, scale_s, flag, t, t_value,
    n_r, n_s, rows_r, rows_s, first_block, first_slot, acc_rows,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, ALIGN: tl.constexpr, SPLITS: tl.constexpr,
    PLAIN: tl.constexpr, MASKED: tl.constexpr,  # which tiles this launch takes
    PEERS: tl.constexpr, SPLIT_PLAIN: tl.constexpr, SPLIT_MASKED: tl.constexpr,
    ONLINE: tl.constexpr, HAS_T: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_FLAG: tl.constexpr,
):  # fmt: skip
    if HAS_FLAG:
        if (tl.load(flag) != 0) != ONLINE:
            return
    block = tl.program_id(0)
    split = tl.program_id(1)
    start_r = (first_block + block) * BLOCK_R
    low_r = rows_r.to(tl.int64) * D
    low_s = rows_s.to(tl.int64) * D
    inverse_t = inverse_temperature(t, t_value, HAS_T)
    factor = logit_scale(inverse_t, scale_r, scale_s, HAS_SCALE) * LOG2E
    shift = shift_log2(inverse_t)
    b_r = load_tile(zr, start_r, BLOCK_R, D, D)
    SPLIT: tl.constexpr = (SPLIT_PLAIN and PLAIN) or (SPLIT_MASKED and MASKED)
    b_r_low = load_tile(zr + low_r, start_r, BLOCK_R, D, D) if SPLIT else b_r
    lo, hi = class_range(lo_r, hi_r, start_r, n_r, ALIGN)
    # A last tile with padding is masked: a product of 0 may well have a weight that half precision does not hold.
    whole = n_s // BLOCK_S * BLOCK_S
    n_before = lo // BLOCK_S
    n_plain = n_before + tl.maximum(whole - hi, 0) // BLOCK_S
    n_class = (tl.minimum(hi, tl.cdiv(n_s, BLOCK_S) * BLOCK_S) - lo) // BLOCK_S
    n_masked = n_class + tl.where((hi <= whole) & (whole < n_s), 1, 0)
    b_acc = tl.zeros([D, BLOCK_R], tl.float32)
    if PLAIN:
        for i in tl.range(n_plain * split // SPLITS, n_plain * (split + 1) // SPLITS):
            start_s = tl.where(i < n_before, i * BLOCK_S, hi + (i - n_before) * BLOCK_S)
            b_p, b_s, b_s_low = products(
                zs, zr, b_r, b_r_low, start_s, start_r, low_s, low_r, BLOCK_S, BLOCK_R, D, D, SPLIT_PLAIN
            )
            b_w = tile_weights(
                b_p * factor, shift, w_r, w_s, rows_r, rows_s, start_r, start_s, n_r, n_s, stats_r, stats_s,
                src_r, src_s, lo_r, first_r, cls_s, smp_s, BLOCK_S, BLOCK_R, False, PEERS, ONLINE,
            )  # fmt: skip
            b_acc = _accumulate(b_acc, b_s, b_s_low, b_w, SPLIT_PLAIN)
    if MASKED:
        for i in tl.range(n_masked * split // SPLITS, n_masked * (split + 1) // SPLITS):
            start_s = tl.where(i < n_class, lo + i * BLOCK_S, whole)
            b_p, b_s, b_s_low = products(
                zs, zr, b_r, b_r_low, start_s, start_r, low_s, low_r, BLOCK_S, BLOCK_R, D, D, SPLIT_MASKED
            )
            b_w = tile_weights(
                b_p * factor, shift, w_r, w_s, rows_r, rows_s, start_r, start_s, n_r, n_s, stats_r, stats_s,
                src_r, src_s, lo_r, first_r, cls_s, smp_s, BLOCK_S, BLOCK_R, True, PEERS, ONLINE,
            )  # fmt: skip
            b_acc = _accumulate(b_acc, b_s, b_s_low, b_w, SPLIT_MASKED)
    o_r = block * BLOCK_R + tl.arange(0, BLOCK_R)  # blocks are whole: none leaves acc_rows
    p_acc = acc + ((first_slot + split).to(tl.int64) * acc_rows + o_r[None, :]) * D + tl.arange(0, D)[:, None]
    tl.store(p_acc, b_acc)
