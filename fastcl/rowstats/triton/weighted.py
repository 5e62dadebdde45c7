"""The sides of a backward pass: upstream gradients, and the weights that the kernels over tiles make gradients of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcl.kernels.common.arguments import fixed
from fastcl.kernels.common.launch import launch, launch_sides
from fastcl.kernels.contrastive import backward_epilogue, backward_prologue
from fastcl.kernels.contrastive.backward import Weights
from fastcl.rowstats.triton.operand import ALIGN, Call, Operand


@dataclass(frozen=True)
class Upstream:
    """One side's statistics and their upstream gradients; both gradients are None if the side has none."""

    stats: Tensor
    grad_stats: Tensor | None  # (5, n)
    grad_losses: Tensor | None  # (objectives, n), or if the losses are reduced (objectives,), of one ()

    @property
    def any(self) -> bool:
        """Whether there is an upstream gradient."""
        return self.grad_stats is not None or self.grad_losses is not None


@dataclass(frozen=True)
class Side:
    """An operand with what the backward pass knows of it."""

    operand: Operand
    upstream: Upstream
    weights: Tensor  # (5, rows)
    bound: Tensor  # (1,)
    grad: Tensor | None = None  # (): upstream gradient of a loss whose weights are those at 1

    @cached_property
    def weighted(self) -> Weights:
        """The side's weights, as kernels over tiles take them."""
        return Weights(self.weights, self.upstream.stats, self.operand.lists[0])

    @cached_property
    def views(self) -> backward_epilogue.Views:
        """The side's view pairs, as `finalize_kernel` takes them."""
        r = self.operand
        values = (self.weights, self.upstream.stats) if self.upstream.any else (None, None)
        return backward_epilogue.Views(r.lists[3], r.lists[4], *values, r.rows)


class Settled(NamedTuple):
    """Weights that `finish_kernel` has written."""

    weights: tuple[Tensor | None, Tensor | None]  # of the sides with an upstream gradient, as `Side.weights`
    bound: Tensor
    arrived: Tensor | None  # (1,) int32, as `Degree.arrived`; None: the temperature is a number


def weighted(
    operands: list[Operand], call: Call, flag: Tensor | None, upstreams: Sequence[Upstream], ready: Settled | None,
    arrived: Tensor | None,
) -> list[Side]:  # fmt: skip
    """Each side with its weights, which share one scale because the tiles add weights of both sides.

    Args:
        ready: used instead of launching anything.
        arrived: is set to 0 otherwise.
    """
    z = operands[0].z
    given, bound, grad = (None, None), z.new_empty(1, dtype=torch.float32), None
    if ready is not None:
        given, bound, grad = ready.weights, ready.bound, upstreams[0].grad_losses
    sides = []
    for r, upstream, weights in zip(operands, upstreams, given, strict=False):
        if weights is None:
            # A side without upstream gradients has zero weights; only the other side's act on it.
            weights = (z.new_empty if upstream.any else z.new_zeros)(5, r.rows, dtype=torch.float32)
        sides.append(Side(r, upstream, weights, bound, grad))
    if ready is not None:
        return sides
    active = [
        _derivatives(one, sides[len(sides) - 1 - k].operand, call) for k, one in enumerate(sides) if one.upstream.any
    ]
    blocks = [side.rows // ALIGN for side, _ in active]
    scales = z.new_empty(sum(blocks), dtype=torch.float32)
    for (side, constants), part in zip(active, scales.split(blocks), strict=True):
        launch(backward_prologue.maxima_kernel, (len(part),), 4, 1, side=side, maxima=part, **constants)
    for group, constants in alike(active):
        launch_sides(
            backward_prologue.weights_kernel, group, [side.rows // ALIGN for side in group], 4, 1,
            scale=backward_prologue.Scale(scales, len(scales), bound, arrived), flag=flag, temperature=call.degree,
            **constants,
        )  # fmt: skip
    return sides


def _derivatives(side: Side, other: Operand, call: Call) -> tuple[backward_prologue.Upstream, dict]:
    """Arguments common to the kernels that form derivatives: a side, and constants."""
    r, upstream = side.operand, side.upstream
    grad, factor, stride_k, stride_n = upstream.grad_losses, 1.0, 0, 0
    if grad is not None:
        stride_k, stride_n = (*grad.stride(), 0, 0)[:2]
        if grad.ndim < 2:
            factor = call.factor(r.n)
    given = backward_prologue.Upstream(
        r.order, upstream.stats, upstream.grad_stats, grad, stride_k, stride_n, factor, r.n, other.n, r.rows,
        side.weights,
    )  # fmt: skip
    constants = {"BLOCK_N": ALIGN, "SYMMETRIC": r is other, "CODES": fixed(() if grad is None else call.codes)}
    return given, constants


def over_pairs(r: Side, s: Side, call: Call, flag: Tensor | None) -> dict:
    """Arguments common to the kernels that turn pairs of rows into weights."""
    return {
        "r": r.operand.resident, "s": s.operand.streamed, "w_r": r.weighted, "w_s": s.weighted,
        "temperature": call.degree, "flag": flag,
    }  # fmt: skip


def alike(given: Sequence[tuple[Any, Any]]) -> list[tuple[list[Any], Any]]:
    """Sides that share their constants, and these: one launch for all, or one for each."""
    if all(constants == given[0][1] for _, constants in given):
        return [([side for side, _ in given], given[0][1])] if given else []
    return [([side], constants) for side, constants in given]
