"""Pair statistics on Triton: working copies of the features, then moments of a chunk or tiles of two Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import triton
from torch import Tensor

from fastcl.kernels.common.launch import Config, launch, splits
from fastcl.kernels.gram import rows as row_kernels
from fastcl.kernels.gram import tiles as tile_kernels
from fastcl.kernels.gram.moments import moments_kernel
from fastcl.rowstats.triton.operand import half_scale, tabled

ALIGN = 128  # block size of the rows of a working copy for tiles, and of a model's columns in a stack
_ROW_TILE = {"BLOCK_N": 8, "BLOCK_D": 128}  # tile of the row-wise kernels
_SUPERTILE = 8  # blocks of columns per group of tiles, so that neighbouring programs read the same data


@dataclass(frozen=True)
class _Measured:
    """Output of `measure_kernel` for (n, d) rows: their factors, |v|^2, <pilot, v>, and the scale of v."""

    x: Tensor
    pilot: Tensor  # (d,) float64
    factors: Tensor | None  # (3, n) float64: scale, mean and inverse norm; None: rows are used unchanged
    squares: Tensor  # (n,) float64
    margins: Tensor  # (n,) float64
    scale: Tensor  # (1,) float64, power of two

    @classmethod
    def of(cls, x: Tensor, pilot: Tensor, kernel: str) -> _Measured:
        x = x if x.stride(1) == 1 else x.contiguous()
        n, d = x.shape
        new = partial(torch.empty, dtype=torch.float64, device=x.device)
        programs = triton.cdiv(n, _ROW_TILE["BLOCK_N"])
        factors = new(3, n) if kernel in ("cosine", "correlation") else None
        squares, margins, peaks = new(n), new(n), new(programs)
        launch(
            row_kernels.measure_kernel, (programs,), 4, 1,
            features=row_kernels.Features(x, n, d, x.stride(0)), pilot=pilot, factors=factors, squares=squares,
            margins=margins, peaks=peaks, **_ROW_TILE, CENTRE=kernel == "correlation",
        )  # fmt: skip
        return cls(x, pilot, factors, squares, margins, half_scale(peaks.amax().reshape(1)))

    def split_into(self, z: Tensor, first: int, columns: int) -> None:
        """Write v into columns [first, first + columns) of a working copy (2, rows, width)."""
        n, d = self.x.shape
        _, rows, width = z.shape
        grid = (triton.cdiv(rows, _ROW_TILE["BLOCK_N"]), triton.cdiv(columns, _ROW_TILE["BLOCK_D"]))
        launch(
            row_kernels.split_kernel, grid, 4, 1,
            features=row_kernels.Features(self.x, n, d, self.x.stride(0)), pilot=self.pilot, factors=self.factors,
            scale=self.scale, z=z, rows=rows, width=width, first=first, columns=columns, **_ROW_TILE,
        )  # fmt: skip


def _first_row(x: Tensor, kernel: str) -> Tensor:
    """(d,) float64: the first row as the kernels map it, so that rows equal to it vanish up to rounding."""
    found = _Measured.of(x[:1], x.new_zeros(x.shape[1], dtype=torch.float64), kernel)
    row = x[0].double()
    if found.factors is None:
        return row
    scale, mean, inverse = found.factors[:, 0]
    return (row * scale - mean) * inverse


def _choose(kernel: str, device: torch.device, d: int, n: int) -> Config:
    return cast(Config, tabled(kernel, device, "all", d, n))  # the table has all widths


class StackedMoments:
    """Moments of all pairs of models about given pilots, from chunks of rows.

    Args:
        kernel: "linear", "cosine" or "correlation".
        pilots: per model (d_i,) float64.
    """

    def __init__(self, kernel: str, pilots: Sequence[Tensor]) -> None:
        self.kernel = kernel
        self.pilots = list(pilots)
        device = pilots[0].device
        # In blocks of columns. The last share is E in the kernel: |v|^2 and <pilot, v> of each model, then 1.
        shares = [triton.cdiv(width, ALIGN) for width in (*map(len, pilots), 2 * len(pilots) + 1)]
        self._firsts = [ALIGN * sum(shares[:k]) for k in range(len(shares))]
        self._shares = [ALIGN * share for share in shares]
        width = sum(self._shares)
        self._sums = torch.zeros(width, width, dtype=torch.float64, device=device)
        blocks = [(model, local) for model, share in enumerate(shares) for local in range(share)]
        tiles = [(a, b) for a in range(len(blocks)) for b in range(a, len(blocks))]
        tiles.sort(key=lambda tile: (tile[0] // _SUPERTILE, tile[1] // _SUPERTILE, *tile))
        last = len(pilots)
        # E has no counterpart in other models, so its tiles are never transposed.
        turned = [blocks[a][1] > blocks[b][1] and blocks[b][0] != last for a, b in tiles]
        ordered = [(b, a) if turn else (a, b) for turn, (a, b) in zip(turned, tiles, strict=True)]
        self._tiles = torch.tensor(ordered, dtype=torch.int32, device=device) * ALIGN
        self._turned = torch.tensor(turned, dtype=torch.int32, device=device)

    def add(self, batch: Sequence[Tensor]) -> None:
        """Add a chunk: per model (b, d_i), any dtype narrower than float64."""
        with torch.cuda.device_of(batch[0]):
            self._add(batch)

    def _add(self, batch: Sequence[Tensor]) -> None:
        device = batch[0].device
        chosen = _choose("moments", device, len(self._sums), len(batch[0]))
        rows = triton.cdiv(len(batch[0]), chosen.block_s) * chosen.block_s
        z = torch.empty(2, rows, len(self._sums), dtype=torch.float16, device=device)
        models = [_Measured.of(x, pilot, self.kernel) for x, pilot in zip(batch, self.pilots, strict=True)]
        for model, first, share in zip(models, self._firsts, self._shares, strict=False):
            model.split_into(z, first, share)
        columns = [column for m in models for column in (m.squares, m.margins)]
        extra = torch.stack([*columns, torch.ones_like(columns[0])], 1)
        extra = torch.nn.functional.pad(extra, (0, self._shares[-1] - extra.shape[1], 0, rows - len(extra)))
        scale_e = half_scale(extra.abs().amax(0))
        extra = (extra * scale_e).float()
        z[0, :, self._firsts[-1] :] = extra
        z[1, :, self._firsts[-1] :] = extra - z[0, :, self._firsts[-1] :].float()
        scales = [m.scale.expand(share) for m, share in zip(models, self._shares, strict=False)]
        launch(
            moments_kernel, (len(self._tiles),), chosen.warps, chosen.stages,
            z=z, unscale=1 / torch.cat([*scales, scale_e]), tiles=self._tiles, turned=self._turned, sums=self._sums,
            rows=rows, width=len(self._sums), BLOCK=ALIGN, BLOCK_N=chosen.block_s,
        )  # fmt: skip

    def moments(self, i: int, j: int) -> Tensor:
        """(d_i + 3, d_j + 3) float64 sums of [v, |v|^2, <p, v>, 1] [w, |w|^2, <q, w>, 1]', i <= j."""
        d_i, d_j = len(self.pilots[i]), len(self.pilots[j])
        extra, one = self._firsts[-1], self._firsts[-1] + 2 * len(self.pilots)
        of_i, of_j = ([extra + 2 * k, extra + 2 * k + 1, one] for k in (i, j))
        v, w = (self._sums[first : first + d] for first, d in ((self._firsts[i], d_i), (self._firsts[j], d_j)))
        corner = self._sums[of_i][:, of_j]
        upper, lower = [self._block(i, j), v[:, of_j]], [w[:, of_i].mT, corner]
        return torch.cat([torch.cat(upper, 1), torch.cat(lower, 1)])

    def _block(self, i: int, j: int) -> Tensor:
        first, last = self._firsts[i], self._firsts[j]
        d_i, d_j = len(self.pilots[i]), len(self.pilots[j])
        block = self._sums[first : first + d_i, last : last + d_j]
        if i != j:
            return block
        whole = block.clone()
        for k in range(ALIGN, d_i, ALIGN):  # mirror the tiles above the diagonal
            whole[k : k + ALIGN, :k] = block[:k, k : k + ALIGN].mT
        return whole


