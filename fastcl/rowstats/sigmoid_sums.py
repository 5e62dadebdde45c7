"""The two statistics of the sigmoid loss, of rows x and y with logits <x_i, y_j> * scale + bias.

Each row of x has one pair, row k of y for row k of x: its logit, and the sum of softplus(logit) over all other rows of
y. Rows of other ranks are nobody's pairs. The derivative of softplus is a sigmoid, which the backward pass recomputes
tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.checks import check_finite, check_positive, check_precision, check_transforms
from fastcl.dispatch import choose
from fastcl.rowstats.api import prepared
from fastcl.rowstats.log_sums import column_slices
from fastcl.rowstats.registration import differentiable_once, refuse_batched, register
from fastcl.rowstats.small import closed, decisions, route
from fastcl.rowstats.triton.operator import operator_arguments

_library = torch.library.Library("fastcl", "FRAGMENT")
_INPUTS = "Tensor x, Tensor y, Tensor bias, bool paired"
_library.define(f"sigmoid_sums({_INPUTS}) -> Tensor")
_library.define(f"sigmoid_sums_backward({_INPUTS}, Tensor grad, bool[] need) -> (Tensor, Tensor, Tensor)")


def check_options(scale: float | Tensor, bias: float | Tensor, precision: str | None) -> None:
    """Raise FastclError unless `sigmoid_sums` can use them."""
    check_positive(scale, "logit_scale")
    check_finite(bias, "logit_bias")
    check_precision(precision)


def sigmoid_sums(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor, normalize: bool, precision: str | None
) -> tuple[Tensor, Tensor]:
    """The logit of each row's own pair, (N,), and the sum of softplus(logit) over all others, (N,).

    Args:
        x, y: (N, D); rows k of both are pair k.
        scale, bias, precision: as checked by `check_options`.
        normalize: divide the rows by their norms first.

    Raises:
        FastclError: as `dispatch.choose`.
    """
    if choose(x, y) == "triton":
        own, sums, bias = _fused(x, y, scale, bias, normalize, precision, paired=True)
        return own + bias.to(own).reshape(()), sums
    with torch.autocast(x.device.type, enabled=False):
        x, y, bias = _prepared(x, y, scale, bias, normalize)
        return (x * y).sum(1) + bias, _on_torch(x, y, bias, paired=True)


def few_sum(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor, normalize: bool, reduction: str
) -> Tensor | None:
    """The loss of few rows on a CPU, by a shorter way than `sigmoid_sums`; None where that has to be taken.

    Args:
        reduction: "mean" or "sum". The others as of `sigmoid_sums`.
    """
    tensors = [v for v in (x, y, scale, bias) if isinstance(v, Tensor)]
    if not (all(map(route.supports, tensors)) and route.is_few(len(x) ** 2) and choose(x, y) == "chunked"):
        return None
    return decisions.sigmoid_sum(x, y, scale, bias, normalize, reduction)


def unpaired_sums(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor, normalize: bool, precision: str | None
) -> Tensor:
    """The sum of softplus(logit) over all rows of y, (N,); no row of y is the pair of one of x.

    Args:
        x: (N, D). y: (M, D). The others as of `sigmoid_sums`.

    Raises:
        FastclError: as `dispatch.choose`.
    """
    if choose(x, y) == "triton":
        return _fused(x, y, scale, bias, normalize, precision, paired=False)[1]
    with torch.autocast(x.device.type, enabled=False):
        return _on_torch(*_prepared(x, y, scale, bias, normalize), paired=False)


def _prepared(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose inner products are logits without the bias, and the bias as a tensor."""
    x = prepared(x, normalize)
    x = x * (scale.to(x).reshape(()) if isinstance(scale, Tensor) else scale)
    bias = bias.to(x).reshape(()) if isinstance(bias, Tensor) else x.new_full((), bias)
    return x, prepared(y, normalize), bias


def _on_torch(x: Tensor, y: Tensor, bias: Tensor, paired: bool) -> Tensor:
    chosen = choose(x, y)
    if chosen == "dense":
        terms = closed.softplus(x @ y.T + bias)
        pairs = torch.eye(len(x), dtype=torch.bool, device=x.device) if paired else None
        return (terms if pairs is None else terms.masked_fill(pairs, 0)).sum(1)
    check_transforms(chosen, x, y, bias)
    return torch.ops.fastcl.sigmoid_sums(x, y, bias, paired)


def _fused(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor, normalize: bool, precision: str | None,
    paired: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """On the Triton backend: logits of the pairs without the bias, sums, and the bias as a tensor."""
    if isinstance(bias, Tensor):
        bias = bias.to(x.device)
    else:
        bias = torch.full((), bias, dtype=torch.float32, device=x.device)
    degree = scale if isinstance(scale, Tensor) else 1 / scale
    options = operator_arguments(degree, precision, x, y, bias)
    ids = None, None
    if not paired:
        own = torch.arange(len(x) + len(y), dtype=torch.int64, device=x.device)
        ids = own[: len(x)], own[len(x) :]
    sums, views, *_ = torch.ops.fastcl.fused_sigmoid(x, y, *ids, bias, options[0], options[1], normalize, options[2])
    return views[0], sums, bias


def _forward(x: Tensor, y: Tensor, bias: Tensor, paired: bool) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        total = torch.zeros_like(x[:, 0])
        for columns in column_slices(x, y):
            logits = torch.addmm(bias, x, y[columns].T)
            logits = _without_pairs(logits, columns, -torch.inf) if paired else logits
            total += decisions.softplus_of_many(logits).sum(1)
        return total


def _without_pairs(tile: Tensor, columns: slice, value: float) -> Tensor:
    """The tile with a value in place of the pairs: row i of x and of y."""
    tile.diagonal(-columns.start).fill_(value)
    return tile


def _backward(
    x: Tensor, y: Tensor, bias: Tensor, paired: bool, grad: Tensor, need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    given = zip((x, y, bias), need, strict=True)
    dx, dy, dbias = (torch.zeros_like(v) if wanted else v.new_empty(0) for v, wanted in given)
    with torch.autocast(x.device.type, enabled=False):
        for columns in column_slices(x, y):
            weights = torch.addmm(bias, x, y[columns].T).sigmoid_().mul_(grad[:, None])
            weights = _without_pairs(weights, columns, 0) if paired else weights
            if need[0]:
                dx.addmm_(weights, y[columns])
            if need[1]:
                torch.mm(weights.T, x, out=dy[columns])
            if need[2]:
                dbias += weights.sum()
    return dx, dy, dbias


def _setup_context(ctx, inputs, **_) -> None:
    x, y, bias, ctx.paired = inputs
    ctx.save_for_backward(x, y, bias)


def _autograd(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_batched("chunked", grad)
    need = list(ctx.needs_input_grad[:3])
    found = torch.ops.fastcl.sigmoid_sums_backward(*ctx.saved_tensors, ctx.paired, grad.contiguous(), need)
    return *(v if wanted else None for v, wanted in zip(found, need, strict=True)), None


def _forward_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0])


def _backward_fake(x: Tensor, y: Tensor, bias: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    given = zip((x, y, bias), rest[-1], strict=True)
    dx, dy, dbias = (v.new_empty(v.shape if wanted else 0) for v, wanted in given)
    return dx, dy, dbias


register(_library, "sigmoid_sums", _forward, _forward_fake, _autograd, _setup_context)
register(_library, "sigmoid_sums_backward", _backward, _backward_fake, differentiable_once("chunked"))
