"""torch.ops.fastcl.fused: statistics and losses on the Triton backend, which is imported with the first call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.rowstats.operator import differentiable_once, refuse_batched, register
from fastcl.rowstats.order import Layout

_library = torch.library.Library("fastcl", "FRAGMENT")
_ROWS = "Tensor x, Tensor? x2, Tensor? y"
_IDS = "Tensor? sample, Tensor? labels, Tensor? sample_y, Tensor? labels_y"
_CALL = "Tensor? temperature, float value, bool normalize, str precision, bool columns, int[] codes"
_library.define(f"fused({_ROWS}, {_IDS}, {_CALL}) -> ({', '.join(['Tensor'] * 14)})")
_library.define(
    f"fused_backward({_ROWS}, bool labelled, {_CALL}, Tensor[] saved, Tensor?[] grads, bool[] need) "
    "-> (Tensor, Tensor, Tensor)"
)


def split_mode(labelled: bool, precision: str, codes: list[int]) -> tuple[str, bool]:
    """Which tiles take split half precision, and whether peers matter at all; no codes: the caller's own objective."""
    attracted = labelled and (not codes or any(code & 16 for code in codes))
    peers = labelled and (not codes or any(code & 18 for code in codes))
    return "all" if precision == "fp32" else "peers" if attracted else "none", peers


def call_of(temperature, value, normalize, precision, codes, labelled):
    """The `Call` of an operator's arguments."""
    from fastcl.rowstats.triton.operand import Call

    split, peers = split_mode(labelled, precision, codes)
    return Call(temperature, value, normalize, precision, tuple(codes), split, peers)


def _forward(x, x2, y, sample, labels, sample_y, labels_y, temperature, value, normalize, precision, columns, codes):
    from fastcl.rowstats.triton import forward, operand

    call = call_of(temperature, value, normalize, precision, codes, labels is not None)
    flag = torch.empty(1, dtype=torch.int32, device=x.device) if call.may_overflow else None
    with torch.cuda.device_of(x):
        if sample is not None:
            order_x, order_y = operand.sorted_orders(Layout.of(sample, labels, sample_y, labels_y))
        elif y is None:
            order_x, order_y = operand.known_order(len(x), 2, labels, x.device), None
        else:
            order_x, order_y = operand.known_order(len(x), 1, None, x.device), None
        a = operand.prepare(x, x2, order_x, call, flag)
        b = None if y is None else operand.prepare(y, None, order_x if order_y is None else order_y, call, flag)
        found = forward.statistics(a, b, call, flag, columns)
    nothing = [x.new_empty(0) for _ in range(8)]
    results_y = found[1] if columns else nothing[:3]
    saved_y = nothing[3:6] if b is None else (b.z, b.inv, nothing[5] if order_y is None else order_y)
    scales = [o.scale for o in (a, b) if o is not None and o.scale is not None]
    scale = torch.cat(scales) if scales else nothing[6]
    return *found[0], *results_y, a.z, a.inv, order_x, *saved_y, scale, nothing[7] if flag is None else flag


def _forward_fake(
    x, x2, y, sample, labels, sample_y, labels_y, temperature, value, normalize, precision, columns, codes
):
    from fastcl.rowstats.triton.operand import DTYPES, working_shape

    call = call_of(temperature, value, normalize, precision, codes, labels is not None)
    n, d = x.shape[0] * (1 if x2 is None else 2), x.shape[1]

    def results(rows):
        return (
            x.new_empty(5, rows, dtype=torch.float32), x.new_empty(0 if codes else 3, rows, dtype=torch.int64),
            x.new_empty(len(codes), rows, dtype=torch.float32),
        )  # fmt: skip

    def saved(rows, order_rows):
        z = x.new_empty(working_shape(rows, d, call.split), dtype=DTYPES[precision])
        inv = x.new_empty(rows if normalize else 0, dtype=torch.float32)
        return z, inv, x.new_empty(order_rows, rows, dtype=torch.int32) if order_rows else x.new_empty(0)

    nothing = [x.new_empty(0) for _ in range(8)]
    rectangular = y is not None and sample is not None
    saved_y = nothing[3:6] if y is None else saved(y.shape[0], 7 if rectangular else 0)
    scale = nothing[6] if normalize else x.new_empty(1 if y is None else 2, dtype=torch.float32)
    flag = x.new_empty(1, dtype=torch.int32) if call.may_overflow else nothing[7]
    return (
        *results(n), *(results(y.shape[0]) if columns else nothing[:3]), *saved(n, 7 if rectangular else 5), *saved_y,
        scale, flag,
    )  # fmt: skip


