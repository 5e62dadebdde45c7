"""Row statistics of the global batch: a rank's own rows as anchors, the rows of all ranks as candidates.

Own rows meet own rows as they do without ranks; only there can be views, for all views of a sample live on one rank and
sample ids are the rank's own. They meet the rows of the other ranks, which are gathered, in `torch.ops.fastcl.apart`.
The gradient is that of the sum over all ranks: a rank also needs what its rows do to the losses of the others. For that
the ranks exchange five numbers a row (`torch.ops.fastcl.tell_ranks`), never the gradients of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastcl.checks import check_positive
from fastcl.dispatch import choose
from fastcl.exchange import Ranks
from fastcl.rowstats.api import RowStats, check_precision, scaled, statistics
from fastcl.rowstats.request import Batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Options(NamedTuple):
    """How statistics are computed; as the arguments of `fastcl.row_stats`."""

    temperature: float | Tensor
    normalize: bool
    columns: bool
    precision: str | None

    def checked(self) -> Options:
        """These options; raises FastclError unless temperature and precision can be used."""
        check_positive(self.temperature, "temperature")
        check_precision(self.precision)
        return self


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
        counts, common = _facts(batch, options)
    except Exception as error:
        raise ranks.refuse(error) from error
    return batch, options, ranks.agree(counts, {**facts, **common})


def row_stats(
    checked: Callable[[], Batch], options: Options, name: str, group: ProcessGroup | None
) -> tuple[RowStats, ...]:
    """`sharded_statistics` of checked arguments; errors as `agreed`. `name` is that of the function."""
    batch, _, sides = agreed(lambda: (checked(), options.checked()), {"function": name}, group)
    return sharded_statistics(batch, options, sides)


def _facts(batch: Batch, options: Options) -> tuple[tuple[int, ...], dict[str, object]]:
    """Numbers of anchors and candidates, and what all ranks must have in common."""
    x, y = batch.x, batch.y
    counts = len(x) * (1 if batch.x2 is None else 2), *(() if y is None else (len(y),))
    if torch.compiler.is_compiling():
        return counts, {}
    t = options.temperature.detach() if isinstance(options.temperature, Tensor) else options.temperature
    on_cpu = not isinstance(t, Tensor) or t.device.type == "cpu"
    wanted = torch.is_grad_enabled() and [
        v is not None and v.requires_grad for v in (x, batch.x2, y, _tensor(options.temperature))
    ]
    return counts, {
        "temperature": float(t) if on_cpu else "a tensor",  # reading a GPU's number would wait for it
        "dtype": x.dtype, "number of columns": x.shape[1], "device": x.device.type,
        "labels": "labels" if batch.labels is not None else "no labels",
        "y": "candidates y" if y is not None else "no y", "normalize": options.normalize, "columns": options.columns,
        "precision": options.precision, "backend": choose(x), "need of gradients": wanted,
    }  # fmt: skip


def _tensor(value: float | Tensor) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def sharded_statistics(
    batch: Batch, options: Options, sides: tuple[Ranks, ...], peers: bool = True
) -> tuple[RowStats, ...]:
    """RowStats of this rank's anchors and, with columns, of its candidates, in the batch of all ranks.

    Args:
        sides: the ranks of the anchors and, with candidates, of those, from `agreed`.
        peers: whether statistics of peers are needed. Without, those of other ranks' peers are missing.
    """
    if sides[0].world == 1:
        return statistics(batch, *options[:4])
    batch = batch.spelled_out()
    mine = [_Side(batch.x, batch.labels, sides[0])]
    if batch.y is not None:
        mine.append(_Side(batch.y, None if batch.labels is None else batch.labels_y, sides[1]))
    chosen = choose(batch.x)
    with torch.autocast(batch.x.device.type, enabled=False):
        rows = [scaled(side.x, options.temperature, options.normalize) for side in mine]
        # Candidates without gradients, such as a queue, do not need to know the other ranks' anchors.
        one_way = batch.y is not None and not (options.columns or rows[1].requires_grad)
        started = [side.started(x) for side, x in zip(mine[one_way:], rows[one_way:], strict=True)]
    own = statistics(batch, *options[:4])  # while the rows travel
    theirs = [side.others(*sent) for side, sent in zip(mine[one_way:], started, strict=True)]
    # Anchors meet the others' candidates; candidates meet the others' anchors.
    met = zip(mine, rows, reversed(theirs), strict=not one_way)
    found = [torch.ops.fastcl.apart(x, y, side.labels, of_y, peers, chosen == "dense") for side, x, (y, of_y) in met]
    joined = []
    for k, (stats, (*rest, counts, _)) in enumerate(zip(own, found, strict=False)):
        if not one_way:
            # What the other ranks' anchors do to this rank's rows is heard where those are candidates.
            there = mine[k].ranks
            heard, flag = found[-1 - k][4], counts.new_empty(0)
            rest = torch.ops.fastcl.tell_ranks(*rest, counts, heard, flag, list(there.sizes), there.rank, there.group)
        joined.append(_joined(stats, rest, counts))
    return tuple(joined)


class _Side(NamedTuple):
    """This rank's anchors or candidates."""

    x: Tensor
    labels: Tensor | None
    ranks: Ranks

    def started(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Send prepared rows and their labels."""
        return self.ranks.start(x.detach()), None if self.labels is None else self.ranks.start(self.labels)

    def others(self, rows: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The other ranks' rows and labels."""
        return self.ranks.others(rows), None if labels is None else self.ranks.others(labels)


def _joined(own: RowStats, rest: Sequence[Tensor], counts: Tensor) -> RowStats:
    """Statistics over own candidates and, from `torch.ops.fastcl.apart`, those of other ranks."""
    mean_peer, lse_peer, lse_other = rest
    n_peer = own.n_peer + counts[0]
    share = counts[0].to(mean_peer.dtype) / n_peer.clamp(min=1)
    mean = own.mean_peer * (1 - share) + mean_peer * share
    return RowStats(
        own.lse_view, own.spread_view, own.mean_view, _log_add(own.lse_peer, lse_peer), mean,
        _log_add(own.lse_other, lse_other), own.n_view, n_peer, own.n_other + counts[1],
    )  # fmt: skip


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """logaddexp with zero gradient, not NaN, where both are -inf."""
    empty = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(empty, 0), b.masked_fill(empty, 0)).masked_fill(empty, -torch.inf)


def share_of(rows: Tensor, ranks: Ranks, reduction: str) -> Tensor:
    """Reduced losses of own rows. The average over ranks of "mean" is the mean over all rows, of any ranks' sizes."""
    if reduction == "none":
        return rows
    return rows.sum() * (ranks.world / ranks.total) if reduction == "mean" else rows.sum()
