"""Sums of exponentials per relation, in one pass over tiles of the similarity matrix.

A program keeps a block of R rows resident and streams the candidates past it in tiles of S. Rows are sorted by class,
so same-class pairs lie in one range of tiles (`class_range`); outside it a tile holds only the relation `other` and
costs a product, one exponential per element and two sums.

Symmetric case (the candidates are the rows themselves): a program streams only the rows before its class range, and
each of these tiles serves its resident and its streamed rows. Tiles of the class range are computed from both sides,
each time for the resident rows only, so peers need no second buffer.

    parts.resident (slots, 3, rows): sums of resident rows, a slot for each program that shares them: exponentials over
                                     others, exponentials over peers, products with peers
    parts.streamed (blocks, rows): sums of streamed rows, from each block of resident rows

There are no atomics and every element has one writer, so the sums do not depend on timing. `finish_kernel` adds them
up.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.arguments import Sums
from ..common.numerics import (
    LN2,
    load_block,
    logits_of,
    masked_start,
    plain_start,
    products,
    relations,
    share,
    walk_of,
)
from .statistics import MASKED_COST, programs_of, relation_counts
from .terms import term
from .totals import Found, complete, evaluate


@triton.jit
def plain_tile(
    b_sum, block, s, p_part, start_s, m_r, logits, TILE,
    SPLIT: tl.constexpr, PADDED: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    """Add a tile's terms to sums (S, R); returns these and the products.

    PADDED: keep resident rows outside m_r, padding, out of the sums. STREAMED: store the sums of the streamed rows.
    """
    b_p, _, _ = products(block, s, start_s, TILE, SPLIT)
    b_e = term(b_p * logits.factor - logits.shift, TILE.TERM)
    if PADDED:
        b_e = tl.where(m_r[None, :], b_e, 0.0)
    b_sum += b_e
    if STREAMED:
        tl.store(p_part + start_s + tl.arange(0, TILE.BLOCK_S), tl.sum(b_e, 1))
    return b_sum, b_p


@triton.jit
def masked_tile(sums, b_p, m_other, m_peer, logits, TILE):
    """Add a tile of products to the sums, of which `other` may be (S, R); returns these and the terms (S, R) over
    others."""
    b_e = term(b_p * logits.factor - logits.shift, TILE.TERM)
    b_e_other = tl.where(m_other, b_e, 0.0)
    b_other = sums.other + (b_e_other if len(sums.other.shape) == 2 else tl.sum(b_e_other, 0))
    b_peer = sums.peer
    b_linear = sums.linear
    if TILE.PEERS:
        b_peer += tl.sum(tl.where(m_peer, b_e, 0.0), 0)
        b_linear += tl.sum(tl.where(m_peer, b_p, 0.0), 0)
    return Sums(b_other, b_peer, b_linear), b_e_other


@triton.jit
def _plain_loop(block, s, parts, p_part, walk, first, last, logits, n_r, TILE, PADDED: tl.constexpr):
    """(R,) sums over plain tiles first .. last - 1."""
    b_sum = tl.zeros([TILE.BLOCK_S, TILE.BLOCK_R], tl.float32)
    m_r = block.start + tl.arange(0, TILE.BLOCK_R) < n_r
    for i in tl.range(first, last, flatten=TILE.D != TILE.BLOCK_D and not TILE.SPLIT_PLAIN):
        b_sum, _ = plain_tile(
            b_sum, block, s, p_part, plain_start(walk, i, TILE), m_r, logits, TILE, TILE.SPLIT_PLAIN, PADDED,
            parts.streamed is not None,
        )  # fmt: skip
    return tl.sum(b_sum, 0)


class Share(NamedTuple):
    """Inside a kernel: a program's tiles, from the first to the last + 1."""

    plain: Any
    plain_end: Any
    masked: Any
    masked_end: Any


@triton.jit
def _share_of(walk, split, splits, FOLDED: tl.constexpr):
    """What the program `split` of `splits` takes of a block's tiles; FOLDED: in one row, the masked ones last."""
    if FOLDED:
        n_tiles = walk.n_plain + MASKED_COST * walk.n_masked
        first = n_tiles * split // splits
        last = n_tiles * (split + 1) // splits
        masked = tl.maximum(first - walk.n_plain, 0) // MASKED_COST
        masked_end = tl.maximum(last - walk.n_plain, 0) // MASKED_COST
        mine = Share(tl.minimum(first, walk.n_plain), tl.minimum(last, walk.n_plain), masked, masked_end)
    else:
        plain, plain_end = share(walk.n_plain, split)
        masked, masked_end = share(walk.n_masked, split)
        mine = Share(plain, plain_end, masked, masked_end)
    return mine


@triton.jit
def _plain_tiles(block, s, parts, p_part, walk, mine, logits, n_r, TILE):
    """(R,) sums over a program's plain tiles."""
    first, last = mine.plain, mine.plain_end
    if parts.streamed is not None and block.start + TILE.BLOCK_R > n_r:
        b_sum = _plain_loop(block, s, parts, p_part, walk, first, last, logits, n_r, TILE, True)
    else:
        b_sum = _plain_loop(block, s, parts, p_part, walk, first, last, logits, n_r, TILE, False)
    return b_sum


