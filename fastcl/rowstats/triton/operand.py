"""The two sides of a call as the kernels see them: working order, layout and working copy of the rows; tile sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import triton
from torch import Tensor

from fastcl.kernels.common.arguments import Resident, Rows, Streamed, Temperature, Tile
from fastcl.kernels.common.launch import Config, architecture, config, launch
from fastcl.kernels.common.numerics import SAFE_INVERSE_T
from fastcl.kernels.contrastive.prepare import layout_kernel, prepare_kernel
from fastcl.rowstats.order import Layout, Side

ALIGN = 128  # working copies are padded to whole blocks of this many rows; every tile size divides it
NARROW = 256  # wider rows are processed in pieces
WORKSPACE = 256 * 2**20  # limit in bytes for partial results
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float16}


@dataclass(frozen=True)
class Call:
    """The options of a call. The temperature is the tensor `temperature` or, if that is None, the number `value`.

    split: which tiles use split half precision: "none", "peers" (same-class tiles) or "all".
    peers: whether sums over peers are needed.
    """

    temperature: Tensor | None
    value: float
    normalize: bool
    precision: str
    codes: tuple[int, ...]
    split: str
    peers: bool

    @property
    def may_overflow(self) -> bool:
        """Whether a fixed shift of the exponentials may be insufficient; a flag on the device then decides."""
        return self.temperature is not None or not self.normalize or self.value < 1 / SAFE_INVERSE_T.value

    @cached_property
    def degree(self) -> Temperature:
        """The temperature, as kernels take it."""
        return Temperature(self.temperature, self.value)

    @property
    def parts(self) -> tuple[tuple[str, bool, bool], ...]:
        """The launches over tiles: mode of the table, whether it processes plain tiles, whether masked ones.

        If only masked tiles use split precision, they get a separate launch, because they need smaller tiles than
        others.
        """
        return (("none", True, False), ("peers", False, True)) if self.split == "peers" else ((self.split, True, True),)

    def tile(self, r: Operand, chosen: Config) -> Tile:
        """Constants of a launch over tiles; narrow rows are processed in one piece."""
        block_d = r.width if r.width <= NARROW else chosen.block_d
        split = self.split == "all", self.split != "none"
        return Tile(r.width, chosen.block_r, chosen.block_s, block_d, ALIGN, self.peers, *split)


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
    inv: Tensor  # (n,); empty if rows are not normalised
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

    @cached_property
    def source(self) -> Rows:
        """The original rows, as kernels take them."""
        n, d, inv = self.n, self.x.shape[1], None if self.scale is not None else self.inv
        if self.x2 is None:
            return Rows(self.x, None, self.order[0], inv, n, d, self.x.stride(0), 0, 0)
        return Rows(self.x, self.x2, self.order[0], inv, n, d, self.x.stride(0), len(self.x), self.x2.stride(0))

    @cached_property
    def resident(self) -> Resident:
        """The working copy, as kernels over tiles take resident rows."""
        return Resident(self.z, self.scale, self.order[1], self.order[2], self.order[3], self.n, self.rows)

    @cached_property
    def streamed(self) -> Streamed:
        """The working copy, as kernels over tiles take streamed rows."""
        own = (5, 6) if len(self.order) > 5 else (1, 3)
        return Streamed(self.z, self.scale, self.order[own[0]], self.order[own[1]], self.n, self.rows)

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
    """`config` for a device."""
    return config(kernel, _architecture(device), mode, d, n)


def _architecture(device: torch.device) -> int:
    return architecture(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


def padded_width(d: int) -> int:
    """Width of a working copy: a power of two up to NARROW, a multiple of 64 beyond."""
    return max(32, triton.next_power_of_2(d)) if d <= NARROW else triton.cdiv(d, 64) * 64


def working_shape(n: int, d: int, split: str) -> tuple[int, int, int]:
    """Shape of the working copy of n rows of width d."""
    return 1 if split == "none" else 2, (n + ALIGN - 1) // ALIGN * ALIGN, padded_width(d)


def row_block(d: int, tile: int = 1024) -> tuple[int, int, int]:
    """Rows, columns and warps per program of the row-wise kernels, which hold whole rows: `tile` elements in total."""
    block_d = triton.next_power_of_2(max(d, 32))
    return max(tile // block_d, 1), block_d, max(4, block_d // 256)


def prepare(x: Tensor, x2: Tensor | None, order: Tensor, call: Call, flag: Tensor | None) -> Operand:
    """Fill the working copy; initialise the flag, to 1 if rows or temperature already rule out a fixed shift."""
    x, x2 = _unit_stride(x), None if x2 is None else _unit_stride(x2)
    n, d = order.shape[1], x.shape[1]
    z = torch.empty(working_shape(n, d, call.split), dtype=DTYPES[call.precision], device=x.device)
    inv = torch.empty(n if call.normalize else 0, dtype=torch.float32, device=x.device)
    scale = None if call.normalize else _scale(x, x2)
    operand = Operand(x, x2, order, z, inv, scale)
    block_n, block_d, warps = row_block(operand.width)
    launch(
        prepare_kernel, (triton.cdiv(operand.rows, block_n),), warps, 1,
        x=operand.source, z=z, rows=operand.rows, scale=scale, flag=flag, temperature=call.degree, D=operand.width,
        BLOCK_N=block_n, BLOCK_D=block_d, LOW=len(z) == 2,
    )  # fmt: skip
    return operand


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


def known_order(samples: int, views: int, labels: Tensor | None, device: torch.device) -> Tensor:
    """The order for two views of each sample (views = 2) or one row each (1), as `layout_kernel` writes it.

    Args:
        labels: (samples,) int64, or None.
    """
    n = samples * views
    order = torch.empty(5, n, dtype=torch.int32, device=device)
    ordered, index = (order, order) if labels is None else labels.sort(stable=True)
    launch(
        layout_kernel, (triton.cdiv(n, 1024),), 4, 1,
        order_B=index, sorted_B=ordered, layout_5N=order, batch=samples, n=n, VIEWS=views,
        LABELLED=labels is not None, STEPS=samples.bit_length() + 1, BLOCK_N=1024,
    )  # fmt: skip
    return order


def sorted_orders(layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The orders of both sides for arbitrary ids; the second is None in the symmetric case."""
    if layout.symmetric:
        return _order(layout.x, layout.x, False), None
    return _order(layout.x, layout.y, True), _order(layout.y, layout.x, True)


def _order(own: Side, other: Side, with_own: bool) -> Tensor:
    rows = [own.order, *_interval(other.group, own.group), *_interval(other.key, own.key)]
    if with_own:
        rows += [torch.searchsorted(own.group, own.group), torch.searchsorted(own.key, own.key)]
    return torch.stack([row.int() for row in rows])


def _interval(ordered: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end of each value in an ascending tensor; if it does not occur, the start is -1 - position."""
    first, last = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return torch.where(first < last, first, -1 - first), last


def restored(x: Tensor, x2: Tensor | None, order: Tensor, z: Tensor, inv: Tensor, scale: Tensor | None) -> Operand:
    """Rebuild an operand from what the forward pass saved."""
    x2 = None if x2 is None else _unit_stride(x2)
    return Operand(_unit_stride(x), x2, order, z, inv, scale)
