"""Two models on the same samples: the sums of `forward_kernel` for both, and sums over both matrices of cosines.

With K and L the cosines of the models' rows less their means over all pairs, a program adds up

    |K - L|^2, |K|^2, |L|^2        of which 2 <K, L> = |K|^2 + |L|^2 - |K - L|^2

over the tiles that it forms for the row statistics: the tiles of both models are in its registers at the same time,
and the three sums cost no product of their own. Means are removed element by element, so that digits are kept where all
cosines are nearly equal; the difference is squared, so that they are kept where both models are.

The candidates are the rows themselves, and both models' rows lie in one order (`layout`); which tiles are plain and
which masked is the same for both. A plain tile serves its resident and its streamed rows, and counts twice for the
pairs. Masked tiles are formed from both sides, and count once. They have a launch of their own: a thread holds six sums
for each of its resident rows there, and plain tiles of that kernel's size would be half as large.
"""

import triton
import triton.language as tl

from ..common.numerics import (
    LN2,
    LOG2E,
    SCALE,
    class_range,
    inverse_temperature,
    load_tile,
    logit_scale,
    products,
    relations,
    shift_log2,
)


@triton.jit
def _deviations(b_p, mean):
    """Cosines less their mean, from products of working copies."""
    return b_p * (1.0 / (SCALE * SCALE)) - mean


@triton.jit
def _pair_sums(b_dd, b_kk, b_ll, b_k, b_l):
    """(S,) sums along each streamed row. A row lies in few threads: adding it up costs no exchange between warps."""
    b_d = b_k - b_l
    return b_dd + tl.sum(b_d * b_d, 1), b_kk + tl.sum(b_k * b_k, 1), b_ll + tl.sum(b_l * b_l, 1)


@triton.jit
def _plain_tile(b_sum, b_p, p_part, m_r, factor, shift, mean, PADDED: tl.constexpr):
    """A tile of one model: exponentials to its resident and its streamed rows; its cosines less their mean."""
    b_e = tl.exp2(b_p * factor - shift)
    b_d = _deviations(b_p, mean)
    if PADDED:
        b_e = tl.where(m_r, b_e, 0.0)
        b_d = tl.where(m_r, b_d, 0.0)
    tl.store(p_part, tl.sum(b_e, 1))
    return b_sum + b_e, b_d


