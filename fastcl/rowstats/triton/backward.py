"""The backward pass: upstream gradients into weights, tiles, then the gradient of the rows and of the temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastcl.kernels.common.launch import launch
from fastcl.kernels.contrastive.backward import backward_kernel
from fastcl.kernels.contrastive.backward_epilogue import finalize_kernel
from fastcl.kernels.contrastive.backward_prologue import derivatives_kernel, weights_kernel
from fastcl.kernels.contrastive.wide import pair_weights_kernel, product_kernel
from fastcl.rowstats.triton.forward import WORKSPACE, choose, parts, scaling, sides, splits, switches, tabled
from fastcl.rowstats.triton.operand import ALIGN, NARROW, Call, Operand, row_block


@dataclass(frozen=True)
class Upstream:
    """One side's statistics and the gradients that came for it; both None where the side has none."""

    stats: Tensor
    grad_stats: Tensor | None  # (5, n)
    grad_losses: Tensor | None  # (objectives, n)

    @property
    def any(self) -> bool:
        """Whether a gradient came."""
        return self.grad_stats is not None or self.grad_losses is not None


@dataclass(frozen=True)
class _Side:
    operand: Operand
    upstream: Upstream
    weights: Tensor  # (5, rows)
    bound: Tensor  # (1,)