@dataclass(frozen=True)
class _Working:
    """Centred rows in split half precision."""

    z: Tensor  # (2, rows, D)
    measured: _Measured

    @classmethod
    def of(cls, x: Tensor, kernel: str) -> _Working:
        n, d = x.shape
        z = torch.empty(2, triton.cdiv(n, ALIGN) * ALIGN, triton.cdiv(d, 64) * 64, dtype=torch.float16, device=x.device)
        pilot = _first_row(x, kernel)
        for last in (False, True):  # about the first row, then about the mean
            measured = _Measured.of(x, pilot, kernel)
            measured.split_into(z, 0, z.shape[2])
            if not last:
                mean = z.sum((0, 1), dtype=torch.float64)[:d] / (n * measured.scale)
                pilot = pilot + mean
        return cls(z, measured)

    def units(self, exponent: float) -> tuple[Tensor, Tensor]:
        """The exponent (1,) and |v|^2 (n,) in units of the scale, float32: in range at any scale of the rows."""
        square = self.measured.scale.square()
        return (exponent / square).float(), (self.measured.squares * square).float()


def inner_sums(
    x: Tensor, y: Tensor, kernel: str
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Arguments of `PairSums.of_centred`, float64: sums over tiles, then per model |v|^2, margins and |mu|^2."""
    with torch.cuda.device_of(x):
        models = [_Working.of(v, kernel) for v in (x, y)]
        inner, _ = _over_tiles(models, (0.0, 0.0), False, False)
    measured = [model.measured for model in models]
    a, b = (m.scale.pow(-2) for m in measured)
    squares, margins, means = zip(*((m.squares, m.margins, m.pilot @ m.pilot) for m in measured), strict=True)
    return inner * torch.cat([a * b, a * a, b * b]), squares, margins, means


def rbf_sums(x: Tensor, y: Tensor, exponents: Sequence[float], shift: float) -> tuple[Tensor, list[Tensor]]:
    """<K, L>, <K, K>, <L, L> and the row sums of K and L, both minus the shift (0 or 1), without diagonals; float64.

    Args:
        exponents: 1 / (2 sigma^2) per model.
    """
    with torch.cuda.device_of(x):
        models = [_Working.of(v, "rbf") for v in (x, y)]
        inner, totals = _over_tiles(models, exponents, True, shift == 1)
    return inner, [total.double() / tile_kernels.FIXED_POINT.value for total in totals]


def _over_tiles(
    models: Sequence[_Working], exponents: Sequence[float], rbf: bool, wide: bool
) -> tuple[Tensor, list[Tensor]]:
    x, n = models[0], len(models[0].measured.x)
    chosen = _choose("rbf" if rbf else "gram", x.z.device, max(model.z.shape[2] for model in models), n)
    blocks = triton.cdiv(n, chosen.block_r)
    shared = splits(blocks, blocks)
    widths = [model.z.shape[2] for model in models]
    # At least two blocks of columns: if the inner loop has one iteration, the compiler pipelines the wrong loop.
    block_d = min(chosen.block_d, *(width // 2 for width in widths))
    sums = torch.zeros(blocks, shared, 3, dtype=torch.float64, device=x.z.device)
    totals = list(torch.zeros(2, n, dtype=torch.int64, device=x.z.device)) if rbf else []
    rows = [
        tile_kernels.Features(model.z, *((*model.units(exponent), totals[k]) if rbf else (None, None, None)))
        for k, (model, exponent) in enumerate(zip(models, exponents, strict=True))
    ]
    launch(
        tile_kernels.gram_kernel, (blocks, shared), chosen.warps, chosen.stages,
        x=rows[0], y=rows[1], sums=sums, n=n, rows=x.z.shape[1], blocks=blocks, DX=widths[0], DY=widths[1],
        BLOCK=chosen.block_r, BLOCK_D=block_d, SPLITS=shared, WIDE=wide,
    )  # fmt: skip
    return sums.sum((0, 1)), totals
