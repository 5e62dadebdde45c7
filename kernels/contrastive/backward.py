"""Gradient of the rows, by recomputation: a program owns R rows and visits all candidates once.

    acc = (G + G') Z    one product for S, one for the gradient: 4 N N D operations, and no element has two writers

With G_ij = dL/ds_ij, the weight of rows i and j is G_ij + G_ji:

    other   e_ij (a_i + a_j)                a_i = dL/dlse_other[i] exp(c - lse_other[i]), e_ij = exp(s_ij - c)
    peer    e_ij (b_i + b_j) + h_i + h_j    b_i likewise, h_i = dL/dmean_peer[i] / n_peer[i]
    view    0: view pairs are added separately

One exponential per element serves both rows. With ONLINE, when no shift c fits all rows, the terms are
exp(s_ij - lse[i]) dL/dlse[i] and the same for j: two exponentials.

The accumulator is transposed, acc' (D, R) += Z_s' (D, S) W (S, R), so that both operands of both products are in shared
memory: some versions of ptxas miscompile WGMMA with its first operand in registers, others serialise it.

The result is float32 in working order; `finalize_kernel` adds view pairs and undoes the scales and the normalisation.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.numerics import (
    LOG2E,
    coarse_share,
    load_block,
    logits_of,
    masked_start,
    plain_start,
    products,
    relations,
    share,
    split_dot,
    split_half,
    walk_of,
)
from .terms import term


class Weights(NamedTuple):
    """Weights of one side's statistics in the gradient of the rows."""

    weights: Any  # (5, rows) float32 as `weights_kernel` writes them
    stats: Any  # (5, n); stats and src_N are read only with ONLINE
    src_N: Any  # (n,) int32


class Accumulator(NamedTuple):
    """Output of a wave of resident blocks: their gradient."""

    sums: Any  # (splits, rows, D) float32: rows from the wave's first block on
    rows: int
    first_block: int


