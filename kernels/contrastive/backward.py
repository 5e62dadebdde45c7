"""Gradient of the rows, by recomputation: a program owns R rows and visits all candidates once.

    acc = (G + G') Z    one product for S, one for the gradient: 4 N N D operations, and no element has two writers

The accumulator is transposed, acc' (D, R) += Z_s' (D, S) W (S, R), so that both operands of both products are in shared
memory: some versions of ptxas miscompile WGMMA with its first operand in registers, others serialise it.

The result is float32 in working order; `finalize_kernel` adds view pairs and undoes the scales and the normalisation.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.numerics import class_range, dot, load_block, logits_of, products, split_half
from .backward_tile import tile_weights


class Accumulator(NamedTuple):
    """Output of a wave of resident blocks: their gradient."""

    sums: Any  # (slots, rows, D) float32: rows from the wave's first block on, a slot for each split
    rows: int
    first_block: int
    first_slot: int  # of this launch


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
    r, s,  # Resident, Streamed
    w_r, w_s,  # their Weights
    acc,  # Accumulator
    temperature, flag,
    TILE,
    PLAIN: tl.constexpr, MASKED: tl.constexpr,  # which tiles this launch processes
    ONLINE: tl.constexpr,
):  # fmt: skip
    if flag is not None:
        if (tl.load(flag) != 0) != ONLINE:
            return
    block_r = tl.program_id(0)
    split = tl.program_id(1)
    start_r = (acc.first_block + block_r) * TILE.BLOCK_R
    logits = logits_of(temperature, r, s)
    block = load_block(r, start_r, TILE, (TILE.SPLIT_PLAIN and PLAIN) or (TILE.SPLIT_MASKED and MASKED))
    lo, hi = class_range(r, start_r, TILE.ALIGN)
    # A last tile with padding must be masked: for a product of 0 the weight may overflow half precision.
    whole = s.n // TILE.BLOCK_S * TILE.BLOCK_S
    n_before = lo // TILE.BLOCK_S
    n_plain = n_before + tl.maximum(whole - hi, 0) // TILE.BLOCK_S
    n_class = (tl.minimum(hi, tl.cdiv(s.n, TILE.BLOCK_S) * TILE.BLOCK_S) - lo) // TILE.BLOCK_S
    n_masked = n_class + tl.where((hi <= whole) & (whole < s.n), 1, 0)
    b_acc = tl.zeros([TILE.D, TILE.BLOCK_R], tl.float32)
    if PLAIN:
        for i in tl.range(n_plain * split // TILE.SPLITS, n_plain * (split + 1) // TILE.SPLITS):
            start_s = tl.where(i < n_before, i * TILE.BLOCK_S, hi + (i - n_before) * TILE.BLOCK_S)
            b_p, b_s, b_s_low = products(block, s, start_s, TILE, TILE.SPLIT_PLAIN)
            b_x = b_p * logits.factor
            b_w = tile_weights(b_x, logits.shift, r, s, w_r, w_s, start_r, start_s, TILE, False, ONLINE)
            b_acc = _accumulate(b_acc, b_s, b_s_low, b_w, TILE.SPLIT_PLAIN)
    if MASKED:
        for i in tl.range(n_masked * split // TILE.SPLITS, n_masked * (split + 1) // TILE.SPLITS):
            start_s = tl.where(i < n_class, lo + i * TILE.BLOCK_S, whole)
            b_p, b_s, b_s_low = products(block, s, start_s, TILE, TILE.SPLIT_MASKED)
            b_x = b_p * logits.factor
            b_w = tile_weights(b_x, logits.shift, r, s, w_r, w_s, start_r, start_s, TILE, True, ONLINE)
            b_acc = _accumulate(b_acc, b_s, b_s_low, b_w, TILE.SPLIT_MASKED)
    o_r = block_r * TILE.BLOCK_R + tl.arange(0, TILE.BLOCK_R)  # no mask: the wave's rows are whole blocks
    slot = (acc.first_slot + split).to(tl.int64)
    tl.store(acc.sums + (slot * acc.rows + o_r[None, :]) * TILE.D + tl.arange(0, TILE.D)[:, None], b_acc)
