"""The two sides of a call as the kernels see them: working order, layout and working copy of the rows; tile sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, cast

import torch
import triton
from torch import Tensor

from fastcl.kernels.common.arguments import Resident, Rows, Streamed, Temperature, Tile, fixed
from fastcl.kernels.common.launch import Config, architecture, cdiv, config, launch_sides
from fastcl.kernels.common.numerics import SAFE_INVERSE_T
from fastcl.kernels.contrastive.prepare import Initial, Preparation, Prepared, prepare_kernel
from fastcl.rowstats.triton.working_order import Order

ALIGN = 128  # working copies are padded to whole blocks of this many rows; every tile size divides it
NARROW = 256  # wider rows are processed in pieces
WORKSPACE = 256 * 2**20  # limit in bytes for partial results
FEW = 16384  # rows whose weights `finish_kernel` may scale
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float16}


def modes(split: str) -> tuple[str, ...]:
    """The table's modes for `Call.split`: of all tiles, or of plain and of masked ones."""
    return ("none", "peers") if split == "peers" else (split,)


@dataclass(frozen=True)
class Call:
    """The options of a call. The temperature is the tensor `temperature` or, if that is None, the number `value`.

    inverted: the tensor holds 1 / T.
    bias: one element, added to all logits but those of view pairs; None: 0.
    term: what pairs add to sums, as `Tile.TERM`.
    split: which tiles use split half precision: "none", "peers" (same-class tiles) or "all".
    peers: whether sums over peers are needed.
    reduction: of the losses over all anchors, "mean" or "sum"; "none": each row has its own.
    sides: 2 if the candidates are anchors too; a reduced loss is then the mean of both sides' losses.
    """

    temperature: Tensor | None
    value: float
    normalize: bool
    precision: str
    codes: tuple[int, ...]
    split: str
    peers: bool
    reduction: str = "none"
    sides: int = 1
    inverted: bool = False
    bias: Tensor | None = None
    term: str = "exponential"

    @property
    def may_overflow(self) -> bool:
        """Whether a fixed shift of the exponentials may be insufficient; a flag on the device then decides."""
        if self.term != "exponential":
            return False
        return self.temperature is not None or not self.normalize or self.value < 1 / SAFE_INVERSE_T.value

    @cached_property
    def degree(self) -> Temperature:
        """The temperature, as kernels take it."""
        given = (None, self.temperature) if self.inverted else (self.temperature, None)
        return Temperature(*given, self.value, self.bias)

    @property
    def reduced(self) -> bool:
        """Whether the losses are reduced."""
        return self.reduction != "none" and bool(self.codes)

    def settles(self, rows: int) -> bool:
        """Whether `finish_kernel` writes the weights of the backward pass, for so many rows on all sides: for one
        reduced loss, whose upstream gradient is one number, and few rows, since its last program scales them all."""
        return self.reduced and len(self.codes) == 1 and rows <= FEW

    def factor(self, n: int) -> float:
        """Factor of a row's loss in a reduced loss, on a side of n rows."""
        return 1 / (self.sides * (n if self.reduction == "mean" else 1))

    @property
    def parts(self) -> tuple[tuple[str, bool, bool], ...]:
        """The launches over tiles: mode of the table, whether it processes plain tiles, whether masked ones.

        If only masked tiles use split precision, they get a separate launch, because they need smaller tiles than
        others.
        """
        plain, *masked = modes(self.split)
        return ((plain, True, False), (masked[0], False, True)) if masked else ((plain, True, True),)

    def tile(self, r: Operand, chosen: Config) -> Tile:
        """Constants of a launch over tiles; narrow rows are processed in one piece.

        A branch before the loop over masked tiles is predicted to slow the one before it down on all but sm_90.
        """
        block_d = chosen.block_d if r.in_pieces else r.width
        split = self.split == "all", self.split != "none"
        return Tile(r.width, chosen.block_r, chosen.block_s, block_d, ALIGN, self.peers, *split, self.term, r.sm == 90)


