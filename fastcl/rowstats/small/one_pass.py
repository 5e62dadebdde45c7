"""The loss of a queue on a CPU with its gradients from one pass over the tiles of the queue: no logit is kept, or
computed again.

Exponentials are added up as they are, so that tiles need no common maximum; rows whose sums leave float32's range are
left to the operator.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastcl.rowstats import chunked
from fastcl.rowstats.registration import refuse_batched
from fastcl.rowstats.small.autograd import as_float, once
from fastcl.rowstats.small.closed import softplus
from fastcl.rowstats.small.whole import MaybeNone, Way, in_range, number, unit_rows


class Options(NamedTuple):
    """What is no tensor of a call."""

    way: Way
    reduction: str
    tiles: Iterable[slice]
    wanted: bool  # whether autograd records


class Pass(NamedTuple):
    """What a pass over the queue has found: of its last tile, which is the only one if the queue needs a gradient, the
    rows, their norms and the exponentials of their logits."""

    q: Tensor  # (N, D) queries, normalised if requested, and so on
    k: Tensor
    norm: Tensor  # (2N, 1) of queries and keys as given
    total: Tensor  # (N,) sums of exponentials
    pulled: Tensor | MaybeNone  # (N, D) sums of the queue's rows, weighted by exponentials, if they are needed
    y: Tensor | MaybeNone
    y_norm: Tensor | MaybeNone
    e: Tensor | MaybeNone


def queue_loss(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float | Tensor, normalize: bool, reduction: str,
    tiles: Iterable[slice],
) -> Tensor | None:  # fmt: skip
    """`fastcl.queue_loss` of checked arguments on a CPU, where values may be read.

    Args:
        tiles: slices of the queue's rows.

    Returns:
        None if rows or sums are out of range, or if the queue needs a gradient that one pass does not give: that of row
        losses, or of a matrix too large to be kept.
    """
    wanted = torch.is_grad_enabled()
    if wanted and queue.requires_grad:
        if reduction == "none" or query.shape[0] * queue.shape[0] > chunked.WHOLE:
            return None
        tiles = (slice(None),)
    given = temperature if isinstance(temperature, Tensor) else None
    options = Options(Way(as_float(temperature), normalize, False), reduction, tiles, wanted)
    with torch.autocast("cpu", enabled=False):
        return _OnePass.apply(options, query, key, queue, given)


class _OnePass(Function):
    @staticmethod
    def forward(ctx, options, *inputs):
        need = [options.wanted and needed for needed in ctx.needs_input_grad[1:]]
        ctx.inputs = [x if needed else None for x, needed in zip(inputs, need, strict=True)]
        if (found := _passed(options, need[0] or need[3], *inputs[:3])) is None:
            return None
        scale = 1 / options.way.temperature
        gap = found.total.log().sub_((found.q * found.k).sum(1), alpha=scale)
        losses, force = softplus(gap), gap.sigmoid_()
        if options.reduction != "none":
            losses = getattr(losses, options.reduction)()
        if True in need:
            force *= scale / len(force) if options.reduction == "mean" else scale
            ctx.save_for_backward(*_gradients(found, force.unsqueeze(1), options.way, need))
        return losses

    @staticmethod
    def backward(ctx, *grads):
        refuse_batched("chunked", *grads)
        *rows, dt = ctx.saved_tensors
        (grad,) = grads
        upstream = grad.unsqueeze(1) if grad.dim() else grad
        found = [None if d is None else (d * upstream).to(x.dtype) for d, x in zip(rows, ctx.inputs, strict=False)]
        if dt is not None:
            temperature = ctx.inputs[3]
            dt = (dt * grad).sum().reshape(temperature.shape).to(temperature)
        return None, *once((*found, dt), ctx.inputs, grads)


def _passed(options: Options, pulls: bool, query: Tensor, key: Tensor, queue: Tensor) -> Pass | None:
    """The pass over the tiles; pulls: queries or temperature need a gradient."""
    way = options.way
    dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype, queue.dtype) else torch.float32
    if (both := unit_rows(torch.cat([query.to(dtype), key.to(dtype)]), way)) is None:
        return None
    n = query.shape[0]
    q, k = both[0].split_with_sizes((n, n))
    total = pulled = y = y_norm = e = None
    for columns in options.tiles:
        if (others := unit_rows(queue[columns].to(dtype), way)) is None:
            return None
        y, y_norm, _ = others
        e = torch.addmm(number(0, dtype), q, y.t(), beta=0, alpha=1 / way.temperature).exp_()
        total = e.sum(1) if total is None else total.add_(e.sum(1))
        if pulls:
            pulled = torch.mm(e, y) if pulled is None else pulled.addmm_(e, y)
    return Pass(q, k, both[1], total, pulled, y, y_norm, e) if total is not None and in_range(total) else None


def _gradients(found: Pass, force: Tensor, way: Way, need: list[bool]) -> list[Tensor | None]:
    """Gradients of query, key, queue and temperature; of the last (N,), one for each row.

    Args:
        force: (N, 1) derivatives of the reduced loss by the difference of log-sum and positive logit, / temperature.
    """
    n = len(force)
    dq, dk, dy, dt = None, None, None, None
    share = force / found.total.unsqueeze(1)
    if need[0] or need[3]:
        dq = (found.pulled * share).addcmul_(force, found.k, value=-1)
        radial = _tangential(dq, found.q, found.norm[:n], way.normalize)
        dt = radial.mul_(-1 / way.temperature).squeeze(1) if need[3] else None
    if need[1]:
        dk = found.q * -force
        _tangential(dk, found.k, found.norm[n:], way.normalize)
    if need[2]:
        dy = torch.mm(found.e.t(), found.q * share)
        _tangential(dy, found.y, found.y_norm, way.normalize)
    return [dq if need[0] else None, dk, dy, dt]


def _tangential(d: Tensor, v: Tensor, norm: Tensor, normalize: bool) -> Tensor:
    """Turns the gradient d of rows v into that of the rows before normalisation; returns its parts along v, (N, 1)."""
    radial = (d * v).sum(1, keepdim=True)
    if normalize:
        d.addcmul_(v, radial, value=-1).div_(norm)
    return radial
