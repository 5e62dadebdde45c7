"""Plans of calls: all that follows from a loss's arguments but not from the values in its tensors, checked once.

Calls that differ in values alone share a plan: for few rows on a CPU the checks would cost as much as several sums.
What a `with` block decides is read at every call: the backend, autocast, the gradient mode, transforms of torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcl.checks import check_positive, check_precision, check_rows
from fastcl.choices import REDUCTIONS
from fastcl.dispatch import choose
from fastcl.errors import FastclError, one_of
from fastcl.losses.objectives import Objective, ObjectiveLike, resolve
from fastcl.rowstats.api import RowStats, statistics
from fastcl.rowstats.request import Batch, check_in_order, check_pairs, check_rectangle, check_two_views
from fastcl.rowstats.small import route
from fastcl.rowstats.triton.operator import fused

MOST = 256  # plans that are kept; a plan holds no tensor

_plans: dict[Any, CallPlan] = {}
_facts = attrgetter("__class__", "shape", "dtype", "device", "layout")


class Kind(NamedTuple):
    """What the tensors of a call are."""

    check: Callable[..., None]  # raises FastclError unless they fit together, whatever their values
    batch: Callable[..., Batch]  # of tensors that do; it may check values
    multiple: int = 1  # anchors for each row of the first tensor
    candidates: int = 0  # which tensor they are counted by, with the same multiple
    columns: bool = False  # the candidates are anchors too
    inverted: bool = False  # what the caller gives is 1 / T
    labels: int = 2  # where these are among the tensors

    def check_degree(self, given: float | Tensor) -> None:
        """Raise FastclError unless the temperature, or the scale of the logits that stands for it, is positive."""
        check_positive(given, "logit_scale" if self.inverted else "temperature")

    def temperature(self, given: float | Tensor, x: Tensor) -> float | Tensor:
        """The temperature of what the caller gives, for rows like x."""
        self.check_degree(given)
        if not self.inverted:
            return given
        if not isinstance(given, Tensor):
            return 1 / float(given)
        return 1 / given.to(torch.float64 if torch.float64 in (given.dtype, x.dtype) else torch.float32)


TWO_VIEWS = Kind(check_two_views, Batch.two_views, multiple=2)  # z1, z2 and perhaps labels
TOWERS = Kind(check_pairs, Batch.pairs, candidates=1, columns=True, inverted=True)  # image, text
IN_ORDER = Kind(check_in_order, Batch.pairs, candidates=1)  # x, y
ROWS = Kind(lambda z, *_: check_rows(z, "z"), Batch.rows)  # z, sample and perhaps labels
# x, y, sample, sample_y, perhaps both labels
RECTANGLE = Kind(check_rectangle, Batch.rectangle, candidates=1, labels=4)


class CallPlan(NamedTuple):
    """The decisions of a call; find it with `plan_of`."""

    kind: Kind
    losses: tuple[Callable[[RowStats], Tensor], ...]
    codes: tuple[int, ...] | None  # of the losses, if all are rows of the table
    entries: int  # of the matrix of all anchors and candidates
    group: route.Group | None  # of the losses, if the whole matrix may be computed at once
    normalize: bool
    reduction: str
    precision: str | None

    def run(self, tensors: Sequence[Tensor], temperature: float | Tensor) -> Sequence[Tensor]:
        """Reduced row losses of the anchors; with columns, averaged with those of the candidates.

        The temperature is as the caller gave it. On the Triton backend, and for small batches on a CPU, objectives of
        the table are evaluated together with the statistics. A callable of the caller's own is always evaluated by
        torch on the statistics.
        """
        batch, normalize, columns = self.kind.batch(*tensors), self.normalize, self.kind.columns
        chosen = None if self.codes is None else choose(batch.x)
        if chosen == "triton" and self.codes:
            return self._fused(batch, temperature)
        if chosen == "chunked" and self.group is not None and route.is_few(self.entries):
            self.kind.check_degree(temperature)
            found = route.losses(batch, self.group, temperature, self.kind.inverted, normalize, columns, self.reduction)
            if found is not None:
                return [self._halved(rows) for rows in found] if columns and self.reduction != "mean" else found
        temperature = self.kind.temperature(temperature, tensors[0])
        stats = statistics(batch, temperature, normalize, columns, self.precision)
        sides = [[loss(found) for loss in self.losses] for found in stats]
        if self.reduction != "none":
            sides = [[getattr(rows, self.reduction)() for rows in side] for side in sides]
        return [(a + b) / 2 for a, b in zip(*sides, strict=True)] if columns else sides[0]

    def _fused(self, batch: Batch, temperature: float | Tensor) -> Sequence[Tensor]:
        inverted = self.kind.inverted and isinstance(temperature, Tensor)  # the kernels invert it themselves
        if inverted:
            self.kind.check_degree(temperature)
        else:
            temperature = self.kind.temperature(temperature, batch.x)
        options = self.normalize, self.kind.columns, self.precision, self.codes or (), self.reduction, inverted
        _, _, losses, _, _, losses_y = fused(batch, temperature, *options)
        if self.kind.columns and self.reduction == "none":
            losses = (losses + losses_y) / 2
        if losses.ndim == 0:
            return [losses]
        if len(losses) == 1:
            return [losses.squeeze(0)]  # a view, which needs no kernel, forward or backward
        return losses.unbind() if self.reduction == "none" else [loss.clone() for loss in losses.unbind()]

    def _halved(self, found: Tensor) -> Tensor:
        """Losses, or their sum, of anchors and candidates in one list, averaged over both roles."""
        return found.view(2, -1).mean(0) if self.reduction == "none" else found / 2


def plan_of(
    kind: Kind, tensors: Sequence[Tensor], objectives: tuple[ObjectiveLike, ...] | str, normalize: bool, reduction: str,
    precision: str | None,
) -> CallPlan:  # fmt: skip
    """The plan of a call, the same for all calls that differ in the values of their tensors alone.

    Raises:
        FastclError: tensors that do not fit together, an unknown objective, reduction or precision, missing labels.
    """
    key = None
    if not torch.compiler.is_compiling():
        try:
            key = kind, objectives, not normalize, reduction, precision, *map(_facts, tensors)
            if (found := _plans.get(key)) is not None:
                return found
        except (AttributeError, TypeError):  # something that is no tensor, or has no hash
            key = None
    made = _made(kind, tensors, objectives, normalize, reduction, precision)
    if key is not None and made.codes is not None:  # a callable might keep tensors alive
        if len(_plans) >= MOST:
            _plans.clear()
        _plans[key] = made
    return made


def _made(
    kind: Kind, tensors: Sequence[Tensor], objectives: tuple[ObjectiveLike, ...] | str, normalize: bool, reduction: str,
    precision: str | None,
) -> CallPlan:  # fmt: skip
    if not isinstance(objectives, tuple):
        what = "the string " if isinstance(objectives, str) else ""
        raise FastclError(f"objectives must be a sequence of names, got {what}{objectives!r}")
    if reduction not in REDUCTIONS:
        raise FastclError(one_of("reduction", REDUCTIONS, reduction))
    losses = tuple(map(resolve, objectives))
    # Exactly Objective: a subclass may compute something else.
    table = [loss for loss in losses if isinstance(loss, Objective) and type(loss) is Objective]
    has_labels = len(tensors) > kind.labels and tensors[kind.labels] is not None
    for name, loss in zip(objectives, losses, strict=True):
        if isinstance(loss, Objective) and loss.needs_labels and not has_labels:
            raise FastclError(f"labels are required by objective {name!r}")
    kind.check(*tensors)
    check_precision(precision)
    codes = tuple(loss.code for loss in table) if losses and len(table) == len(losses) else None
    anchors, candidates = (kind.multiple * len(tensors[k]) for k in (0, kind.candidates))
    least = 2 if kind.columns else 4
    small = codes is not None and anchors >= least and route.supports(tensors[0])
    group = route.group_of(table) if small else None
    return CallPlan(kind, losses, codes, anchors * candidates, group, bool(normalize), reduction, precision)