@dataclass(frozen=True)
class Operand:
    """One side of a call.

    `order` is (5, n) int32: source row, then the intervals [lo, hi) of each row's class and [first, last) of its sample
    among the candidates' positions; the start of an empty interval is stored as -1 - position. If the candidates are
    another operand with ids of its own, there are two more rows: the starts of the row's class and sample among its own
    side's positions.
    """

    x: Tensor
    x2: Tensor | None  # the second view of each sample, if two tensors hold the rows
    order: Tensor
    z: Tensor  # (1 or 2, rows, D)
    inv: Tensor | None  # (n,); None if rows are not normalised
    scale: Tensor | None  # (1,); None if rows are normalised

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.order.shape[1]

    @property
    def rows(self) -> int:
        """n rounded up to whole blocks."""
        return self.z.shape[1]

    @property
    def width(self) -> int:
        """Width of the working copy."""
        return self.z.shape[2]

    @property
    def in_pieces(self) -> bool:
        """Whether kernels process the working copy in blocks of columns."""
        return _in_pieces(self.width)

    @cached_property
    def lists(self) -> tuple[Tensor, ...]:
        """The rows of `order`, (n,) each."""
        return self.order.unbind()

    @cached_property
    def source(self) -> Rows:
        """The original rows, as kernels take them."""
        n, d, inv = self.n, self.x.shape[1], self.inv
        if self.x2 is None:
            return Rows(self.x, None, self.lists[0], inv, n, d, self.x.stride(0), 0, 0)
        return Rows(self.x, self.x2, self.lists[0], inv, n, d, self.x.stride(0), len(self.x), self.x2.stride(0))

    @cached_property
    def resident(self) -> Resident:
        """The working copy, as kernels over tiles take resident rows."""
        return Resident(self.z, self.scale, self.lists[1], self.lists[2], self.lists[3], self.n, self.rows)

    @cached_property
    def streamed(self) -> Streamed:
        """The working copy, as kernels over tiles take streamed rows."""
        own = (5, 6) if len(self.order) > 5 else (1, 3)
        return Streamed(self.z, self.scale, self.lists[own[0]], self.lists[own[1]], self.n, self.rows)

    def tabled(self, kernel: str, mode: str) -> Config | None:
        """Tile sizes of a launch that streams these rows, from the table; None if it has none."""
        return tabled(kernel, self.z.device, mode, self.width, self.n)

    @property
    def sm(self) -> int:
        """The table's architecture for the rows' device."""
        return _architecture(self.z.device)

    def chosen(self, kernel: str, mode: str) -> Config:
        """The same; the table must have them."""
        return cast(Config, self.tabled(kernel, mode))


def tabled(kernel: str, device: torch.device, mode: str, d: int, n: int) -> Config | None:
    """`config` for a device and working copies of width d. Those in pieces take the rows for any width, but for the
    product, which always takes pieces."""
    whole = not _in_pieces(d) or kernel == "product"
    return config(kernel, _architecture(device), mode, d if whole else max(d, NARROW + 1), n)


def online_tile(call: Call, device: torch.device, d: int) -> Config:
    """Tile sizes of `forward_online_kernel` for working copies of width d, whatever the number of rows."""
    return cast(Config, tabled("online", device, "none" if call.split == "none" else "all", d, 0))


def online_blocks(call: Call, device: torch.device, d: int) -> int:
    """Its programs for one of `finish_kernel`; 1 if it never runs."""
    return ALIGN // online_tile(call, device, d).block_r if call.may_overflow else 1


