"""Two models on the same samples: the sums of `forward_kernel` for both, and sums over both matrices of cosines.

With K and L the cosines of the models' rows minus their means over all pairs, a program adds up

    |K - L|^2, |K|^2, |L|^2        which give 2 <K, L> = |K|^2 + |L|^2 - |K - L|^2

over the tiles that it computes for the row statistics. The tiles of both models are in registers at the same time, so
the three sums need no extra product. Means are removed element by element, which keeps precision if all cosines are
nearly equal; squaring the difference keeps it if both models are nearly equal.

The candidates are the rows themselves, and both models' rows are in the same order (`layout`), so the same tiles are
plain and masked for both. A plain tile serves its resident and its streamed rows, and counts twice for the pairs.
Masked tiles are computed from both sides and count once. They have a separate launch, because each thread holds six
sums for each of its resident rows there; a joint launch would halve the size of the plain tiles.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.arguments import Sums
from ..common.numerics import SCALE, load_block, logits_of, products, relations, share, walk_of
from .forward import masked_tile, plain_tile, store_sums


class Model(NamedTuple):
    """Inside the kernel: one model's side of a program."""

    block: Any  # Block
    p_part: Any  # (rows,) sums of streamed rows from this block
    mean: Any  # mean of its cosines


class PairSums(NamedTuple):
    """Inside the kernel: sums of |K - L|^2, |K|^2 and |L|^2 along each streamed row, (S,) each. A row is held by few
    threads, so summing it needs no exchange between warps."""

    dd: Any
    kk: Any
    ll: Any


@triton.jit
def _deviations(b_p, mean):
    """Cosines minus their mean, from products of working copies."""
    return b_p * (1.0 / (SCALE * SCALE)) - mean


@triton.jit
def _add_pairs(pairs, b_k, b_l):
    b_d = b_k - b_l
    return PairSums(
        pairs.dd + tl.sum(b_d * b_d, 1), pairs.kk + tl.sum(b_k * b_k, 1), pairs.ll + tl.sum(b_l * b_l, 1)
    )  # fmt: skip


@triton.jit
def _plain_tile(b_sum, model, start_s, m_r, logits, TILE, SPLIT: tl.constexpr, PADDED: tl.constexpr):
    """`plain_tile` of one model; returns its cosines minus their mean instead of products."""
    block = model.block
    b_sum, b_p = plain_tile(b_sum, block, block, model.p_part, start_s, m_r, logits, TILE, SPLIT, PADDED, True)
    b_d = _deviations(b_p, model.mean)
    if PADDED:
        b_d = tl.where(m_r[None, :], b_d, 0.0)
    return b_sum, b_d


@triton.jit
def _plain_loop(a, b, n, first, last, logits, A, B, SPLIT: tl.constexpr, PADDED: tl.constexpr):
    """Sums of both models over plain tiles first .. last - 1, and pair sums. PADDED: as in `plain_tile`."""
    b_sum_a = tl.zeros([A.BLOCK_S, A.BLOCK_R], tl.float32)
    b_sum_b = b_sum_a
    b_none_s = tl.zeros([A.BLOCK_S], tl.float32)
    pairs = PairSums(b_none_s, b_none_s, b_none_s)
    m_r = a.block.start + tl.arange(0, A.BLOCK_R) < n
    for i in tl.range(first, last):
        # One model after the other, so that only one product and the first model's deviations are live at a time.
        b_sum_a, b_k = _plain_tile(b_sum_a, a, i * A.BLOCK_S, m_r, logits, A, SPLIT, PADDED)
        b_sum_b, b_l = _plain_tile(b_sum_b, b, i * A.BLOCK_S, m_r, logits, B, SPLIT, PADDED)
        pairs = _add_pairs(pairs, b_k, b_l)
    b_none = tl.zeros([A.BLOCK_R], tl.float32)
    return Sums(tl.sum(b_sum_a, 0), b_none, b_none), Sums(tl.sum(b_sum_b, 0), b_none, b_none), pairs


