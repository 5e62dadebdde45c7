"""torch.ops.fastcl.gather_rows: the rows of all ranks, with the gradient of what every rank computes from them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.exchange import Ranks
from fastcl.rowstats.registration import keep_order, refuse_batched, refuse_second, register

_library = torch.library.Library("fastcl", "FRAGMENT")
_library.define("gather_rows(Tensor rows, SymInt[] sizes, int rank, str group) -> Tensor")
_library.define("gather_rows_backward(Tensor grad, SymInt[] sizes, int rank, str group) -> Tensor")


def gather_rows(rows: Tensor, ranks: Ranks) -> Tensor:
    """(M, D) rows of all ranks, of this rank's (N, D); float32, float64 for float64.

    The gradients that all ranks have of these rows are added up in that precision: each rank gets those of its own.
    """
    return torch.ops.fastcl.gather_rows(rows, list(ranks.sizes), ranks.rank, ranks.group)


def _ranks(sizes: list[int], rank: int, group: str) -> Ranks:
    return Ranks(group, rank, len(sizes), tuple(sizes))


def _forward(rows: Tensor, sizes: list[int], rank: int, group: str) -> Tensor:
    ranks = _ranks(sizes, rank, group)
    return ranks.gather(ranks.start(rows)).to(wide(rows))


def wide(rows: Tensor) -> torch.dtype:
    """The precision in which the gradients of rows are added up over the ranks."""
    return rows.dtype if rows.dtype == torch.float64 else torch.float32


def _forward_fake(rows: Tensor, sizes: list[int], *_: object) -> Tensor:
    return rows.new_empty(sum(sizes), rows.shape[1], dtype=wide(rows))


def _setup_context(ctx, inputs, **_) -> None:
    rows, ctx.sizes, ctx.rank, ctx.group = inputs
    ctx.dtype = rows.dtype


def _autograd(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_batched("chunked", grad)
    own = torch.ops.fastcl.gather_rows_backward(grad, ctx.sizes, ctx.rank, ctx.group)
    return own.to(ctx.dtype), None, None, None


def _backward(grad: Tensor, sizes: list[int], rank: int, group: str) -> Tensor:
    return _ranks(sizes, rank, group).add_up(grad).split(list(sizes))[rank].clone()


def _backward_fake(grad: Tensor, sizes: list[int], rank: int, _group: str) -> Tensor:
    return grad.new_empty(sizes[rank], grad.shape[1])


register(_library, "gather_rows", _forward, _forward_fake, _autograd, _setup_context)
register(_library, "gather_rows_backward", _backward, _backward_fake, refuse_second)
keep_order(_library, "gather_rows", "gather_rows_backward")
