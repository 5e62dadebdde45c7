"""One epoch of training: its steps, when their measurements are read, and what is noted of them.

The device is never waited for within a step. The host runs ahead of it, and reads what was measured once every
`train.log_every` steps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.profiler import record_function

from fastcl.config.settings import Config
from fastcl.data import Batch
from fastcl.errors import FastclError
from fastcl.train.group import Ranks
from fastcl.train.models import STEP_VALUES, Twin, learning_rate
from fastcl.train.run_folder.logbook import Logbook
from fastcl.train.step import WAITING, Measured, StepTable, fetch, partner_of, step_twins
from fastcl.train.step_profile import StepProfile


@dataclass
class Steps:
    """The steps of a run.

    Attributes:
        length: steps of an epoch.
        device: of the views and networks.
        where: the run's folder, as errors name it.
        profile: of some steps of the first epoch that is trained; None: no profile.
    """

    config: Config
    twins: Sequence[Twin]
    ranks: Ranks
    log: Logbook
    length: int
    device: torch.device
    where: str
    profile: StepProfile | None = None

    def epoch(self, epoch: int, batches: Iterator[Batch], bar: Any) -> dict[str, list[float]]:
        """Train an epoch and write its records; returns each twin's means of STEP_VALUES.

        Args:
            epoch: from 0, also the number of completed epochs.
            batches: those of the epoch.
            bar: a tqdm bar that counts images.
        """
        started, waiting = time.perf_counter(), Waiting(self.device)
        images = self.config.train.batch_size
        sums = np.zeros((len(self.twins), len(STEP_VALUES)))
        held: list[Measured] = []
        for k in range(self.length):
            with self._profiled(k):
                with waiting.measured(), record_function(WAITING), self.ranks.together():
                    batch = next(batches)
                held.append(self._step(epoch * self.length + k, batch))
                if len(held) == self.config.train.log_every or k + 1 == self.length:
                    tables = self._read(epoch, k + 1 - len(held), held)
                    for table in tables:
                        sums += table.values
                    loss = f"{self.twins[0].name} loss {tables[-1].values[0, 0]:.4f}"
                    bar.set_postfix_str(f"epoch {epoch + 1}, {loss}", refresh=False)
                    held = []
            bar.update(images)
        seconds = time.perf_counter() - started
        rate = self.length * images / seconds
        with self.ranks.together():
            self.log.epoch({
                "epoch": epoch + 1, "seconds": seconds, "images_per_second": rate,
                "rendering_seconds": waiting.seconds(),
            })  # fmt: skip
        self.profile = None
        return {t.name: row.tolist() for t, row in zip(self.twins, sums / self.length, strict=True)}

    def _profiled(self, k: int) -> AbstractContextManager[None]:
        return nullcontext() if self.profile is None else self.profile.step(k)

    def _step(self, step: int, batch: Batch) -> Measured:
        t = self.config.train
        return step_twins(
            self.twins, batch.views[:2], batch.views[2:] or None, batch.labels, temperature=t.temperature,
            lr=learning_rate(self.config, step, self.length), seed=self.ranks.seed(t.seed << 32 | step),
            micro_batch=t.micro_batch, ranks=self.ranks, total=t.batch_size,
        )  # fmt: skip

    def _read(self, epoch: int, k: int, held: Sequence[Measured]) -> list[StepTable]:
        """Read the measurements of consecutive steps, the first of which is the epoch's k-th, and note them.

        Raises:
            FastclError: on all ranks, if one of them is not finite. Names the first step and model.
        """
        tables, first = fetch(held), epoch * self.length + k
        finite = list(itertools.takewhile(lambda table: np.isfinite(table.values).all(), tables))
        with self.ranks.together():
            for step, table in enumerate(finite, first):
                self._note(step, table)
        if len(finite) < len(tables):
            raise self._not_finite(first + len(finite), tables[len(finite)])
        return tables

    def _note(self, step: int, table: StepTable) -> None:
        """Note a step's measurements."""
        place = {"step": step, "epoch": step // self.length}
        lr = learning_rate(self.config, step, self.length)
        rows = zip(self.twins, table.values.tolist(), strict=True)
        models = [place | {"model": t.name, **dict(zip(STEP_VALUES, row, strict=True)), "lr": lr} for t, row in rows]
        partner, pair = partner_of(self.twins), None
        if partner is not None:
            pair = place | {"pair": [self.twins[0].name, partner.name], **table.pair(), "lr": lr}
        self.log.step(step, models, pair)

    def _not_finite(self, step: int, table: StepTable) -> FastclError:
        i, j = np.argwhere(~np.isfinite(table.values))[0]
        epoch, lr = step // self.length, learning_rate(self.config, step, self.length)
        return self.ranks.error(
            f"{STEP_VALUES[j]} of model {self.twins[i].name!r} is {table.values[i, j]} at step {step} (epoch {epoch}, "
            f"lr {lr:.4g}); epochs up to {epoch} are complete in {self.where}"
        )


class Waiting:
    """How long steps wait for their batches: the host; on a GPU, which the host runs ahead of, the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add the time of the block. On a GPU: from the end of the work queued before it to the end of its own, which
        is no time at all if the GPU is still busy when the block ends."""
        began, first = time.perf_counter(), self._event()
        yield
        if first is not None:
            self._events.append((first, self._event()))
        else:
            self._seconds += time.perf_counter() - began

    def seconds(self) -> float:
        """The sum. On a GPU, whose work must be done."""
        return self._seconds + sum(first.elapsed_time(last) for first, last in self._events) / 1e3

    def _event(self) -> Any:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
