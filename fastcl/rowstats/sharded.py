"""Row statistics of the global batch: a rank's own rows as anchors, the rows of all ranks as candidates.

Own rows meet own rows as they do without ranks; only there can be views, for all views of a sample live on one rank and
sample ids are the rank's own. They meet the rows of the other ranks, which are gathered, in `torch.ops.fastcl.apart` or
on the Triton backend `fused_apart`. The gradient is that of the sum over all ranks: a rank also needs what its rows do
to the losses of the others. For that the ranks exchange five numbers a row (`torch.ops.fastcl.tell_ranks`), never the
gradients of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastcl.checks import check_positive
from fastcl.dispatch import choose
from fastcl.exchange import Ranks
from fastcl.rowstats.api import (
    RowStats,
    check_precision,
    check_transforms,
    normalize_rows,
    operator_arguments,
    scaled,
    statistics,
)
from fastcl.rowstats.request import Batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Options(NamedTuple):
    """How statistics are computed; as the arguments of `fastcl.row_stats`."""

    temperature: float | Tensor
    normalize: bool
    columns: bool
    precision: str | None
    inverse: bool = False  # `temperature` is its inverse, the scale of the logits


class Needs(NamedTuple):
    """What is needed of peers; they never count as others."""

    peers: bool = True  # their statistics
    attracted: bool = True  # and the objective attracts them


ALL = Needs()


def agreed(
    checked: Callable[[], Batch], options: Options, facts: Mapping[str, object], group: ProcessGroup | None
) -> tuple[Batch, Options, tuple[Ranks, ...]]:
    """The batch, the options with a temperature, and the ranks of the anchors and, with candidates, of those.

    Args:
        checked: makes the batch of this rank's arguments. If it raises, every rank raises.
        facts: what all ranks must have in common, besides the options; may be filled by `checked`.
    """
    ranks = Ranks.of(group)
    try:
        batch = checked()
        check_positive(options.temperature, "temperature")
        check_precision(options.precision)
        if options.inverse:
            options = options._replace(temperature=inverse(options.temperature, batch.x), inverse=False)
        if choose(batch.x) == "triton":  # what None stands for may depend on a rank's autocast
            options = options._replace(precision=operator_arguments(1.0, options.precision, batch.x)[2])
        counts, common = _facts(batch, options)
    except Exception as error:
        raise ranks.refuse(error) from error
    return batch, options, ranks.agree(counts, {**facts, **common})


def inverse(scale: float | Tensor, x: Tensor) -> float | Tensor:
    """The temperature that stands for a scale of the logits of rows x."""
    if isinstance(scale, Tensor):
        return 1 / scale.to(torch.float64 if torch.float64 in (scale.dtype, x.dtype) else torch.float32)
    return 1 / float(scale)


def row_stats(
    checked: Callable[[], Batch], options: Options, name: str, group: ProcessGroup | None
) -> tuple[RowStats, ...]:
    """`sharded_statistics` of checked arguments; errors as `agreed`. `name` is that of the function."""
    batch, options, sides = agreed(checked, options, {"function": name}, group)
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
    batch: Batch, options: Options, sides: tuple[Ranks, ...], needs: Needs = ALL
) -> tuple[RowStats, ...]:
    """RowStats of this rank's anchors and, with columns, of its candidates, in the batch of all ranks.

    Args:
        sides: the ranks of the anchors and, with candidates, of those, from `agreed`.
        needs: statistics of other ranks' rows that are not needed are missing.
    """
    if sides[0].world == 1:
        return statistics(batch, *options[:4])
    whole = batch.spelled_out()
    mine = [_Side(whole.x, whole.labels, sides[0])]
    if whole.y is not None:
        mine.append(_Side(whole.y, None if whole.labels is None else whole.labels_y, sides[1]))
    chosen = choose(whole.x)
    meeting = (_Fused if chosen == "triton" else _Torch)(options, needs, chosen == "dense")
    with torch.autocast(whole.x.device.type, enabled=False):
        rows = [meeting.prepared(side.x) for side in mine]
        # Candidates without gradients, such as a queue, do not need to know the other ranks' anchors.
        one_way = whole.y is not None and not (options.columns or meeting.differentiable(rows[1]))
        sent = [side.started(meeting.sent(x)) for side, x in zip(mine[one_way:], rows[one_way:], strict=True)]
    own = statistics(batch, *options[:4])  # while the rows travel
    theirs = [side.others(*one) for side, one in zip(mine[one_way:], sent, strict=True)]
    # Anchors meet the others' candidates; candidates meet the others' anchors.
    met = zip(mine, rows, reversed(theirs), strict=not one_way)
    found = [meeting.of(x, side.labels, *others) for side, x, others in met]
    joined = []
    for k, (stats, one) in enumerate(zip(own, found, strict=False)):
        rest = one.stats
        if not one_way:
            # What the other ranks' anchors do to this rank's rows is heard where those are candidates.
            there, heard = mine[k].ranks, found[-1 - k].theirs
            named = list(there.sizes), there.rank, there.group
            rest = torch.ops.fastcl.tell_ranks(*rest, one.counts, heard, one.flag, *named)
        joined.append(_joined(stats, rest, one.counts))
    return tuple(joined)


class _Met(NamedTuple):
    """Own rows against others' rows."""

    stats: Sequence[Tensor]  # mean_peer, lse_peer, lse_other
    counts: Tensor  # (2, N): peers, others
    theirs: Tensor  # its gradient is what the other ranks tell about their rows
    flag: Tensor  # whether the logits leave the range of a fixed shift; empty: they do not


