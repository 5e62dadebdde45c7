"""A tile of the backward pass: turns products into the weights G + G' of the rows' gradient.

With G_ij = dL/ds_ij, the weight of rows i and j is G_ij + G_ji:

    other   e_ij (a_i + a_j)                a_i = dL/dlse_other[i] exp(c - lse_other[i]), e_ij = exp(s_ij - c)
    peer    e_ij (b_i + b_j) + h_i + h_j    b_i likewise, h_i = dL/dmean_peer[i] / n_peer[i]
    view    0: view pairs are added separately

One exponential per element serves both rows. With ONLINE, when no shift c fits all rows, the terms are
exp(s_ij - lse[i]) dL/dlse[i] and the same for j: two exponentials.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.numerics import LOG2E, relations


class Weights(NamedTuple):
    """Weights of one side's statistics in the gradient of the rows."""

    weights: Any  # (5, rows) float32 as `weights_kernel` leaves them
    stats: Any  # (5, n); stats and src_N are read only with ONLINE
    src_N: Any  # (n,) int32


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
        b_e = tl.exp2(b_x - shift)
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