@triton.jit
def _masked_tiles(
    block, r, s, parts, p_part, walk, mine, logits, TILE, SYMMETRIC: tl.constexpr, AT_END: tl.constexpr
):  # fmt: skip
    """Sums over a program's masked tiles. AT_END: over the streamed rows once, not for every tile."""
    o_r = block.start + tl.arange(0, TILE.BLOCK_R)
    m_r = o_r < r.n
    b_none = tl.zeros([TILE.BLOCK_R], tl.float32)
    sums = Sums(b_none, b_none, b_none)
    some = mine.masked < mine.masked_end  # most programs have none and go on without starting the loop's pipeline
    if not TILE.SKIPS or (TILE.D <= 64 and not SYMMETRIC):  # with 64 columns there are no registers for a branch
        some = True
    if some:
        if AT_END:
            sums = Sums(tl.zeros([TILE.BLOCK_S, TILE.BLOCK_R], tl.float32), b_none, b_none)
        for i in tl.range(mine.masked, mine.masked_end, flatten=TILE.D != TILE.BLOCK_D and not TILE.SPLIT_MASKED):
            start_s = masked_start(walk, i, TILE)
            o_s = start_s + tl.arange(0, TILE.BLOCK_S)
            b_p, _, _ = products(block, s, start_s, TILE, TILE.SPLIT_MASKED)
            m_other, m_peer = relations(r, s.class_N, s.sample_N, o_r, o_s, o_s < s.n)
            sums, b_e = masked_tile(sums, b_p, m_other, m_peer, logits, TILE)
            if parts.streamed is not None and not SYMMETRIC:
                tl.store(p_part + o_s, tl.sum(tl.where(m_r[None, :], b_e, 0.0), 1), mask=o_s < s.n)
        if AT_END:
            sums = Sums(tl.sum(sums.other, 0), sums.peer, sums.linear)
    return sums


@triton.jit
def store_sums(parts, slot, sums, o_r, m_r, rows, factor, PEERS: tl.constexpr):
    """Write the resident rows' sums into their slot, with products converted to logits."""
    p_part = parts.resident + slot.to(tl.int64) * 3 * rows + o_r
    tl.store(p_part, sums.other, mask=m_r)
    if PEERS:
        tl.store(p_part + rows, sums.peer, mask=m_r)
        tl.store(p_part + 2 * rows, sums.linear * (factor * LN2), mask=m_r)


@triton.jit
def forward_kernel(
    r, s,  # Resident, Streamed
    parts,  # Parts; sums of streamed rows are stored unless parts.streamed is None
    temperature,
    flag,  # as in prepare_kernel
    TILE,
    SYMMETRIC: tl.constexpr,
    PLAIN: tl.constexpr, MASKED: tl.constexpr,  # which tiles this launch processes
    FOLDED: tl.constexpr,  # the programs of a column of the grid share two blocks (`programs_of`), not one
):  # fmt: skip
    if flag is not None:
        if tl.load(flag) != 0:
            return
    # Start the blocks with the most tiles first, so that only short ones run at the end.
    block_r = parts.n_blocks - 1 - tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    if FOLDED:
        longer = programs_of(block_r, parts.n_blocks, splits)
        is_longer = split < longer
        block_r = tl.where(is_longer, block_r, tl.program_id(0))
        splits = tl.where(is_longer, longer, splits - longer)
        split = tl.where(is_longer, split, split - longer)
    start_r = (parts.first_block + block_r) * TILE.BLOCK_R
    logits = logits_of(temperature, r, s)
    p_part = parts.resident
    if parts.streamed is not None:
        p_part = parts.streamed + block_r.to(tl.int64) * s.rows
    block = load_block(r, start_r, TILE, (TILE.SPLIT_PLAIN and PLAIN) or (TILE.SPLIT_MASKED and MASKED))
    walk = walk_of(r, s, start_r, TILE, SYMMETRIC)
    mine = _share_of(walk, split, splits, FOLDED)
    b_other = tl.zeros([TILE.BLOCK_R], tl.float32)
    b_peer = b_other
    b_linear = b_other
    if PLAIN:
        b_other += _plain_tiles(block, s, parts, p_part, walk, mine, logits, r.n, TILE)
    if MASKED:
        # With 64 columns, and for other terms than exponentials, there are no registers for it; peers gain nothing.
        AT_END: tl.constexpr = (PLAIN and not TILE.PEERS) and (TILE.D > 64 and TILE.TERM == "exponential")
        masked = _masked_tiles(block, r, s, parts, p_part, walk, mine, logits, TILE, SYMMETRIC, AT_END)
        b_other += masked.other
        b_peer = masked.peer
        b_linear = masked.linear
    o_r = start_r + tl.arange(0, TILE.BLOCK_R)
    sums = Sums(b_other, b_peer, b_linear)
    store_sums(parts, parts.first_slot + split, sums, o_r, o_r < r.n, r.rows, logits.factor, TILE.PEERS)