def gradients(
    x: Operand, y: Operand | None, call: Call, flag: Tensor | None, upstreams: Sequence[Upstream],
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx (n, d) and dy of the rows' dtype in source order, and dT; None where not needed.

    Args:
        upstreams: of x's statistics and, with y, of y's.
        need: whether dx, dy and dT are wanted; dT comes from dx's kernel.
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
    """Each side with its weights. The tiles add weights of both: they have one scale."""
    z = operands[0].z
    blocks = [r.rows // ALIGN for r in operands]
    maxima = z.new_zeros(sum(blocks), dtype=torch.float32)
    bound = z.new_empty(1, dtype=torch.float32)
    found = []
    for r, upstream, part in zip(operands, upstreams, maxima.split(blocks), strict=False):
        # A side without upstream gradients is only attracted or repelled by the other.
        weights = (z.new_empty if upstream.any else z.new_zeros)(5, r.rows, dtype=torch.float32)
        found.append(_Side(r, upstream, weights, bound))
        if upstream.any:
            other = operands[len(operands) - len(found)]
            losses = upstream.grad_losses if upstream.grad_losses is not None else weights[:0]
            launch(
                derivatives_kernel, (r.rows // ALIGN,), 4, 1,
                layout_5N=r.order, stats=upstream.stats, grad_stats=upstream.grad_stats, grad_losses=losses,
                weights=weights, maxima=part, n=r.n, n_s=other.n, rows=r.rows, stride_k=losses.stride(0),
                stride_n=losses.stride(1), BLOCK_N=ALIGN, SYMMETRIC=len(operands) == 1, K=len(losses),
                CODES=call.packed_codes if len(losses) else 0, HAS_STATS=upstream.grad_stats is not None,
            )  # fmt: skip
    for side in found:
        if side.upstream.any:
            r = side.operand
            launch(
                weights_kernel, (r.rows // ALIGN,), 4, 1,
                layout_5N=r.order, stats=side.upstream.stats, weights=side.weights, maxima=maxima, bound=bound,
                flag=flag, t=call.temperature, t_value=call.value, n=r.n, rows=r.rows, n_maxima=len(maxima),
                BLOCK_N=ALIGN, HAS_T=call.temperature is not None, HAS_FLAG=flag is not None,
            )  # fmt: skip
    return found


def _gradient(r: _Side, s: _Side, call: Call, flag: Tensor | None, need_dot: bool) -> tuple[Tensor, Tensor | None]:
    n, d = r.operand.n, r.operand.x.shape[1]
    dx = torch.empty(n, d, dtype=r.operand.x.dtype, device=r.operand.z.device)
    dot = torch.empty(n, dtype=torch.float32, device=dx.device) if need_dot else None
    if r.operand.width > NARROW or not all(tabled("backward", s.operand, mode) for mode, _, _ in parts(call)):
        acc = dx if dx.dtype == torch.float32 else torch.empty(n, d, dtype=torch.float32, device=dx.device)
        _wide(r, s, call, flag, acc)
        _finalize(r, s, call, acc[None], dx, dot, first=0, in_order=True)
        return dx, dot
    plain = choose("backward", s.operand, parts(call)[0][0])
    n_splits = splits(triton.cdiv(n, plain.block_r), triton.cdiv(s.operand.n, plain.block_s))
    slots = n_splits * len(parts(call))
    wave = min(r.operand.rows, max(1, WORKSPACE // (4 * slots * ALIGN * r.operand.width)) * ALIGN)
    acc = torch.empty(slots, wave, r.operand.width, dtype=torch.float32, device=dx.device)
    for first in range(0, r.operand.rows, wave):
        _narrow(r, s, call, flag, acc, n_splits, first)
        _finalize(r, s, call, acc, dx, dot, first, in_order=False)
    return dx, dot


def _pairs(r: _Side, s: _Side, call: Call, flag: Tensor | None) -> tuple[dict, dict]:
    """Arguments, and constant ones, of the kernels that turn pairs of rows into weights."""
    arguments = sides(r.operand, s.operand) | scaling(call, flag, r.operand, s.operand)
    arguments |= {
        "w_r": r.weights, "w_s": s.weights, "stats_r": r.upstream.stats, "stats_s": s.upstream.stats,
        "src_r": r.operand.order[0], "src_s": s.operand.order[0], "n_r": r.operand.n, "n_s": s.operand.n,
        "rows_r": r.operand.rows, "rows_s": s.operand.rows,
    }  # fmt: skip
    constants = switches(call, flag) | {
        "D": r.operand.width, "ALIGN": ALIGN, "PEERS": call.peers, "SPLIT_PLAIN": call.split == "all",
        "SPLIT_MASKED": call.split != "none",
    }  # fmt: skip
    return arguments, constants


def _narrow(r: _Side, s: _Side, call: Call, flag: Tensor | None, acc: Tensor, n_splits: int, first: int) -> None:
    """Fill acc (slots, rows, width) for the resident rows from `first` on."""
    arguments, constants = _pairs(r, s, call, flag)
    rows = min(acc.shape[1], r.operand.rows - first)
    for part, (mode, takes_plain, takes_masked) in enumerate(parts(call)):
        for online in (False,) if flag is None else (False, True):
            chosen = choose("backward_online" if online else "backward", s.operand, mode)
            launch(
                backward_kernel, (rows // chosen.block_r, n_splits), chosen.warps, chosen.stages,
                **arguments, acc=acc, first_block=first // chosen.block_r, first_slot=part * n_splits,
                acc_rows=acc.shape[1], BLOCK_R=chosen.block_r, BLOCK_S=chosen.block_s, SPLITS=n_splits,
                PLAIN=takes_plain, MASKED=takes_masked, ONLINE=online, **constants,
            )  # fmt: skip


def _finalize(
    r: _Side, s: _Side, call: Call, acc: Tensor, dx: Tensor, dot: Tensor | None, first: int, in_order: bool
) -> None:
    x, y = r.operand, s.operand
    tile = 1024 if 64 < x.width <= NARROW else 512  # neither Triton 3.6 nor 3.8 spills these on sm_90
    block_n, block_d, warps = row_block(x.width, tile)
    rows = min(acc.shape[1], x.n - first)
    launch(
        finalize_kernel, (triton.cdiv(rows, block_n),), warps, 1,
        acc=acc, **x.source("x"), **y.source("y"), first_x=x.order[3], last_x=x.order[4], w_x=r.weights,
        stats_x=r.upstream.stats, first_y=y.order[3], last_y=y.order[4], w_y=s.weights, stats_y=s.upstream.stats,
        dx=dx, dot_N=dot, bound=r.bound, scale_y=y.scale, t=call.temperature, t_value=call.value, n=x.n, n_y=y.n,
        d=dx.shape[1], first_row=first, acc_rows=acc.shape[1], stride_acc=acc.stride(1), rows_x=x.rows, rows_y=y.rows,
        BLOCK_N=block_n, BLOCK_D=block_d, SLOTS=len(acc), IN_ORDER=in_order, SYMMETRIC=r is s,
        OWN=r.upstream.any, OTHER=s.upstream.any, NORMALIZE=call.normalize, NEED_DOT=dot is not None,
        HAS_TWO=x.x2 is not None, HAS_T=call.temperature is not None, HAS_SCALE=not call.normalize,
    )  # fmt: skip


def _wide(r: _Side, s: _Side, call: Call, flag: Tensor | None, acc: Tensor) -> None:
    """Square blocks of pairs; in the symmetric case those on and above the diagonal."""
    halves = 1 if call.split == "none" else 2
    size = int((WORKSPACE / (2 * halves)) ** 0.5) // ALIGN * ALIGN
    size = min(size, max(r.operand.rows, s.operand.rows))
    w = torch.empty(halves, size, size, dtype=r.operand.z.dtype, device=acc.device)
    for i in range(0, r.operand.rows, size):
        for j in range(i if r is s else 0, s.operand.rows, size):
            _pair_weights(r, s, call, flag, w, i, j)
            _product(r, s, call, w, acc, i, j, transposed=False, add=i > 0 or j > 0 if r is s else j > 0)
            if r is s and j > i:
                _product(s, r, call, w, acc, j, i, transposed=True, add=i > 0)


def _pair_weights(r: _Side, s: _Side, call: Call, flag: Tensor | None, w: Tensor, i: int, j: int) -> None:
    chosen = choose("weights", s.operand, call.split)
    arguments, constants = _pairs(r, s, call, flag)
    size = w.shape[1]
    grid = min(size, r.operand.rows - i) // chosen.block_r, min(size, s.operand.rows - j) // chosen.block_s
    for online in (False,) if flag is None else (False, True):
        launch(
            pair_weights_kernel, grid, chosen.warps, chosen.stages,
            **arguments, w=w, first_r_row=i, first_s_row=j, size=size, BLOCK_R=chosen.block_r, BLOCK_S=chosen.block_s,
            BLOCK_D=chosen.block_d, ONLINE=online, **constants,
        )  # fmt: skip


def _product(
    rows: _Side, summed: _Side, call: Call, w: Tensor, acc: Tensor, i: int, k: int, transposed: bool, add: bool
) -> None:
    """Add to acc the gradient of rows i .. from the rows k .. of the other side."""
    chosen = choose("product", summed.operand, call.split)
    x, z = rows.operand, summed.operand.z
    size = w.shape[1]
    m, size_k = min(size, x.rows - i), min(size, z.shape[1] - k)
    launch(
        product_kernel, (m // chosen.block_r, triton.cdiv(z.shape[2], chosen.block_d)), chosen.warps, chosen.stages,
        w=w, z=z, src_N=x.order[0], lo_N=x.order[1], hi_N=x.order[2], acc=acc, n=x.n, d=acc.shape[1],
        z_rows=z.shape[1], first_m=i, first_k=k, size_k=size_k, size=size, D=z.shape[2], BLOCK_M=chosen.block_r,
        BLOCK_K=chosen.block_s, BLOCK_D=chosen.block_d, ALIGN=ALIGN, TRANSPOSED=transposed,
        SPLIT_PLAIN=call.split == "all", SPLIT_MASKED=call.split != "none", ADD=add,
    )  # fmt: skip
