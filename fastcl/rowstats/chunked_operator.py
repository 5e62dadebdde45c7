"""torch.ops.fastcl.row_stats: the chunked backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.rowstats import chunked
from fastcl.rowstats.order import Layout
from fastcl.rowstats.registration import differentiable_once, refuse_batched, register

_library = torch.library.Library("fastcl", "DEF")
_IDS = "Tensor sample, Tensor? labels, Tensor? sample_y, Tensor? labels_y"
_library.define(f"row_stats(Tensor x, Tensor? y, {_IDS}) -> ({', '.join(['Tensor'] * 8)})")
_library.define(f"row_stats_backward(Tensor x, Tensor? y, {_IDS}, Tensor[] lse, Tensor[] grads) -> (Tensor, Tensor)")


def _forward(
    x: Tensor, y: Tensor | None, sample: Tensor, labels: Tensor | None, sample_y: Tensor | None, labels_y: Tensor | None
) -> tuple[Tensor, ...]:
    with torch.autocast(x.device.type, enabled=False):
        return chunked.forward(x, y, Layout.of(sample, labels, sample_y, labels_y))


def _forward_fake(x: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
    n = x.shape[0]
    return tuple(x.new_empty(n) for _ in range(5)) + tuple(x.new_empty(n, dtype=torch.int64) for _ in range(3))


def _backward(x: Tensor, y: Tensor | None, *rest) -> tuple[Tensor, Tensor]:
    *ids, lse, grads = rest
    with torch.autocast(x.device.type, enabled=False):
        return chunked.backward(x, y, Layout.of(*ids), tuple(lse), tuple(grads))


def _backward_fake(x: Tensor, y: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if y is None else y.new_empty(y.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, y, *ids = inputs
    ctx.save_for_backward(x, y, *ids, output[3], output[4])
    ctx.mark_non_differentiable(*output[5:])


def _autograd(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    refuse_batched("chunked", *grads)
    x, y, *ids, lse_peer, lse_other = ctx.saved_tensors
    dx, dy = torch.ops.fastcl.row_stats_backward(x, y, *ids, [lse_peer, lse_other], [g.contiguous() for g in grads[:5]])
    return dx, None if y is None else dy, None, None, None, None


register(_library, "row_stats", _forward, _forward_fake, _autograd, _setup_context)
register(_library, "row_stats_backward", _backward, _backward_fake, differentiable_once("chunked"))
