"""A tile of the backward pass: from products to the weights G + G' of the rows' gradient.

With G_ij = dL/ds_ij, the weight of rows i and j is G_ij + G_ji:

    other   e_ij (a_i + a_j)                a_i = dL/dlse_other[i] exp(c - lse_other[i]), e_ij = exp(s_ij - c)
    peer    e_ij (b_i + b_j) + h_i + h_j    b_i likewise, h_i = dL/dmean_peer[i] / n_peer[i]
    view    0: view pairs are added apart

One exponential per element serves both rows. ONLINE, where no shift c fits all rows: exp(s_ij - lse[i]) dL/dlse[i] and
the same of j, two exponentials.
"""

import triton
import triton.language as tl

from ..common.numerics import LOG2E, relations


@triton.jit
def load_lse(stats, src_N, o_n, m_n, n, ROW: tl.constexpr):
    """A row of the statistics at working positions, in units of log2; +inf, of which exp(s - .) is 0, where empty."""
    b_lse = tl.load(stats + ROW * n + tl.load(src_N + o_n, mask=m_n, other=0), mask=m_n, other=float("inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)


@triton.jit
def _exponentials(
    b_x, b_shift, w_r, w_s, rows_r, rows_s, o_r, o_s, m_r, m_s, n_r, n_s, stats_r, stats_s, src_r, src_s,
    ROW: tl.constexpr, RELATION: tl.constexpr, MASKED: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    # In the few masked tiles registers are short: nothing of the resident rows is kept there (volatile).
    b_w_r = tl.load(w_r + RELATION * rows_r + o_r)
    b_w_s = tl.load(w_s + RELATION * rows_s + o_s)
    if ONLINE:
        b_l_r = load_lse(stats_r, src_r, o_r, m_r, n_r, ROW)
        b_l_s = load_lse(stats_s, src_s, o_s, m_s, n_s, ROW)
        b_w = _term(b_x, b_l_s[:, None], b_w_s[:, None]) + _term(b_x, b_l_r[None, :], b_w_r[None, :])
    else:
        b_w = b_shift * (b_w_s[:, None] + b_w_r[None, :])
    return b_w


@triton.jit
def _term(b_x, b_lse, b_weight):
    # A softmax is at most 1, also where logits are so large that rounding lifts one above its log-sum-exp. A weight of
    # 0 may go with a log-sum-exp of nothing: no exponential of that.
    b_power = tl.minimum(b_x - b_lse, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(b_weight == 0.0, 0.0, tl.exp2(b_power) * b_weight)


@triton.jit
def tile_weights(
    b_x, shift, w_r, w_s, rows_r, rows_s, start_r, start_s, n_r, n_s, stats_r, stats_s, src_r, src_s,
    lo_r, first_r, cls_s, smp_s,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
    MASKED: tl.constexpr, PEERS: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """Weights (S, R) of a tile of logits b_x in units of log2; w_r, w_s: (5, rows) as `weights_kernel` leaves them."""
    o_r = start_r + tl.arange(0, BLOCK_R)
    o_s = start_s + tl.arange(0, BLOCK_S)
    m_r = o_r < n_r
    m_s = o_s < n_s
    b_e = b_x
    if not ONLINE:
        b_e = tl.exp2(b_x - shift)
    b_w = _exponentials(
        b_x, b_e, w_r, w_s, rows_r, rows_s, o_r, o_s, m_r, m_s, n_r, n_s, stats_r, stats_s, src_r, src_s,
        4, 0, MASKED, ONLINE,
    )  # fmt: skip
    if MASKED:
        m_other, m_peer = relations(lo_r, first_r, cls_s, smp_s, o_r, m_r, o_s, m_s)
        b_w = tl.where(m_other & m_r[None, :], b_w, 0.0)
        if PEERS:
            b_p = _exponentials(
                b_x, b_e, w_r, w_s, rows_r, rows_s, o_r, o_s, m_r, m_s, n_r, n_s, stats_r, stats_s, src_r, src_s,
                3, 1, MASKED, ONLINE,
            )  # fmt: skip
            # Softmax and mean meet in float32: near the optimum they cancel.
            b_p += tl.load(w_s + 2 * rows_s + o_s)[:, None] + tl.load(w_r + 2 * rows_r + o_r)[None, :]
            b_w += tl.where(m_peer, b_p, 0.0)
    return b_w
