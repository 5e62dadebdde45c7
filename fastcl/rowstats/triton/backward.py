"""The backward pass: upstream gradients to weights, tiles, then the gradients of the rows and of the temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastcl.kernels.common.arguments import fixed
from fastcl.kernels.common.launch import Config, cdiv, evened, launch, shares
from fastcl.kernels.contrastive import backward_epilogue, backward_prologue, wide
from fastcl.kernels.contrastive.backward import Accumulator, Weights, backward_kernel
from fastcl.rowstats.triton import hopper
from fastcl.rowstats.triton.operand import ALIGN, NARROW, WORKSPACE, Call, Operand, row_block


@dataclass(frozen=True)
class Upstream:
    """One side's statistics and their upstream gradients; both gradients are None if the side has none."""

    stats: Tensor
    grad_stats: Tensor | None  # (5, n)
    grad_losses: Tensor | None  # (objectives, n), or (objectives,) if the losses are reduced

    @property
    def any(self) -> bool:
        """Whether there is an upstream gradient."""
        return self.grad_stats is not None or self.grad_losses is not None


@dataclass(frozen=True)
class _Side:
    operand: Operand
    upstream: Upstream
    weights: Tensor  # (5, rows)
    bound: Tensor  # (1,)

    @cached_property
    def weighted(self) -> Weights:
        """The side's weights, as kernels over tiles take them."""
        return Weights(self.weights, self.upstream.stats, self.operand.order[0])

    @cached_property
    def views(self) -> backward_epilogue.Views:
        """The side's view pairs, as `finalize_kernel` takes them."""
        r = self.operand
        values = (self.weights, self.upstream.stats) if self.upstream.any else (None, None)
        return backward_epilogue.Views(r.order[3], r.order[4], *values, r.rows)


