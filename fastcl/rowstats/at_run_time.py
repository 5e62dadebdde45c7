"""Ranks whose numbers of rows are data, as they are to compiled code, and the operators by which rows travel there.

To the compiler the number of rows that arrive is one that depends on data, as the result of torch.nonzero. Only
operators of this package take such rows: what a loss computes of their results has the shapes of own rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor

from fastcl.exchange import Ranks
from fastcl.rowstats.gathered import wide
from fastcl.rowstats.registration import keep_order, refuse_batched, refuse_second, register

_library = torch.library.Library("fastcl", "FRAGMENT")
_RANKS = "Tensor sizes, int rank, str group"
_library.define(f"start_rows(Tensor rows, {_RANKS}) -> Tensor")
_library.define(f"arrived_rows(Tensor started, Tensor rows, {_RANKS}) -> Tensor")
_library.define(f"hear_ranks(Tensor told, SymInt heard, {_RANKS}) -> Tensor")
_library.define(f"other_rows(Tensor rows, {_RANKS}) -> Tensor")
_library.define(f"other_rows_backward(Tensor grad, SymInt own, {_RANKS}) -> Tensor")


@dataclass(frozen=True)
class RanksAtRunTime(Ranks):
    """Ranks in compiled code. `start` returns what `others` takes."""

    told: Any = None  # (world,) int64 on the CPU: the number of rows of each
    share: Any = None  # () float64 on the device of the rows

    @property
    def total(self) -> Any:
        """() float64: number of rows of all ranks."""
        return self.world / self.share

    @property
    def table(self) -> Tensor:
        """As of `Ranks`."""
        return self.told

    @property
    def weight(self) -> Any:
        """As of `Ranks`."""
        return self.share

    def start(self, rows: Tensor) -> Any:
        """As of `Ranks`; the rows come along, for their memory may not be used again before they have left."""
        return torch.ops.fastcl.start_rows(rows, self.told, self.rank, self.group), rows

    def others(self, started: Any) -> Tensor:
        """As of `Ranks`."""
        return torch.ops.fastcl.arrived_rows(*started, self.told, self.rank, self.group)


def other_rows(rows: Tensor, ranks: Ranks) -> Tensor:
    """(M, D) rows of the other ranks, of this rank's (N, D); float32, float64 for float64.

    The gradients that the other ranks have of this rank's rows are added up in that precision.
    """
    return torch.ops.fastcl.other_rows(rows, ranks.table, ranks.rank, ranks.group)


def _ranks(sizes: Tensor, rank: int, group: str) -> Ranks:
    return Ranks(group, rank, len(sizes), tuple(sizes.tolist()))


def _start(rows: Tensor, *place: Any) -> Tensor:
    return _ranks(*place).start(rows)


def _arrived(started: Tensor, _rows: Tensor, *place: Any) -> Tensor:
    return _ranks(*place).others(started)


def _of_any_size(rows: Any, *_: Any) -> Tensor:
    """Fake rows of a number that depends on data; PyTorch's own way asks for a setting of torch._dynamo."""
    return rows.new_empty(rows.fake_mode.shape_env.create_unbacked_symint(), *rows.shape[1:])


def _others(rows: Tensor, *place: Any) -> Tensor:
    ranks = _ranks(*place)
    return ranks.others(ranks.start(rows)).to(wide(rows))


def _others_fake(rows: Tensor, *_: Any) -> Tensor:
    return _of_any_size(rows).to(wide(rows))


def _setup_context(ctx, inputs, **_) -> None:
    rows, sizes, ctx.rank, ctx.group = inputs
    ctx.own, ctx.dtype = rows.shape[0], rows.dtype
    ctx.save_for_backward(sizes)


def _autograd(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_batched("chunked", grad)
    place = *ctx.saved_tensors, ctx.rank, ctx.group
    return torch.ops.fastcl.other_rows_backward(grad, ctx.own, *place).to(ctx.dtype), None, None, None


def _backward(grad: Tensor, own: int, *place: Any) -> Tensor:
    ranks = _ranks(*place)
    first = sum(ranks.sizes[: ranks.rank])
    grad = torch.cat([grad[:first], grad.new_zeros(own, grad.shape[1]), grad[first:]])
    return ranks.add_up(grad)[first : first + own].clone()


def _hear(told: Tensor, _heard: int, *place: Any) -> Tensor:
    """(heard, K): what the other ranks tell about their rows, of what this rank tells about its own."""
    ranks = _ranks(*place)
    return ranks.others(ranks.start(told))


def _known(rows: Tensor, n: int | SymInt, *_: Any) -> Tensor:
    return rows.new_empty(n, rows.shape[1])


register(_library, "start_rows", _start, _of_any_size, refuse_second)
register(_library, "arrived_rows", _arrived, _of_any_size, refuse_second)
register(_library, "hear_ranks", _hear, _known, refuse_second)
register(_library, "other_rows", _others, _others_fake, _autograd, _setup_context)
register(_library, "other_rows_backward", _backward, _known, refuse_second)
keep_order(_library, "start_rows", "hear_ranks", "other_rows", "other_rows_backward")
