"""Own rows against the rows of other ranks, on any backend, and in slices if those are too many to be held at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastcl.checks import check_positive, check_precision, check_transforms
from fastcl.exchange import Ranks
from fastcl.rowstats import apart_operator  # noqa: F401  (registers its operators)
from fastcl.rowstats.api import normalize_rows, scaled
from fastcl.rowstats.triton import apart_kernels  # noqa: F401  (registers its own)
from fastcl.rowstats.triton.operator import operator_arguments

T = TypeVar("T")
SLICE = 2**31  # bytes of rows of all ranks that a rank holds at once, besides as many while it takes them apart


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

    def tensor(self) -> Tensor | None:  # not a property, which PyTorch 2.7 cannot compile
        """The temperature if it is a tensor."""
        return self.temperature if isinstance(self.temperature, Tensor) else None


class Needs(NamedTuple):
    """What is needed of peers; they never count as others."""

    peers: bool = True  # their statistics
    attracted: bool = True  # and the objective attracts them


ALL = Needs()


class Met(NamedTuple):
    """Own rows against others' rows."""

    stats: Sequence[Tensor]  # mean_peer, lse_peer, lse_other
    counts: Tensor  # (2, N): peers, others
    theirs: Tensor  # its gradient is what the other ranks tell about their rows
    flag: Tensor  # whether the logits leave the range of a fixed shift; empty: they do not


@dataclass(frozen=True)
class OnTorch:
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

    def of(self, x: Tensor, labels: Tensor | None, y: Tensor, labels_y: Tensor | None) -> Met:
        """Statistics of prepared rows x against rows y that have arrived."""
        check_transforms("chunked", x)
        *stats, counts, theirs = torch.ops.fastcl.apart(x, y, labels, labels_y, self.needs.peers, self.dense)
        return Met(stats, counts, theirs, counts.new_empty(0))


class OnTriton(OnTorch):
    """How they meet on the Triton backend."""

    def prepared(self, x: Tensor) -> Tensor:
        """The rows themselves: the kernels prepare them."""
        return x

    def differentiable(self, x: Tensor) -> bool:
        """As of `OnTorch`."""
        t = self.options.tensor()
        return torch.is_grad_enabled() and (x.requires_grad or (t is not None and t.requires_grad))

    def sent(self, x: Tensor) -> Tensor:
        """Rows travel in the precision of the products, if that is narrower than their own."""
        x = x.detach()
        if x.dtype != torch.float32 or self.options.precision == "fp32" or not self.options.normalize:
            return x
        return normalize_rows(x).to(torch.bfloat16 if self.options.precision == "bf16" else torch.float16)

    def of(self, x: Tensor, labels: Tensor | None, y: Tensor, labels_y: Tensor | None) -> Met:
        """As of `OnTorch`."""
        given, value, precision = operator_arguments(self.options.temperature, self.options.precision, x)
        stats, counts, theirs, *saved = torch.ops.fastcl.fused_apart(
            x, y, labels, labels_y, given, value, self.options.normalize, precision, *self.needs
        )
        return Met(stats[2:].unbind(), counts[1:], theirs, saved[-1])


@dataclass(frozen=True)
class Sent:
    """Rows and labels of this rank that the others get."""

    rows: Tensor
    labels: Tensor | None
    ranks: Ranks
    started: tuple[Tensor, Tensor | None] | None = None  # on their way; None: not yet

    @classmethod
    def start(cls, rows: Tensor, labels: Tensor | None, ranks: Ranks) -> Sent:
        """Send the rows, unless those of all ranks are more than a slice."""
        sent = cls(rows, labels, ranks)
        return sent if sent.n_slices > 1 else sent.on_its_way()

    def on_its_way(self) -> Sent:
        """Send the rows."""
        labels = None if self.labels is None else self.ranks.start(self.labels)
        return replace(self, started=(self.ranks.start(self.rows), labels))

    def others(self) -> tuple[Tensor, Tensor | None]:
        """The other ranks' rows and labels, once they have arrived."""
        assert self.started is not None
        rows, labels = self.started
        return self.ranks.others(rows), None if labels is None else self.ranks.others(labels)

    @property
    def n_slices(self) -> int:
        """Number of slices; each has rows of every rank."""
        if torch.compiler.is_compiling():
            return 1
        whole = self.rows[:1].nbytes * self.ranks.world * max(self.ranks.sizes)
        return min(-(-whole // SLICE), *self.ranks.sizes)

    def slices(self) -> list[Sent]:
        """Equal parts of every rank's rows."""
        found, n = [], self.n_slices
        if n == 1:
            return [self]
        for k in range(n):
            cuts = [(size * k // n, size * (k + 1) // n) for size in self.ranks.sizes]
            mine = slice(*cuts[self.ranks.rank])
            labels = None if self.labels is None else self.labels[mine]
            ranks = replace(self.ranks, sizes=tuple(last - first for first, last in cuts))
            found.append(Sent(self.rows[mine], labels, ranks))
        return found


def meet(meeting: OnTorch, x: Tensor, labels: Tensor | None, sent: Sent) -> Met:
    """Statistics of this rank's prepared rows against those that the other ranks have sent."""
    if sent.started is not None:
        return meeting.of(x, labels, *sent.others())
    slices = sent.slices()
    parts = [Met(*part) for part in in_slices(lambda one: meeting.of(x, labels, *one.on_its_way().others()), slices)]
    total = parts[0]
    for part in parts[1:]:
        total = _combined(total, part)
    return total._replace(theirs=torch.cat([part.theirs for part in parts], 1)[:, _places(slices, x.device)])


def in_slices(of: Callable[[Sent], T], slices: Sequence[Sent]) -> list[T]:
    """What a function finds in each slice. A slice is gathered again in the backward pass, instead of being kept."""
    if len(slices) == 1:
        return [of(slices[0])]
    return [cast(T, checkpoint(of, one, use_reentrant=False, preserve_rng_state=False)) for one in slices]


def _combined(a: Met, b: Met) -> Met:
    """Statistics over the candidates of both; `theirs` is a's."""
    stats = joined(a.stats, a.counts[0], b.stats, b.counts[0])
    return Met(stats, a.counts + b.counts, a.theirs, torch.maximum(a.flag, b.flag))


def _places(slices: Sequence[Sent], device: torch.device) -> Tensor:
    """Where the other ranks' rows, in the order of the ranks, are among the slices."""
    found: list[list[Tensor]] = [[] for _ in slices[0].ranks.sizes]
    at = 0
    for one in slices:
        for rank, size in enumerate(one.ranks.sizes):
            if rank != one.ranks.rank:
                found[rank].append(torch.arange(at, at + size, dtype=torch.int64, device=device))
                at += size
    return torch.cat([places for of in found for places in of])


def joined(a: Sequence[Tensor], n_a: Tensor, b: Sequence[Tensor], n_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean_peer, lse_peer, lse_other over two sets of candidates, from those of each and its numbers of peers."""
    share = n_b.to(a[0].dtype) / (n_a + n_b).clamp(min=1)
    return a[0] * (1 - share) + b[0] * share, _log_add(a[1], b[1]), _log_add(a[2], b[2])


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """logaddexp with zero gradient, not NaN, where both are -inf."""
    empty = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(empty, 0), b.masked_fill(empty, 0)).masked_fill(empty, -torch.inf)
