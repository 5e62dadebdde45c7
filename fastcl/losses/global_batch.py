"""Losses of the global batch: a rank's own rows as anchors, the rows of all ranks as candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastcl.exchange import Ranks
from fastcl.losses.arguments import Checked
from fastcl.losses.objectives import OBJECTIVES, Objective
from fastcl.rowstats import sharded
from fastcl.rowstats.api import RowStats
from fastcl.rowstats.meeting import Needs, Options
from fastcl.rowstats.request import Batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def agreed(
    checked: Callable[[], Checked], options: Options, reduction: str, group: ProcessGroup | None
) -> tuple[Checked, Options, tuple[Ranks, ...]]:
    """The checked batch and objectives, the options, and the ranks of each side; errors as `sharded.agreed`."""
    found: list[Checked] = []

    def batch_of() -> Batch:
        found.append(checked())
        facts["objective"] = ", ".join(map(_name, found[0][1]))
        return found[0][0]

    facts: dict[str, object] = {"function": "loss", "reduction": reduction}
    _, options, sides = sharded.agreed(batch_of, options, facts, group)
    return found[0], options, sides


def _name(loss: Callable[[RowStats], Tensor]) -> str:
    """An objective as errors name it; ranks compare these names."""
    for name, known in OBJECTIVES.items():
        if loss == known:
            return name
    return repr(loss) if isinstance(loss, Objective) else getattr(loss, "__qualname__", type(loss).__qualname__)


def losses(found: Checked, sides: tuple[Ranks, ...], options: Options, reduction: str) -> list[Tensor]:
    """This rank's share of each loss; with columns, that of anchors and candidates together.

    The average of the shares over all ranks, and of their gradients, is the loss of the global batch and its gradient.
    """
    batch, objectives = found
    stats = sharded.sharded_statistics(batch, options, sides, _needs(objectives))
    reduced = []
    for loss in objectives:
        parts = [sharded.share_of(loss(one), side, reduction) for one, side in zip(stats, sides, strict=False)]
        reduced.append(sum(parts[1:], start=parts[0]) / len(parts))
    return reduced


def _needs(losses: Sequence[Callable[[RowStats], Tensor]]) -> Needs:
    """What objectives use of peers; one of the caller's own may use all."""
    table = [loss for loss in losses if isinstance(loss, Objective) and type(loss) is Objective]
    if len(table) < len(losses):
        return Needs()
    attracted = any("peer" in loss.positives for loss in table)
    return Needs(attracted or any("peer" in loss.denominator for loss in table), attracted)
