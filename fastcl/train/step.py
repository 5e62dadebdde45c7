"""One training step of every twin on one batch, and the similarity of the first two models' embeddings of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from fastcl import PairStats, RowStats, TwinStats, twin_stats, two_view_stats
from fastcl.errors import FastclError
from fastcl.micro import TwoPasses
from fastcl.train.group import ALONE, Ranks, average_gradients
from fastcl.train.models import CROSS_ENTROPY, IDENTITY, RESEEDED, STEP_VALUES, Twin, step_values

# Names of a step's spans in torch.profiler; the first is the wait for its batch.
WAITING, ENCODERS, LOSSES, METRICS, BACKWARD, OPTIMIZERS = (
    f"fastcl.{name}" for name in ("waiting", "encoders", "losses", "metrics", "backward", "optimizers")
)
PAIR_VALUES = ("drift", "cka", "cka_debiased", "rsa")


@dataclass(frozen=True)
class Measured:
    """Measurements of one step on the device, which may not have made them yet; `fetch` reads them.

    Attributes:
        flat: float64, the values of a StepTable row by row, then its sums.
        twins: number of twins.
        rows, rounding: as in a StepTable.
    """

    flat: Tensor
    twins: int
    rows: int
    rounding: float


@dataclass(frozen=True)
class StepTable:
    """Measurements of one step, before its updates.

    Attributes:
        values: (twins, 5) float64, STEP_VALUES of every twin.
        sums: (18,) float64, sums over the cosine Gram matrices of the reference's and its partner's embeddings, in the
            format of `PairStats.unpacked`; None without a partner.
        rows: number of rows of those matrices: both views of each sample of the batch.
        rounding: as `TwinStats.rounding`.
    """

    values: np.ndarray
    sums: np.ndarray | None
    rows: int
    rounding: float

    def pair(self) -> dict[str, float | None]:
        """PAIR_VALUES of the two models; None for undefined measures."""
        try:
            stats = PairStats.unpacked(self.rows, "cosine", self.sums.tolist(), self.rounding)
        except FastclError:
            return dict.fromkeys(PAIR_VALUES)
        return {name: _or_none(stats, name) for name in PAIR_VALUES}


def fetch(steps: Sequence[Measured]) -> list[StepTable]:
    """Read the measurements of steps of the same twins: one copy, which waits until the device has made them all."""
    tables = []
    for flat, step in zip(torch.stack([step.flat for step in steps]).cpu().numpy(), steps, strict=True):
        count = step.twins * len(STEP_VALUES)
        sums = flat[count:] if len(flat) > count else None
        tables.append(StepTable(flat[:count].reshape(step.twins, -1), sums, step.rows, step.rounding))
    return tables


def partner_of(twins: Sequence[Twin]) -> Twin | None:
    """The model that is compared with the reference (the first twin) at every step: the second twin, unless it is a
    control. None for a run of one model."""
    return next((twin for twin in twins[1:2] if twin.name not in (IDENTITY, RESEEDED)), None)


def step_twins(
    twins: Sequence[Twin],
    views: tuple[Tensor, Tensor],
    reseeded: tuple[Tensor, Tensor] | None,
    labels: Tensor,
    *,
    temperature: float,
    lr: float,
    seed: int,
    micro_batch: int | None = None,
    ranks: Ranks = ALONE,
    total: int | None = None,
) -> Measured:
    """Update every twin once, without waiting for the device.

    For the reference and its partner, one call of `twin_stats` gives both row statistics and pair statistics.

    Args:
        twins: the reference first.
        views: two tensors (B, C, S, S).
        reseeded: the views of the reseeded twin.
        labels: (B,) int64.
        temperature: temperature of the contrastive objectives.
        lr: learning rate of this step.
        seed: seed of dropout and other random layers.
        micro_batch: samples whose activations are held at a time (see `fastcl.micro_step`); None: the whole batch.
        ranks: processes that share the batch; losses, gradients and measurements are those of the whole.
        total: samples of all ranks; None: each has as many as this one.
    """
    step = _Step(views, reseeded, labels, temperature, lr, seed, micro_batch, ranks, total)
    reference, partner = twins[0], partner_of(twins)
    found: dict[str, Tensor] = {}
    sums, rounding = None, 0.0
    if partner is not None:
        z, z_partner = step.embed(reference), step.embed(partner)
        pair = step.pair_stats(reference.rows(z), partner.rows(z_partner))
        found |= step.update({reference: (z, pair.a), partner: (z_partner, pair.b)})
        sums, rounding, z_partner = pair.sums, pair.rounding, z_partner.detach()
    for twin in twins:
        if twin.name in found:
            continue
        z = step.embed(twin)
        if twin.name == IDENTITY and partner is not None:
            # Use the reference's operator in the same role: any other would round differently.
            stats = step.pair_stats(twin.rows(z), z_partner).a
        else:
            with record_function(METRICS if twin.objective == CROSS_ENTROPY else LOSSES):
                stats = step.stats(twin.rows(z))
        found |= step.update({twin: (z, stats)})
    step.finish()
    table = ranks.average(torch.stack([found[twin.name] for twin in twins]) * step.weight)
    flat = table.flatten() if sums is None else torch.cat([table.flatten(), sums])
    return Measured(flat, len(twins), rows=2 * step.total, rounding=rounding)


class _Step:
    """One batch and the settings of its step."""

    def __init__(
        self, views: tuple[Tensor, Tensor], reseeded: tuple[Tensor, Tensor] | None, labels: Tensor,
        temperature: float, lr: float, seed: int, micro_batch: int | None, ranks: Ranks, total: int | None,
    ) -> None:  # fmt: skip
        self.views, self.reseeded, self.labels = views, reseeded, labels
        self.temperature, self.lr, self.seed = temperature, lr, seed
        self.part = micro_batch if micro_batch is not None and micro_batch < len(labels) else None
        self.passes: dict[Twin, TwoPasses] = {}
        self.ranks, self.gather = ranks, {"gather_distributed": ranks.size > 1, "group": ranks.group}
        self.total = len(labels) * ranks.size if total is None else total
        # The average over ranks of their means, times these weights, is the mean over the batch. Equal parts: 1.0.
        self.weight = len(labels) * ranks.size / self.total
        self.travelling: list[tuple[Twin, Callable[[], None]]] = []

    def embed(self, twin: Twin) -> Tensor:
        torch.manual_seed(self.seed)  # dropout: same numbers for every twin, no state to restore on resume
        views = self.reseeded if twin.reseeded else self.views
        assert views is not None
        with record_function(ENCODERS):
            if self.part is None:
                return twin.embed(views)
            pairs = list(zip(*(view.split(self.part) for view in views), strict=True))
            passes = TwoPasses(lambda pair: twin.embed(pair).chunk(2), pairs, twin.network)
            self.passes[twin] = passes
            return torch.cat(passes.embed())

    def stats(self, z: Tensor) -> RowStats:
        return two_view_stats(*z.chunk(2), self.labels, self.temperature, **self.gather)

    def pair_stats(self, za: Tensor, zb: Tensor) -> TwinStats:
        sample = torch.arange(len(self.labels), dtype=torch.int64, device=za.device).repeat(2)
        with record_function(LOSSES):
            return twin_stats(
                za, zb, sample, self.labels.repeat(2), temperature=self.temperature, **self.gather
            )  # fmt: skip

    def update(self, found: dict[Twin, tuple[Tensor, RowStats]]) -> dict[str, Tensor]:
        """Update twins from their embeddings and statistics; returns STEP_VALUES of each.

        Over several ranks their gradients travel while the next network runs; `finish` ends the step.
        """
        with record_function(LOSSES):
            losses = {twin: twin.loss(z, stats, self.labels) for twin, (z, stats) in found.items()}
        with record_function(METRICS):
            values = {twin.name: step_values(losses[twin], stats) for twin, (_, stats) in found.items()}
        for twin in losses:
            twin.optimizer.zero_grad(set_to_none=True)
        with record_function(BACKWARD):
            weights = [torch.full_like(loss, self.weight) for loss in losses.values()]
            torch.autograd.backward(list(losses.values()), weights)  # one call, since their statistics share a graph
            for twin in losses:
                if twin in self.passes:
                    self.passes.pop(twin).backward()
        self.finish()
        self.travelling = [(twin, average_gradients(twin.network, self.ranks)) for twin in losses]
        return values

    def finish(self) -> None:
        """Let the optimisers step whose gradients have travelled."""
        with record_function(OPTIMIZERS):
            for twin, wait in self.travelling:
                wait()
                for group in twin.optimizer.param_groups:
                    group["lr"] = self.lr
                twin.optimizer.step()
        self.travelling = []


def _or_none(stats: PairStats, measure: str) -> float | None:
    try:
        return getattr(stats, measure)
    except FastclError:
        return None
