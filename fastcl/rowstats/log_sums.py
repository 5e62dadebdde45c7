"""Log-sum-exps of rows against rows that are nobody's views, such as those of a queue: the one statistic of a queue.

Candidates without gradients stay as they are, in half precision for instance: the chunked backend prepares one tile of
them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastcl.checks import check_transforms
from fastcl.rowstats.api import prepared
from fastcl.rowstats.registration import differentiable_once, refuse_batched, register
from fastcl.rowstats.request import Batch
from fastcl.rowstats.triton.operator import fused

TILE = {"cpu": 1 << 19}  # logits of a tile: 2 MiB of float32
TILE_ELSEWHERE = 1 << 24
NARROWEST = 64  # columns of a tile, if there are many rows

_library = torch.library.Library("fastcl", "FRAGMENT")
_library.define("log_sums(Tensor x, Tensor y, bool normalize) -> Tensor")
_library.define(
    "log_sums_backward(Tensor x, Tensor y, bool normalize, Tensor lse, Tensor grad, bool[] need) -> (Tensor, Tensor)"
)


def log_sums(
    x: Tensor, y: Tensor, temperature: float | Tensor, normalize: bool, precision: str | None, chosen: str
) -> tuple[Tensor, Tensor]:
    """log sum_j exp(<x_i, y_j> / temperature) over all rows of y, (N,), and the rows x as they were compared, (N, D),
    divided by the temperature.

    Args:
        x: (N, D) anchors. y: (M, D) candidates of any dtype.
        temperature, normalize, precision: as `fastcl.row_stats`. All are checked by the caller.
        chosen: the backend.

    Raises:
        FastclError: a transform that the backend lacks.
    """
    with torch.autocast(x.device.type, enabled=False):
        if torch.float64 in (x.dtype, y.dtype):
            x = x.double()
        rows = prepared(x, normalize)
        rows = rows / (temperature.to(rows).reshape(()) if isinstance(temperature, Tensor) else temperature)
    if chosen == "triton":
        ids = torch.arange(len(x) + len(y), dtype=torch.int64, device=x.device)
        batch = Batch(x, y=y, sample=ids[: len(x)], sample_y=ids[len(x) :])
        return fused(batch, temperature, normalize, False, precision, ())[0][4], rows
    with torch.autocast(x.device.type, enabled=False):
        trains = y.requires_grad and torch.is_grad_enabled()
        if chosen == "dense" or trains:
            y, normalize = prepared(y.to(rows.dtype), normalize), False
        if chosen == "dense":
            return (rows @ y.T).logsumexp(1), rows
        check_transforms(chosen, rows, y)
        return torch.ops.fastcl.log_sums(rows, y, normalize), rows


def column_slices(x: Tensor, y: Tensor) -> Iterator[slice]:
    """Slices of y's rows, each of which makes one tile with all rows of x."""
    width = max(NARROWEST, TILE.get(x.device.type, TILE_ELSEWHERE) // len(x))
    for k in range(0, len(y), width):
        yield slice(k, k + width)


def _tiles(x: Tensor, y: Tensor, normalize: bool) -> Iterator[tuple[slice, Tensor]]:
    """Slices of y with their rows as x's dtype, normalised if requested."""
    for columns in column_slices(x, y):
        yield columns, prepared(y[columns].to(x.dtype), normalize)


def _forward(x: Tensor, y: Tensor, normalize: bool) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        total = x.new_full((len(x),), -torch.inf)
        for _, rows in _tiles(x, y, normalize):
            total = torch.logaddexp(total, (x @ rows.T).logsumexp(1))
        return total


def _backward(
    x: Tensor, y: Tensor, normalize: bool, lse: Tensor, grad: Tensor, need: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    dx, dy = (torch.zeros_like(v) if wanted else v.new_empty(0) for v, wanted in zip((x, y), need, strict=True))
    with torch.autocast(x.device.type, enabled=False):
        for columns, rows in _tiles(x, y, normalize):
            weights = (x @ rows.T).sub_(lse[:, None]).exp_().mul_(grad[:, None])
            if need[0]:
                dx.addmm_(weights, rows)
            if need[1]:
                torch.mm(weights.T, x, out=dy[columns])
    return dx, dy


def _setup_context(ctx, inputs, output) -> None:
    x, y, ctx.normalize = inputs
    ctx.save_for_backward(x, y, output)


def _autograd(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_batched("chunked", grad)
    x, y, lse = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:2])
    dx, dy = torch.ops.fastcl.log_sums_backward(x, y, ctx.normalize, lse, grad.contiguous(), need)
    return dx if need[0] else None, dy if need[1] else None, None


def _forward_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0])


def _backward_fake(x: Tensor, y: Tensor, *rest) -> tuple[Tensor, Tensor]:
    dx, dy = (v.new_empty(v.shape if wanted else 0) for v, wanted in zip((x, y), rest[-1], strict=True))
    return dx, dy


register(_library, "log_sums", _forward, _forward_fake, _autograd, _setup_context)
register(_library, "log_sums_backward", _backward, _backward_fake, differentiable_once("chunked"))