def _architecture(device: torch.device) -> int:
    return architecture(_capability(device) if device.type == "cuda" else None)


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int] | None:
    """None where there is no GPU, as a fake tensor may say."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def _in_pieces(width: int) -> bool:
    """Whether a working copy is too wide to be held on the chip in one piece, or no power of two, as pieces are."""
    return width > NARROW or width & (width - 1) != 0


def padded_width(d: int, split: str, device: torch.device) -> int:
    """Width of a working copy: a power of two up to NARROW, a multiple of 64 beyond.

    A multiple of 64 beyond NARROW / 2 already if the table has no tile of NARROW columns for the backward pass: its
    kernels take blocks of columns then, and so may all others.
    """
    held = NARROW
    if not all(tabled("backward", device, mode, NARROW, 0) for mode in modes(split)):
        held //= 2
    return max(32, triton.next_power_of_2(d)) if d <= held else cdiv(d, 64) * 64


def working_shape(n: int, d: int, split: str, device: torch.device) -> tuple[int, int, int]:
    """Shape of the working copy of n rows of width d."""
    return 1 if split == "none" else 2, (n + ALIGN - 1) // ALIGN * ALIGN, padded_width(d, split, device)


def row_block(d: int, tile: int = 1024) -> tuple[int, int, int]:
    """Rows, columns and warps per program of the row-wise kernels, which hold whole rows: `tile` elements in total."""
    block_d = triton.next_power_of_2(max(d, 32))
    return max(tile // block_d, 1), block_d, max(4, block_d // 256)


class Source(NamedTuple):
    """The rows [x; x2] of a side, and their order."""

    x: Tensor
    x2: Tensor | None
    order: Order


def allocated(source: Source, call: Call) -> Operand:
    """The operand of a side, whose working copy, inverse norms and, if it follows from labels, order `fill` writes."""
    x, x2 = _unit_stride(source.x), None if source.x2 is None else _unit_stride(source.x2)
    order = source.order.tensor
    n, d = order.shape[1], x.shape[1]
    z = torch.empty(working_shape(n, d, call.split, x.device), dtype=DTYPES[call.precision], device=x.device)
    inv = torch.empty(n, dtype=torch.float32, device=x.device) if call.normalize else None
    return Operand(x, x2, order, z, inv, None if call.normalize else _scale(x, x2))


def fill(
    operands: Sequence[Operand], orders: Sequence[Order], call: Call, stats: Sequence[Tensor | None], initial: Initial
) -> None:
    """Write the working copies, and the statistics of view pairs among the candidates where stats is not None.

    Args:
        operands: one, whose rows are its candidates, or two, each the other's candidates.
    """
    a, order = operands[0], orders[0]
    block_n, block_d, warps = row_block(a.width)
    constants = Preparation(
        a.width, block_n, block_d, len(a.z) == 2, order.views, len(operands) == 1, max(2048 // block_n, 32)
    )
    given = zip(operands, operands[::-1], orders, stats, strict=True)
    sides = [Prepared(x.source, y.source, x.order, o.labels, x.z, x.rows, x.scale, s) for x, y, o, s in given]
    launch_sides(
        prepare_kernel, sides, [cdiv(x.rows, block_n) for x in operands], warps, 1,
        initial=initial, temperature=call.degree, CONSTANTS=fixed(constants),
    )  # fmt: skip


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def half_scale(peaks: Tensor) -> Tensor:
    """Powers of two that bring the peaks to between 128 and 256, so that remainders do not underflow in half precision;
    256 for a peak of 0."""
    exponent = torch.frexp(peaks)[1]
    # With an integer exponent ldexp would compute 2^x in PyTorch's default dtype.
    return torch.ldexp(torch.ones_like(peaks), (8 - exponent).to(peaks.dtype))


def _scale(*rows: Tensor | None) -> Tensor:
    """(1,) `half_scale` of the largest entry of all finite rows."""
    peaks = [torch.linalg.vector_norm(x, torch.inf, 1, dtype=torch.float32) for x in rows if x is not None]
    peaks = torch.cat(peaks)
    peak = peaks.masked_fill(~peaks.isfinite(), 0).amax().reshape(1)
    return half_scale(peak).clamp(max=2.0**126)  # so that its reciprocal is a normal number


def restored(
    x: Tensor, x2: Tensor | None, order: Tensor, z: Tensor, inv: Tensor | None, scale: Tensor | None
) -> Operand:
    """Rebuild an operand from what the forward pass saved; `inv` is not read if there is a scale."""
    x2 = None if x2 is None else _unit_stride(x2)
    return Operand(_unit_stride(x), x2, order, z, inv if scale is None else None, scale)
