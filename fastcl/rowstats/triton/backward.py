"""The backward pass: upstream gradients to weights, tiles, then the gradients of the rows and of the temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from fastcl.kernels.common.arguments import fixed
from fastcl.kernels.common.launch import Config, evened, launch, shares
from fastcl.kernels.contrastive import backward_epilogue, wide
from fastcl.kernels.contrastive.backward import Accumulator, Weights, backward_kernel
from fastcl.kernels.contrastive.statistics import Losses, derivatives_kernel, weights_kernel
from fastcl.rowstats.triton.operand import ALIGN, NARROW, WORKSPACE, Call, Operand, row_block


@dataclass(frozen=True)
class Upstream:
    """One side's statistics and their upstream gradients; both gradients are None if the side has none."""

    stats: Tensor
    grad_stats: Tensor | None  # (5, n)
    grad_losses: Tensor | None  # (objectives, n)

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
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx (n, d) and dy of the rows' dtype in source order, and dT; None where not needed.

    Args:
        upstreams: gradients of x's statistics and, with y, of y's.
        need: whether dx, dy and dT are needed; dT comes from dx's kernel.
    """
    sides = _sides([x] if y is None else [x, y], call, flag, upstreams)
    if y is None:
        dx, dot = _gradient(sides[0], sides[0], call, flag, need[2])
        return dx, None, _temperature(dot, call, 2)
    a, b = sides
    dx, dot = _gradient(a, b, call, flag, need[2]) if need[0] or need[2] else (None, None)
    dy, _ = _gradient(b, a, call, flag, False) if need[1] else (None, None)
    return dx, dy, _temperature(dot, call, 1)


def _temperature(dot: Tensor | None, call: Call, times: int) -> Tensor | None:
    if dot is None or call.temperature is None:
        return None
    return -dot.sum() / (times * call.temperature.float().reshape(()))


def _sides(operands: list[Operand], call: Call, flag: Tensor | None, upstreams: Sequence[Upstream]) -> list[_Side]:
    """Each side with its weights, which share one scale because the tiles add weights of both sides."""
    z = operands[0].z
    blocks = [r.rows // ALIGN for r in operands]
    maxima = z.new_zeros(sum(blocks), dtype=torch.float32)
    bound = z.new_empty(1, dtype=torch.float32)
    found = []
    for r, upstream, part in zip(operands, upstreams, maxima.split(blocks), strict=False):
        # A side without upstream gradients has zero weights; only the other side's act on it.
        weights = (z.new_empty if upstream.any else z.new_zeros)(5, r.rows, dtype=torch.float32)
        found.append(_Side(r, upstream, weights, bound))
        if upstream.any:
            other, losses = operands[len(operands) - len(found)], upstream.grad_losses
            launch(
                derivatives_kernel, (r.rows // ALIGN,), 4, 1,
                layout_5N=r.order, stats=upstream.stats, grad_stats=upstream.grad_stats,
                upstream=None if losses is None else Losses(losses, *losses.stride()),
                weights=weights, maxima=part, n=r.n, n_s=other.n, rows=r.rows, BLOCK_N=ALIGN,
                SYMMETRIC=len(operands) == 1, CODES=fixed(() if losses is None else call.codes),
            )  # fmt: skip
    for side in found:
        if side.upstream.any:
            r = side.operand
            launch(
                weights_kernel, (r.rows // ALIGN,), 4, 1,
                layout_5N=r.order, stats=side.upstream.stats, weights=side.weights, maxima=maxima, bound=bound,
                flag=flag, temperature=call.degree, n=r.n, rows=r.rows, n_maxima=len(maxima), BLOCK_N=ALIGN,
            )  # fmt: skip
    return found


def _gradient(r: _Side, s: _Side, call: Call, flag: Tensor | None, need_dot: bool) -> tuple[Tensor, Tensor | None]:
    n, d = r.operand.n, r.operand.x.shape[1]
    dx = torch.empty(n, d, dtype=r.operand.x.dtype, device=r.operand.z.device)
    dot = torch.empty(n, dtype=torch.float32, device=dx.device) if need_dot else None
    if r.operand.width > NARROW or not all(s.operand.tabled("backward", mode) for mode, _, _ in call.parts):
        acc = dx if dx.dtype == torch.float32 else torch.empty(n, d, dtype=torch.float32, device=dx.device)
        _wide(r, s, call, flag, acc)
        _finalize(r, s, call, acc[None], dx, dot, first=0, in_order=True)
        return dx, dot
    plain = s.operand.chosen("backward", call.parts[0][0])
    n_splits = shares(triton.cdiv(n, plain.block_r), triton.cdiv(s.operand.n, plain.block_s), plain.slots)
    wave = min(r.operand.rows, max(1, WORKSPACE // (4 * n_splits * ALIGN * r.operand.width)) * ALIGN)
    acc = torch.empty(n_splits, wave, r.operand.width, dtype=torch.float32, device=dx.device)
    for first in range(0, r.operand.rows, wave):
        _narrow(r, s, call, flag, acc, n_splits, first)
        _finalize(r, s, call, acc, dx, dot, first, in_order=False)
    return dx, dot


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
            launch(
                backward_kernel, (rows // chosen.block_r, n_splits), chosen.warps, chosen.stages,
                **_over_pairs(r, s, call, flag),
                acc=Accumulator(acc, acc.shape[1], first // chosen.block_r),
                TILE=fixed(call.tile(r.operand, chosen)), PLAIN=takes_plain, MASKED=takes_masked,
                ONLINE=online,
            )  # fmt: skip


def _parts(s: Operand, call: Call, online: bool) -> list[tuple[Config, bool, bool]]:
    """The launches over tiles of narrow rows: tiles, whether it processes plain ones, whether masked ones.

    Masked tiles have a launch of their own if the table has a row for it: without them, plain tiles can be larger.
    """
    apart = None if online or call.split == "peers" else s.tabled("backward_masked", call.split)
    if apart is not None:
        return [(s.chosen("backward", call.split), True, False), (apart, False, True)]
    kernel = "backward_online" if online else "backward"
    return [(s.chosen(kernel, mode), plain, masked) for mode, plain, masked in call.parts]


def _finalize(
    r: _Side, s: _Side, call: Call, acc: Tensor, dx: Tensor, dot: Tensor | None, first: int, in_order: bool
) -> None:
    x, y = r.operand, s.operand
    elements = 1024 if 64 < x.width <= NARROW and call.normalize else 512  # Triton 3.8 spills none of these on sm_90
    block_n, block_d, warps = row_block(x.width, elements)
    rows = min(acc.shape[1], x.n - first)
    launch(
        backward_epilogue.finalize_kernel, (triton.cdiv(rows, block_n),), warps, 1,
        tiles=backward_epilogue.Gradient(acc, first, acc.shape[1], acc.stride(1)),
        x=x.source, x_views=r.views, y=y.source, y_views=s.views, dx=dx, dot_N=dot, bound=r.bound, scale=y.scale,
        temperature=call.degree,
        CONSTANTS=fixed(backward_epilogue.Finish(block_n, block_d, len(acc), in_order, r is s)),
    )  # fmt: skip


def _wide(r: _Side, s: _Side, call: Call, flag: Tensor | None, acc: Tensor) -> None:
    """Work through square blocks of pairs; in the symmetric case only those on and above the diagonal."""
    halves = 1 if call.split == "none" else 2
    most = int((WORKSPACE / (2 * halves)) ** 0.5) // ALIGN
    chosen = s.operand.chosen("product", call.split)
    strips = ALIGN // chosen.block_r * triton.cdiv(s.operand.width, chosen.block_d)
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
        wide.product_kernel, (m // chosen.block_r, triton.cdiv(y.width, chosen.block_d)), chosen.warps, chosen.stages,
        pairs=wide.Pairs(w, i, k, size), summed=wide.Summed(y.z, y.rows, k, count),
        gradient=wide.Gradient(acc, x.order[0], x.order[1], x.order[2], x.n, acc.shape[1], i),
        TILE=fixed(wide.Product(*sizes, transposed, call.split == "all", call.split != "none", add)),
    )  # fmt: skip
