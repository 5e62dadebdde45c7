"""The algebra of extended rows: from their moments to sums over Gram matrices, and from one pilot to another.

See `fastcl.similarity.sums.moments` for what an extended row is and why there is a pilot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Model(NamedTuple):
    """Functionals of the extended row x+ of one model about its exact mean mu."""

    offset: Tensor  # (d,) mu - pilot
    margin: Tensor  # (d + 3,): margin . x+ = mu . (row - mu) = mean of K's row i, less the mean of K
    diagonal: Tensor  # (d + 3,): diagonal . x+ = K_ii, less the mean of K
    shift: Tensor  # () |mu|^2, the mean of K
    trace: Tensor  # () sum of diagonal . x+
    noise: Tensor  # () what merges may have done to <K, K>, as a multiple of the rounding of products


def model_of(pilot: Tensor, moments: Tensor, swept: Tensor) -> Model:
    """swept: see `Moments`."""
    sums = moments[:, -1]
    offset = sums[:-3] / sums[-1]
    mean = pilot + offset
    one = torch.ones_like(offset[:1])
    spread = (sums[-3] - sums[-1] * (offset @ offset)).clamp_min(0)
    moved = torch.where(swept > 0, swept / spread, 0)
    # mu . v is <p, v> plus what is left of mu, as far as mu points along p: where the mean is far from zero p is nearly
    # mu and <p, v> has the digits; where it is zero p is but noise. Moments that came from another pilot, at a squared
    # distance `moved`, brought the rounding of their products into <p, v>: the less of it is taken.
    along = mean @ pilot / (torch.where(pilot.any(), pilot @ pilot, 1.0) + moved)
    left = mean - along * pilot
    noise = torch.where(swept > 0, 2 * sums[-1] * (left @ left + along * along * moved) * spread, 0)
    margin = torch.cat([left, 0 * one, along * one, -(mean @ offset) * one])
    diagonal = torch.cat([0 * offset, one, 2 * one, -((pilot + mean) @ offset) * one])
    return Model(offset, margin, diagonal, mean @ mean, diagonal @ sums, noise)


def sums_of(moments: Tensor, x: Model, y: Model) -> Tensor:
    """Sums over K - mean(K) and L - mean(L) as a (4,) tensor: <K, L>, <k, l>, then both without the diagonals.

    With a_i, b_i the margins, K_ij - mean(K) = (HKH)_ij + a_i + a_j, where HKH is the Gram matrix of the centred rows,
    has zero row sums, and sum a_i = 0. So <K, L> = ||C||^2 + 2n<a, b> and the row sums are n a_i.
    """
    n = moments[-1, -1]
    centred = torch.addr(moments[:-3, :-3], -n * x.offset, y.offset)
    margins = x.margin @ (moments @ y.margin)
    full = centred.square_().sum() + 2 * n * margins
    full_rows = n * n * margins
    along_diagonal = moments @ y.diagonal
    diagonals = x.diagonal @ along_diagonal
    mixed = x.margin @ along_diagonal + x.diagonal @ (moments @ y.margin)
    return torch.stack([full, full_rows, full - diagonals, full_rows - n * mixed + diagonals])


def strain(model: Model, sums: Tensor, n: Tensor) -> Tensor:
    """() how many times the rounding of products merges may have brought into a matrix K, relative to ||HKH||^2.

    Args:
        sums: those of `sums_of` for K and K.
        n: () rows.
    """
    centred = sums[0] - 2 / n * sums[1]
    return torch.where((centred > 0) & (model.noise > 0), model.noise / centred, 0)


def extended(x: Tensor, pilot: Tensor) -> Tensor:
    """(b, d + 3) extended rows of (b, d) rows, which are overwritten."""
    rows = x.new_empty(len(x), x.shape[1] + 3)
    v = torch.sub(x, pilot, out=rows[:, :-3])
    torch.mv(v, pilot, out=rows[:, -2])
    torch.sum(torch.mul(v, v, out=x), 1, out=rows[:, -3])
    rows[:, -1] = 1
    return rows


def translation(old: Tensor, new: Tensor) -> Tensor:
    """T that turns extended rows about one pilot into those about another."""
    delta, d = old - new, len(old)
    t = torch.eye(d + 3, dtype=delta.dtype, device=delta.device)
    t[:d, -1] = delta
    t[d, :d], t[d, -1] = 2 * delta, delta @ delta
    t[d + 1, :d], t[d + 1, -1] = -delta, new @ delta  # <new, v + delta>
    return t
