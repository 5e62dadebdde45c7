"""The two statistics of the sigmoid loss, of rows x and y with logits <x_i, y_j> * scale + bias.

Each row of x has one pair among the rows of y: its logit, and the sum of softplus(logit) over all other rows of y. The
derivative of softplus is a sigmoid, which the backward pass recomputes tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastcl.checks import check_finite, check_positive, check_precision, check_transforms
from fastcl.dispatch import choose
from fastcl.rowstats.api import prepared
from fastcl.rowstats.log_sums import column_slices
from fastcl.rowstats.registration import differentiable_once, refuse_batched, register
from fastcl.rowstats.triton.operator import operator_arguments

_LINEAR = 40.0  # from here on softplus is its argument, to the last digit of float64

_library = torch.library.Library("fastcl", "FRAGMENT")
_INPUTS = "Tensor x, Tensor y, Tensor bias, SymInt first"
_library.define(f"sigmoid_sums({_INPUTS}) -> Tensor")
_library.define(f"sigmoid_sums_backward({_INPUTS}, Tensor grad, bool[] need) -> (Tensor, Tensor, Tensor)")


def check_options(scale: float | Tensor, bias: float | Tensor, precision: str | None) -> None:
    """Raise FastclError unless `sigmoid_sums` can use them."""
    check_positive(scale, "logit_scale")
    check_finite(bias, "logit_bias")
    check_precision(precision)


def sigmoid_sums(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor, normalize: bool,
    precision: str | None, first: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The logit of each row's own pair, (N,), and the sum of softplus(logit) over all others, (N,).

    Args:
        x: (N, D). y: (M, D), of which row first + i is the pair of row i of x.
        scale, bias, precision: as checked by `check_options`.
        normalize: divide the rows by their norms first.

    Raises:
        FastclError: as `dispatch.choose`.
    """
    chosen = choose(x, y)
    if chosen == "triton":
        return _fused(x, y, scale, bias, normalize, precision, first)
    with torch.autocast(x.device.type, enabled=False):
        x = prepared(x, normalize)
        x = x * (scale.to(x).reshape(()) if isinstance(scale, Tensor) else scale)
        y = prepared(y, normalize)
        bias = bias.to(x).reshape(()) if isinstance(bias, Tensor) else x.new_full((), bias)
        own = (x * y[first : first + len(x)]).sum(1) + bias
        if chosen == "dense":
            s = x @ y.T + bias
            pairs = torch.arange(len(x), dtype=torch.int64, device=x.device) + first
            return own, softplus(s, threshold=_LINEAR).scatter(1, pairs[:, None], 0).sum(1)
        check_transforms(chosen, x, y, bias)
        return own, torch.ops.fastcl.sigmoid_sums(x, y, bias, first)


def _fused(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor, normalize: bool, precision: str | None,
    first: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sigmoid_sums` on the Triton backend."""
    if isinstance(bias, Tensor):
        bias = bias.to(x.device)
    else:
        bias = torch.full((), bias, dtype=torch.float32, device=x.device)
    degree = scale if isinstance(scale, Tensor) else 1 / scale
    options = operator_arguments(degree, precision, x, y, bias)
    ids = None, None
    if len(x) != len(y):
        ids_y = torch.arange(len(y), dtype=torch.int64, device=x.device)
        ids = ids_y[first : first + len(x)], ids_y
    sums, views, *_ = torch.ops.fastcl.fused_sigmoid(x, y, *ids, bias, options[0], options[1], normalize, options[2])
    return views[0] + bias.to(views).reshape(()), sums


def _forward(x: Tensor, y: Tensor, bias: Tensor, first: int) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        total = torch.zeros_like(x[:, 0])
        for columns in column_slices(x, y):
            terms = softplus(torch.addmm(bias, x, y[columns].T), threshold=_LINEAR)
            total += _without_pairs(terms, columns, first).sum(1)
        return total


def _without_pairs(tile: Tensor, columns: slice, first: int) -> Tensor:
    """The tile with 0 in place of the pairs: column first + i of row i."""
    tile.diagonal(first - columns.start).zero_()
    return tile


def _backward(
    x: Tensor, y: Tensor, bias: Tensor, first: int, grad: Tensor, need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    given = zip((x, y, bias), need, strict=True)
    dx, dy, dbias = (torch.zeros_like(v) if wanted else v.new_empty(0) for v, wanted in given)
    with torch.autocast(x.device.type, enabled=False):
        for columns in column_slices(x, y):
            weights = torch.addmm(bias, x, y[columns].T).sigmoid_().mul_(grad[:, None])
            weights = _without_pairs(weights, columns, first)
            if need[0]:
                dx.addmm_(weights, y[columns])
            if need[1]:
                torch.mm(weights.T, x, out=dy[columns])
            if need[2]:
                dbias += weights.sum()
    return dx, dy, dbias


def _setup_context(ctx, inputs, **_) -> None:
    x, y, bias, ctx.first = inputs
    ctx.save_for_backward(x, y, bias)


def _autograd(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_batched("chunked", grad)
    need = list(ctx.needs_input_grad[:3])
    found = torch.ops.fastcl.sigmoid_sums_backward(*ctx.saved_tensors, ctx.first, grad.contiguous(), need)
    return *(v if wanted else None for v, wanted in zip(found, need, strict=True)), None


def _forward_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0])


def _backward_fake(x: Tensor, y: Tensor, bias: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    given = zip((x, y, bias), rest[-1], strict=True)
    dx, dy, dbias = (v.new_empty(v.shape if wanted else 0) for v, wanted in given)
    return dx, dy, dbias


register(_library, "sigmoid_sums", _forward, _forward_fake, _autograd, _setup_context)
register(_library, "sigmoid_sums_backward", _backward, _backward_fake, differentiable_once("chunked"))
