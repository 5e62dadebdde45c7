"""The checked arguments of a loss: the batch, and the objectives as callables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from fastcl.checks import check_positive, check_rows
from fastcl.choices import REDUCTIONS, ObjectiveName
from fastcl.errors import FastclError, one_of
from fastcl.losses.objectives import Objective, ObjectiveLike, resolve
from fastcl.rowstats.api import RowStats
from fastcl.rowstats.request import Batch

Checked: TypeAlias = tuple[Batch, Sequence[Callable[[RowStats], Tensor]]]


def checked_rows(
    z: Tensor, sample: Tensor, labels: Tensor | None, objectives: str | Sequence[ObjectiveLike], reduction: str
) -> Checked:
    """Rows with arbitrary ids; errors as `fastcl.contrastive_losses`."""
    _check_reduction(reduction)
    check_rows(z, "z")
    if isinstance(objectives, str):
        raise FastclError(f"objectives must be a sequence of names, got the string {objectives!r}")
    losses = [_labelled(objective, labels) for objective in objectives]
    return Batch.of(z, None, sample, labels, None, None), losses


def checked_views(z1: Tensor, z2: Tensor, labels: Tensor | None, objective: ObjectiveName, reduction: str) -> Checked:
    """Two views of each sample; errors as `fastcl.nscl_loss`."""
    _check_reduction(reduction)
    loss = _labelled(objective, labels)
    return Batch.two_views(z1, z2, labels), [loss]


def checked_pairs(image: Tensor, text: Tensor, logit_scale: float | Tensor) -> Checked:
    """Pairs of two towers; errors as `fastcl.clip_loss`."""
    batch = Batch.pairs(image, text, "image", "text")
    check_positive(logit_scale, "logit_scale")
    return batch, [resolve("ntxent")]


def _labelled(objective: ObjectiveLike, labels: Tensor | None) -> Callable[[RowStats], Tensor]:
    loss = resolve(objective)
    if labels is None and isinstance(loss, Objective) and loss.needs_labels:
        raise FastclError(f"labels are required by objective {objective!r}")
    return loss


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise FastclError(one_of("reduction", REDUCTIONS, reduction))
