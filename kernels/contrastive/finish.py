"""Between the passes over tiles: partial sums into statistics and losses, and upstream gradients into tile weights.

An objective reaches the kernels as a number (`fastcl.objectives.Objective.code`): bits 0 to 2 are the relations view,
peer, other of its denominator, bits 3 and 4 view and peer of its positives, bit 5 says that the mean over positives
stands inside the log. With P the log-sum-exp over positives and Q that over the rest of the denominator, the loss of a
row is

    spread + softplus(Q - P)    where the denominator holds the positives
    spread + lse_denominator - P    where it does not

and spread is log n for a mean inside the log, P minus the mean logit of the positives for one outside.
"""

import triton
import triton.language as tl

from .numerics import LN2, SAFE_INVERSE_T, SMALLEST_SUM, begin, inverse_temperature, shift_log2


@triton.jit
def softplus(b_x):
    """log(1 + e^x), to relative precision however small it is: log1p by the series of atanh."""
    b_e = tl.exp(-tl.abs(b_x))
    b_t = b_e / (2.0 + b_e)  # at most 1/3
    b_u = b_t * b_t
    b_series = 1 / 11 + b_u * (1 / 13)
    b_series = 1.0 + b_u * (1 / 3 + b_u * (1 / 5 + b_u * (1 / 7 + b_u * (1 / 9 + b_u * b_series))))
    return tl.maximum(b_x, 0.0) + 2.0 * b_t * b_series


@triton.jit
def _sigmoid(b_x):
    b_e = tl.exp(-tl.abs(b_x))
    return tl.where(b_x >= 0, 1.0, b_e) / (1.0 + b_e)


@triton.jit
def _log_sum(b_a, b_b):
    """log(e^a + e^b), and the shares of e^a and e^b in the sum; of two that are -inf: -inf, 0 and 0."""
    m_none = (b_a == float("-inf")) & (b_b == float("-inf"))
    b_gap = tl.where(m_none, 0.0, b_a - b_b)
    b_lse = tl.maximum(b_a, b_b) + softplus(-tl.abs(b_gap))
    return b_lse, tl.where(m_none, 0.0, _sigmoid(b_gap)), tl.where(m_none, 0.0, _sigmoid(-b_gap))


@triton.jit
def _log_sum_3(b_view, b_peer, b_other, RELATIONS: tl.constexpr):
    """log-sum-exp over a set of relations (bits 0 to 2), and the shares of view, peer and other in it."""
    b_none = tl.full(b_view.shape, float("-inf"), tl.float32)
    b_inner, b_v, b_p = _log_sum(b_view if RELATIONS & 1 else b_none, b_peer if RELATIONS & 2 else b_none)
    b_lse, b_in, b_o = _log_sum(b_inner, b_other if RELATIONS & 4 else b_none)
    return b_lse, b_in * b_v, b_in * b_p, b_o


@triton.jit
def _count_of(b_n_v, b_n_p, b_n_o, RELATIONS: tl.constexpr):
    b_n = b_n_v if RELATIONS & 1 else b_n_v * 0
    b_n += b_n_p if RELATIONS & 2 else b_n_p * 0
    return b_n + (b_n_o if RELATIONS & 4 else b_n_o * 0)


