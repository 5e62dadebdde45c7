"""The tile route: sums over Gram matrices from tiles of both, formed together and never stored. O(n^2 d) time, O(n d)
memory.

Cheaper than moments where there are fewer samples than features, and the only way for kernels that are no inner
product. With v_i the rows less their mean mu, and the shifts as in `PairStats`,

    inner products:  K_ij - |mu|^2 = <v_i, v_j> + a_i + a_j,   a_i = <mu, v_i>
    rbf:             K_ij - s      = exp(-|v_i - v_j|^2 / (2 sigma^2)) - s,   s = 1 for a wide kernel, else 0

Tiles of inner products hold <v_i, v_j> alone. Its rows sum to 0, without the diagonal to -|v_i|^2, so what the margins
add to a sum is known without tiles, and no digits are lost where the mean is large. Only tiles on and right of the
diagonal are formed; each serves its rows and its columns. Diagonals are left out: in a narrow kernel they are all there
is, and the rest would be lost beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.errors import FastclError
from fastcl.similarity.inputs import on_triton
from fastcl.similarity.rows import INNER, mapped

TILE = 1024
_SAMPLED = 2048  # rows whose distances give the median


class TileSums(NamedTuple):
    """Sums over K - shift_k and L - shift_l without their diagonals, and these; float64."""

    inner: Tensor  # (3,) <K, L>, <K, K>, <L, L>
    rows: tuple[Tensor, Tensor]  # (n,) row sums of K and of L
    diagonals: tuple[Tensor, Tensor]  # (n,)
    shifts: tuple[Tensor, Tensor]  # ()

    def packed(self) -> Tensor:
        """(18,) the numbers of `PairStats.unpacked`."""
        full_rows = [k + diagonal for k, diagonal in zip(self.rows, self.diagonals, strict=True)]
        parts = [self.inner + _three(*self.diagonals), _three(*full_rows), *(k.sum()[None] for k in full_rows)]
        parts += [self.inner, _three(*self.rows), *(k.sum()[None] for k in self.rows)]
        return torch.cat([*parts, torch.stack(self.shifts)])

    @classmethod
    def of_centred(
        cls, inner: Tensor, squares: Sequence[Tensor], margins: Sequence[Tensor], means: Sequence[Tensor]
    ) -> TileSums:
        """From rows v of zero mean.

        Args:
            inner: (3,) sums of products of <v_i, v_j> and <w_i, w_j> over i != j.
            squares, margins: per model (n,) |v_i|^2 and a_i.
            means: per model () |mu|^2.
        """
        n = len(margins[0])
        a, b = (margin - margin.mean() for margin in margins)  # what rounding left of a sum of 0
        (s, t) = squares
        # Over i != j: <v_i, v_j> (b_i + b_j) adds up to -2 s_i b_i, and (a_i + a_j)(b_i + b_j) to 2 (n - 2) <a, b>.
        mixed = torch.stack([s @ b + t @ a, 2 * (s @ a), 2 * (t @ b)])
        inner = inner + 2 * (n - 2) * _three(a, b) - 2 * mixed
        return cls(inner, ((n - 2) * a - s, (n - 2) * b - t), (s + 2 * a, t + 2 * b), tuple(means))


def tile_sums(x: Tensor, y: Tensor, kernel: str, bandwidth: float) -> TileSums:
    """Sums of (n, d) features; arguments as `fastcl.pair_stats`, checked."""
    fused = on_triton(x, y)
    if fused:
        from fastcl.backends.triton import gram
    if kernel in INNER:
        if fused:
            return TileSums.of_centred(*gram.inner_sums(x, y, kernel))
        models = [_centred(mapped(v, kernel)) for v in (x, y)]
        rows = [v for v, _ in models]
        inner, _ = _over_tiles([_InnerTiles(v) for v in rows])
        margins = [v @ mean for v, mean in models]
        return TileSums.of_centred(inner, [v.square().sum(1) for v in rows], margins, [m @ m for _, m in models])
    shift = float(math.exp(-0.5 / bandwidth**2) > 0.5)
    scales = [0.5 / (bandwidth * median_distance(v, name)) ** 2 for v, name in ((x, "x"), (y, "y"))]
    if fused:
        inner, rows = gram.rbf_sums(x, y, scales, shift)
    else:
        rows = [_centred(mapped(v, kernel))[0] for v in (x, y)]
        inner, rows = _over_tiles([_RbfTiles(v, scale, shift) for v, scale in zip(rows, scales, strict=True)])
    diagonal = rows[0].new_full((len(x),), 1 - shift)
    return TileSums(inner, tuple(rows), (diagonal, diagonal), (rows[0].new_tensor(shift),) * 2)


def median_distance(x: Tensor, name: str) -> float:
    """Median distance between two of at most 2,048 evenly spaced rows.

    Raises:
        FastclError: it is 0: half of the pairs or more are of equal rows.
    """
    step = -(-len(x) // _SAMPLED)
    distances = torch.pdist(x[::step].double())
    median = float(distances.median()) if len(distances) else 0.0
    if not median > 0:
        raise FastclError(
            f"the rbf kernel has no scale for {name}: the median distance between its {len(x)} samples is {median:g}"
        )
    return median


def _three(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a @ b, a @ a, b @ b])


def _centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows less their mean, and the mean; about the first row, so that equal rows give exact zeros."""
    mean = rows[0] + (rows - rows[0]).mean(dim=0)
    return rows - mean, mean


class _InnerTiles(NamedTuple):
    rows: Tensor  # (n, d) of zero mean

    def __call__(self, i: slice, j: slice) -> Tensor:
        return self.rows[i] @ self.rows[j].mT


class _RbfTiles(NamedTuple):
    rows: Tensor
    scale: float  # 1 / (2 sigma^2)
    shift: float  # 0 or 1

    def __call__(self, i: slice, j: slice) -> Tensor:
        norms_i, norms_j = (self.rows[k].square().sum(1) for k in (i, j))
        squares = torch.addmm(norms_j, self.rows[i], self.rows[j].mT, alpha=-2).add_(norms_i[:, None]).clamp_min_(0)
        power = squares.mul_(-self.scale)
        return power.expm1_() if self.shift else power.exp_()


def _over_tiles(models: Sequence[Callable[[slice, slice], Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """(3,) <K, L>, <K, K>, <L, L>, and the row sums of K and L."""
    first = models[0].rows
    n = len(first)
    inner = first.new_zeros(3)
    sums = [first.new_zeros(n) for _ in models]  # of equal alignment, or equal models would differ in a last bit
    for top in range(0, n, TILE):
        i = slice(top, min(top + TILE, n))
        for left in range(top, n, TILE):
            j = slice(left, min(left + TILE, n))
            tiles = [model(i, j) for model in models]
            if i == j:
                tiles = [tile.fill_diagonal_(0) for tile in tiles]
            for total, tile in zip(sums, tiles, strict=True):
                total[i] += tile.sum(1)
                if i != j:
                    total[j] += tile.sum(0)
            inner += _three(*(tile.view(-1) for tile in tiles)) * (1 if i == j else 2)
    return inner, sums