@triton.jit
def _masked_tiles(a, b, r, walk, split, logits, A, B, SPLIT: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Over a split's share of the class range: with ROWS, row sums of both models; with PAIRS, pair sums."""
    o_r = a.block.start + tl.arange(0, A.BLOCK_R)
    b_none = tl.zeros([A.BLOCK_R], tl.float32)
    sums_a = Sums(b_none, b_none, b_none)
    sums_b = Sums(b_none, b_none, b_none)
    b_none_s = tl.zeros([A.BLOCK_S], tl.float32)
    pairs = PairSums(b_none_s, b_none_s, b_none_s)
    first, last = share(walk.n_masked, split)
    for i in tl.range(first, last):
        start_s = walk.lo + i * A.BLOCK_S
        o_s = start_s + tl.arange(0, A.BLOCK_S)
        m_pair = (o_s < r.n)[:, None] & (o_r < r.n)[None, :]
        b_p, _, _ = products(a.block, a.block, start_s, A, SPLIT)
        if ROWS:
            m_other, m_peer = relations(r, r.lo_N, r.first_N, o_r, o_s, o_s < r.n)
            sums_a, _ = masked_tile(sums_a, b_p, m_other, m_peer, logits, A)
        b_k = tl.where(m_pair, _deviations(b_p, a.mean), 0.0)
        b_p, _, _ = products(b.block, b.block, start_s, B, SPLIT)
        if ROWS:
            m_other, m_peer = relations(r, r.lo_N, r.first_N, o_r, o_s, o_s < r.n)
            sums_b, _ = masked_tile(sums_b, b_p, m_other, m_peer, logits, A)
        if PAIRS:
            b_l = tl.where(m_pair, _deviations(b_p, b.mean), 0.0)
            pairs = _add_pairs(pairs, b_k, b_l)
    return sums_a, sums_b, pairs


@triton.jit
def twin_kernel(
    a, b,  # Resident: both models' rows, in one order
    parts_a, parts_b,  # Parts of each model
    pair_sums,  # (blocks of all waves, splits, 3) float32: each program's part of the three sums
    means,  # (2,) float32: mean cosines
    temperature,
    A, B,  # Tile of each model; only D and BLOCK_D may differ
    MASKED: tl.constexpr,  # whether this launch processes the masked tiles or the plain ones
):  # fmt: skip
    # Start the blocks with the most tiles first, as in forward_kernel.
    block_r = parts_a.n_blocks - 1 - tl.program_id(0)
    split = tl.program_id(1)
    start_r = (parts_a.first_block + block_r) * A.BLOCK_R
    # Pair sums use one precision for all tiles, that of the plain ones; row sums of masked tiles may use another.
    SPLIT: tl.constexpr = A.SPLIT_MASKED if MASKED else A.SPLIT_PLAIN
    logits = logits_of(temperature, a, b)
    offset = block_r.to(tl.int64) * a.rows
    model_a = Model(load_block(a, start_r, A, SPLIT), parts_a.streamed + offset, tl.load(means))
    model_b = Model(load_block(b, start_r, B, SPLIT), parts_b.streamed + offset, tl.load(means + 1))
    walk = walk_of(a, a, start_r, A, True)
    if MASKED:
        sums_a, sums_b, pairs = _masked_tiles(
            model_a, model_b, a, walk, split, logits, A, B, SPLIT, True, SPLIT == A.SPLIT_PLAIN
        )
        if SPLIT != A.SPLIT_PLAIN:
            # A separate loop: in a joint one the compiler would share a product and make the others wait for it.
            _, _, pairs = _masked_tiles(model_a, model_b, a, walk, split, logits, A, B, A.SPLIT_PLAIN, False, True)
    else:
        first, last = share(walk.n_plain, split)
        if start_r + A.BLOCK_R > a.n:
            sums_a, sums_b, pairs = _plain_loop(model_a, model_b, a.n, first, last, logits, A, B, SPLIT, True)
        else:
            sums_a, sums_b, pairs = _plain_loop(model_a, model_b, a.n, first, last, logits, A, B, SPLIT, False)
    o_r = start_r + tl.arange(0, A.BLOCK_R)
    slot = parts_a.first_slot + split
    store_sums(parts_a, slot, sums_a, o_r, o_r < a.n, a.rows, logits.factor, A.PEERS)
    store_sums(parts_b, slot, sums_b, o_r, o_r < a.n, a.rows, logits.factor, A.PEERS)
    p_pairs = pair_sums + ((parts_a.first_block + block_r) * tl.num_programs(1) + split) * 3
    tl.store(p_pairs, tl.sum(pairs.dd, 0))
    tl.store(p_pairs + 1, tl.sum(pairs.kk, 0))
    tl.store(p_pairs + 2, tl.sum(pairs.ll, 0))
