"""The algebra of objectives: row losses from row statistics, and their derivatives.

An objective reaches the kernels as a number (`fastcl.losses.objectives.Objective.code`): bits 0 to 2 are the relations
view, peer, other of its denominator, bits 3 and 4 view and peer of its positives, and bit 5 puts the mean over
positives inside the log. With P the log-sum-exp over the positives and Q that over the rest of the denominator, the
loss of a row is

    spread + softplus(Q - P)    if the denominator contains all positives
    spread + lse_denominator - P    if it contains none of them

where spread is log n for a mean inside the log and P minus the mean logit of the positives for a mean outside. If the
denominator contains only one of two attracted relations, S but not A, it shares S with the positives. The remaining
terms (Q = others in the denominator, A among the positives) again enter through a softplus,

    log n + softplus(Q - S) - softplus(A - S)    for a mean inside the log
    (n_S (S - mean_S + softplus(Q - S)) + n_A (lse_denominator - mean_A)) / n    for a mean outside

so that no precision is lost in rows where Q and A are small or absent. With a single peer, lse_peer equals mean_peer.
The whole derivative is then assigned to lse_peer: split into 1 - p and -1, it would cancel to p with float32's error.
"""

import triton
import triton.language as tl


@triton.jit
def softplus(b_x):
    """log(1 + e^x) with full relative precision, however small it is: log1p by the series of atanh."""
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
    """log(e^a + e^b), and the shares of e^a and e^b in the sum; -inf, 0 and 0 if both are -inf."""
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
def _spread(b_spread_v, b_own_p, b_lse_v, b_lse_p, b_n_v, b_n_p, b_part_v, b_part_p, POSITIVES: tl.constexpr):
    """P minus the mean logit of the positives.

    Summed per relation r as (lse_r - mean_r) + (P - lse_r), the second a softplus, so that small values stay accurate.
    """
    b_loss = b_part_v * 0.0
    if POSITIVES & 1:
        b_up = softplus(tl.where(b_n_p > 0, b_lse_p - b_lse_v, float("-inf"))) if POSITIVES & 2 else b_loss
        b_loss += tl.where(b_n_v > 0, b_part_v * (b_spread_v + b_up), 0.0)
    if POSITIVES & 2:
        b_up = softplus(tl.where(b_n_v > 0, b_lse_v - b_lse_p, float("-inf"))) if POSITIVES & 1 else b_part_v * 0.0
        b_loss += tl.where(b_n_p > 0, b_part_p * (b_own_p + b_up), 0.0)
    return b_loss


@triton.jit
def _partly_shared(
    b_s, b_own_s, b_a, b_own_a, b_o, b_n_s, b_n_a, b_part_s, b_part_a, b_count, INSIDE: tl.constexpr
):  # fmt: skip
    """Loss with denominator S and others, positives S and A; and its derivatives.

    b_s, b_a, b_o: log-sum-exps; b_o is -inf if the denominator has no others. b_own_s, b_own_a: log-sum-exps of S and A
    minus their mean logits. Derivatives: by the mean of S, by its log-sum-exp at a fixed mean, by A as a whole, by
    others.
    """
    m_s = b_n_s > 0
    m_a = b_n_a > 0
    b_gap = tl.where(m_s, b_o - b_s, 0.0)
    b_over = softplus(b_gap)
    b_q = tl.where(m_s, _sigmoid(b_gap), 1.0)  # share of the others in the denominator, and of S
    b_rest = tl.where(m_s, _sigmoid(-b_gap), 0.0)
    b_den_less_a = tl.where(m_a, tl.where(m_s, b_s - b_a + b_over, b_o - b_a), 0.0)
    if INSIDE:
        b_up = tl.where(m_s & m_a, b_a - b_s, float("-inf"))
        b_loss = tl.log(b_count) + tl.where(m_s, b_over - softplus(b_up), b_den_less_a)
        b_d_a = tl.where(m_s, -_sigmoid(b_up), -1.0)
        b_d_mean = tl.where(m_s, _sigmoid(b_up) - b_q, 0.0)
        b_d_spread = b_d_mean
    else:
        b_loss = b_part_s * (b_own_s + b_over) + b_part_a * (b_own_a + b_den_less_a)
        b_d_a = -b_part_a
        b_d_mean = b_part_a * b_rest - b_part_s * b_q
        b_d_spread = b_rest
    return b_loss, b_d_mean, b_d_spread, b_d_a, b_q


