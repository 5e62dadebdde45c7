"""torch.ops.fastcl.fused_sigmoid: the sigmoid loss's statistics on the Triton backend, which is imported on the first
call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcl.rowstats.registration import differentiable_once, refuse_batched, register, replayed

if TYPE_CHECKING:
    from fastcl.rowstats.triton.operand import Call

_library = torch.library.Library("fastcl", "FRAGMENT")
_ROWS = "Tensor x, Tensor y"
_CALL = "Tensor bias, Tensor? scale, float value, bool normalize, str precision"
_library.define(
    f"fused_sigmoid({_ROWS}, Tensor? sample, Tensor? sample_y, {_CALL}) -> ({', '.join(['Tensor'] * 9)})"
)  # fmt: skip
_library.define(
    f"fused_sigmoid_backward({_ROWS}, {_CALL}, Tensor[] found, Tensor[] saved, Tensor[] grads, bool[] need) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _call(term: str, bias: Tensor, scale: Tensor | None, value: float, normalize: bool, precision: str) -> Call:
    """The call; `value`: 1 / scale, if `scale` is None."""
    from fastcl.rowstats.triton.operand import Call

    split = "all" if precision == "fp32" else "none"
    return Call(scale, value, normalize, precision, (), split, False, inverted=True, bias=bias, term=term)


def _forward(*args) -> tuple[Tensor, ...]:
    return replayed(_statistics, args[:6], args[6:])


def _statistics(x, y, sample, sample_y, *options) -> tuple[Tensor | None, ...]:
    """Sums (N,), statistics of the pairs (2, N), then what is saved: working copies, inverse norms and orders of both
    sides, and the scales of rows that are not normalised.

    Without ids rows k of x and y are pair k, and the second order is empty: it equals the first.
    """
    from fastcl.rowstats.triton import sigmoid_kernels, working_order
    from fastcl.rowstats.triton.operand import Source

    call = _call("softplus", *options)
    with torch.cuda.device_of(x):
        if sample is None:
            order_x = order_y = working_order.known_order(len(x), 1, None, x.device)
        else:
            order_x, order_y = working_order.orders(sample, None, sample_y)
            assert order_y is not None
        a, b, sums, views = sigmoid_kernels.statistics(Source(x, None, order_x), Source(y, None, order_y), call)
    scale = x.new_empty(0) if a.scale is None or b.scale is None else torch.cat([a.scale, b.scale])
    return sums, views, a.z, a.inv, a.order, b.z, b.inv, x.new_empty(0) if sample is None else b.order, scale


def _forward_fake(x, y, sample, _sample_y, *options) -> tuple[Tensor, ...]:
    from fastcl.rowstats.triton.operand import DTYPES, working_shape

    call, n, d = _call("softplus", *options), x.shape[0], x.shape[1]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    saved = []
    for rows, with_order in ((n, True), (y.shape[0], sample is not None)):
        order = empty(5 if sample is None else 7, rows, dtype=torch.int32) if with_order else x.new_empty(0)
        z = empty(*working_shape(rows, d, call.split, x.device), dtype=DTYPES[call.precision])
        saved += [z, empty(rows if call.normalize else 0), order]
    return empty(n), empty(2, n), *saved, x.new_empty(0) if call.normalize else empty(2)


def _backward(x, y, bias, scale, value, normalize, precision, found, saved, grads, need) -> tuple[Tensor, ...]:
    tensors = x, y, bias, scale, *grads, *found, *saved
    return replayed(_gradients, tensors, (value, normalize, precision, tuple(need)))


def _gradients(x, y, *rest) -> tuple[Tensor, ...]:
    from fastcl.rowstats.triton import operand, sigmoid_kernels

    bias, scale, *grads, sums, views, z, inv, order, z_y, inv_y, order_y, lengths, value, normalize, precision, need = (
        rest
    )
    call = _call("sigmoid", bias, scale, value, normalize, precision)
    scales = (None, None) if normalize else (lengths[:1], lengths[1:])
    a = operand.restored(x, None, order, z, inv, scales[0])
    b = operand.restored(y, None, order_y if order_y.numel() else order, z_y, inv_y, scales[1])
    with torch.cuda.device_of(x):
        results = sigmoid_kernels.gradients(a, b, call, [sums, views], grads, need)
    return tuple(x.new_empty(0) if v is None else v for v in results)


def _backward_fake(x, y, *rest) -> tuple[Tensor, ...]:
    need = rest[-1]
    has_dx = need[0] or need[2]
    numbers = (x.new_empty(() if wanted else 0, dtype=torch.float32 if wanted else x.dtype) for wanted in need[2:])
    return x.new_empty(x.shape if has_dx else 0), y.new_empty(y.shape) if need[1] else x.new_empty(0), *numbers


def _setup_context(ctx, inputs, output) -> None:
    x, y, _, _, bias, scale, *ctx.options = inputs
    ctx.save_for_backward(x, y, bias, scale, *output)
    ctx.mark_non_differentiable(*output[2:])


def _autograd(ctx, grad_sums: Tensor, grad_views: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    refuse_batched("triton", grad_sums, grad_views)
    x, y, bias, scale, sums, views, *saved = ctx.saved_tensors
    need = [ctx.needs_input_grad[k] for k in (0, 1, 5, 4)]
    grads = [grad_sums.contiguous(), grad_views[0].contiguous()]
    dx, dy, d_scale, d_bias = torch.ops.fastcl.fused_sigmoid_backward(
        x, y, bias, scale, *ctx.options, [sums, views], saved, grads, need
    )
    d_scale = d_scale.reshape(scale.shape).to(scale.dtype) if need[2] else None
    d_bias = d_bias.reshape(bias.shape).to(bias.dtype) if need[3] else None
    rows = dx if need[0] else None, dy if need[1] else None
    return *rows, None, None, d_bias, d_scale, None, None, None


register(_library, "fused_sigmoid", _forward, _forward_fake, _autograd, _setup_context)
register(_library, "fused_sigmoid_backward", _backward, _backward_fake, differentiable_once("triton"))
