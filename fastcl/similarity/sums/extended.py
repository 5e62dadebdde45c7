"""The algebra of extended rows: moments to sums over Gram matrices, and the change from one pilot to another.

`fastcl.similarity.sums.moments` defines extended rows and explains the pilot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Model(NamedTuple):
    """Linear functionals of one model's extended row x+, for its exact mean mu."""

    offset: Tensor  # (d,) mu - pilot
    margin: Tensor  # (d + 3,): margin . x+ = mu . (row - mu) = mean of row i of K minus the mean of K
    diagonal: Tensor  # (d + 3,): diagonal . x+ = K_ii minus the mean of K
    shift: Tensor  # () |mu|^2, the mean of K
    trace: Tensor  # () sum of diagonal . x+
    noise: Tensor  # () possible error of <K, K> from merges, in units of the rounding of products


def model_of(pilot: Tensor, moments: Tensor, swept: Tensor) -> Model:
    """The functionals of a model from its pilot, its (d + 3, d + 3) moments and `swept` (see `Moments`)."""
    sums = moments[:, -1]
    offset = sums[:-3] / sums[-1]
    mean = pilot + offset
    one = torch.ones_like(offset[:1])
    spread = (sums[-3] - sums[-1] * (offset @ offset)).clamp_min(0)
    moved = torch.where(swept > 0, swept / spread, 0)
    # Split mu into its component along p and the rest: mu . v = along <p, v> + left . v. If the mean is far from zero,
    # p is nearly mu and <p, v> has the digits; if it is zero, p is only noise. Moments merged from another pilot, at a
    # squared distance `moved`, bring the rounding of their products into <p, v>, so `moved` makes `along` smaller.
    along = mean @ pilot / (torch.where(pilot.any(), pilot @ pilot, 1.0) + moved)
    left = mean - along * pilot
    noise = torch.where(swept > 0, 2 * sums[-1] * (left @ left + along * along * moved) * spread, 0)
    margin = torch.cat([left, 0 * one, along * one, -(mean @ offset) * one])
    diagonal = torch.cat([0 * offset, one, 2 * one, -((pilot + mean) @ offset) * one])
    return Model(offset, margin, diagonal, mean @ mean, diagonal @ sums, noise)


def sums_of(moments: Tensor, x: Model, y: Model) -> Tensor:
    """Sums over K - mean(K) and L - mean(L) as a (4,) tensor: <K, L>, <k, l>, then both without the diagonals.

    With margins a_i and b_i, K_ij - mean(K) = (HKH)_ij + a_i + a_j, where HKH is the Gram matrix of the centred rows
    and has zero row sums, and sum a_i = 0. So <K, L> = ||C||^2 + 2n<a, b>, with C the cross-moment of the centred rows,
    and the row sums are n a_i.
    """
    n = moments[-1, -1]
    centred = cross_moment(moments, x.offset, y.offset)
    margins = x.margin @ (moments @ y.margin)
    full = centred.square_().sum() + 2 * n * margins
    full_rows = n * n * margins
    along_diagonal = moments @ y.diagonal
    diagonals = x.diagonal @ along_diagonal
    mixed = x.margin @ along_diagonal + x.diagonal @ (moments @ y.margin)
    return torch.stack([full, full_rows, full - diagonals, full_rows - n * mixed + diagonals])


def cross_moment(moments: Tensor, x_offset: Tensor, y_offset: Tensor) -> Tensor:
    """(d_x, d_y) cross-moment of the centred rows, from moments and the offsets of both models."""
    return torch.addr(moments[:-3, :-3], -moments[-1, -1] * x_offset, y_offset)


def strain(model: Model, sums: Tensor, n: Tensor) -> Tensor:
    """Possible error of K from merges, relative to ||HKH||^2, in units of the rounding of products; shape ().

    Args:
        sums: `sums_of` for K and K.
        n: () number of rows.
    """
    centred = sums[0] - 2 / n * sums[1]
    return torch.where((centred > 0) & (model.noise > 0), model.noise / centred, 0)


def extended(x: Tensor, pilot: Tensor) -> Tensor:
    """(b, d + 3) extended rows; the (b, d) rows are overwritten."""
    rows = x.new_empty(len(x), x.shape[1] + 3)
    v = torch.sub(x, pilot, out=rows[:, :-3])
    torch.mv(v, pilot, out=rows[:, -2])
    torch.sum(torch.mul(v, v, out=x), 1, out=rows[:, -3])
    rows[:, -1] = 1
    return rows


def translation(old: Tensor, new: Tensor) -> Tensor:
    """The matrix T that turns extended rows about the old pilot into those about the new one."""
    delta, d = old - new, len(old)
    t = torch.eye(d + 3, dtype=delta.dtype, device=delta.device)
    t[:d, -1] = delta
    t[d, :d], t[d, -1] = 2 * delta, delta @ delta
    t[d + 1, :d], t[d + 1, -1] = -delta, new @ delta  # <new, v + delta>
    return t
