"""`PairStats` of many subsets of the samples, from one pass over tiles of both Gram matrices.

Let W (n x R) have a column of zeros and ones for each of R subsets. For the rows i of a tile, K_i W are the row sums of
K over every subset, and (K * L)_i W, with the elementwise product, those of the products; summed over the rows of each
subset they are the sums that `PairStats` takes. Five products of matrices serve all subsets, whatever the widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from fastcl.similarity.stats import PairStats
from fastcl.similarity.sums.routes import statistics
from fastcl.similarity.sums.rows import Inner
from fastcl.similarity.uncertainty.permuted import Centred

_TILE = 512  # rows of a tile
_GROUP = 256  # subsets at a time: columns of W
_FEW = 2000  # samples, below which tiles are always faster
_TILES = 10  # multiplications for each entry of a Gram matrix and subset


def half_stats(x: Tensor, y: Tensor, kernel: Inner, subsets: Iterable[Tensor]) -> Iterator[PairStats]:
    """The statistics of two models on each subset.

    Args:
        x, y: (n, d) checked features.
        subsets: (m,) int64 each, the distinct samples of a subset; the same m for all.
    """
    n, a, b = len(x), x.shape[1], y.shape[1]
    if n >= _FEW and a * a + a * b + b * b < _TILES * n:
        for chosen in subsets:
            chosen = chosen.to(x.device)
            yield statistics(x[chosen], y[chosen], kernel)
        return
    models = [Centred.of(v, kernel) for v in (x, y)]
    drawn = iter(subsets)
    while group := list(islice(drawn, _GROUP)):
        weights = torch.zeros(n, len(group), dtype=torch.float64, device=x.device)
        weights.scatter_(0, torch.stack(group, 1).to(x.device), 1.0)
        levels = [model.level.expand(1, len(group)) for model in models]
        for values in torch.cat([_sums(models, weights), *levels]).mT.tolist():
            yield PairStats.unpacked(len(group[0]), kernel, values)


def _sums(models: list[Centred], weights: Tensor) -> Tensor:
    """(16, R) sums of K and L minus their means over all samples: with their diagonals, then without."""
    full, hollow = (weights.new_zeros(8, weights.shape[1]) for _ in range(2))
    for start in range(0, len(weights), _TILE):
        i = slice(start, start + _TILE)
        k, l = (_tile(model, start) for model in models)  # noqa: E741
        inside = weights[i]
        products = [(first * second) @ weights for first, second in ((k, l), (k, k), (l, l))]
        rows = [tile @ weights for tile in (k, l)]
        diagonals = [(model.squares[i] + 2 * model.margins[i])[:, None] for model in models]
        hollow += _eight(products, rows, inside)
        d, e = diagonals
        products = [p + q for p, q in zip(products, (d * e, d * d, e * e), strict=True)]
        full += _eight(products, [row + diagonal for row, diagonal in zip(rows, diagonals, strict=True)], inside)
    return torch.cat([full, hollow])


def _eight(products: list[Tensor], rows: list[Tensor], inside: Tensor) -> Tensor:
    """(8, R) sums over the rows of each subset, in the order of GramSums."""
    k, l = rows  # noqa: E741
    return torch.stack([(inside * part).sum(0) for part in (*products, k * l, k * k, l * l, k, l)])


def _tile(model: Centred, start: int) -> Tensor:
    """(b, n) rows of K minus its mean, without the diagonal."""
    i = slice(start, start + _TILE)
    tile = (model.rows[i] @ model.rows.mT).add_(model.margins[i, None]).add_(model.margins)
    tile.diagonal(start).zero_()
    return tile
