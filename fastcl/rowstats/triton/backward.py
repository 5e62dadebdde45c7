"""The backward pass: upstream gradients to weights, tiles, then the gradients of the rows and of the temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.kernels.common.arguments import fixed
from fastcl.kernels.common.launch import Config, cdiv, launch, launch_sides, shares
from fastcl.kernels.contrastive import backward_epilogue
from fastcl.kernels.contrastive.backward import Accumulator, Direction, backward_kernel, backward_online_kernel
from fastcl.kernels.contrastive.totals import AT_ONCE
from fastcl.rowstats.triton import hopper, wide
from fastcl.rowstats.triton.operand import ALIGN, WORKSPACE, Call, Operand, row_block
from fastcl.rowstats.triton.weighted import Settled, Side, Upstream, alike, over_pairs, weighted

_ELEMENTS = 512  # of a program of `finalize_kernel`; with more, fewer of them fit on a multiprocessor
_ROUND = 924  # of these programs run at a time: seven on each of 132 multiprocessors


@dataclass(frozen=True)
class _Wanted:
    """The gradient of r's rows in `dx` and, unless it is None, that of the temperature in `total`."""

    r: Side
    s: Side
    dx: Tensor
    total: Tensor | None
    arrived: Tensor | None

    @classmethod
    def of(cls, r: Side, s: Side, total: Tensor | None, arrived: Tensor | None) -> _Wanted:
        x = r.operand
        dx = torch.empty(x.n, x.x.shape[1], dtype=x.x.dtype, device=x.z.device)
        return cls(r, s, dx, total, arrived)

    def sums(self, acc: Tensor) -> _Sums:
        """The tiles' sums in `acc`, as large as a wave, and where parts of the temperature's gradient go."""
        if self.total is None:
            return _Sums(acc, None)
        n, wave, block_n = self.r.operand.n, acc.shape[1], _row_block(self.r.operand, len(acc))[0]
        programs = sum(cdiv(min(wave, n - first), block_n) for first in range(0, n, wave))
        parts = torch.empty(programs, dtype=torch.float32, device=acc.device)
        factor = 0.5 if self.r is self.s else 1.0
        return _Sums(acc, backward_epilogue.Degree(parts, self.total, self.arrived, factor, programs))

    def tiles(self, acc: Accumulator) -> Direction:
        """The rows on both sides, as `backward_online_kernel` takes them."""
        r, s = self.r, self.s
        return Direction(r.operand.resident, s.operand.streamed, r.weighted, s.weighted, acc)


class _Sums(NamedTuple):
    acc: Tensor  # (splits, rows, width) or, in source order, (1, n, d)
    degree: backward_epilogue.Degree | None  # of all waves