@triton.jit
def _add_online(b_max, b_sum, b_x, m):
    """Add a tile's masked exponentials to a running (maximum, sum) in units of log2."""
    b_new = tl.maximum(b_max, tl.max(tl.where(m, b_x, float("-inf")), 0))
    b_at = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_sum = b_sum * tl.exp2(b_max - b_at) + tl.sum(tl.where(m, tl.exp2(b_x - b_at[None, :]), 0.0), 0)
    return b_new, b_sum


class Online(NamedTuple):
    """A side of `forward_online_kernel`."""

    r: Any  # Resident
    s: Any  # Streamed
    layout_5N: Any  # as in finish_kernel
    stats: Any  # (5, n) in source order; rows 2 to 4 are written: mean_peer, lse_peer, lse_other
    losses: Any  # Losses


@triton.jit
def _online(side, program, temperature, TILE, SYMMETRIC: tl.constexpr, CODES):
    stats = side.stats
    start_r = program * TILE.BLOCK_R
    logits = logits_of(temperature, side.r, side.s)
    block = load_block(side.r, start_r, TILE, TILE.SPLIT_MASKED)
    o_r = start_r + tl.arange(0, TILE.BLOCK_R)
    m_r = o_r < side.r.n
    b_max = tl.full([TILE.BLOCK_R], float("-inf"), tl.float32)
    b_max_peer = b_max
    b_other = tl.zeros([TILE.BLOCK_R], tl.float32)
    b_peer = b_other
    b_linear = b_other
    for start_s in tl.range(0, side.s.n, TILE.BLOCK_S):
        o_s = start_s + tl.arange(0, TILE.BLOCK_S)
        b_p, _, _ = products(block, side.s, start_s, TILE, TILE.SPLIT_MASKED)
        m_other, m_peer = relations(side.r, side.s.class_N, side.s.sample_N, o_r, o_s, o_s < side.s.n)
        b_x = b_p * logits.factor
        b_max, b_other = _add_online(b_max, b_other, b_x, m_other)
        if TILE.PEERS:
            b_max_peer, b_peer = _add_online(b_max_peer, b_peer, b_x, m_peer)
            b_linear += tl.sum(tl.where(m_peer, b_x, 0.0), 0)
    b_src = tl.load(side.layout_5N + o_r, mask=m_r, other=0)
    counts = relation_counts(side.layout_5N, o_r, m_r, side.r.n, side.s.n, SYMMETRIC)
    b_lse_o = (b_max + tl.log2(b_other)) * LN2
    b_mean_p = b_linear
    b_lse_p = b_max_peer
    if TILE.PEERS:
        b_mean_p = b_linear * LN2 / tl.maximum(counts[1], 1).to(tl.float32)
        b_lse_p = (b_max_peer + tl.log2(b_peer)) * LN2
    tl.store(stats + 2 * side.r.n + b_src, b_mean_p, mask=m_r)
    tl.store(stats + 3 * side.r.n + b_src, b_lse_p, mask=m_r)
    tl.store(stats + 4 * side.r.n + b_src, b_lse_o, mask=m_r)
    b_mean_v = tl.load(stats + b_src, mask=m_r, other=0.0)
    b_spread_v = tl.load(stats + side.r.n + b_src, mask=m_r, other=0.0)
    b_one = tl.full([TILE.BLOCK_R], 1.0, tl.float32)  # tiles subtract each row's own log-sum-exp
    found = Found(b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o, b_one, b_one)
    BLOCKS: tl.constexpr = TILE.ALIGN // TILE.BLOCK_R
    i_p = side.losses.start // TILE.BLOCK_R + program
    programs = side.losses.end // TILE.BLOCK_R
    return evaluate(side.losses, i_p, programs, o_r, b_src, m_r, counts, found, side.r.n, BLOCKS, True, CODES)


@triton.jit
def forward_online_kernel(
    one, two, first,  # Online; as `launch_sides` passes them
    temperature, flag,
    TILE,
    SYMMETRIC: tl.constexpr, CODES,
    MANY: tl.constexpr,  # as in finish_kernel
):  # fmt: skip
    """Log-sum-exps with a running maximum over all tiles, and the losses again; runs if a fixed shift is not enough."""
    if tl.load(flag) == 0:
        return
    program = tl.program_id(0)
    if first is None:
        last = _online(one, program, temperature, TILE, SYMMETRIC, CODES)
    else:
        if program < first:
            last = _online(one, program, temperature, TILE, SYMMETRIC, CODES)
        else:
            last = _online(two, program - first, temperature, TILE, SYMMETRIC, CODES)
    if len(CODES) > 0 and one.losses.sums is not None:
        if last:
            BLOCKS: tl.constexpr = TILE.ALIGN // TILE.BLOCK_R
            if first is None:
                complete(one.losses, one.losses, False, BLOCKS, True, MANY, TILE.ALIGN, TILE.PEERS, CODES)
            else:
                complete(one.losses, two.losses, True, BLOCKS, True, MANY, TILE.ALIGN, TILE.PEERS, CODES)
