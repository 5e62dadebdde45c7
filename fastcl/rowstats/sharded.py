"""Row statistics of the global batch: a rank's own rows as anchors, the rows of all ranks as candidates.

Own rows meet own rows as they do without ranks; only there can be views, for all views of a sample live on one rank and
sample ids are the rank's own. They meet the rows of the other ranks, which are gathered, in `torch.ops.fastcl.apart` or
on the Triton backend `fused_apart`. The gradient is that of the sum over all ranks: a rank also needs what its rows do
to the losses of the others. For that the ranks exchange five numbers a row (`torch.ops.fastcl.tell_ranks`), never the
gradients of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcl.dispatch import choose
from fastcl.exchange import Ranks
from fastcl.rowstats.agreement import agreed
from fastcl.rowstats.api import RowStats, statistics
from fastcl.rowstats.fields import unpack
from fastcl.rowstats.meeting import ALL, Needs, OnTorch, OnTriton, Options, Sent, joined, meet
from fastcl.rowstats.request import Batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def row_stats(
    checked: Callable[[], Batch], given: Options, name: str, group: ProcessGroup | None
) -> tuple[RowStats, ...]:
    """`sharded_statistics` of checked arguments; errors as `agreed`. `name` is that of the function."""
    found = agreed(lambda: (checked(), given.checked()), {"function": name}, group)
    if isinstance(found, Tensor):  # refused
        return (unpack([found] * 5, [found] * 3),) * (2 if given.columns else 1)
    return sharded_statistics(*found)


def sharded_statistics(
    batch: Batch, options: Options, sides: tuple[Ranks, ...], needs: Needs = ALL
) -> tuple[RowStats, ...]:
    """RowStats of this rank's anchors and, with columns, of its candidates, in the batch of all ranks.

    Args:
        sides: the ranks of the anchors and, with candidates, of those, from `agreed`.
        needs: statistics of other ranks' rows that are not needed are missing.
    """
    if sides[0].world == 1:
        return statistics(batch, *options)
    with torch.autocast(batch.x.device.type, enabled=False):
        whole = batch.spelled_out()
    mine = [(whole.x, whole.labels, sides[0])]
    if whole.y is not None:
        mine.append((whole.y, None if whole.labels is None else whole.labels_y, sides[1]))
    chosen = choose(whole.x)
    meeting = (OnTriton if chosen == "triton" else OnTorch)(options, needs, chosen == "dense")
    with torch.autocast(whole.x.device.type, enabled=False):
        rows = [meeting.prepared(x) for x, _, _ in mine]
        # Candidates without gradients, such as a queue, do not need to know the other ranks' anchors.
        one_way = whole.y is not None and not (options.columns or meeting.differentiable(rows[1]))
        pairs = list(zip(mine, rows, strict=True))[one_way:]
        sent = [Sent.start(meeting.sent(x), labels, ranks) for (_, labels, ranks), x in pairs]
    own = statistics(batch, *options)  # while the rows travel
    # Anchors meet the others' candidates; candidates meet the others' anchors.
    met = zip(mine, rows, reversed(sent), strict=not one_way)
    with torch.autocast(whole.x.device.type, enabled=False):  # torch.cat refuses other half precision than its own
        found = [meet(meeting, x, labels, others) for (_, labels, _), x, others in met]
    whole_batch = []
    for k, (stats, one) in enumerate(zip(own, found, strict=False)):
        rest = one.stats
        if not one_way:
            # What the other ranks' anchors do to this rank's rows is heard where those are candidates.
            there, heard = sides[k], found[-1 - k].theirs
            named = there.table, there.rank, there.group
            rest = torch.ops.fastcl.tell_ranks(*rest, one.counts, heard, one.flag, *named)
        whole_batch.append(_joined(stats, rest, one.counts))
    return tuple(whole_batch)


def _joined(own: RowStats, rest: Sequence[Tensor], counts: Tensor) -> RowStats:
    """Statistics over own candidates and, from `torch.ops.fastcl.apart`, those of other ranks."""
    mean_peer, lse_peer, lse_other = joined(
        (own.mean_peer, own.lse_peer, own.lse_other), own.n_peer, rest, counts[0]
    )  # fmt: skip
    return RowStats(
        own.lse_view, own.spread_view, own.mean_view, lse_peer, mean_peer, lse_other, own.n_view,
        own.n_peer + counts[0], own.n_other + counts[1],
    )  # fmt: skip


def share_of(rows: Tensor, ranks: Ranks, reduction: str) -> Tensor:
    """Reduced losses of own rows. The average over ranks of "mean" is the mean over all rows, of any ranks' sizes."""
    if reduction == "none":
        return rows
    if reduction == "mean" and ranks.world > 1:
        return (rows.sum() * ranks.weight).to(rows.dtype)  # which in compiled code is a float64 tensor
    return getattr(rows, reduction)()
