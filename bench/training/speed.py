"""Images per second of whole steps: 1, 2 and 4 networks in lockstep, beside loops of others' that train one.

All train the same network with the same optimiser, batch and precision on views of the same recipe, and take turns in
one run. A step begins with the wait for its batch. The other loops are written here from their descriptions:

- the published loop of arXiv 2510.08852: torchvision's views in a DataLoader, blocking copies, a forward pass for each
  view, clipped gradients, and a host that waits for every step. Its loss is a plain matrix product here; the published
  form of it, an N x N x D broadcast, is in the benchmark of the losses.
- the SimCLR step of solo-learn: the same views from pinned memory, encoder and projector for each view, the loss by
  masks over exponentials, and a linear classifier that learns beside on detached features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from bench.data.peers import Samples, torchvision_transforms
from bench.harness.clocks import Peak, Sample, measure_peak, time_call
from bench.harness.records import Record
from bench.harness.suite import Comparison, Entry, Provider, Run
from bench.losses import plain
from bench.training.profile import endless, take
from fastcl.config.settings import Config
from fastcl.train import Lockstep
from fastcl.train.models import Twin, make_twins
from fastcl.train.step import fetch

SECTION = "speed"
PUBLISHED = "published loop"
STEPS = {"cuda": 4, "cpu": 1}  # in one sample; on a GPU the host may run ahead of them


@dataclass(frozen=True)
class Case:
    """Attributes:
    batch, precision: of the steps.
    small: whether the network and its images are.
    configs: the config of a run of so many networks.
    scratch: folder for the runs, which never finish.
    """

    batch: int
    precision: str
    small: bool
    configs: Callable[[int], Config]
    scratch: Path

    def __str__(self) -> str:
        return f"speed, {self.network}, B = {self.batch:,}, {self.precision}"

    @property
    def network(self) -> str:
        """What is trained, in words."""
        return "small ResNet, 12 x 12" if self.small else "ResNet-18, 32 x 32"

    def folder(self, name: str) -> Path:
        """Where a run of this case would be kept."""
        return self.scratch / f"speed-{self.precision}-{'small' if self.small else 'whole'}-{name}"


@dataclass(frozen=True)
class Loop(Provider):
    """A loop: a generator function of a case and a device that takes one step at a time.

    Args:
        networks: that it trains.
    """

    steps: Callable[[Case, torch.device], Iterator[None]]
    networks: int = 1


def _lockstep(networks: int, case: Case, device: torch.device) -> Iterator[None]:
    run = Lockstep(case.configs(networks), case.folder(str(networks)))
    held = []
    with closing(endless(run)) as batches:
        for k, batch in enumerate(batches):
            held.append(take(run, k, batch))
            if len(held) == run.config.train.log_every:
                fetch(held)
                held = []
            yield


class _Labelled(Samples):
    """Views of each image, and its class."""

    def __getitem__(self, k: int) -> tuple[Any, ...]:
        return *super().__getitem__(k), int(self.split.labels[k])


def _opened(case: Case, name: str, device: torch.device) -> tuple[Twin, Iterator[Any], int]:
    """One network with its optimiser, batches for ever, and the number of classes."""
    config = case.configs(1)
    run = Lockstep(config, case.folder(name))  # for its data and its number of workers
    (twin,) = make_twins(config, run.data.channels, len(run.data.classes), device)
    twin.network.to(memory_format=torch.contiguous_format)  # as both leave it
    workers = run.loader.workers
    loader = DataLoader(
        _Labelled(run.data.train, torchvision_transforms(config.views, True)), case.batch, shuffle=True,
        drop_last=True, num_workers=workers, persistent_workers=workers > 0, pin_memory=device.type == "cuda",
    )  # fmt: skip
    return twin, itertools.chain.from_iterable(loader for _ in itertools.count()), len(run.data.classes)


def _published(case: Case, device: torch.device) -> Iterator[None]:
    twin, batches, _ = _opened(case, "published", device)
    network, optimizer = twin.network.train(), twin.optimizer
    for first, second, labels in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=twin.lowered):
            z = torch.cat([network(view.to(device)) for view in (first, second)]).float()
        loss = plain.ntxent(z, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        loss.item()  # waits for the device
        yield


def _solo_learn(case: Case, device: torch.device) -> Iterator[None]:
    twin, batches, classes = _opened(case, "solo-learn", device)
    network, optimizer = twin.network.train(), twin.optimizer
    width = next(network.projector.parameters()).shape[1]  # of the encoder's outputs
    classifier = nn.Linear(width, classes, device=device)
    probe = torch.optim.SGD(classifier.parameters(), lr=0.1)
    for *views, labels in batches:
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=twin.lowered):
            features = [network.encoder(view.to(device, non_blocking=True)) for view in views]
            z = torch.cat([network.projector(h) for h in features])
            logits = [classifier(h.detach()) for h in features]
        loss = masked_ntxent(z.float(), torch.arange(len(labels), device=device).repeat(2), plain.TEMPERATURE)
        loss = loss + sum(functional.cross_entropy(one.float(), labels) for one in logits) / 2
        optimizer.zero_grad()
        probe.zero_grad()
        loss.backward()
        optimizer.step()
        probe.step()
        yield


def masked_ntxent(z: Tensor, sample: Tensor, temperature: float) -> Tensor:
    """NT-Xent of rows z (N, D) with ids (N,), as solo-learn forms it: masked sums of exponentials without a shift."""
    z = functional.normalize(z)
    e = (z @ z.T / temperature).exp()
    same = sample[:, None] == sample
    positive = (e * (same & ~torch.eye(len(z), dtype=torch.bool, device=z.device))).sum(1)
    return -(positive / (positive + (e * ~same).sum(1))).log().mean()


def _ours(networks: int) -> Loop:
    name = f"fastcl, {networks} network{'s' * (networks > 1)}"
    return Loop(name, steps=partial(_lockstep, networks), networks=networks)


LOOPS = (
    *map(_ours, (1, 2, 4)), Loop(PUBLISHED, steps=_published, ours=False),
    Loop("solo-learn's step", steps=_solo_learn, ours=False),
)  # fmt: skip


class Speed(Comparison):
    """The loops on one case."""

    table = LOOPS

    def __init__(self, run: Run, case: Case) -> None:
        super().__init__(run, case)
        self.running: list[Any] = []

    def providers(self) -> Sequence[Loop]:
        """All loops."""
        return self.table

    def check(self, entry: Entry) -> None:
        """Start a loop."""
        entry.result = entry.provider.steps(self.case, self.device)
        self.running.append(entry.result)
        next(entry.result)

    def peak(self, entry: Entry) -> Peak:
        """Peak memory of a step on a GPU, beyond what all loops hold, and its duration."""
        step = partial(self._step, entry, 1)
        if self.device.type == "cuda":
            return measure_peak(lambda device: (bool, step), "cuda")  # the first step was the warm-up
        return Peak(None, step().ms / 1e3)

    def time(self, entry: Entry) -> dict[str, Sample]:
        """The time of a step, the mean of STEPS of them."""
        count = STEPS[self.device.type]
        return {"both": Sample(self._step(entry, count).ms / count)}

    def _step(self, entry: Entry, count: int) -> Sample:
        # As their users do, the others take any algorithm, and on a GPU the fastest of several.
        torch.use_deterministic_algorithms(entry.provider.ours)
        torch.backends.cudnn.benchmark = not entry.provider.ours
        return Sample(time_call(lambda: [next(entry.result) for _ in range(count)], self.device).wall)

    def fields(self, entry: Entry, samples: Sequence[Sample]) -> Record:
        """The case, and the number of networks."""
        case: Case = self.case
        return {"section": SECTION, "network": case.network, "batch": case.batch, "precision": case.precision,
                "networks": entry.provider.networks}  # fmt: skip

    def measure(self) -> None:
        """Compare the loops; their workers end with it."""
        try:
            super().measure()
        finally:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
            for loop in self.running:
                loop.close()
