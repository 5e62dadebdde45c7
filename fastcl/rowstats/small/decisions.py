"""The sigmoid loss of small batches: its sum over all pairs and the gradients, from one visit to each logit.

With the sign of the pairs' own logits turned every pair costs softplus(logit), whose derivative is a sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastcl.rowstats.registration import refuse_batched
from fastcl.rowstats.small import whole
from fastcl.rowstats.small.autograd import as_float, in_full, once
from fastcl.rowstats.small.whole import MaybeNone

TILE = 1 << 19  # logits that are computed together: 2 MiB of float32 stay in a CPU's cache
_COSINES = whole.Way(1.0, True, False)


def sigmoid_sum(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor, normalize: bool, reduction: str
) -> Tensor | None:
    """The sum of the losses of all pairs, or with "mean" its N-th part.

    Args:
        x, y: (N, D) on a CPU, where values may be read; rows k of both are pair k. The others as `fastcl.sigmoid_loss`.

    Returns:
        None if a norm is out of range, or without normalisation a logit is not finite.
    """
    options = _Options(as_float(scale), as_float(bias), normalize, len(x) if reduction == "mean" else 1)
    if x.dtype.itemsize < 4:
        x, y = x.float(), y.float()
    given = scale if isinstance(scale, Tensor) else None, bias if isinstance(bias, Tensor) else None
    with in_full():
        return _Sum.apply(options, torch.is_grad_enabled(), x, y, *given)


def softplus_of_many(s: Tensor) -> Tensor:
    """log(1 + e^s), to a few units in the last place.

    max(s, 0) + log(1 + a) with a = e^-|s|. The logarithm is that of the rounded sum u = 1 + a, to which a - (u - 1),
    what the rounding has lost, adds its share; torch's log1p takes ten times as long.
    """
    one = whole.number(1, s.dtype) if s.device.type == "cpu" else 1
    a = s.abs().neg_().exp_()
    u = a + one
    lost = a.sub_(u - one)
    return u.log().addcdiv_(lost, u).add_(s.relu())


class _Options(NamedTuple):
    """What is no tensor of a call."""

    scale: float
    bias: float
    normalize: bool
    divisor: int  # of the sum


class _Found(NamedTuple):
    """The loss, and its derivatives where they are wanted: by the rows as they were compared, and by the bias."""

    loss: Tensor
    dx: Tensor | MaybeNone
    dy: Tensor | MaybeNone
    d_bias: Tensor | MaybeNone


class _Sum(Function):
    """The gradients are computed with the loss: N x D numbers are kept for the backward pass."""

    @staticmethod
    def forward(ctx, options, enabled, x, y, scale, bias):
        need = ctx.needs_input_grad[2:] if enabled else (False,) * 4
        ctx.inputs = x, y, scale, bias
        if (one := _compared(x, options)) is None or (two := _compared(y, options)) is None:
            return None
        (u, norm_u), (v, norm_v) = one, two
        if (found := _tiles(options, u, v, (need[0] or need[2], need[1], need[3]))) is None:
            return None
        loss, du, dv, d_bias = found
        if True in need:
            d_scale = (du * u).sum().div_(options.scale).view(scale.shape) if need[2] else None
            if options.normalize:
                for d, rows, norm in ((du, u, norm_u), (dv, v, norm_v)):
                    if d is not None:
                        whole.to_inputs(rows, norm, _COSINES, (True, True), d, False)
            ctx.save_for_backward(du, dv, d_scale, d_bias.view(bias.shape) if need[3] else None)
        return loss

    @staticmethod
    def backward(ctx, *grads):
        refuse_batched("chunked", *grads)
        found = tuple(None if d is None else d * grads[0] for d in ctx.saved_tensors)
        return None, None, *once(found, ctx.inputs, grads)


def _compared(x: Tensor, options: _Options) -> tuple[Tensor, Tensor | MaybeNone] | None:
    """Rows as they are compared, and their norms if they are normalised; None if one is out of range."""
    if not options.normalize:
        return x, None
    found = whole.unit_rows(x, _COSINES)
    return found and found[:2]


def _tiles(options: _Options, x: Tensor, y: Tensor, need: Sequence[bool]) -> _Found | None:
    """Sums over tiles of rows of x and all of y; None if a logit is not finite.

    Args:
        need: whether the derivatives by x, y and the bias are wanted.
    """
    height, factor = max(1, TILE // len(x)), options.scale / options.divisor
    offset, zero, count = x.new_full((), options.bias), whole.number(0, x.dtype), whole.number(options.divisor, x.dtype)
    losses, dx, dy, d_bias = [], [], zero, []
    for k, part in enumerate(x.split(height)):
        s = torch.addmm(offset, part, y.t(), alpha=options.scale)
        if not (options.normalize or math.isfinite(s.sum().item())):
            return None
        own = s.diagonal(k * height)
        own.neg_()
        losses.append(softplus_of_many(s).sum())
        if True in need:
            s.sigmoid_()
            own.neg_()
        if need[0]:
            dx.append(torch.addmm(zero, s, y, beta=0, alpha=factor))
        if need[1]:
            dy = torch.addmm(dy, s.t(), part, beta=int(k > 0), alpha=factor)
        if need[2]:
            d_bias.append(s.sum())
    dx = (dx[0] if len(dx) == 1 else torch.cat(dx)) if need[0] else None
    return _Found(_sum(losses).div_(count), dx, dy if need[1] else None, _sum(d_bias).div_(count) if need[2] else None)


def _sum(numbers: list[Tensor]) -> Tensor:
    first, *more = numbers
    return sum(more, start=first)