@triton.jit
def _plain_loop(
    za, zb, b_a, b_a_low, b_b, b_b_low, part_sa, part_sb, first, last, start_r, low_a, low_b, factor, shift,
    mean_k, mean_l, n,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, DA: tl.constexpr, BLOCK_DA: tl.constexpr, DB: tl.constexpr,
    BLOCK_DB: tl.constexpr, SPLIT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """(R,) sums of both models over tiles first .. last - 1, and (S,) sums for pairs; PADDED as in forward_kernel."""
    b_sum_a = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    b_sum_b = b_sum_a
    b_dd = tl.zeros([BLOCK_S], tl.float32)
    b_kk = b_dd
    b_ll = b_dd
    m_r = (start_r + tl.arange(0, BLOCK_R) < n)[None, :]
    for i in tl.range(first, last):
        start_s = i * BLOCK_S
        o_s = start_s + tl.arange(0, BLOCK_S)
        # One model after the other, so that no more than a product and the first model's deviations are held at a time.
        b_p, _, _ = products(
            za, za, b_a, b_a_low, start_s, start_r, low_a, low_a, BLOCK_S, BLOCK_R, DA, BLOCK_DA, SPLIT
        )
        b_sum_a, b_k = _plain_tile(b_sum_a, b_p, part_sa + o_s, m_r, factor, shift, mean_k, PADDED)
        b_p, _, _ = products(
            zb, zb, b_b, b_b_low, start_s, start_r, low_b, low_b, BLOCK_S, BLOCK_R, DB, BLOCK_DB, SPLIT
        )
        b_sum_b, b_l = _plain_tile(b_sum_b, b_p, part_sb + o_s, m_r, factor, shift, mean_l, PADDED)
        b_dd, b_kk, b_ll = _pair_sums(b_dd, b_kk, b_ll, b_k, b_l)
    return tl.sum(b_sum_a, 0), tl.sum(b_sum_b, 0), b_dd, b_kk, b_ll


@triton.jit
def _plain_tiles(
    za, zb, b_a, b_a_low, b_b, b_b_low, part_sa, part_sb, n_plain, split, start_r, low_a, low_b, factor, shift,
    mean_k, mean_l, n,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, DA: tl.constexpr, BLOCK_DA: tl.constexpr, DB: tl.constexpr,
    BLOCK_DB: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What `_plain_loop` gives for a split's share of the tiles before the class range."""
    first = (n_plain.to(tl.int64) * split // SPLITS).to(tl.int32)
    last = (n_plain.to(tl.int64) * (split + 1) // SPLITS).to(tl.int32)
    if start_r + BLOCK_R > n:
        b_a_sum, b_b_sum, b_dd, b_kk, b_ll = _plain_loop(
            za, zb, b_a, b_a_low, b_b, b_b_low, part_sa, part_sb, first, last, start_r, low_a, low_b, factor, shift,
            mean_k, mean_l, n, BLOCK_R, BLOCK_S, DA, BLOCK_DA, DB, BLOCK_DB, SPLIT, True,
        )  # fmt: skip
    else:
        b_a_sum, b_b_sum, b_dd, b_kk, b_ll = _plain_loop(
            za, zb, b_a, b_a_low, b_b, b_b_low, part_sa, part_sb, first, last, start_r, low_a, low_b, factor, shift,
            mean_k, mean_l, n, BLOCK_R, BLOCK_S, DA, BLOCK_DA, DB, BLOCK_DB, SPLIT, False,
        )  # fmt: skip
    return b_a_sum, b_b_sum, b_dd, b_kk, b_ll


@triton.jit
def _masked_tile(b_other, b_peer, b_linear, b_p, lo_N, first_N, o_r, o_s, n, factor, shift, PEERS: tl.constexpr):
    """A tile of one model, added to its (R,) sums over others, over peers, and of peers' products."""
    m_other, m_peer = relations(lo_N, first_N, lo_N, first_N, o_r, o_r < n, o_s, o_s < n)
    b_e = tl.exp2(b_p * factor - shift)
    b_other += tl.sum(tl.where(m_other, b_e, 0.0), 0)
    if PEERS:
        b_peer += tl.sum(tl.where(m_peer, b_e, 0.0), 0)
        b_linear += tl.sum(tl.where(m_peer, b_p, 0.0), 0)
    return b_other, b_peer, b_linear


@triton.jit
def _masked_tiles(
    za, zb, b_a, b_a_low, b_b, b_b_low, lo_N, first_N, lo, hi, split, start_r, low_a, low_b, factor, shift,
    mean_k, mean_l, n,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, DA: tl.constexpr, BLOCK_DA: tl.constexpr, DB: tl.constexpr,
    BLOCK_DB: tl.constexpr, SPLITS: tl.constexpr, PEERS: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Over a split's share of the class range: with ROWS (R,) sums of both models, with PAIRS (S,) sums for pairs."""
    o_r = start_r + tl.arange(0, BLOCK_R)
    b_sum_a = tl.zeros([BLOCK_R], tl.float32)
    b_sum_b = b_sum_a
    b_peer_a = b_sum_a
    b_peer_b = b_sum_a
    b_linear_a = b_sum_a
    b_linear_b = b_sum_a
    b_dd = tl.zeros([BLOCK_S], tl.float32)
    b_kk = b_dd
    b_ll = b_dd
    n_class = (tl.minimum(hi, (n + BLOCK_S - 1) // BLOCK_S * BLOCK_S) - lo) // BLOCK_S
    for i in tl.range(n_class * split // SPLITS, n_class * (split + 1) // SPLITS):
        start_s = lo + i * BLOCK_S
        o_s = start_s + tl.arange(0, BLOCK_S)
        m_pair = (o_s < n)[:, None] & (o_r < n)[None, :]
        b_p, _, _ = products(
            za, za, b_a, b_a_low, start_s, start_r, low_a, low_a, BLOCK_S, BLOCK_R, DA, BLOCK_DA, SPLIT
        )
        if ROWS:
            b_sum_a, b_peer_a, b_linear_a = _masked_tile(
                b_sum_a, b_peer_a, b_linear_a, b_p, lo_N, first_N, o_r, o_s, n, factor, shift, PEERS
            )
        b_k = tl.where(m_pair, _deviations(b_p, mean_k), 0.0)
        b_p, _, _ = products(
            zb, zb, b_b, b_b_low, start_s, start_r, low_b, low_b, BLOCK_S, BLOCK_R, DB, BLOCK_DB, SPLIT
        )
        if ROWS:
            b_sum_b, b_peer_b, b_linear_b = _masked_tile(
                b_sum_b, b_peer_b, b_linear_b, b_p, lo_N, first_N, o_r, o_s, n, factor, shift, PEERS
            )
        if PAIRS:
            b_l = tl.where(m_pair, _deviations(b_p, mean_l), 0.0)
            b_dd, b_kk, b_ll = _pair_sums(b_dd, b_kk, b_ll, b_k, b_l)
    return b_sum_a, b_peer_a, b_linear_a, b_sum_b, b_peer_b, b_linear_b, b_dd, b_kk, b_ll


@triton.jit
def _store_part(part_r, slot, start_r, rows, n, b_other, b_peer, b_linear, BLOCK_R: tl.constexpr, PEERS: tl.constexpr):
    o_r = start_r + tl.arange(0, BLOCK_R)
    p_part = part_r + slot.to(tl.int64) * 3 * rows + o_r
    tl.store(p_part, b_other, mask=o_r < n)
    if PEERS:
        tl.store(p_part + rows, b_peer, mask=o_r < n)
        tl.store(p_part + 2 * rows, b_linear, mask=o_r < n)


@triton.jit
def _store_pairs(p_pairs, b_dd, b_kk, b_ll):
    tl.store(p_pairs, tl.sum(b_dd, 0))
    tl.store(p_pairs + 1, tl.sum(b_kk, 0))
    tl.store(p_pairs + 2, tl.sum(b_ll, 0))


@triton.jit
def twin_kernel(
    za, zb,  # working copies (., rows, DA) and (., rows, DB), in one order
    lo_N, hi_N, first_N,  # (n,) int32: each row's class, and its sample's begin
    part_ra, part_sa, part_rb, part_sb,  # as part_r and part_s of forward_kernel, for each model
    pairs,  # (blocks of all waves, SPLITS, 3) float32: what each program found of the three sums
    means,  # (2,) float32: mean cosines
    t, t_value, n, rows, first_block, n_blocks, first_slot,
    DA: tl.constexpr, BLOCK_DA: tl.constexpr, DB: tl.constexpr, BLOCK_DB: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, ALIGN: tl.constexpr, SPLITS: tl.constexpr,
    MASKED: tl.constexpr,  # whether this launch takes the masked tiles, or the plain ones
    PEERS: tl.constexpr,
    SPLIT: tl.constexpr,  # products in split half precision
    SPLIT_PAIRS: tl.constexpr,  # those of the pairs' sums too: one precision for all tiles, whatever the others take
    HAS_T: tl.constexpr,
):  # fmt: skip
    # The block with the most tiles first, as in forward_kernel.
    block = n_blocks - 1 - tl.program_id(0)
    split = tl.program_id(1)
    start_r = (first_block + block) * BLOCK_R
    low_a = rows.to(tl.int64) * DA
    low_b = rows.to(tl.int64) * DB
    inverse_t = inverse_temperature(t, t_value, HAS_T)
    factor = logit_scale(inverse_t, means, means, False) * LOG2E
    shift = shift_log2(inverse_t)
    mean_k = tl.load(means)
    mean_l = tl.load(means + 1)
    b_a = load_tile(za, start_r, BLOCK_R, DA, BLOCK_DA)
    b_b = load_tile(zb, start_r, BLOCK_R, DB, BLOCK_DB)
    b_a_low = load_tile(za + low_a, start_r, BLOCK_R, DA, BLOCK_DA) if SPLIT else b_a
    b_b_low = load_tile(zb + low_b, start_r, BLOCK_R, DB, BLOCK_DB) if SPLIT else b_b
    lo, hi = class_range(lo_N, hi_N, start_r, n, ALIGN)
    if MASKED:
        b_sum_a, b_peer_a, b_linear_a, b_sum_b, b_peer_b, b_linear_b, b_dd, b_kk, b_ll = _masked_tiles(
            za, zb, b_a, b_a_low, b_b, b_b_low, lo_N, first_N, lo, hi, split, start_r, low_a, low_b, factor, shift,
            mean_k, mean_l, n, BLOCK_R, BLOCK_S, DA, BLOCK_DA, DB, BLOCK_DB, SPLITS, PEERS, SPLIT, True,
            SPLIT == SPLIT_PAIRS,
        )  # fmt: skip
        if SPLIT != SPLIT_PAIRS:
            # A loop of its own: in one loop the compiler would share a product and make the others wait for it.
            _, _, _, _, _, _, b_dd, b_kk, b_ll = _masked_tiles(
                za, zb, b_a, b_a, b_b, b_b, lo_N, first_N, lo, hi, split, start_r, low_a, low_b, factor, shift,
                mean_k, mean_l, n, BLOCK_R, BLOCK_S, DA, BLOCK_DA, DB, BLOCK_DB, SPLITS, PEERS, SPLIT_PAIRS, False,
                True,
            )  # fmt: skip
    else:
        b_sum_a, b_sum_b, b_dd, b_kk, b_ll = _plain_tiles(
            za, zb, b_a, b_a_low, b_b, b_b_low, part_sa + block.to(tl.int64) * rows,
            part_sb + block.to(tl.int64) * rows, lo // BLOCK_S, split, start_r, low_a, low_b, factor, shift,
            mean_k, mean_l, n, BLOCK_R, BLOCK_S, DA, BLOCK_DA, DB, BLOCK_DB, SPLITS, SPLIT,
        )  # fmt: skip
        b_peer_a = tl.zeros([BLOCK_R], tl.float32)
        b_linear_a = b_peer_a
        b_peer_b = b_peer_a
        b_linear_b = b_peer_a
    slot = first_slot + split
    _store_part(part_ra, slot, start_r, rows, n, b_sum_a, b_peer_a, b_linear_a * (factor * LN2), BLOCK_R, PEERS)
    _store_part(part_rb, slot, start_r, rows, n, b_sum_b, b_peer_b, b_linear_b * (factor * LN2), BLOCK_R, PEERS)
    _store_pairs(pairs + ((first_block + block) * SPLITS + split) * 3, b_dd, b_kk, b_ll)