def gradients(
    x: Operand, y: Operand | None, call: Call, flag: Tensor | None, upstreams: Sequence[Upstream],
    need: tuple[bool, bool, bool], maxima: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx (n, d) and dy of the rows' dtype in source order, and dT; None where not needed.

    Args:
        upstreams: gradients of x's statistics and, with y, of y's.
        need: whether dx, dy and dT are needed; dT comes from dx's kernel.
        maxima: of the derivatives, from the forward pass; it is used if losses alone have upstream gradients.
    """
    total, arrived = None, None
    if need[2]:
        total, arrived = x.z.new_empty((), dtype=torch.float32), x.z.new_empty(1, dtype=torch.int32)
    sides = _sides([x] if y is None else [x, y], call, flag, upstreams, maxima, arrived)
    a, b = sides[0], sides[-1]
    dx = _gradient(a, b, call, flag, total, arrived) if y is None or need[0] or need[2] else None
    dy = _gradient(b, a, call, flag, None, None) if y is not None and need[1] else None
    return dx, dy, total


def _sides(
    operands: list[Operand], call: Call, flag: Tensor | None, upstreams: Sequence[Upstream], maxima: Tensor | None,
    arrived: Tensor | None,
) -> list[_Side]:  # fmt: skip
    """Each side with its weights, which share one scale because the tiles add weights of both sides.

    Args:
        arrived: is set to 0.
    """
    z = operands[0].z
    bound = z.new_empty(1, dtype=torch.float32)
    sides = []
    for r, upstream in zip(operands, upstreams, strict=False):
        # A side without upstream gradients has zero weights; only the other side's act on it.
        weights = (z.new_empty if upstream.any else z.new_zeros)(5, r.rows, dtype=torch.float32)
        sides.append(_Side(r, upstream, weights, bound))
    active = [(one, _derivatives(one, sides[len(sides) - 1 - k].operand, call)) for k, one in enumerate(sides)]
    active = [(one, given) for one, given in active if one.upstream.any]
    known = maxima is not None and all(one.upstream.grad_stats is None for one, _ in active)
    blocks = [one.operand.rows // ALIGN for one, _ in active]
    scales = maxima if maxima is not None and known else z.new_empty(sum(blocks), dtype=torch.float32)
    if not known:
        for (_, given), part in zip(active, scales.split(blocks), strict=True):
            launch(backward_prologue.maxima_kernel, (len(part),), 4, 1, **given[0], maxima=part, **given[1])
    for one, given in active:
        launch(
            backward_prologue.weights_kernel, (one.operand.rows // ALIGN,), 4, 1,
            **given[0], weights=one.weights, maxima=scales, n_maxima=len(scales), bound=bound,
            arrived=arrived, flag=flag, temperature=call.degree, **given[1], UNIT=known,
        )  # fmt: skip
    return sides


def _derivatives(side: _Side, other: Operand, call: Call) -> tuple[dict, dict]:
    """Arguments common to the kernels that form derivatives: the first of each, and constants."""
    r, upstream = side.operand, side.upstream
    grad, factor, stride_k, stride_n = upstream.grad_losses, 1.0, 0, 0
    if grad is not None:
        stride_k = grad.stride(0)
        if grad.ndim == 1:
            factor = call.factor(r.n)
        else:
            stride_n = grad.stride(1)
    given = backward_prologue.Upstream(
        r.order, upstream.stats, upstream.grad_stats, grad, stride_k, stride_n, factor, r.n, other.n, r.rows
    )
    constants = {"BLOCK_N": ALIGN, "SYMMETRIC": r is other, "CODES": fixed(() if grad is None else call.codes)}
    return {"side": given}, constants


def _gradient(
    r: _Side, s: _Side, call: Call, flag: Tensor | None, total: Tensor | None, arrived: Tensor | None
) -> Tensor:
    """The gradient of r's rows; that of the temperature in `total`, unless it is None."""
    n, d = r.operand.n, r.operand.x.shape[1]
    dx = torch.empty(n, d, dtype=r.operand.x.dtype, device=r.operand.z.device)
    if r.operand.width > NARROW or not all(s.operand.tabled("backward", mode) for mode, _, _ in call.parts):
        acc = dx if dx.dtype == torch.float32 else torch.empty(n, d, dtype=torch.float32, device=dx.device)
        _wide(r, s, call, flag, acc)
        _finalize(r, s, call, acc[None], dx, _degree(r, s, call, n, total, arrived), first=0, in_order=True)
        return dx
    plain = _parts(s.operand, call, online=False)[0][0]
    n_splits = shares(cdiv(n, plain.block_r), cdiv(s.operand.n, plain.block_s), plain.slots)
    wave = min(r.operand.rows, max(1, WORKSPACE // (4 * n_splits * ALIGN * r.operand.width)) * ALIGN)
    acc = torch.empty(n_splits, wave, r.operand.width, dtype=torch.float32, device=dx.device)
    degree = _degree(r, s, call, wave, total, arrived)
    for first in range(0, r.operand.rows, wave):
        _narrow(r, s, call, flag, acc, n_splits, first)
        _finalize(r, s, call, acc, dx, degree, first, in_order=False)
    return dx


def _degree(
    r: _Side, s: _Side, call: Call, wave: int, total: Tensor | None, arrived: Tensor | None
) -> backward_epilogue.Degree | None:
    """Where the programs of all waves of r's rows put their parts of the temperature's gradient."""
    if total is None:
        return None
    n, block_n = r.operand.n, _rows_of(r.operand, call)[0]
    programs = sum(cdiv(min(wave, n - first), block_n) for first in range(0, n, wave))
    sums = torch.empty(programs, dtype=torch.float32, device=total.device)
    return backward_epilogue.Degree(sums, total, arrived, 0.5 if r is s else 1.0, programs)


def _over_pairs(r: _Side, s: _Side, call: Call, flag: Tensor | None) -> dict:
    """Arguments common to the kernels that turn pairs of rows into weights."""
    return {
        "r": r.operand.resident, "s": s.operand.streamed, "w_r": r.weighted, "w_s": s.weighted,
        "temperature": call.degree, "flag": flag,
    }  # fmt: skip


def _narrow(r: _Side, s: _Side, call: Call, flag: Tensor | None, acc: Tensor, n_splits: int, first: int) -> None:
    """Fill acc (splits, rows, width) for the resident rows from `first` on."""
    rows = min(acc.shape[1], r.operand.rows - first)
    for online in (False,) if flag is None else (False, True):
        for chosen, takes_plain, takes_masked in _parts(s.operand, call, online):
            grid, into = (rows // chosen.block_r, n_splits), Accumulator(acc, acc.shape[1], first // chosen.block_r)
            if chosen.consumers:
                hopper.backward(r.operand, s.operand, (r.weighted, s.weighted), call, chosen, grid, into)
                continue
            launch(
                backward_kernel, grid, chosen.warps, chosen.stages,
                **_over_pairs(r, s, call, flag), acc=into,
                TILE=fixed(call.tile(r.operand, chosen)), PLAIN=takes_plain, MASKED=takes_masked,
                ONLINE=online,
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


def _rows_of(x: Operand, call: Call) -> tuple[int, int, int]:
    """Rows, columns and warps of a program of `finalize_kernel`."""
    elements = 1024 if 64 < x.width <= NARROW and call.normalize else 512  # Triton 3.8 spills none of these on sm_90
    return row_block(x.width, elements)


def _finalize(
    r: _Side, s: _Side, call: Call, acc: Tensor, dx: Tensor, degree: backward_epilogue.Degree | None, first: int,
    in_order: bool,
) -> None:  # fmt: skip
    x, y = r.operand, s.operand
    block_n, block_d, warps = _rows_of(x, call)
    rows = min(acc.shape[1], x.n - first)
    constants = backward_epilogue.Finish(block_n, block_d, len(acc), in_order, r is s)
    launch(
        backward_epilogue.finalize_kernel, (cdiv(rows, block_n),), warps, 1,
        tiles=backward_epilogue.Gradient(acc, first, acc.shape[1], acc.stride(1)),
        x=x.source, x_views=r.views, y=y.source, y_views=s.views, dx=dx, degree=degree, bound=r.bound, scale=y.scale,
        temperature=call.degree, CONSTANTS=fixed(constants),
    )  # fmt: skip


def _wide(r: _Side, s: _Side, call: Call, flag: Tensor | None, acc: Tensor) -> None:
    """Work through square blocks of pairs; in the symmetric case only those on and above the diagonal."""
    halves = 1 if call.split == "none" else 2
    most = int((WORKSPACE / (2 * halves)) ** 0.5) // ALIGN
    chosen = s.operand.chosen("product", call.split)
    strips = ALIGN // chosen.block_r * cdiv(s.operand.width, chosen.block_d)
    size = min(evened(most, strips, r.operand.sm) * ALIGN, max(r.operand.rows, s.operand.rows))
    w = torch.empty(halves, size, size, dtype=r.operand.z.dtype, device=acc.device)
    for i in range(0, r.operand.rows, size):
        for j in range(i if r is s else 0, s.operand.rows, size):
            _pair_weights(r, s, call, flag, w, i, j)
            _product(r, s, call, w, acc, i, j, transposed=False, add=i > 0 or j > 0 if r is s else j > 0)
            if r is s and j > i:
                _product(s, r, call, w, acc, j, i, transposed=True, add=i > 0)


def _pair_weights(r: _Side, s: _Side, call: Call, flag: Tensor | None, w: Tensor, i: int, j: int) -> None:
    size = w.shape[1]
    for online in (False,) if flag is None else (False, True):
        chosen = s.operand.chosen("weights_online" if online else "weights", call.split)
        grid = min(size, r.operand.rows - i) // chosen.block_r, min(size, s.operand.rows - j) // chosen.block_s
        constants = call.tile(r.operand, chosen)._replace(BLOCK_D=chosen.block_d)  # even for narrow rows
        launch(
            wide.pair_weights_kernel, grid, chosen.warps, chosen.stages,
            **_over_pairs(r, s, call, flag), pairs=wide.Pairs(w, i, j, size), TILE=fixed(constants), ONLINE=online,
        )  # fmt: skip


def _product(
    rows: _Side, summed: _Side, call: Call, w: Tensor, acc: Tensor, i: int, k: int, transposed: bool, add: bool
) -> None:
    """Add to acc (or, without `add`, write) the gradient of rows i .. from rows k .. of the other side."""
    chosen = summed.operand.chosen("product", call.split)
    x, y = rows.operand, summed.operand
    size = w.shape[1]
    m, count = min(size, x.rows - i), min(size, y.rows - k)
    sizes = y.width, chosen.block_r, chosen.block_s, chosen.block_d, ALIGN
    launch(
        wide.product_kernel, (m // chosen.block_r, cdiv(y.width, chosen.block_d)), chosen.warps, chosen.stages,
        pairs=wide.Pairs(w, i, k, size), summed=wide.Summed(y.z, y.rows, k, count),
        gradient=wide.Gradient(acc, x.order[0], x.order[1], x.order[2], x.n, acc.shape[1], i),
        TILE=fixed(wide.Product(*sizes, transposed, call.split == "all", call.split != "none", add)),
    )  # fmt: skip
