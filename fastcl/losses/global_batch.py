"""Losses of the global batch: a rank's own rows as anchors, the rows of all ranks as candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from fastcl.exchange import Ranks
from fastcl.losses.call_plans import CallPlan
from fastcl.losses.explicit import Margin, check_smoothing, pairs_above_mean
from fastcl.losses.objectives import Objective
from fastcl.losses.sameness import described
from fastcl.rowstats import sharded
from fastcl.rowstats.agreement import Request, agreed, number
from fastcl.rowstats.api import RowStats
from fastcl.rowstats.gathered import gather_rows
from fastcl.rowstats.meeting import Needs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def losses(
    plan_of: Callable[[], CallPlan], tensors: Sequence[Tensor], temperature: float | Tensor,
    group: ProcessGroup | None, smoothing: float = 0,
) -> Sequence[Tensor]:  # fmt: skip
    """This rank's share of each loss; with columns, that of anchors and candidates together.

    The average of the shares over all ranks, and of their gradients, is the loss of the global batch and its gradient.

    Args:
        plan_of: the plan of this rank's call, as `plan_of`. If it raises, every rank raises.
        smoothing: the label smoothing of `fastcl.clip_loss`.

    Raises:
        FastclError: as `plan_of`, `check_smoothing` and `agreed`.
    """
    plan: CallPlan | None = None
    facts: dict[str, object] = {"function": "loss"}

    def request() -> Request:
        nonlocal plan
        plan = plan_of()
        check_smoothing(smoothing)
        facts.update(label_smoothing=number(smoothing), reduction=plan.reduction)
        facts["objective"] = ", ".join(map(described, plan.losses))
        with_margin = ((k, loss) for k, loss in enumerate(plan.losses) if isinstance(loss, Margin))
        facts.update({f"margin of objective {k + 1}": number(loss.margin) for k, loss in with_margin})
        degree = plan.kind.temperature(temperature, tensors[0])
        options = sharded.Options(degree, plan.normalize, plan.kind.columns, plan.precision)
        return plan.kind.batch(*tensors), options

    agreement = agreed(request, facts, group)
    if isinstance(agreement, Tensor):  # refused
        return [agreement]
    assert plan is not None
    batch, options, sides = agreement
    if sides[0].world == 1:
        found = plan.run(tensors, temperature)
    else:
        found = _shares(plan, sharded.sharded_statistics(batch, options, sides, _needs(plan.losses)), sides)
    if not smoothing:
        return found
    mean_of = partial(_mean_of_all, sides[0])
    rows = pairs_above_mean(tensors[0], tensors[1], temperature, plan.normalize, mean_of)
    return [loss + smoothing * sharded.share_of(rows, sides[0], plan.reduction) for loss in found]


def _mean_of_all(ranks: Ranks, rows: Tensor) -> Tensor:
    """(D,): the mean row of all ranks' rows."""
    if ranks.world == 1:
        return rows.mean(0)
    sums = gather_rows(rows.sum(0, keepdim=True), replace(ranks, sizes=(1,) * ranks.world))
    return sums.sum(0) / ranks.total


def _shares(plan: CallPlan, stats: Sequence[RowStats], sides: Sequence[Ranks]) -> list[Tensor]:
    reduced = []
    for loss in plan.losses:
        parts = [sharded.share_of(loss(one), side, plan.reduction) for one, side in zip(stats, sides, strict=False)]
        reduced.append(sum(parts[1:], start=parts[0]) / len(parts))
    return reduced


def _needs(losses: Sequence[Callable[[RowStats], Tensor]]) -> Needs:
    """What objectives use of peers; one of the caller's own may use all."""
    table = [loss for loss in losses if isinstance(loss, Objective) and type(loss) is Objective]
    if len(table) < len(losses):
        return Needs()
    attracted = any("peer" in loss.positives for loss in table)
    return Needs(attracted or any("peer" in loss.denominator for loss in table), attracted)
