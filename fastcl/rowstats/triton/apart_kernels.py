"""torch.ops.fastcl.fused_apart: `torch.ops.fastcl.apart` on the Triton backend, which is imported on the first call."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastcl.rowstats.apart import layout_of
from fastcl.rowstats.registration import differentiable_once, refuse_batched, register, replayed
from fastcl.rowstats.triton.operator import Saved

if TYPE_CHECKING:
    from fastcl.rowstats.triton.operand import Call

_library = torch.library.Library("fastcl", "FRAGMENT")
_CALL = "Tensor? temperature, float value, bool normalize, str precision, bool peers, bool attracted"
_library.define(
    f"fused_apart(Tensor x, Tensor y, Tensor? labels, Tensor? labels_y, {_CALL}) -> ({', '.join(['Tensor'] * 11)})"
)
_library.define(
    f"fused_apart_backward(Tensor x, Tensor y, bool labelled, {_CALL}, Tensor stats, Tensor[] saved, Tensor grads, "
    "Tensor? theirs, bool[] need) -> (Tensor, Tensor)"
)


class _Asked(NamedTuple):
    """The arguments other than rows and ids, in the order of the schema."""

    temperature: Tensor | None
    value: float
    normalize: bool
    precision: str
    peers: bool  # statistics of peers are needed
    attracted: bool  # and the objective attracts peers: their tiles need split precision

    def call(self, labelled: bool) -> Call:
        from fastcl.rowstats.triton.operand import Call

        split = "all" if self.precision == "fp32" else "peers" if labelled and self.peers and self.attracted else "none"
        return Call(*self[:4], (), split, labelled and self.peers)


def _forward(*args) -> tuple[Tensor, ...]:
    return replayed(_statistics, args[:5], args[5:])


def _statistics(x, y, labels, labels_y, *asked) -> tuple[Tensor | None, ...]:
    """Statistics (5, N), of which the first two rows are 0, counts (3, N), `theirs` as of `apart`, and `Saved`.

    Where the logits may leave the range of a fixed shift, `theirs` has a sixth row: the other ranks' flags.
    """
    from fastcl.rowstats.triton import forward, working_order
    from fastcl.rowstats.triton.operand import Source

    call = _Asked(*asked).call(labels is not None)
    flag = torch.empty(1, dtype=torch.int32, device=x.device) if call.may_overflow else None
    with torch.cuda.device_of(x):
        order_x, order_y = working_order.sorted_orders(layout_of(x, y, labels, labels_y, call.peers))
        assert order_y is not None
        sources = Source(x, None, order_x), Source(y, None, order_y)
        (a, b), ((stats, counts, _),), _ = forward.statistics(*sources, call, flag, columns=False)
    theirs = stats.new_zeros(5 if flag is None else 6, len(y))
    scale = x.new_empty(0) if a.scale is None or b.scale is None else torch.cat([a.scale, b.scale])
    flag = x.new_empty(0) if flag is None else flag
    return stats, counts, theirs, a.z, a.inv, a.order, b.z, b.inv, b.order, scale, flag


def _forward_fake(x, y, labels, _labels_y, *asked) -> tuple[Tensor, ...]:
    from fastcl.rowstats.triton.operand import DTYPES, working_shape

    call, n, m = _Asked(*asked).call(labels is not None), x.shape[0], y.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    saved = []
    for rows in (n, m):
        saved += [empty(*working_shape(rows, x.shape[1], call.split, x.device), dtype=DTYPES[call.precision])]
        saved += [empty(rows if call.normalize else 0), empty(7, rows, dtype=torch.int32)]
    scale = x.new_empty(0) if call.normalize else empty(2)
    flag = empty(1, dtype=torch.int32) if call.may_overflow else x.new_empty(0)
    theirs = empty(6 if call.may_overflow else 5, m)
    return empty(5, n), empty(3, n, dtype=torch.int64), theirs, *saved, scale, flag


def _backward(x, y, labelled, temperature, *rest) -> tuple[Tensor, Tensor]:
    *asked, stats, saved, grads, theirs, need = rest
    tensors = x, y, temperature, stats, grads, theirs, *saved
    return replayed(_gradients, tensors, (*asked, labelled, tuple(need)))


def _gradients(x, y, temperature, stats, grads, theirs, *rest) -> tuple[Tensor, Tensor]:
    """dx, as anchors and as candidates, and dT; each rank's share of dT counts a pair once on each side."""
    from fastcl.rowstats.triton import backward, operand

    *saved, value, normalize, precision, peers, attracted, labelled, need = rest
    call, saved = _Asked(temperature, value, normalize, precision, peers, attracted).call(labelled), Saved(*saved)
    flag = saved.flag if call.may_overflow else None
    scales = (None, None) if call.normalize else (saved.scale[:1], saved.scale[1:])
    a = operand.restored(x, None, saved.order, saved.z, saved.inv, scales[0])
    b = operand.restored(y, None, saved.order_y, saved.z_y, saved.inv_y, scales[1])
    stats_y = stats.new_zeros(5, len(y) if theirs is not None or flag is not None else 0)
    of_y = backward.Upstream(stats_y, None, None)
    if theirs is not None:
        stats_y[3:] = theirs[:2]
        # The kernel divides by the number of peers among x, not by those among all rows that y has met.
        here = torch.zeros_like(stats_y)
        here[2] = theirs[2] * _peers(saved.order_y).clamp(min=1)
        here[3:] = theirs[3:5]
        of_y = backward.Upstream(stats_y, here, None)
        if flag is not None:
            flag = torch.maximum(flag, theirs[5].amax().to(flag.dtype))
    with torch.cuda.device_of(x):
        upstreams = backward.Upstream(stats, grads, None), of_y
        dx, _, dt = backward.gradients(a, b, call, flag, upstreams, (need[0], False, need[1]))
    dx = x.new_empty(0) if dx is None else dx
    return dx, x.new_empty(0) if dt is None else dt / 2


def _peers(order: Tensor) -> Tensor:
    """(m,) numbers of rows of each row's class on the other side, in source order."""
    found = torch.where(order[1] < 0, 0, order[2] - order[1])
    return torch.empty_like(found).index_copy_(0, order[0].long(), found)


def _backward_fake(x, _y, _labelled, *rest) -> tuple[Tensor, Tensor]:
    need = rest[-1]
    dt = x.new_empty((), dtype=torch.float32) if need[1] else x.new_empty(0)
    return x.new_empty(x.shape if any(need) else 0), dt


def _setup_context(ctx, inputs, output) -> None:
    x, y, labels, _, temperature, *ctx.asked = inputs
    stats, counts, _, *saved = output
    ctx.labelled = labels is not None
    ctx.save_for_backward(x, y, temperature, stats, *saved)
    ctx.mark_non_differentiable(counts, *saved)
    ctx.set_materialize_grads(False)


def _autograd(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_batched("triton", *grads)
    x, y, temperature, stats, *saved = ctx.saved_tensors
    own = torch.zeros_like(stats) if grads[0] is None else grads[0].contiguous()
    theirs = None if grads[2] is None else grads[2].contiguous()
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[4]]
    dx, dt = torch.ops.fastcl.fused_apart_backward(
        x, y, ctx.labelled, temperature, *ctx.asked, stats, saved, own, theirs, need
    )
    dt = dt.reshape(temperature.shape).to(temperature.dtype) if need[1] else None
    return dx if need[0] else None, None, None, None, dt, *(None,) * 5


register(_library, "fused_apart", _forward, _forward_fake, _autograd, _setup_context)
register(_library, "fused_apart_backward", _backward, _backward_fake, differentiable_once("triton"))
