"""The tile route: sums over Gram matrices from tiles of both, formed together and never stored. O(n^2 d) time, O(n d)
memory.

Cheaper than moments if there are fewer samples than features, and the only route for kernels that are not inner
products. With v_i the rows minus their mean mu, and the shifts as in `PairStats`,

    inner products:  K_ij - |mu|^2 = <v_i, v_j> + a_i + a_j,   a_i = <mu, v_i>
    rbf:             K_ij - s      = exp(-|v_i - v_j|^2 / (2 sigma^2)) - s,   s = 1 for a wide kernel, else 0

Tiles of inner products hold only <v_i, v_j>. Its rows sum to 0, or to -|v_i|^2 without the diagonal, so the margins'
share of each sum is known without tiles, and a large mean costs no digits. Only tiles on and right of the diagonal are
formed; each serves its rows and its columns. Diagonals are left out: in a narrow kernel they dominate, and the rest
would be lost to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastcl.dispatch import on_triton, ran_on
from fastcl.errors import FastclError
from fastcl.rowstats.pair_sums import PairSums, three
from fastcl.similarity.sums.features import multiplied_narrow
from fastcl.similarity.sums.rows import INNER, mapped

TILE = 512
_SAMPLED = 2048  # rows used for the median distance
_NEAR = 1e-6  # times the largest |v|^2: smaller squared distances are computed from differences, for 10 digits
_REACH = 64.0  # largest |v|^2 / (2 sigma^2) for float32, where its errors in exponents are about 1e-5


def tile_sums(x: Tensor, y: Tensor, kernel: str, bandwidth: float) -> PairSums:
    """Sums of (n, d) features; checked arguments as in `fastcl.pair_stats`."""
    kernels, narrow = on_triton(x, y), multiplied_narrow(x, y)
    if kernel in INNER:
        if kernels:
            from fastcl.similarity.sums import triton as gram

            return PairSums.of_centred(*gram.inner_sums(x, y, kernel))
        models = [_Rows.of(mapped(v, kernel), narrow) for v in (x, y)]
        inner, _ = _over_tiles([model.products for model in models], len(x), row_sums=False)
        squares, margins, means = zip(*((m.squares, m.margins, m.mean @ m.mean) for m in models), strict=True)
        return PairSums.of_centred(inner, squares, margins, means)
    shift = float(math.exp(-0.5 / bandwidth**2) > 0.5)
    scales = [0.5 / (bandwidth * median_distance(v, name)) ** 2 for v, name in ((x, "x"), (y, "y"))]
    # Squared distances are |v_i|^2 + |v_j|^2 - 2 <v_i, v_j>: with a far outlier float32 would lose the others.
    reach = max(scale * _largest_square(v) for v, scale in zip((x, y), scales, strict=True))
    if kernels and reach < _REACH:
        from fastcl.similarity.sums import triton as gram

        inner, rows = gram.rbf_sums(x, y, scales, shift)
    else:
        if kernels:
            ran_on("chunked")
        models = [_Rows.of(mapped(v, kernel), narrow and reach < _REACH) for v in (x, y)]
        tiles = [partial(model.exponentials, scale, shift) for model, scale in zip(models, scales, strict=True)]
        inner, rows = _over_tiles(tiles, len(x), row_sums=True)
    diagonal, level = rows[0].new_full((len(x),), 1 - shift), rows[0].new_tensor(shift)
    return PairSums(inner, (rows[0], rows[1]), (diagonal, diagonal), (level, level))


def median_distance(x: Tensor, name: str) -> float:
    """Median distance between two of at most 2,048 evenly spaced rows.

    Raises:
        FastclError: it is 0, that is, at least half of the pairs are equal rows.
    """
    sampled = mapped(x[:: -(-len(x) // _SAMPLED)], "rbf")
    rows = sampled - (sampled[0] + (sampled - sampled[0]).mean(0))
    squares = rows.square().sum(1)
    found = torch.cat([_squared_distances(rows, squares, i) for i in range(0, len(rows), TILE)])
    square = float(found.median()) if len(found) else 0.0
    # If rows are much closer to each other than to the origin, products cannot tell them from equal rows.
    near = not square > _NEAR * float(squares.amax())
    median = float(torch.pdist(sampled).median()) if near and len(found) else math.sqrt(square)
    if not median > 0:
        raise FastclError(
            f"the rbf kernel has no scale for {name}: the median distance between its {len(x)} samples is {median:g}"
        )
    return median


def _squared_distances(rows: Tensor, squares: Tensor, start: int) -> Tensor:
    """Squared distances of TILE rows to every earlier row, flat; many times faster than from differences."""
    block = slice(start, start + TILE)
    before = slice(0, start + len(rows[block]))
    with torch.autocast(rows.device.type, enabled=False):
        tile = torch.addmm(squares[before], rows[block], rows[before].mT, alpha=-2).add_(squares[block, None])
    return tile[torch.ones_like(tile, dtype=torch.bool).tril_(start - 1)]


def _largest_square(x: Tensor) -> float:
    """The largest |v|^2 of the centred rows v."""
    v = mapped(x, "rbf")
    v -= v.mean(dim=0)
    return v.square_().sum(dim=1).amax().item()


@dataclass(frozen=True)
class _Rows:
    """One model's centred rows and what their tiles need."""

    rows: Tensor  # (n, d) float64; float32, scaled by a power of two, if that is as accurate as the features
    factor: float  # <v_i, v_j> divided by the product of these rows
    squares: Tensor  # (n,) float64: |v_i|^2
    margins: Tensor  # (n,) float64: a_i
    mean: Tensor  # (d,) float64

    @classmethod
    def of(cls, rows: Tensor, narrow: bool) -> _Rows:
        # Computed about the first row, so that equal rows give exact zeros.
        mean = rows[0] + (rows - rows[0]).mean(dim=0)
        rows = rows - mean
        squares, margins, factor = rows.square().sum(1), rows @ mean, 1.0
        if narrow:
            exponent = torch.frexp(rows.abs().amax())[1].item()
            rows, factor = torch.ldexp(rows, -squares.new_tensor(exponent)).float(), 4.0**exponent
        return cls(rows, factor, squares, margins, mean)

    def products(self, i: slice, j: slice) -> Tensor:
        """Tile of <v_i, v_j>, float64."""
        with torch.autocast(self.rows.device.type, enabled=False):
            return (self.rows[i] @ self.rows[j].mT).double().mul_(self.factor)

    def exponentials(self, scale: float, shift: float, i: slice, j: slice) -> Tensor:
        """Tile of exp(-scale |v_i - v_j|^2) - shift, float64."""
        squares = self.squares[j] - self.products(i, j).mul_(2)
        power = squares.add_(self.squares[i, None]).clamp_min_(0).mul_(-scale)
        return power.expm1_() if shift else power.exp_()


def _over_tiles(
    models: Sequence[Callable[[slice, slice], Tensor]], n: int, row_sums: bool
) -> tuple[Tensor, list[Tensor]]:
    """(3,) <K, L>, <K, K>, <L, L>, and the row sums of K and L if requested."""
    inner, sums = torch.zeros(3, dtype=torch.float64, device="cpu"), []
    for top in range(0, n, TILE):
        i = slice(top, min(top + TILE, n))
        for left in range(top, n, TILE):
            j = slice(left, min(left + TILE, n))
            tiles = [model(i, j) for model in models]
            if i == j:
                tiles = [tile.fill_diagonal_(0) for tile in tiles]
            if row_sums:
                # Buffers need equal alignment, or equal models would differ in the last bit.
                sums = sums or [tile.new_zeros(n) for tile in tiles]
                for total, tile in zip(sums, tiles, strict=True):
                    total[i] += tile.sum(1)
                    if i != j:
                        total[j] += tile.sum(0)
            inner = inner.to(tiles[0].device) + three(*(tile.view(-1) for tile in tiles)) * (1 if i == j else 2)
    return inner, sums
