"""Sums over two cosine Gram matrices as tensors on the device of the rows: what PairStats is made of, without a wait.

With mu the mean of the unit rows u_i, v_i = u_i - mu and the margins a_i = <v_i, mu>, the matrix of cosines less its
mean |mu|^2 is

    K'_ij = <v_i, v_j> + a_i + a_j        row sums n a_i        diagonal |v_i|^2 + 2 a_i

since sum_i v_i = 0 and sum_i a_i = 0. So all sums but three inner products <K', L'> take O(n d); those are
|V'W|^2 + 2 n <a, b>, or come from tiles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Profile:
    """What one model's matrix K' brings beside its inner products; float64."""

    shift: Tensor  # () |mu|^2, the mean of K
    margins: Tensor  # (n,)
    diagonal: Tensor  # (n,)

    @classmethod
    def of(cls, blocks: Iterable[Tensor], mean: Tensor) -> Profile:
        """From the unit rows, (., d) float64 in any number of blocks, and their mean (d,)."""
        margins, diagonal = [], []
        for u in blocks:
            v = u - mean
            margins.append(v @ mean)
            diagonal.append(v.square().sum(1) + 2 * margins[-1])
        return cls(mean.square().sum(), torch.cat(margins), torch.cat(diagonal))

    def times(self, factor: Tensor) -> Profile:
        """K' times a number of 0 dimensions; the shift stays."""
        return Profile(self.shift, self.margins * factor, self.diagonal * factor)


def sums_of(inner: Tensor, a: Profile, b: Profile) -> Tensor:
    """(18,) float64 for `PairStats.unpacked`, from the inner products <K', L'>, <K', K'>, <L', L'>."""
    n = len(a.margins)
    full, hollow = [], []
    for x, y in ((a, b), (a, a), (b, b)):
        full.append(n * n * (x.margins * y.margins).sum())
        diagonals = (x.diagonal * y.diagonal).sum()
        hollow.append((diagonals, ((n * x.margins - x.diagonal) * (n * y.margins - y.diagonal)).sum()))
    diagonals, rows = (torch.stack(values) for values in zip(*hollow, strict=True))
    nothing = torch.zeros_like(inner[:2])
    traces = torch.stack([-a.diagonal.sum(), -b.diagonal.sum()])
    shifts = torch.stack([a.shift, b.shift])
    return torch.cat([inner, torch.stack(full), nothing, inner - diagonals, rows, traces, shifts])


def sums_of_rows(ua: Tensor, ub: Tensor) -> Tensor:
    """(18,) float64 for `PairStats.unpacked`, of unit rows (n, da) and (n, db), float64; zero rows stay zero."""
    n = len(ua)
    means = [u.mean(0) for u in (ua, ub)]
    a, b = (Profile.of([u], mean) for u, mean in zip((ua, ub), means, strict=True))
    va, vb = ua - means[0], ub - means[1]
    da, db = ua.shape[1], ub.shape[1]
    pairs = ((va, vb, a, b), (va, va, a, a), (vb, vb, b, b))
    if n * (da + db) < da * da + da * db + db * db:  # few rows: the matrices themselves are smaller
        grams = va @ va.mT, vb @ vb.mT
        squares = [(k * g).sum() for k, g in (grams, grams[:1] * 2, grams[1:] * 2)]
    else:
        squares = [(x.mT @ y).square().sum() for x, y, _, _ in pairs]
    margins = [2 * n * (x.margins * y.margins).sum() for _, _, x, y in pairs]
    return sums_of(torch.stack(squares) + torch.stack(margins), a, b)
