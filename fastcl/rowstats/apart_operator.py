"""torch.ops.fastcl.apart: own rows against the rows of other ranks, on the torch backends; and what ranks tell each
other in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.rowstats import apart, at_run_time  # noqa: F401  (the latter registers its operators)
from fastcl.rowstats.registration import differentiable_once, refuse_batched, register

_library = torch.library.Library("fastcl", "FRAGMENT")
_INPUTS = "Tensor x, Tensor y, Tensor? labels, Tensor? labels_y, bool peers, bool dense"
_library.define(f"apart({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(f"apart_backward({_INPUTS}, Tensor[] lse, Tensor[] grads, Tensor? theirs) -> Tensor")
_library.define(
    "tell_ranks(Tensor mean_peer, Tensor lse_peer, Tensor lse_other, Tensor counts, Tensor theirs, Tensor flag, "
    "Tensor sizes, int rank, str group) -> (Tensor, Tensor, Tensor)"
)


def _forward(x, y, labels, labels_y, peers, dense) -> tuple[Tensor, ...]:
    """mean_peer, lse_peer, lse_other, the two counts (2, N), and `theirs`, whose gradient is set by `tell_ranks`."""
    with torch.autocast(x.device.type, enabled=False):
        if dense:
            *stats, n_peer, n_other = apart.dense_forward(x, y, labels, labels_y, peers)
        else:
            *stats, n_peer, n_other = apart.forward(x, y, apart.layout_of(x, y, labels, labels_y, peers))
    return *stats, torch.stack([n_peer, n_other]), x.new_zeros(5, len(y))


def _forward_fake(x, y, *_) -> tuple[Tensor, ...]:
    n = x.shape[0]
    stats = (x.new_empty(n) for _ in range(3))
    return *stats, x.new_empty(2, n, dtype=torch.int64), x.new_empty(5, y.shape[0])


def _backward(x, y, labels, labels_y, peers, dense, lse, grads, theirs) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        if dense:
            return apart.dense_backward(x, y, labels, labels_y, tuple(lse), tuple(grads), theirs)
        layout = apart.layout_of(x, y, labels, labels_y, peers)
        return apart.backward(x, y, layout, tuple(lse), tuple(grads), theirs)


def _backward_fake(x, *_) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, y, labels, labels_y, *ctx.asked = inputs
    ctx.save_for_backward(x, y, labels, labels_y, output[1], output[2])
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _autograd(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    refuse_batched("chunked", *grads)
    *inputs, lse_peer, lse_other = ctx.saved_tensors
    *upstream, _, theirs = grads
    upstream = [torch.zeros_like(lse_peer) if g is None else g.contiguous() for g in upstream]
    theirs = None if theirs is None else theirs.contiguous()
    dx = torch.ops.fastcl.apart_backward(*inputs, *ctx.asked, [lse_peer, lse_other], upstream, theirs)
    return dx, *(None,) * 5


def _tell(mean_peer, lse_peer, lse_other, *_) -> tuple[Tensor, ...]:
    """The statistics as they are. In the backward pass each rank tells the others, for every row, its log-sum-exps and
    upstream gradients; what it hears arrives as the gradient of `theirs`."""
    return mean_peer.clone(), lse_peer.clone(), lse_other.clone()


def _tell_fake(mean_peer, *_) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(mean_peer) for _ in range(3))


def _setup_telling(ctx, inputs, **_) -> None:
    _, lse_peer, lse_other, counts, theirs, flag, sizes, ctx.rank, ctx.group = inputs
    ctx.save_for_backward(lse_peer, lse_other, counts, flag, sizes)
    ctx.heard = theirs.shape[1]


def _tell_autograd(ctx, g_mean: Tensor, g_peer: Tensor, g_other: Tensor) -> tuple[Tensor | None, ...]:
    lse_peer, lse_other, counts, flag, sizes = ctx.saved_tensors
    told = [lse_peer, lse_other, g_mean / counts[0].clamp(min=1), g_peer, g_other]
    told += [one.to(g_mean.dtype).expand_as(g_mean) for one in flag.unbind()]
    theirs = torch.ops.fastcl.hear_ranks(torch.stack(told, 1), ctx.heard, sizes, ctx.rank, ctx.group).T
    return g_mean, g_peer, g_other, None, theirs, *(None,) * 4


register(_library, "apart", _forward, _forward_fake, _autograd, _setup_context)
register(_library, "apart_backward", _backward, _backward_fake, differentiable_once("chunked"))
register(_library, "tell_ranks", _tell, _tell_fake, _tell_autograd, _setup_telling)
