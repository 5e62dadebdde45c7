"""Batches of views. The order of samples is a pure function of (seed, epoch, step), like the views themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from fastcl.data.philox import Stream, keys, permutation
from fastcl.data.plan import ViewPlan, center_view
from fastcl.data.render import render_torchvision
from fastcl.data.sources import Split
from fastcl.errors import FastclError

ORDERS = ("shuffled", "balanced")
_VIEWS = 2


@dataclass(frozen=True)
class ViewLoader:
    """Two views of each sample of a batch.

    Args:
        split: the images.
        plan: seed and spec; the plan's seed also gives the order.
        batch_size: samples per batch; the last incomplete batch of an epoch is left out.
        order: "shuffled": a permutation of the samples each epoch. "balanced": each batch drawn by itself, without
            replacement, with probabilities inverse to the class sizes (the paper's main runs).

    Raises:
        FastclError: an unknown order, or a batch larger than the split.
    """

    split: Split
    plan: ViewPlan
    batch_size: int
    order: str = "shuffled"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise FastclError(f"data.order must be one of {', '.join(ORDERS)}; got {self.order!r}")
        n = len(self.split.ids)
        if not 0 < self.batch_size <= n:
            raise FastclError(f"train.batch_size must lie between 1 and the {n} training images, got {self.batch_size}")

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.split.ids) // self.batch_size

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """(batch_size,) positions in the split of the samples of one batch.

        Args:
            epoch: from 0.
            step: 0 <= step < len(self), within the epoch.
        """
        n, seed = len(self.split.ids), self.plan.seed
        if self.order == "shuffled":
            return _shuffled(n, seed, epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        # Weighted sampling without replacement: the largest u^(1/w) (Efraimidis and Spirakis 2006), as -log(u)/w.
        random = keys(n, seed=seed, stream=Stream.BATCH, epoch=epoch * len(self) + step)
        u = (random.astype(np.float64) + 0.5) * 2.0**-64
        class_sizes = np.bincount(self.split.labels)[self.split.labels]
        return np.argsort(-np.log(u) * class_sizes, kind="stable")[: self.batch_size]

    def views(self, positions: np.ndarray, epoch: int, plan: ViewPlan | None = None) -> tuple[Tensor, ...]:
        """Both views of the samples, (b, C, size, size) float32 each.

        Args:
            positions: (b,) positions in the split.
            epoch: from 0.
            plan: draw from another plan (another seed) than the loader's own.
        """
        plan = plan or self.plan
        split = self.split
        images = [split.image(int(p)) for p in positions]
        ids, sizes = split.ids[positions], split.sizes[positions]
        params = (plan.draw(epoch, ids, view, sizes) for view in range(_VIEWS))
        return tuple(render_torchvision(images, p, plan.spec) for p in params)


def eval_batches(split: Split, plan: ViewPlan, batch_size: int) -> Iterator[Tensor]:
    """The whole split in order, unaugmented (see `center_view`), (b, C, size, size) float32 a batch."""
    for start in range(0, len(split.ids), batch_size):
        stop = min(start + batch_size, len(split.ids))
        images = [split.image(p) for p in range(start, stop)]
        yield render_torchvision(images, center_view(plan.spec, split.sizes[start:stop]), plan.spec)


@lru_cache(maxsize=1)
def _shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(n, seed=seed, stream=Stream.ORDER, epoch=epoch)