def _backward(x, x2, y, labelled, temperature, value, normalize, precision, columns, codes, saved, grads, need):
    from fastcl.rowstats.triton import backward, operand

    call = call_of(temperature, value, normalize, precision, codes, labelled)
    stats, stats_y, z, inv, order, z_y, inv_y, order_y, scale, flag = saved
    flag = flag if call.may_overflow else None
    scales = [None, None] if normalize else [scale[:1], scale[1:]]
    a = operand.restored(x, x2, order, z, inv, scales[0])
    upstreams = [backward.Upstream(stats, grads[0], grads[1]), None]
    b = None
    if y is not None:
        b = operand.restored(y, None, order_y if order_y.numel() else order, z_y, inv_y, scales[1])
        if not columns:  # read, where the flag is set, with weights of 0
            stats_y = stats.new_zeros(5, len(y) if flag is not None else 0)
        upstreams[1] = backward.Upstream(stats_y, grads[2], grads[3])
    with torch.cuda.device_of(x):
        found = backward.gradients(a, b, call, flag, tuple(upstreams), tuple(need))
    return tuple(x.new_empty(0) if g is None else g for g in found)


def _backward_fake(x, x2, y, labelled, temperature, value, normalize, precision, columns, codes, saved, grads, need):
    n = x.shape[0] * (1 if x2 is None else 2)
    has_dx = y is None or need[0] or need[2]
    return (
        x.new_empty((n, x.shape[1]) if has_dx else 0), x.new_empty(y.shape if y is not None and need[1] else 0),
        x.new_empty((), dtype=torch.float32) if need[2] else x.new_empty(0),
    )  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:
    x, x2, y, sample, labels, sample_y, labels_y, temperature, *ctx.call = inputs
    stats, counts, losses, stats_y, counts_y, losses_y, *saved = output
    ctx.labelled = labels is not None
    ctx.save_for_backward(x, x2, y, temperature, stats, stats_y, *saved)
    ctx.mark_non_differentiable(counts, counts_y, *saved)
    ctx.set_materialize_grads(False)


def _autograd(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_batched("triton", *grads)
    x, x2, y, temperature, *saved = ctx.saved_tensors
    grads = [None if g is None or g.numel() == 0 else g for g in (grads[0], grads[2], grads[3], grads[5])]
    # The kernels read the losses' gradients as they come, a mean's expanded number too.
    grads = [g if g is None or k % 2 else g.contiguous() for k, g in enumerate(grads)]
    need = [ctx.needs_input_grad[0] or ctx.needs_input_grad[1], ctx.needs_input_grad[2], ctx.needs_input_grad[7]]
    if all(g is None for g in grads):
        return (None,) * 13
    dx, dy, dt = torch.ops.fastcl.fused_backward(x, x2, y, ctx.labelled, temperature, *ctx.call, saved, grads, need)
    two = (dx, None) if x2 is None else (dx[: x.shape[0]], dx[x.shape[0] :])
    dt = dt.reshape(temperature.shape).to(temperature.dtype) if need[2] else None
    rows = (*two, dy if need[1] else None) if need[0] else (None, None, dy if need[1] else None)
    return *rows, None, None, None, None, dt, *(None,) * 5


register(_library, "fused", _forward, _forward_fake, _autograd, _setup_context)
register(_library, "fused_backward", _backward, _backward_fake, differentiable_once("triton"))
