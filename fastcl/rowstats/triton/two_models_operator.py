"""torch.ops.fastcl.twin: statistics of two models on the Triton backend, which is imported on the first call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.rowstats.registration import call_backward, keep, kept, refuse_batched, register_for_small, tensors_of
from fastcl.rowstats.triton.operator import Asked, Saved

_library = torch.library.Library("fastcl", "FRAGMENT")
_IDS = "Tensor sample, Tensor? labels"
_CALL = "float value, str precision"
_library.define(f"twin(Tensor za, Tensor zb, Tensor? temperature, {_IDS}, {_CALL}) -> ({', '.join(['Tensor'] * 11)})")


def _call(temperature, value, precision, labelled):
    return Asked(temperature, value, True, precision, False, (), "none", False).call(labelled)


def _forward(za, zb, temperature, sample, labels, value, precision):
    from fastcl.rowstats.triton import two_models, working_order

    asked = _call(temperature, value, precision, labels is not None)
    flags = [za.new_empty(1, dtype=torch.int32) if asked.may_overflow else None for _ in range(2)]
    given, _ = working_order.orders(sample, labels)
    (a, b), found = two_models.statistics(za, zb, given, asked, (flags[0], flags[1]))
    return *found, a.order, a.z, a.inv, b.z, b.inv, *flags


def _forward_fake(za, zb, temperature, _sample, labels, value, precision):
    from fastcl.rowstats.triton.operand import DTYPES, working_shape

    asked = _call(temperature, value, precision, labels is not None)
    n = za.shape[0]
    stats = [z.new_empty(5, n, dtype=torch.float32) for z in (za, zb)]
    saved = []
    for z in (za, zb):
        saved += [z.new_empty(working_shape(n, z.shape[1], asked.split, z.device), dtype=DTYPES[precision])]
        saved += [z.new_empty(n, dtype=torch.float32)]
    flags = [za.new_empty(1, dtype=torch.int32) if asked.may_overflow else None for _ in range(2)]
    return (
        *stats, za.new_empty(3, n, dtype=torch.int64), za.new_empty(18, dtype=torch.float64),
        za.new_empty(5, n, dtype=torch.int32), *saved, *flags,
    )  # fmt: skip


def _setup_context(ctx, inputs, results, hidden) -> None:
    za, zb, temperature, _, labels, ctx.value, ctx.precision = inputs
    ctx.labelled = labels is not None
    keep(ctx, (za, zb, temperature, *results[:2]), hidden)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_a: Tensor | None, grad_b: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each model's gradient, from the backward pass of `fused`."""
    refuse_batched("triton", grad_a, grad_b)
    (za, zb, temperature, stats_a, stats_b), hidden = kept(ctx)
    order, z_a, inv_a, z_b, inv_b, flag_a, flag_b = tensors_of(hidden)
    need_t = ctx.needs_input_grad[2]
    rows, total = [None, None], None
    sides = ((za, stats_a, z_a, inv_a, flag_a, grad_a), (zb, stats_b, z_b, inv_b, flag_b, grad_b))
    for k, (x, stats, z, inv, flag, grad) in enumerate(sides):
        if grad is None or not (ctx.needs_input_grad[k] or need_t):
            continue
        tensors = x, None, None, temperature, grad.contiguous(), None, None, None, stats, None
        need = ctx.needs_input_grad[k], False, need_t
        options = ctx.value, True, ctx.precision, False, (), "none", False, ctx.labelled, need
        dx, _, dt = call_backward("fused_backward", tensors, Saved(z, inv, order, flag=flag), options)
        if ctx.needs_input_grad[k]:
            rows[k] = dx
        if need_t:
            total = dt if total is None else total + dt
    dt = None if total is None else total.reshape(temperature.shape).to(temperature.dtype)
    return *rows, dt, None, None, None, None


register_for_small(_library, "twin", _forward, _forward_fake, _autograd, _setup_context, 5, 3, 4, 2)
