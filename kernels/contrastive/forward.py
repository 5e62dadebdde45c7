"""Sums of exponentials per relation, in one pass over tiles of the similarity matrix.

A program keeps a block of R rows resident and lets the candidates stream past in tiles of S. Rows are sorted by class,
so same-class pairs lie in one range of tiles (`class_range`); outside it a tile holds the relation `other` alone and
costs a product, one exponential per element and two sums.

Symmetric case (the candidates are the rows themselves): a program streams only the rows before its class range, and
each of these tiles serves its resident and its streamed rows. The tiles of the class range are formed from both sides,
each for its resident rows alone, so peers need no second buffer.

    part_r (slots, 3, rows): what the resident rows got, a slot for each program that shares them: sum of exp over
                             others, over peers, sum of peers' products
    part_s (blocks, rows): what the streamed rows got from each block of resident rows

Nothing is added in memory and every element has one writer: the sums do not depend on timing. `finish_kernel` adds
them up.
"""

import triton
import triton.language as tl

from ..common.numerics import (
    LN2,
    LOG2E,
    begin,
    class_range,
    inverse_temperature,
    load_tile,
    logit_scale,
    products,
    relations,
    shift_log2,
)


@triton.jit
def _plain_loop(
    zs, zr, b_r, b_r_low, part_s, first, last, n_before, hi, start_r, low_s, low_r, factor, shift, n_r,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, BOTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """(R,) sums over tiles first .. last - 1, of which the first n_before lie before the class range, the rest from hi.

    PADDED: resident rows from n_r on are padding, which the streamed rows must not see.
    """
    b_sum = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    m_r = start_r + tl.arange(0, BLOCK_R) < n_r
    for i in tl.range(first, last):
        start_s = tl.where(i < n_before, i * BLOCK_S, hi + (i - n_before) * BLOCK_S)
        b_p, _, _ = products(zs, zr, b_r, b_r_low, start_s, start_r, low_s, low_r, BLOCK_S, BLOCK_R, D, BLOCK_D, SPLIT)
        b_e = tl.exp2(b_p * factor - shift)
        if PADDED:
            b_e = tl.where(m_r[None, :], b_e, 0.0)
        b_sum += b_e
        if BOTH:
            tl.store(part_s + start_s + tl.arange(0, BLOCK_S), tl.sum(b_e, 1))
    return tl.sum(b_sum, 0)


@triton.jit
def _plain_tiles(
    zs, zr, b_r, b_r_low, part_s, lo, hi, whole, split, start_r, low_s, low_r, factor, shift, n_r,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    SYMMETRIC: tl.constexpr, BOTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """(R,) sums over a split's share of the tiles outside the class range; symmetric: of those before it."""
    n_before = lo // BLOCK_S
    n_plain = n_before
    if not SYMMETRIC:
        n_plain += tl.maximum(whole - hi, 0) // BLOCK_S
    first = (n_plain.to(tl.int64) * split // SPLITS).to(tl.int32)
    last = (n_plain.to(tl.int64) * (split + 1) // SPLITS).to(tl.int32)
    if BOTH and start_r + BLOCK_R > n_r:
        b_sum = _plain_loop(
            zs, zr, b_r, b_r_low, part_s, first, last, n_before, hi, start_r, low_s, low_r, factor, shift, n_r,
            BLOCK_R, BLOCK_S, D, BLOCK_D, SPLIT, BOTH, True,
        )  # fmt: skip
    else:
        b_sum = _plain_loop(
            zs, zr, b_r, b_r_low, part_s, first, last, n_before, hi, start_r, low_s, low_r, factor, shift, n_r,
            BLOCK_R, BLOCK_S, D, BLOCK_D, SPLIT, BOTH, False,
        )  # fmt: skip
    return b_sum


@triton.jit
def _masked_tiles(
    zs, zr, b_r, b_r_low, lo_r, first_r, cls_s, smp_s, part_s, lo, hi, whole, split, start_r, low_s, low_r,
    factor, shift, n_r, n_s,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    SYMMETRIC: tl.constexpr, BOTH: tl.constexpr, PEERS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """(R,) sums over a split's share of the class range, and of a last tile with padding: others, peers, products."""
    o_r = start_r + tl.arange(0, BLOCK_R)
    m_r = o_r < n_r
    b_other = tl.zeros([BLOCK_R], tl.float32)
    b_peer = b_other
    b_linear = b_other
    n_class = (tl.minimum(hi, (n_s + BLOCK_S - 1) // BLOCK_S * BLOCK_S) - lo) // BLOCK_S
    n_masked = n_class
    if not SYMMETRIC:
        n_masked += tl.where((hi <= whole) & (whole < n_s), 1, 0)
    for i in tl.range(n_masked * split // SPLITS, n_masked * (split + 1) // SPLITS):
        start_s = tl.where(i < n_class, lo + i * BLOCK_S, whole)
        o_s = start_s + tl.arange(0, BLOCK_S)
        b_p, _, _ = products(zs, zr, b_r, b_r_low, start_s, start_r, low_s, low_r, BLOCK_S, BLOCK_R, D, BLOCK_D, SPLIT)
        m_other, m_peer = relations(lo_r, first_r, cls_s, smp_s, o_r, m_r, o_s, o_s < n_s)
        b_e = tl.exp2(b_p * factor - shift)
        b_e_other = tl.where(m_other, b_e, 0.0)
        b_other += tl.sum(b_e_other, 0)
        if BOTH and not SYMMETRIC:
            tl.store(part_s + o_s, tl.sum(tl.where(m_r[None, :], b_e_other, 0.0), 1), mask=o_s < n_s)
        if PEERS:
            b_peer += tl.sum(tl.where(m_peer, b_e, 0.0), 0)
            b_linear += tl.sum(tl.where(m_peer, b_p, 0.0), 0)
    return b_other, b_peer, b_linear


@triton.jit
def forward_kernel(
    zr, zs,  # working copies (., rows, D) of the resident and the streamed rows
    lo_r, hi_r, first_r,  # (n_r,) int32: each resident row's class, and its sample's begin, among the streamed rows
    cls_s, smp_s,  # (n_s,) int32: where each streamed row's class and sample begin
    part_r, part_s, scale_r, scale_s, flag, t, t_value,
    n_r, n_s, rows_r, rows_s, first_block, n_blocks, first_slot,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share the tiles of a resident block
    SYMMETRIC: tl.constexpr, BOTH: tl.constexpr,  # BOTH: the streamed rows' sums too
    PLAIN: tl.constexpr, MASKED: tl.constexpr,  # which tiles this launch takes
    PEERS: tl.constexpr,  # sums over peers are wanted
    SPLIT_PLAIN: tl.constexpr, SPLIT_MASKED: tl.constexpr,  # products in split half precision
    HAS_T: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_FLAG: tl.constexpr,
):  # fmt: skip
    if HAS_FLAG:
        if tl.load(flag) != 0:
            return
    # The block with the most tiles first: what is left over at the end is small.
    block = n_blocks - 1 - tl.program_id(0)
    split = tl.program_id(1)
    start_r = (first_block + block) * BLOCK_R
    low_r = rows_r.to(tl.int64) * D
    low_s = rows_s.to(tl.int64) * D
    inverse_t = inverse_temperature(t, t_value, HAS_T)
    factor = logit_scale(inverse_t, scale_r, scale_s, HAS_SCALE) * LOG2E
    shift = shift_log2(inverse_t)
    part_s += block.to(tl.int64) * rows_s
    b_r = load_tile(zr, start_r, BLOCK_R, D, BLOCK_D)
    b_r_low = b_r
    if (SPLIT_PLAIN and PLAIN) or (SPLIT_MASKED and MASKED):
        b_r_low = load_tile(zr + low_r, start_r, BLOCK_R, D, BLOCK_D)

    lo, hi = class_range(lo_r, hi_r, start_r, n_r, ALIGN)
    whole = n_s // BLOCK_S * BLOCK_S  # a last tile with padding is masked
    b_other = tl.zeros([BLOCK_R], tl.float32)
    b_peer = b_other
    b_linear = b_other
    if PLAIN:
        b_other += _plain_tiles(
            zs, zr, b_r, b_r_low, part_s, lo, hi, whole, split, start_r, low_s, low_r, factor, shift, n_r,
            BLOCK_R, BLOCK_S, D, BLOCK_D, SPLITS, SYMMETRIC, BOTH, SPLIT_PLAIN,
        )  # fmt: skip
    if MASKED:
        b_masked, b_peer, b_linear = _masked_tiles(
            zs, zr, b_r, b_r_low, lo_r, first_r, cls_s, smp_s, part_s, lo, hi, whole, split, start_r, low_s, low_r,
            factor, shift, n_r, n_s,
            BLOCK_R, BLOCK_S, D, BLOCK_D, SPLITS, SYMMETRIC, BOTH, PEERS, SPLIT_MASKED,
        )  # fmt: skip
        b_other += b_masked
    o_r = start_r + tl.arange(0, BLOCK_R)
    m_r = o_r < n_r
    p_part = part_r + (first_slot + split).to(tl.int64) * 3 * rows_r + o_r
    tl.store(p_part, b_other, mask=m_r)
    if PEERS:
        tl.store(p_part + rows_r, b_peer, mask=m_r)
        tl.store(p_part + 2 * rows_r, b_linear * (factor * LN2), mask=m_r)


@triton.jit
def _add_online(b_max, b_sum, b_x, m):
    """One tile's exponentials under a mask, added to a running (maximum, sum) in units of log2."""
    b_new = tl.maximum(b_max, tl.max(tl.where(m, b_x, float("-inf")), 0))
    b_at = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_sum = b_sum * tl.exp2(b_max - b_at) + tl.sum(tl.where(m, tl.exp2(b_x - b_at[None, :]), 0.0), 0)
    return b_new, b_sum


@triton.jit
def forward_online_kernel(
    zr, zs, lo_r, hi_r, first_r, cls_s, smp_s, last_r, src_r, stats, scale_r, scale_s, flag, t, t_value,
    n_r, n_s, rows_r, rows_s,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    PEERS: tl.constexpr, SPLIT: tl.constexpr, HAS_T: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Where the flag says that a fixed shift does not do: log-sum-exps about a running maximum, over all tiles.

    Writes rows 2 to 4 of stats (5, n_r) in source order: mean_peer, lse_peer, lse_other.
    """
    if tl.load(flag) == 0:
        return
    start_r = tl.program_id(0) * BLOCK_R
    low_r = rows_r.to(tl.int64) * D
    low_s = rows_s.to(tl.int64) * D
    factor = logit_scale(inverse_temperature(t, t_value, HAS_T), scale_r, scale_s, HAS_SCALE) * LOG2E
    b_r = load_tile(zr, start_r, BLOCK_R, D, BLOCK_D)
    b_r_low = b_r
    if SPLIT:
        b_r_low = load_tile(zr + low_r, start_r, BLOCK_R, D, BLOCK_D)
    o_r = start_r + tl.arange(0, BLOCK_R)
    m_r = o_r < n_r
    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_max_peer = b_max
    b_other = tl.zeros([BLOCK_R], tl.float32)
    b_peer = b_other
    b_linear = b_other
    for start_s in tl.range(0, n_s, BLOCK_S):
        o_s = start_s + tl.arange(0, BLOCK_S)
        b_p, _, _ = products(zs, zr, b_r, b_r_low, start_s, start_r, low_s, low_r, BLOCK_S, BLOCK_R, D, BLOCK_D, SPLIT)
        m_other, m_peer = relations(lo_r, first_r, cls_s, smp_s, o_r, m_r, o_s, o_s < n_s)
        b_x = b_p * factor
        b_max, b_other = _add_online(b_max, b_other, b_x, m_other)
        if PEERS:
            b_max_peer, b_peer = _add_online(b_max_peer, b_peer, b_x, m_peer)
            b_linear += tl.sum(tl.where(m_peer, b_x, 0.0), 0)
    b_src = tl.load(src_r + o_r, mask=m_r, other=0)
    tl.store(stats + 4 * n_r + b_src, (b_max + tl.log2(b_other)) * LN2, mask=m_r)
    if PEERS:
        b_n = tl.load(hi_r + o_r, mask=m_r, other=0) - begin(tl.load(lo_r + o_r, mask=m_r, other=0))
        b_n -= tl.load(last_r + o_r, mask=m_r, other=0) - begin(tl.load(first_r + o_r, mask=m_r, other=0))
        tl.store(stats + 2 * n_r + b_src, b_linear * LN2 / tl.maximum(b_n, 1).to(tl.float32), mask=m_r)
        tl.store(stats + 3 * n_r + b_src, (b_max_peer + tl.log2(b_peer)) * LN2, mask=m_r)
    else:
        tl.store(stats + 2 * n_r + b_src, b_linear, mask=m_r)
        tl.store(stats + 3 * n_r + b_src, b_max_peer, mask=m_r)
