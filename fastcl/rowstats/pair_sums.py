"""The sums over two Gram matrices behind `PairStats`, as tensors on the device of the rows, without synchronisation.

With mu the mean of the rows u_i of one model, v_i = u_i - mu and the margins a_i = <mu, v_i>, a matrix of inner
products minus its mean |mu|^2 is

    K_ij = <v_i, v_j> + a_i + a_j        diagonal |v_i|^2 + 2 a_i        row sums n a_i

because v and a sum to zero. So all sums cost O(n d), except the three inner products <K, L>, <K, K>, <L, L>.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.exchange import Ranks

_NEAR = 16  # models count as near if their difference is below a quarter of either, in Euclidean norm


class PairSums(NamedTuple):
    """Sums over K - shift_k and L - shift_l without their diagonals, and the diagonals; float64."""

    inner: Tensor  # (3,) <K, L>, <K, K>, <L, L>
    rows: tuple[Tensor, Tensor]  # (n,) row sums of K and of L
    diagonals: tuple[Tensor, Tensor]  # (n,)
    shifts: tuple[Tensor, Tensor]  # ()

    def packed(self) -> Tensor:
        """(18,) numbers as `PairStats.unpacked` takes them."""
        full_rows = [k + diagonal for k, diagonal in zip(self.rows, self.diagonals, strict=True)]
        parts = [self.inner + three(*self.diagonals), three(*full_rows), *(k.sum()[None] for k in full_rows)]
        parts += [self.inner, three(*self.rows), *(k.sum()[None] for k in self.rows)]
        return torch.cat([*parts, torch.stack(self.shifts)])

    @classmethod
    def of_centred(
        cls, inner: Tensor, squares: Sequence[Tensor], margins: Sequence[Tensor], means: Sequence[Tensor]
    ) -> PairSums:
        """From rows v of zero mean.

        Args:
            inner: (3,) sums of products of <v_i, v_j> and <w_i, w_j> over i != j.
            squares, margins: per model (n,) |v_i|^2 and a_i.
            means: per model () |mu|^2.
        """
        n = len(margins[0])
        a, b = (margin - margin.mean() for margin in margins)  # their sum is 0 up to rounding
        s, t = squares
        # Over i != j: <v_i, v_j> (b_i + b_j) adds up to -2 s_i b_i, and (a_i + a_j)(b_i + b_j) to 2 (n - 2) <a, b>.
        mixed = torch.stack([s @ b + t @ a, 2 * (s @ a), 2 * (t @ b)])
        inner = inner + 2 * (n - 2) * three(a, b) - 2 * mixed
        return cls(inner, ((n - 2) * a - s, (n - 2) * b - t), (s + 2 * a, t + 2 * b), (means[0], means[1]))

    @classmethod
    def of_rows(cls, ua: Tensor, ub: Tensor, narrow: bool) -> PairSums:
        """From float64 rows (n, da) and (n, db), which are overwritten, by their moments or their Gram matrices,
        whichever is cheaper. narrow: moments use float32 products; both models must have the same width."""
        firsts = [u[0].clone() for u in (ua, ub)]  # relative to the first row, so that equal rows give exact zeros
        offsets = [u.sub_(first).mean(0) for u, first in zip((ua, ub), firsts, strict=True)]
        va, vb = (u.sub_(offset) for u, offset in zip((ua, ub), offsets, strict=True))
        means = [first + offset for first, offset in zip(firsts, offsets, strict=True)]
        squares = [torch.linalg.vector_norm(v, dim=1).square_() for v in (va, vb)]  # needs no matrix of squares
        margins = [v @ mean for v, mean in zip((va, vb), means, strict=True)]
        da, db = va.shape[1], vb.shape[1]
        if len(va) * (da + db) < da * da + da * db + db * db:
            inner = three(*(_hollow(v @ v.mT).view(-1) for v in (va, vb)))
        elif narrow:
            inner = _narrow_moments(va, vb, squares) - three(*squares)
        else:
            moments = [(v.mT @ w).square().sum() for v, w in ((va, vb), (va, va), (vb, vb))]
            inner = torch.stack(moments) - three(*squares)
        return cls.of_centred(inner, squares, margins, [mean @ mean for mean in means])

    @classmethod
    def of_ranks(cls, ua: Tensor, ub: Tensor, ranks: Ranks) -> PairSums:
        """From the float64 rows (n, da) and (n, db) that each rank holds, which are overwritten: of all ranks' rows.

        The ranks exchange a row, means, moments (d d numbers) and four numbers a row.
        """
        u, widths = torch.cat([ua, ub], 1), [ua.shape[1], ub.shape[1]]
        one_row = replace(ranks, sizes=(1,) * ranks.world)
        first = one_row.gather(one_row.start(u[:1]))[0]  # as in `of_rows`
        v = u - first
        offset = ranks.add_up(v.sum(0)) / ranks.total
        v -= offset
        pairs = tuple(zip(v.split(widths, 1), (first + offset).split(widths), strict=True))
        moments = ranks.add_up(v.mT @ v)
        inner = [moments[: widths[0], widths[0] :], moments[: widths[0], : widths[0]]]
        inner = torch.stack([m.square().sum() for m in (*inner, moments[widths[0] :, widths[0] :])])
        told = torch.stack([w for part, mean in pairs for w in (part.square().sum(1), part @ mean)], 1)
        squares_a, margins_a, squares_b, margins_b = ranks.gather(ranks.start(told)).T
        squares, margins = (squares_a, squares_b), (margins_a, margins_b)
        return cls.of_centred(inner - three(*squares), squares, margins, [mean @ mean for _, mean in pairs])


def _narrow_moments(v: Tensor, w: Tensor, squares: Sequence[Tensor]) -> Tensor:
    """(3,) <vv', ww'>, <vv', vv'>, <ww', ww'> of (n, d) float64 rows, which are overwritten, by products in float32.

    With h = (v + w) / 2 and e = v - w the matrices differ by vv' - ww' = he' + eh'. If e is small, moments of h and e
    give the difference to full float32 precision, however near the models are; those of v and w would leave only
    rounding error. If e is not small, h and e would leave only rounding error of a model with the smaller spread.

    Args:
        squares: per model (n,) |v_i|^2.
    """
    e = v - w
    largest = torch.linalg.vector_norm(e).square() * _NEAR
    near = (largest < torch.minimum(*(square.sum() for square in squares))).to(e.dtype)
    a, b = v.addcmul_(e, near / -2).float(), w.lerp_(e, near).float()  # h and e, or v and w; no synchronisation
    with torch.autocast(a.device.type, enabled=False):
        aa, ab, bb = ((x.mT @ y).double() for x, y in ((a, a), (a, b), (b, b)))
    drift = 2 * ((aa * bb).sum() + (ab * ab.mT).sum())
    even, odd = aa + bb / 4, (ab + ab.mT) / 2
    first, second = ((even + sign * odd).square().sum() for sign in (1, -1))
    apart = torch.stack([m.square().sum() for m in (ab, aa, bb)])
    return torch.where(near > 0, torch.stack([(first + second - drift) / 2, first, second]), apart)


@dataclass(frozen=True)
class Profile:
    """Properties of one model's matrix K other than inner products; float64."""

    shift: Tensor  # () |mu|^2, the mean of the matrix
    margins: Tensor  # (n,)
    diagonal: Tensor  # (n,)

    @classmethod
    def of(cls, blocks: Iterable[Tensor], mean: Tensor) -> Profile:
        """From rows (., d) float64 in any number of blocks, and their mean (d,)."""
        margins, diagonal = [], []
        for u in blocks:
            v = u - mean
            margins.append(v @ mean)
            diagonal.append(v.square().sum(1) + 2 * margins[-1])
        return cls(mean.square().sum(), torch.cat(margins), torch.cat(diagonal))

    def times(self, factor: Tensor) -> Profile:
        """Profile of K times a 0-dimensional factor; the shift is unchanged."""
        return Profile(self.shift, self.margins * factor, self.diagonal * factor)


def _hollow(matrix: Tensor) -> Tensor:
    """Zero the diagonal in place and return the matrix. fill_diagonal_ would be compiled for a single size."""
    matrix.diagonal().zero_()
    return matrix


def three(a: Tensor, b: Tensor) -> Tensor:
    """(3,) <a, b>, <a, a>, <b, b>."""
    return torch.stack([a @ b, a @ a, b @ b])