def gradients(
    x: Operand, y: Operand | None, call: Call, flag: Tensor | None, upstreams: Sequence[Upstream],
    need: tuple[bool, bool, bool], ready: Settled | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx (n, d) and dy of the rows' dtype in source order, and dT; None where not needed.

    Args:
        upstreams: gradients of x's statistics and, with y, of y's.
        need: whether dx, dy and dT are needed; dT comes from dx's kernel.
        ready: weights from the forward pass.
    """
    total, arrived = None, None
    if need[2]:
        total = x.z.new_empty((), dtype=torch.float32)
        arrived = x.z.new_empty(1, dtype=torch.int32) if ready is None else ready.arrived
    sides = weighted([x] if y is None else [x, y], call, flag, upstreams, ready, arrived)
    return *of_sides(sides, call, flag, need, total, arrived), total


def of_sides(
    sides: Sequence[Side], call: Call, flag: Tensor | None, need: tuple[bool, bool, bool], total: Tensor | None,
    arrived: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dx and dy of one side or two with their weights; dT is written to `total`. Arguments as `gradients`.

    Args:
        arrived: holds 0.
    """
    a, b, two = sides[0], sides[-1], len(sides) == 2
    has_dx, has_dy = not two or need[0] or need[2], two and need[1]
    wanted = [_Wanted.of(a, b, total, arrived)] if has_dx else []
    if has_dy:
        wanted.append(_Wanted.of(b, a, None, None))
    if not wanted:
        return None, None
    if a.operand.in_pieces or not all(a.operand.tabled("backward", mode) for mode, _, _ in call.parts):
        _wide_gradients(wanted, call, flag)
    else:
        _narrow_gradients(wanted, call, flag)
    return wanted[0].dx if has_dx else None, wanted[-1].dx if has_dy else None


def _wide_gradients(wanted: Sequence[_Wanted], call: Call, flag: Tensor | None) -> None:
    """The gradients of rows whose tiles need several pieces."""
    found = [
        one.dx if one.dx.dtype == torch.float32 else torch.empty_like(one.dx, dtype=torch.float32) for one in wanted
    ]
    wide.accumulate(wanted[0].r, wanted[0].s, call, flag, found[0], found[1] if len(found) == 2 else None)
    sums = [one.sums(acc[None]) for one, acc in zip(wanted, found, strict=True)]
    _finalize(wanted, sums, call, first=0, in_order=True)


def _narrow_gradients(wanted: Sequence[_Wanted], call: Call, flag: Tensor | None) -> None:
    """The gradients of all others, in waves as large as the workspace allows; of two sides at once if they are alike
    and small."""
    plans = []
    for one in wanted:
        r, s = one.r.operand, one.s.operand
        plain = _parts(s, call, online=False)[0][0]
        n_splits = shares(cdiv(r.n, plain.block_r), cdiv(s.n, plain.block_s), plain.slots)
        most = max(1, WORKSPACE // (4 * n_splits * ALIGN * r.width)) * ALIGN
        plans.append((n_splits, min(r.rows, most), r.rows))
    n_splits, wave, rows = plans[0]
    size = 4 * n_splits * wave * wanted[0].r.operand.width
    together = len(set(plans)) == 1 and wave == rows and size * len(wanted) <= WORKSPACE
    groups = [(wanted, plans[0])] if together else [([one], plan) for one, plan in zip(wanted, plans, strict=True)]
    for group, (n_splits, wave, rows) in groups:
        shape = n_splits, wave, group[0].r.operand.width
        sums = [one.sums(torch.empty(shape, dtype=torch.float32, device=one.dx.device)) for one in group]
        for first in range(0, rows, wave):
            _narrow(group, sums, call, flag, first)
            _finalize(group, sums, call, first, in_order=False)


def _narrow(group: Sequence[_Wanted], sums: Sequence[_Sums], call: Call, flag: Tensor | None, first: int) -> None:
    """Fill sums (splits, rows, width), one of each direction, for the resident rows from `first` on."""
    n_splits, wave, _ = sums[0].acc.shape
    r, s = group[0].r.operand, group[0].s.operand
    rows = min(wave, r.rows - first)
    for one, (acc, _) in zip(group, sums, strict=True):
        for chosen, takes_plain, takes_masked in _parts(one.s.operand, call, online=False):
            grid, into = (rows // chosen.block_r, n_splits), Accumulator(acc, wave, first // chosen.block_r)
            if chosen.consumers:
                weighted = one.r.weighted, one.s.weighted
                hopper.backward(one.r.operand, one.s.operand, weighted, call, chosen, grid, into)
                continue
            launch(
                backward_kernel, grid, chosen.warps, chosen.stages,
                **over_pairs(one.r, one.s, call, flag), acc=into, TILE=fixed(call.tile(r, chosen)),
                PLAIN=takes_plain, MASKED=takes_masked,
            )  # fmt: skip
    if flag is None:
        return
    for chosen, takes_plain, takes_masked in _parts(s, call, online=True):
        block_r = chosen.block_r
        sides = [one.tiles(Accumulator(acc, wave, first // block_r)) for one, (acc, _) in zip(group, sums, strict=True)]
        launch_sides(
            backward_online_kernel, sides, [rows // block_r] * len(sides), chosen.warps, chosen.stages, n_splits,
            temperature=call.degree, flag=flag, TILE=fixed(call.tile(r, chosen)),
            PLAIN=takes_plain, MASKED=takes_masked,
        )  # fmt: skip


def _parts(s: Operand, call: Call, online: bool) -> list[tuple[Config, bool, bool]]:
    """The launches over tiles of narrow rows: tiles, whether it processes plain ones, whether masked ones.

    Masked tiles have a launch of their own if the table has a row for it, for all but few rows: without them, plain
    tiles can be larger.
    """
    if not online and call.split != "peers":
        joint, masked = s.tabled("backward_joint", call.split), s.tabled("backward_masked", call.split)
        if joint is not None:
            return [(joint, True, True)]
        if by_hand := hopper.chosen("backward_hopper", s, call):
            return [(by_hand, True, False), (masked or s.chosen("backward", call.split), False, True)]
        if masked is not None:
            return [(s.chosen("backward", call.split), True, False), (masked, False, True)]
    kernel = "backward_online" if online else "backward"
    return [(s.chosen(kernel, mode), plain, masked) for mode, plain, masked in call.parts]


def _row_block(x: Operand, slots: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program of `finalize_kernel`: twice the rows where that makes one round of two, if
    so few slots of sums leave registers for it."""
    rounds = x.n * x.width / (_ELEMENTS * _ROUND)
    return row_block(x.width, _ELEMENTS * (2 if 1 < slots <= 4 and 1 < rounds <= 2 else 1))


def _finalize(wanted: Sequence[_Wanted], sums: Sequence[_Sums], call: Call, first: int, in_order: bool) -> None:
    """Turn sums, one for each, into the gradients of the rows from `first` on."""
    block_n, block_d, warps = _row_block(wanted[0].r.operand, len(sums[0].acc))
    # With four warps, 1024 columns whose candidates have no views and two towers of 128 spill (Triton 3.8, sm_90).
    spills = len(wanted) == 2 if block_d == 128 else block_d == 1024 and not wanted[0].s.upstream.any
    warps = 8 if spills else warps
    many = any(degree is not None and degree.programs > AT_ONCE.value for _, degree in sums)
    given = []
    for one, (acc, degree) in zip(wanted, sums, strict=True):
        x, y = one.r.operand, one.s.operand
        tiles = backward_epilogue.Gradient(acc, first, acc.shape[1], acc.stride(1))
        side = backward_epilogue.Finalized(
            tiles, x.source, one.r.views, y.source, one.s.views, one.dx, y.scale, degree
        )  # fmt: skip
        given.append((side, backward_epilogue.Epilogue(block_n, block_d, len(acc), in_order, one.r is one.s, many)))
    for sides, constants in alike(given):
        launch_sides(
            backward_epilogue.finalize_kernel, sides,
            [cdiv(min(side.tiles.rows, side.x.n - first), block_n) for side in sides], warps, 1,
            bound=wanted[0].r.bound, grad=wanted[0].r.grad, temperature=call.degree, CONSTANTS=fixed(constants),
        )  # fmt: skip