@triton.jit
def objective_rows(b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o, b_n_v, b_n_p, b_n_o, CODE: tl.constexpr):
    """Row losses of one objective, and their derivatives by mean_view, spread_view, mean_peer, lse_peer, lse_other."""
    DENOMINATOR: tl.constexpr = CODE & 7
    POSITIVES: tl.constexpr = (CODE >> 3) & 3
    INSIDE: tl.constexpr = (CODE >> 5) & 1
    NEGATIVES: tl.constexpr = DENOMINATOR & ~POSITIVES
    b_lse_v = tl.where(b_n_v > 0, b_mean_v + b_spread_v, float("-inf"))
    b_n = _count_of(b_n_v, b_n_p, b_n_o, POSITIVES)
    m_valid = (b_n > 0) & (_count_of(b_n_v, b_n_p, b_n_o, DENOMINATOR) > 0)
    if NEGATIVES:
        m_valid = m_valid & (_count_of(b_n_v, b_n_p, b_n_o, NEGATIVES) > 0)
    b_count = tl.maximum(b_n, 1).to(tl.float32)
    b_pos, b_pos_v, b_pos_p, _ = _log_sum_3(b_lse_v, b_lse_p, b_lse_o, POSITIVES)
    # Fractions of the positives that are views and peers.
    b_part_v = b_n_v.to(tl.float32) / b_count if POSITIVES & 1 else b_count * 0.0
    b_part_p = b_n_p.to(tl.float32) / b_count if POSITIVES & 2 else b_count * 0.0
    if INSIDE:
        b_loss = tl.log(b_count)
        b_outside = 0.0
    else:
        # P less each relation's mean: (lse_r - mean_r) + (P - lse_r), the latter a softplus. Small stays small.
        b_loss = b_count * 0.0
        if POSITIVES & 1:
            b_up = softplus(tl.where(b_n_p > 0, b_lse_p - b_lse_v, float("-inf"))) if POSITIVES & 2 else b_loss
            b_loss += tl.where(b_n_v > 0, b_part_v * (b_spread_v + b_up), 0.0)
        if POSITIVES & 2:
            b_up = softplus(tl.where(b_n_v > 0, b_lse_v - b_lse_p, float("-inf"))) if POSITIVES & 1 else b_count * 0.0
            b_loss += tl.where(b_n_p > 0, b_part_p * ((b_lse_p - b_mean_p) + b_up), 0.0)
        b_outside = 1.0
    b_neg_v = b_count * 0.0
    b_neg_p = b_neg_v
    b_neg_o = b_neg_v
    b_repel = b_neg_v  # derivative by Q, or by the denominator's log-sum-exp
    b_pull = b_neg_v  # derivative by P, without that of a spread outside the log
    b_with = b_neg_v + b_outside  # the same with it
    if (DENOMINATOR & POSITIVES) == POSITIVES:
        if NEGATIVES:
            b_neg, b_neg_v, b_neg_p, b_neg_o = _log_sum_3(b_lse_v, b_lse_p, b_lse_o, NEGATIVES)
            b_gap = tl.where(m_valid, b_neg - b_pos, 0.0)
            b_loss += softplus(b_gap)
            b_repel = _sigmoid(b_gap)
            b_pull = -b_repel
            b_with = _sigmoid(-b_gap) if not INSIDE else b_pull
    else:
        b_den, b_neg_v, b_neg_p, b_neg_o = _log_sum_3(b_lse_v, b_lse_p, b_lse_o, DENOMINATOR)
        b_loss += b_den - b_pos
        b_repel += 1.0
        b_pull -= 1.0
        b_with -= 1.0
    b_d_spread = b_with * b_pos_v + b_repel * b_neg_v
    b_d_mean = b_pull * b_pos_v + b_outside * (b_pos_v - b_part_v) + b_repel * b_neg_v
    b_d_peer = b_with * b_pos_p + b_repel * b_neg_p
    b_d_mean_p = -b_outside * b_part_p
    b_d_other = b_repel * b_neg_o
    return (
        tl.where(m_valid, b_loss, 0.0), tl.where(m_valid, b_d_mean, 0.0), tl.where(m_valid, b_d_spread, 0.0),
        tl.where(m_valid, b_d_mean_p, 0.0), tl.where(m_valid, b_d_peer, 0.0), tl.where(m_valid, b_d_other, 0.0),
    )  # fmt: skip


@triton.jit
def _counts(layout_5N, o_n, m_n, n, n_s, SYMMETRIC: tl.constexpr):
    """Views, peers and others of each row, from its intervals."""
    b_lo = begin(tl.load(layout_5N + n + o_n, mask=m_n, other=0))
    b_hi = tl.load(layout_5N + 2 * n + o_n, mask=m_n, other=0)
    b_first = begin(tl.load(layout_5N + 3 * n + o_n, mask=m_n, other=0))
    b_last = tl.load(layout_5N + 4 * n + o_n, mask=m_n, other=0)
    return b_last - b_first - (1 if SYMMETRIC else 0), b_hi - b_lo - (b_last - b_first), n_s - (b_hi - b_lo)


@triton.jit
def _load_stats(stats, b_src, m_n, n):
    return (
        tl.load(stats + b_src, mask=m_n, other=0.0),
        tl.load(stats + n + b_src, mask=m_n, other=0.0),
        tl.load(stats + 2 * n + b_src, mask=m_n, other=0.0),
        tl.load(stats + 3 * n + b_src, mask=m_n, other=0.0),
        tl.load(stats + 4 * n + b_src, mask=m_n, other=0.0),
    )


