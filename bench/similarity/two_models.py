"""Two models' losses and a comparison of their similarities: fastcl.twin_stats against the calls it replaces.

Every provider computes the decoupled loss of the first model and the negatives-only supervised loss of the second, the
two whose similarities arXiv 2510.08852 compares; all but the last also compute RSA of both models' cosines.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

import fastcl
from bench.harness.clocks import Sample, Timer
from bench.harness.records import Record, agree
from bench.harness.suite import Comparison, Entry, Provider, Run
from bench.losses.providers import TOLERANCES

SECTION = "twins"
TEMPERATURE = 0.5
SIZES = {"cpu": ((1024, 128), (4096, 128)), "cuda": ((2048, 128), (8192, 128), (16384, 256))}
TINY = ((32, 8),)
PRECISIONS = {"cpu": ("fp32",), "cuda": ("fp16", "fp32")}  # of fastcl's products on the device

Measured: TypeAlias = tuple[Tensor, float | None]  # the loss, and RSA if it is computed


class Batch(NamedTuple):
    """Embeddings (2, n, d), a leaf, by two models of two views of n / 2 samples; sample ids (n,); labels (n,)."""

    z: Tensor
    sample: Tensor
    labels: Tensor
    precision: str


def _loss(a: fastcl.RowStats, b: fastcl.RowStats) -> Tensor:
    return fastcl.OBJECTIVES["dcl"](a).mean() + fastcl.OBJECTIVES["nscl"](b).mean()


def _alone(batch: Batch) -> Measured:
    z, sample, labels, precision = batch
    options = {"sample": sample, "labels": labels, "temperature": TEMPERATURE, "precision": precision}
    return _loss(*(fastcl.row_stats(one, **options) for one in z)), None


def _apart(batch: Batch) -> Measured:
    return _alone(batch)[0], fastcl.pair_stats(*batch.z.detach(), "cosine").rsa


def _together(batch: Batch) -> Measured:
    z, sample, labels, precision = batch
    stats = fastcl.twin_stats(*z, sample, labels, temperature=TEMPERATURE, precision=precision)
    return _loss(stats.a, stats.b), stats.pairs().rsa


TOGETHER, APART, ALONE = "twin_stats", "row_stats twice and pair_stats", "row_stats twice"
PROVIDERS: dict[str, Callable[[Batch], Measured]] = {TOGETHER: _together, APART: _apart, ALONE: _alone}


def cases(args: argparse.Namespace) -> Iterator[tuple[int, int, str]]:
    """Rows, width and precision of each case."""
    for n, d in TINY if args.tiny else SIZES[args.device.type]:
        yield from ((n, d, precision) for precision in PRECISIONS[args.device.type])


class TwoModels(Comparison):
    """Two models on n rows of width d."""

    def __init__(self, run: Run, case: tuple[int, int, str]) -> None:
        super().__init__(run, case)
        self.n, self.d, self.precision = case
        self.where = self.label = f"twins, n={self.n}, d={self.d}"

    def providers(self) -> list[Provider]:
        return [Provider(name, precision=self.precision, capture=False) for name in PROVIDERS]

    @staticmethod
    def prepare(case: tuple[int, int, str], device: torch.device) -> Batch:
        n, d, precision = case
        z = torch.randn(2, n, d, generator=torch.Generator().manual_seed(0))
        z[1].mul_(0.6).add_(z[0], alpha=0.8)
        sample = torch.arange(n // 2, device=device).repeat(2)
        return Batch(z.to(device).requires_grad_(), sample, sample % max(2, min(100, n // 8)), precision)

    @staticmethod
    def shrunk(case: tuple[int, int, str]) -> tuple[int, int, str]:
        return 8, *case[1:]

    @staticmethod
    def call(provider: Provider, inputs: Batch) -> dict[str, Tensor]:
        """Loss, gradient and, if computed, RSA of one forward and backward pass."""
        loss, rsa = PROVIDERS[provider.name](inputs)
        found = {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, inputs.z)[0]}
        return found if rsa is None else found | {"RSA": loss.new_tensor(rsa)}

    def check(self, entry: Entry) -> None:
        """Compare with float64."""
        exact = self.inputs._replace(z=self.inputs.z.detach().double().requires_grad_())
        truth, entry.result = self.call(Provider(APART), exact), self.call(entry.provider, self.inputs)
        wanted = {what: truth[what] for what in entry.result}
        agree({"float64": wanted, entry.provider.name: entry.result}, TOLERANCES[self.precision])

    def timers(self, entries: Sequence[Entry]) -> dict[str, Timer]:
        return self.pass_timers(entries, lambda p: lambda: PROVIDERS[p.name](self.inputs)[0], self.inputs.z)

    def fields(self, entry: Entry, samples: Sequence[Sample]) -> Record:
        return {"section": SECTION, "n": self.n, "d": self.d, "models": 2, "dtype": "float32",
                "precision": self.precision}  # fmt: skip
