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

from fastcl.backends.pairs import PairSums, three
from fastcl.errors import FastclError
from fastcl.similarity.inputs import on_triton
from fastcl.similarity.rows import INNER, mapped

TILE = 1024
_SAMPLED = 2048  # rows whose distances give the median


def tile_sums(x: Tensor, y: Tensor, kernel: str, bandwidth: float) -> PairSums:
    """Sums of (n, d) features; arguments as `fastcl.pair_stats`, checked."""
    fused = on_triton(x, y)
    if fused:
        from fastcl.backends.triton import gram
    if kernel in INNER:
        if fused:
            return PairSums.of_centred(*gram.inner_sums(x, y, kernel))
        models = [_centred(mapped(v, kernel)) for v in (x, y)]
        rows = [v for v, _ in models]
        inner, _ = _over_tiles([_InnerTiles(v) for v in rows])
        margins = [v @ mean for v, mean in models]
        return PairSums.of_centred(inner, [v.square().sum(1) for v in rows], margins, [m @ m for _, m in models])
    shift = float(math.exp(-0.5 / bandwidth**2) > 0.5)
    scales = [0.5 / (bandwidth * median_distance(v, name)) ** 2 for v, name in ((x, "x"), (y, "y"))]
    if fused:
        inner, rows = gram.rbf_sums(x, y, scales, shift)
    else:
        rows = [_centred(mapped(v, kernel))[0] for v in (x, y)]
        inner, rows = _over_tiles([_RbfTiles(v, scale, shift) for v, scale in zip(rows, scales, strict=True)])
    diagonal = rows[0].new_full((len(x),), 1 - shift)
    return PairSums(inner, tuple(rows), (diagonal, diagonal), (rows[0].new_tensor(shift),) * 2)


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
            inner += three(*(tile.view(-1) for tile in tiles)) * (1 if i == j else 2)
    return inner, sums