@triton.jit
def _streamed_sum(
    part_s, layout_5N, o_n, m_n, n, rows, first_block, n_blocks,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """What the rows got from this wave's blocks, which they streamed past."""
    start = 0
    if SYMMETRIC:  # only blocks whose class range begins behind these rows have streamed them
        last = tl.minimum(tl.program_id(0) * BLOCK_N + BLOCK_N, n) - 1
        hi = tl.load(layout_5N + 2 * n + last)
        start = tl.maximum((hi + BLOCK_N - 1) // BLOCK_N * BLOCK_N // BLOCK_R - first_block, 0)
    o_c = tl.arange(0, 16)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for i_c in range(start, n_blocks, 16):
        p_part = part_s + (i_c + o_c).to(tl.int64)[:, None] * rows + o_n[None, :]
        m_part = (i_c + o_c < n_blocks)[:, None] & m_n[None, :]
        b_sum += tl.sum(tl.load(p_part, mask=m_part, other=0.0), 0)
    return b_sum


@triton.jit
def _resident_sums(part_r, o_n, m_n, rows, SLOTS: tl.constexpr, OWN: tl.constexpr, PEERS: tl.constexpr):
    """What the rows got while they were resident: sums over others and peers, and of peers' products."""
    b_other = tl.zeros(o_n.shape, tl.float32)
    b_peer = b_other
    b_linear = b_other
    if OWN:
        for i_k in tl.static_range(SLOTS):
            p_part = part_r + i_k * 3 * rows.to(tl.int64) + o_n
            b_other += tl.load(p_part, mask=m_n, other=0.0)
            if PEERS:
                b_peer += tl.load(p_part + rows, mask=m_n, other=0.0)
                b_linear += tl.load(p_part + 2 * rows, mask=m_n, other=0.0)
    return b_other, b_peer, b_linear


@triton.jit
def _store_stats(
    stats, flag, b_src, m_n, b_other, b_peer, b_linear, b_n_p, b_n_o, inverse_t, n,
    PEERS: tl.constexpr, HAS_FLAG: tl.constexpr,
):  # fmt: skip
    if HAS_FLAG:
        m_lost = (b_n_o > 0) & (b_other < SMALLEST_SUM)
        if PEERS:
            m_lost = m_lost | ((b_n_p > 0) & (b_peer < SMALLEST_SUM))
        if tl.max((m_lost & m_n).to(tl.int32), 0) > 0 and inverse_t > SAFE_INVERSE_T:
            tl.atomic_max(flag, 1)
    shift = shift_log2(inverse_t) * LN2
    b_none = tl.full(b_src.shape, float("-inf"), tl.float32)
    tl.store(stats + 2 * n + b_src, b_linear / tl.maximum(b_n_p, 1).to(tl.float32), mask=m_n)
    tl.store(stats + 3 * n + b_src, tl.where(b_n_p > 0, tl.log(b_peer) + shift, b_none) if PEERS else b_none, mask=m_n)
    tl.store(stats + 4 * n + b_src, tl.where(b_n_o > 0, tl.log(b_other) + shift, b_none), mask=m_n)


@triton.jit
def finish_kernel(
    part_r,  # (SLOTS, 3, rows), of all waves
    part_s,  # (n_blocks, rows)
    layout_5N,
    stats,  # (5, n) float32 in source order: mean_view, spread_view, mean_peer, lse_peer, lse_other
    counts,  # (3, n) int64 in source order: n_view, n_peer, n_other
    losses,  # (K, n) float32 in source order
    flag, t, t_value, n, n_s, rows,
    first_block, n_blocks,  # of this wave
    BLOCK_N: tl.constexpr,  # the alignment of class ranges
    BLOCK_R: tl.constexpr, SLOTS: tl.constexpr, SYMMETRIC: tl.constexpr,
    OWN: tl.constexpr, STREAMED: tl.constexpr,  # the rows were resident (part_r), were streamed (part_s)
    PEERS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,  # wave
    SUMS: tl.constexpr,  # read the partial sums; False: statistics are there already
    COUNTS: tl.constexpr,
    K: tl.constexpr, CODES: tl.constexpr,  # objectives, and their codes of six bits each
    HAS_T: tl.constexpr, HAS_FLAG: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    b_src = tl.load(layout_5N + o_n, mask=m_n, other=0)
    b_n_v, b_n_p, b_n_o = _counts(layout_5N, o_n, m_n, n, n_s, SYMMETRIC)
    run = n > 0
    if HAS_FLAG:
        run = tl.load(flag) == 0
    if SUMS and run:
        p_other = stats + 4 * n + b_src  # carries the sum from wave to wave
        b_sum = tl.zeros([BLOCK_N], tl.float32)
        if not FIRST:
            b_sum += tl.load(p_other, mask=m_n, other=0.0)
        if STREAMED:
            b_sum += _streamed_sum(
                part_s, layout_5N, o_n, m_n, n, rows, first_block, n_blocks, BLOCK_N, BLOCK_R, SYMMETRIC
            )
        if LAST:
            b_other, b_peer, b_linear = _resident_sums(part_r, o_n, m_n, rows, SLOTS, OWN, PEERS)
            inverse_t = inverse_temperature(t, t_value, HAS_T)
            _store_stats(
                stats, flag, b_src, m_n, b_sum + b_other, b_peer, b_linear, b_n_p, b_n_o, inverse_t, n, PEERS, HAS_FLAG
            )
        else:
            tl.store(p_other, b_sum, mask=m_n)
        tl.debug_barrier()
    if COUNTS:
        tl.store(counts + b_src, b_n_v.to(tl.int64), mask=m_n)
        tl.store(counts + n + b_src, b_n_p.to(tl.int64), mask=m_n)
        tl.store(counts + 2 * n + b_src, b_n_o.to(tl.int64), mask=m_n)
    b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o = _load_stats(stats, b_src, m_n, n)
    for i_k in tl.static_range(K):
        b_loss, _, _, _, _, _ = objective_rows(
            b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o, b_n_v, b_n_p, b_n_o, (CODES >> (6 * i_k)) & 63
        )
        tl.store(losses + i_k * n + b_src, b_loss, mask=m_n)
