"""Row statistics of the global batch: a rank's own rows as anchors, the rows of all ranks as candidates.

Own rows meet own rows as they do without ranks; only there can be views, for all views of a sample live on one rank and
sample ids are the rank's own. They meet the rows of the other ranks, which are gathered, in `torch.ops.fastcl.apart` or
on the Triton backend `fused_apart`. The gradient is that of the sum over all ranks: a rank also needs what its rows do
to the losses of the others. For that the ranks exchange five numbers a row (`torch.ops.fastcl.tell_ranks`), never the
gradients of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from fastcl.dispatch import choose
from fastcl.exchange import Ranks
from fastcl.rowstats.api import RowStats, statistics
from fastcl.rowstats.meeting import ALL, Needs, OnTorch, OnTriton, Options, Sent, joined, meet
from fastcl.rowstats.request import Batch
from fastcl.rowstats.triton.operator import operator_arguments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


Request: TypeAlias = tuple[Batch, Options]


def agreed(
    request: Callable[[], Request], facts: Mapping[str, object], group: ProcessGroup | None
) -> tuple[Batch, Options, tuple[Ranks, ...]]:
    """The batch, its options, and the ranks of the anchors and, with candidates, of those.

    Args:
        request: checks this rank's arguments. If it raises, every rank raises.
        facts: what all ranks must have in common, besides the options; may be filled by `request`.
    """
    ranks = Ranks.of(group)
    try:
        batch, options = request()
        if choose(batch.x) == "triton":  # what None stands for may depend on a rank's autocast
            options = options._replace(precision=operator_arguments(1.0, options.precision, batch.x)[2])
        counts, common = _facts(batch, options)
    except Exception as error:
        raise ranks.refuse(error) from error
    return batch, options, ranks.agree(counts, {**facts, **common})


def row_stats(
    checked: Callable[[], Batch], given: Options, name: str, group: ProcessGroup | None
) -> tuple[RowStats, ...]:
    """`sharded_statistics` of checked arguments; errors as `agreed`. `name` is that of the function."""
    batch, options, sides = agreed(lambda: (checked(), given.checked()), {"function": name}, group)
    return sharded_statistics(batch, options, sides)


def _facts(batch: Batch, options: Options) -> tuple[tuple[int, ...], dict[str, object]]:
    """Numbers of anchors and candidates, and what all ranks must have in common."""
    x, y = batch.x, batch.y
    counts = len(x) * (1 if batch.x2 is None else 2), *(() if y is None else (len(y),))
    if torch.compiler.is_compiling():
        return counts, {}
    t = options.temperature.detach() if isinstance(options.temperature, Tensor) else options.temperature
    on_cpu = not isinstance(t, Tensor) or t.device.type == "cpu"
    wanted = torch.is_grad_enabled() and [v is not None and v.requires_grad for v in (x, batch.x2, y, options.tensor)]
    return counts, {
        "temperature": float(t) if on_cpu else "a tensor",  # reading a GPU's number would wait for it
        "dtype": x.dtype, "number of columns": x.shape[1], "device": x.device.type,
        "labels": "labels" if batch.labels is not None else "no labels",
        "y": "candidates y" if y is not None else "no y", "normalize": options.normalize, "columns": options.columns,
        "precision": options.precision, "backend": choose(x), "need of gradients": wanted,
    }  # fmt: skip


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
            named = list(there.sizes), there.rank, there.group
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
        return rows.sum() * (ranks.world / ranks.total)
    return getattr(rows, reduction)()