@triton.jit
def _shared_or_apart(
    b_lse_v, b_lse_p, b_lse_o, b_part_v, b_part_p, m_valid, b_spread,
    DENOMINATOR: tl.constexpr, POSITIVES: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Loss, spread included, if the denominator contains all positives or none; and its derivatives.

    Derivatives: by mean_view, spread_view, lse_peer at a fixed mean_peer, peers as a whole, lse_other.
    """
    NEGATIVES: tl.constexpr = DENOMINATOR & ~POSITIVES
    b_pos, b_pos_v, b_pos_p, _ = _log_sum_3(b_lse_v, b_lse_p, b_lse_o, POSITIVES)
    b_loss = b_spread
    b_outside = 0.0 if INSIDE else 1.0
    b_neg_v = b_spread * 0.0
    b_neg_p = b_neg_v
    b_neg_o = b_neg_v
    b_repel = b_neg_v  # derivative by Q, or by the denominator's log-sum-exp
    b_pull = b_neg_v  # derivative by P, without the spread of a mean outside the log
    b_with = b_neg_v + b_outside  # the same, including it
    if (DENOMINATOR & POSITIVES) == POSITIVES:
        if NEGATIVES:
            b_neg, b_neg_v, b_neg_p, b_neg_o = _log_sum_3(b_lse_v, b_lse_p, b_lse_o, NEGATIVES)
            b_gap = tl.where(m_valid, b_neg - b_pos, 0.0)
            b_loss += softplus(b_gap)
            b_repel = _sigmoid(b_gap)
            b_pull = -b_repel
            b_with = _sigmoid(-b_gap) if not INSIDE else b_pull
    else:  # no positive in the denominator D. Positives = view and D = other: NSCL; D = peer, other: DCL
        b_den, b_neg_v, b_neg_p, b_neg_o = _log_sum_3(b_lse_v, b_lse_p, b_lse_o, DENOMINATOR)
        b_loss += b_den - b_pos
        b_repel += 1.0
        b_pull -= 1.0
        b_with -= 1.0
    b_d_spread = b_with * b_pos_v + b_repel * b_neg_v
    b_d_mean = b_pull * b_pos_v + b_outside * (b_pos_v - b_part_v) + b_repel * b_neg_v
    b_d_peer = b_with * b_pos_p + b_repel * b_neg_p
    b_d_both = b_pull * b_pos_p + b_outside * (b_pos_p - b_part_p) + b_repel * b_neg_p
    return b_loss, b_d_mean, b_d_spread, b_d_peer, b_d_both, b_repel * b_neg_o


@triton.jit
def objective_rows(b_mean_v, b_spread_v, b_mean_p, b_lse_p, b_lse_o, b_n_v, b_n_p, b_n_o, CODE: tl.constexpr):
    """Row losses of one objective, and their derivatives by mean_view, spread_view, mean_peer, lse_peer, lse_other."""
    DENOMINATOR: tl.constexpr = CODE & 7
    POSITIVES: tl.constexpr = (CODE >> 3) & 3
    INSIDE: tl.constexpr = (CODE >> 5) & 1
    NEGATIVES: tl.constexpr = DENOMINATOR & ~POSITIVES
    SHARED: tl.constexpr = DENOMINATOR & POSITIVES
    b_lse_v = tl.where(b_n_v > 0, b_mean_v + b_spread_v, float("-inf"))
    b_n = _count_of(b_n_v, b_n_p, b_n_o, POSITIVES)
    m_valid = (b_n > 0) & (_count_of(b_n_v, b_n_p, b_n_o, DENOMINATOR) > 0)
    if NEGATIVES:
        m_valid = m_valid & (_count_of(b_n_v, b_n_p, b_n_o, NEGATIVES) > 0)
    b_count = tl.maximum(b_n, 1).to(tl.float32)
    # Fractions of the positives that are views and peers.
    b_part_v = b_n_v.to(tl.float32) / b_count if POSITIVES & 1 else b_count * 0.0
    b_part_p = b_n_p.to(tl.float32) / b_count if POSITIVES & 2 else b_count * 0.0
    b_own_p = tl.where(b_n_p > 1, b_lse_p - b_mean_p, 0.0)
    b_outside = 0.0 if INSIDE else 1.0
    if SHARED == 0 or SHARED == POSITIVES:
        b_spread = tl.log(b_count)
        if not INSIDE:
            b_spread = _spread(
                b_spread_v, b_own_p, b_lse_v, b_lse_p, b_n_v, b_n_p, b_part_v, b_part_p, POSITIVES
            )  # fmt: skip
        b_loss, b_d_mean, b_d_spread, b_d_peer, b_d_both, b_d_other = _shared_or_apart(
            b_lse_v, b_lse_p, b_lse_o, b_part_v, b_part_p, m_valid, b_spread, DENOMINATOR, POSITIVES, INSIDE
        )
    else:
        b_q = b_lse_o if NEGATIVES else tl.full(b_lse_o.shape, float("-inf"), tl.float32)
        if SHARED == 1:
            b_loss, b_d_mean, b_d_spread, b_d_both, b_d_other = _partly_shared(
                b_lse_v, b_spread_v, b_lse_p, b_own_p, b_q, b_n_v, b_n_p, b_part_v, b_part_p, b_count, INSIDE
            )
            b_d_peer = b_d_both + b_outside * b_part_p
        else:
            b_loss, b_d_both, b_d_peer, b_d_mean, b_d_other = _partly_shared(
                b_lse_p, b_own_p, b_lse_v, b_spread_v, b_q, b_n_p, b_n_v, b_part_p, b_part_v, b_count, INSIDE
            )
            b_d_spread = b_d_mean + b_outside * b_part_v
    b_d_peer = tl.where(b_n_p == 1, b_d_both, b_d_peer)
    b_d_mean_p = tl.where(b_n_p == 1, 0.0, -b_outside * b_part_p)
    return (
        tl.where(m_valid, b_loss, 0.0), tl.where(m_valid, b_d_mean, 0.0), tl.where(m_valid, b_d_spread, 0.0),
        tl.where(m_valid, b_d_mean_p, 0.0), tl.where(m_valid, b_d_peer, 0.0), tl.where(m_valid, b_d_other, 0.0),
    )  # fmt: skip
