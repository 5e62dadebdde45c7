"""The sigmoid loss's sums and gradients: the launches of the exponentials', with another term."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.kernels.common.arguments import Parts
from fastcl.kernels.common.launch import cdiv
from fastcl.kernels.common.numerics import LEAST_DIVISOR, WEIGHT_SCALE
from fastcl.kernels.contrastive.prepare import Initial
from fastcl.rowstats.triton.backward import of_sides
from fastcl.rowstats.triton.forward import launch_tiles, parts_of, waves
from fastcl.rowstats.triton.operand import Call, Operand, Source, allocated, fill
from fastcl.rowstats.triton.weighted import Side, Upstream


def statistics(x: Source, y: Source, call: Call) -> tuple[Operand, Operand, Tensor, Tensor]:
    """Both operands, the sum of softplus over the other rows of y, (n,), and the statistics of the pairs, (2, n):
    their logits without the bias, and zeros.

    Args:
        call: of the term "softplus".
    """
    a, b = allocated(x, call), allocated(y, call)
    views = torch.empty(2, a.n, dtype=torch.float32, device=a.z.device)
    fill([a, b], [x.order, y.order], call, [views, None], Initial(None, None, None))
    return a, b, _sums(a, b, call), views


def _sums(r: Operand, s: Operand, call: Call) -> Tensor:
    """(n,) sums of the call's term over the rows of s that are no pairs, in source order."""
    parts = parts_of(s, call, apart=True)
    plain = parts[0][0]
    _, _, n_splits = waves(r, s, plain, len(parts), streamed=0, symmetric=False)
    sums = torch.empty(n_splits * len(parts), 3, r.rows, dtype=torch.float32, device=r.z.device)
    for k, part in enumerate(parts):
        made = Parts(sums, None, 0, cdiv(r.n, part[0].block_r), k * n_splits)
        launch_tiles(r, s, call, None, part, n_splits, False, made)
    total = sums[:, 0, : r.n].sum(0)
    return total if _in_order(r) else torch.empty_like(total).index_copy_(0, r.order[0].long(), total)


def _in_order(r: Operand) -> bool:
    """Whether the working order is that of the source: rows k of both sides are pair k, and there are no ids."""
    return len(r.order) == 5


def gradients(
    x: Operand, y: Operand, call: Call, found: Sequence[Tensor], grads: Sequence[Tensor],
    need: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dy of the rows' dtype in source order, and the gradients of scale and bias; None where not needed.

    Args:
        call: of the term "sigmoid".
        found: sums and pairs, from `statistics`; grads: their gradients.
        need: whether dx, dy and the gradients of scale and bias are needed.
    """
    (sums, views), (grad, grad_views) = found, grads
    # A sigmoid is at most 1 and at most the softplus. In a converged run it is far below 1; weights scaled by 1 would
    # vanish in half precision.
    largest = (grad.abs() * sums.clamp(max=1)).nan_to_num(0, 0, 0).amax().reshape(1)
    bound = torch.where(largest > 0, largest.clamp(min=LEAST_DIVISOR.value), 1)
    weights, none = x.z.new_zeros(5, x.rows, dtype=torch.float32), x.z.new_zeros(5, y.rows, dtype=torch.float32)
    given = torch.stack([grad * (WEIGHT_SCALE.value / bound), grad_views])
    weights[0:4:3, : x.n] = given if _in_order(x) else given[:, x.order[0].long()]
    sides = (
        Side(x, Upstream(views, grad_views, None), weights, bound),
        Side(y, Upstream(views, None, None), none, bound),
    )
    total, arrived = None, None
    if need[2]:
        total, arrived = x.z.new_empty((), dtype=torch.float32), x.z.new_zeros(1, dtype=torch.int32)
    dx, dy = of_sides(sides, call, None, need[:3], total, arrived)
    return dx, dy, total, (grad * _sums(x, y, call)).sum() if need[3] else None
