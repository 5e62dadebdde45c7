"""Random settings of similarity descent: within what Theorem 1 assumes, and outside of it in one way each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastcl.choices import Entries
from fastcl.theory import Descent, draw_batches, similarity_descent

COVERED = "covered"
# What each kind changes; all but the first are outside of the theorem's assumptions.
KINDS = {
    COVERED: "all that the theorem assumes",
    "one number a pair": "S_ij and S_ji are one number, and its derivative is taken",
    "repeated samples": "batches drawn with replacement",
    "unbounded": "similarities may leave [-1, 1]",
}
STARTS = ("cosines", "uniform", "peers at 1, others at -1", "one near other")


@dataclass(frozen=True)
class Setting:
    """One run of similarity descent; `seed` fixes all that is drawn."""

    seed: int
    kind: str
    samples: int
    classes: int  # at most; some may be empty
    even: bool  # classes of equal size
    views: int
    batch_size: int
    steps: int
    temperature: float
    rate: float  # peak of a half cosine
    start: str
    entries: Entries
    delta: float

    @property
    def rates(self) -> list[float]:
        """The learning rates."""
        return [self.rate * (1 + math.cos(math.pi * t / self.steps)) / 2 for t in range(self.steps)]

    def labels(self) -> Tensor:
        """(N,) the classes of the samples."""
        if self.even:
            return torch.arange(self.samples) % self.classes
        shares = torch.rand(self.classes, generator=self._numbers(1), dtype=torch.float64) ** 3 + 1e-3
        return torch.multinomial(shares, self.samples, replacement=True, generator=self._numbers(2))

    def similarities(self) -> Tensor:
        """(N K, N K) symmetric start."""
        n, numbers, label = self.samples * self.views, self._numbers(3), self.labels().repeat(self.views)
        peers = label[:, None] == label
        if self.start == "cosines":
            rows = torch.nn.functional.normalize(torch.randn(n, 8, generator=numbers, dtype=torch.float64))
            s = rows @ rows.mT
        elif self.start == "uniform":
            s = 2 * torch.rand(n, n, generator=numbers, dtype=torch.float64) - 1
        else:
            s = torch.where(peers, 1.0, -1.0).double()
        if self.start == STARTS[3]:  # NSCL's softmax lies on one candidate, CL's on one peer: as far apart as can be
            pairs = torch.arange(n) // 2
            s = torch.where((pairs[:, None] == pairs) & ~peers, 0.0, s)
        return ((s + s.mT) / 2).clamp(-1.0, 1.0)

    def run(self) -> Descent:
        """The descent."""
        repeated, clamp = self.kind == "repeated samples", self.kind != "unbounded"
        batches = draw_batches(self.samples, self.batch_size, self.steps, self.seed, repeated)
        return similarity_descent(
            self.similarities(), self.labels(), batches, self.rates, self.temperature, self.entries, clamp
        )

    def _numbers(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 8 + stream)


def drawn(seed: int, kind: str = COVERED, most: int = 300) -> Setting:
    """The setting of a seed, with at most so many samples."""
    numbers = torch.Generator().manual_seed(seed * 8)

    def between(low: float, high: float) -> float:
        return low + (high - low) * torch.rand(1, generator=numbers, dtype=torch.float64).item()

    def one_of(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (1,), generator=numbers))]

    samples, views = round(math.exp(between(math.log(2), math.log(most)))), one_of(1, 2)
    batch_size, temperature = one_of(*range(2, samples + 1)), 10 ** between(-1.5, 1.0)
    anchors = batch_size * views
    setting = Setting(
        seed=seed,
        kind=kind,
        samples=samples,
        classes=one_of(*range(1, 33)),
        even=one_of(True, False),
        views=views,
        batch_size=batch_size,
        steps=one_of(*range(1, 41)),
        temperature=temperature,
        rate=10 ** between(-3.0, 1.0) * temperature**2 * anchors,  # against 4 tau^2 B, where convexity stops helping
        start=one_of(*STARTS),
        entries=one_of("free", "symmetric"),
        delta=10 ** between(-3.0, -0.3),
    )
    if kind == "one number a pair":
        return replace(setting, entries="tied")
    return replace(setting, batch_size=one_of(*range(2, 2 * samples + 1))) if kind == "repeated samples" else setting