@dataclass(frozen=True)
class _Torch:
    """How rows of two ranks meet on the torch backends."""

    options: Options
    needs: Needs
    dense: bool

    def prepared(self, x: Tensor) -> Tensor:
        """Rows as the operator takes them."""
        return scaled(x, self.options.temperature, self.options.normalize)

    def differentiable(self, x: Tensor) -> bool:
        """Whether prepared rows, or the temperature, get a gradient."""
        return x.requires_grad

    def sent(self, x: Tensor) -> Tensor:
        """Prepared rows as they travel."""
        return x.detach()

    def of(self, x: Tensor, labels: Tensor | None, y: Tensor, labels_y: Tensor | None) -> _Met:
        """Statistics of prepared rows x against rows y that have arrived."""
        check_transforms("chunked", x)
        *stats, counts, theirs = torch.ops.fastcl.apart(x, y, labels, labels_y, self.needs.peers, self.dense)
        return _Met(stats, counts, theirs, counts.new_empty(0))


class _Fused(_Torch):
    """How they meet on the Triton backend."""

    def prepared(self, x: Tensor) -> Tensor:
        """The rows themselves: the kernels prepare them."""
        return x

    def differentiable(self, x: Tensor) -> bool:
        """As of `_Torch`."""
        t = _tensor(self.options.temperature)
        return torch.is_grad_enabled() and (x.requires_grad or (t is not None and t.requires_grad))

    def sent(self, x: Tensor) -> Tensor:
        """Rows travel in the precision of the products, if that is narrower than their own."""
        x = x.detach()
        if x.dtype != torch.float32 or self.options.precision == "fp32" or not self.options.normalize:
            return x
        return normalize_rows(x).to(torch.bfloat16 if self.options.precision == "bf16" else torch.float16)

    def of(self, x: Tensor, labels: Tensor | None, y: Tensor, labels_y: Tensor | None) -> _Met:
        """As of `_Torch`."""
        given, value, precision = operator_arguments(self.options.temperature, self.options.precision, x)
        stats, counts, theirs, *saved = torch.ops.fastcl.fused_apart(
            x, y, labels, labels_y, given, value, self.options.normalize, precision, *self.needs
        )
        return _Met(stats[2:].unbind(), counts[1:], theirs, saved[-1])


class _Side(NamedTuple):
    """This rank's anchors or candidates."""

    x: Tensor
    labels: Tensor | None
    ranks: Ranks

    def started(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Send rows and their labels."""
        return self.ranks.start(x), None if self.labels is None else self.ranks.start(self.labels)

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