@triton.jit
def load_lse(w, o_n, m_n, n, ROW: tl.constexpr):
    """A row of the statistics at working positions, in units of log2; +inf, so that exp(s - lse) is 0, where empty."""
    b_src = tl.load(w.src_N + o_n, mask=m_n, other=0)
    b_lse = tl.load(w.stats + ROW * n + b_src, mask=m_n, other=float("inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)


@triton.jit
def _exponentials(
    b_x, b_e, r, s, w_r, w_s, o_r, o_s, ROW: tl.constexpr, RELATION: tl.constexpr, ONLINE: tl.constexpr
):  # fmt: skip
    """Sum of both rows' exponentials times their weights. b_e: the exponential that serves both, unless ONLINE."""
    b_w_r = tl.load(w_r.weights + RELATION * r.rows + o_r)
    b_w_s = tl.load(w_s.weights + RELATION * s.rows + o_s)
    if ONLINE:
        b_l_r = load_lse(w_r, o_r, o_r < r.n, r.n, ROW)
        b_l_s = load_lse(w_s, o_s, o_s < s.n, s.n, ROW)
        b_w = _term(b_x, b_l_s[:, None], b_w_s[:, None]) + _term(b_x, b_l_r[None, :], b_w_r[None, :])
    else:
        b_w = b_e * (b_w_s[:, None] + b_w_r[None, :])
    return b_w


@triton.jit
def _term(b_x, b_lse, b_weight):
    # A softmax is at most 1, even if logits are so large that rounding lifts one above its log-sum-exp. If the weight
    # is 0, the log-sum-exp may be meaningless, so its exponential is not used.
    b_power = tl.minimum(b_x - b_lse, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(b_weight == 0.0, 0.0, tl.exp2(b_power) * b_weight)


@triton.jit
def tile_weights(
    b_x, shift, r, s, w_r, w_s, start_r, start_s, TILE, MASKED: tl.constexpr, ONLINE: tl.constexpr
):  # fmt: skip
    """Weights (S, R) of a tile of logits b_x in units of log2."""
    o_r = start_r + tl.arange(0, TILE.BLOCK_R)
    o_s = start_s + tl.arange(0, TILE.BLOCK_S)
    b_e = b_x
    if not ONLINE:
        b_e = term(b_x - shift, TILE.TERM)
    b_w = _exponentials(b_x, b_e, r, s, w_r, w_s, o_r, o_s, 4, 0, ONLINE)
    if MASKED:
        m_other, m_peer = relations(r, s.class_N, s.sample_N, o_r, o_s, o_s < s.n)
        b_w = tl.where(m_other & (o_r < r.n)[None, :], b_w, 0.0)
        if TILE.PEERS:
            b_p = _exponentials(b_x, b_e, r, s, w_r, w_s, o_r, o_s, 3, 1, ONLINE)
            # Softmax and mean are added in float32, because they cancel near the optimum.
            b_linear_s = tl.load(w_s.weights + 2 * s.rows + o_s)
            b_p += b_linear_s[:, None] + tl.load(w_r.weights + 2 * r.rows + o_r)[None, :]
            b_w += tl.where(m_peer, b_p, 0.0)
    return b_w


@triton.jit
def _accumulate(b_acc, b_s, b_s_low, b_w, SPLIT: tl.constexpr):
    b_w_high, b_w_low = split_half(b_w, b_s.dtype)
    return split_dot(tl.trans(b_s), tl.trans(b_s_low), b_w_high, b_w_low, b_acc, SPLIT)


class Direction(NamedTuple):
    """The rows whose gradient is computed, r, and their candidates."""

    r: Any  # Resident
    s: Any  # Streamed
    w_r: Any  # their Weights
    w_s: Any
    acc: Any  # Accumulator


@triton.jit
def _gradient(
    r, s, w_r, w_s, acc, block_r, temperature, TILE,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    start_r = (acc.first_block + block_r) * TILE.BLOCK_R
    # The longer side of a tile comes first: its rows are shared by the warps, 64 for each warpgroup of a Hopper.
    RESIDENT_FIRST: tl.constexpr = TILE.BLOCK_R > TILE.BLOCK_S
    logits = logits_of(temperature, r, s)
    block = load_block(r, start_r, TILE, (TILE.SPLIT_PLAIN and PLAIN) or (TILE.SPLIT_MASKED and MASKED))
    # A last tile with padding is masked, because for a product of 0 the weight may overflow half precision.
    walk = walk_of(r, s, start_r, TILE, False)
    b_acc = tl.zeros([TILE.D, TILE.BLOCK_R], tl.float32)
    first, last = share(walk.n_plain, split)
    masked, masked_end = share(walk.n_masked, split)
    if not PLAIN:
        masked, masked_end = coarse_share(walk.n_masked, split, 4)
        if masked == masked_end:
            return
    if (PLAIN and MASKED) and TILE.SKIPS:
        # If there are few, in one row with the plain ones, so that all programs have nearly as many tiles. Chosen
        # without a branch, which Triton 3.5 cannot compile here.
        is_row = walk.n_masked < tl.num_programs(1)
        start, end = share(walk.n_plain + walk.n_masked, split)
        first = tl.where(is_row, tl.minimum(start, walk.n_plain), first)
        last = tl.where(is_row, tl.minimum(end, walk.n_plain), last)
        masked = tl.where(is_row, start - first, masked)
        masked_end = tl.where(is_row, end - last, masked_end)
    if PLAIN:
        for i in tl.range(first, last):
            start_s = plain_start(walk, i, TILE)
            b_p, b_s, b_s_low = products(block, s, start_s, TILE, TILE.SPLIT_PLAIN, RESIDENT_FIRST)
            b_x = b_p * logits.factor
            b_w = tile_weights(b_x, logits.shift, r, s, w_r, w_s, start_r, start_s, TILE, False, ONLINE)
            b_acc = _accumulate(b_acc, b_s, b_s_low, b_w, TILE.SPLIT_PLAIN)
    if MASKED:
        some = masked < masked_end  # most programs go on without starting the loop's pipeline
        if not TILE.SKIPS:
            some = True
        if some:
            for i in tl.range(masked, masked_end):
                start_s = masked_start(walk, i, TILE)
                b_p, b_s, b_s_low = products(block, s, start_s, TILE, TILE.SPLIT_MASKED, RESIDENT_FIRST)
                b_x = b_p * logits.factor
                b_w = tile_weights(b_x, logits.shift, r, s, w_r, w_s, start_r, start_s, TILE, True, ONLINE)
                b_acc = _accumulate(b_acc, b_s, b_s_low, b_w, TILE.SPLIT_MASKED)
    o_r = block_r * TILE.BLOCK_R + tl.arange(0, TILE.BLOCK_R)  # no mask: the wave's rows are whole blocks
    p_acc = acc.sums + (split.to(tl.int64) * acc.rows + o_r[None, :]) * TILE.D + tl.arange(0, TILE.D)[:, None]
    if PLAIN:
        tl.store(p_acc, b_acc)
    else:
        # Added to the plain tiles, which an earlier launch stored. Each element has one writer per launch, so the order
        # is fixed; atomic, so that the old values take no registers.
        tl.atomic_add(p_acc, b_acc, sem="relaxed")


@triton.jit
def backward_kernel(
    r, s,  # Resident, Streamed
    w_r, w_s,  # their Weights
    acc,  # Accumulator
    temperature, flag,
    TILE,
    PLAIN: tl.constexpr, MASKED: tl.constexpr,  # which tiles this launch processes; masked ones alone add to the others
):  # fmt: skip
    if flag is not None:
        if tl.load(flag) != 0:
            return
    _gradient(r, s, w_r, w_s, acc, tl.program_id(0), temperature, TILE, PLAIN, MASKED, False)


@triton.jit
def backward_online_kernel(
    one, two, first,  # Direction; as `launch_sides` passes them
    temperature, flag,
    TILE,
    PLAIN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`backward_kernel` where the flag says that a fixed shift is not enough."""
    if tl.load(flag) == 0:
        return
    program = tl.program_id(0)
    if first is None:
        _gradient(one.r, one.s, one.w_r, one.w_s, one.acc, program, temperature, TILE, PLAIN, MASKED, True)
    else:
        if program < first:
            _gradient(one.r, one.s, one.w_r, one.w_s, one.acc, program, temperature, TILE, PLAIN, MASKED, True)
        else:
            i_r = program - first
            _gradient(two.r, two.s, two.w_r, two.w_s, two.acc, i_r, temperature, TILE, PLAIN, MASKED, True)
