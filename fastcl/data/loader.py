"""Batches of views. The order of samples, like the views themselves, is a pure function of (seed, epoch, step).

It does not depend on the number of workers, the prefetch depth, the ranks that share a batch, or where a run resumed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias, cast, get_args

import numpy as np
import torch
from torch import Tensor

from fastcl.data.deferred import Closing
from fastcl.data.limits import check_depth, check_workers
from fastcl.data.philox import Stream, check_integer, keys, permutation
from fastcl.data.plan import ViewParams, ViewPlan, center_view
from fastcl.data.prefetch import rendered
from fastcl.data.renderers.choose import Renderer, TorchvisionRenderer
from fastcl.data.renderers.transfer import to_device
from fastcl.data.renderers.validate import check_positions
from fastcl.data.sources.load import Split
from fastcl.errors import FastclError, one_of

Order: TypeAlias = Literal["shuffled", "balanced"]
ORDERS = get_args(Order)
_VIEWS = 2
_CPU = torch.device("cpu")


class Batch(NamedTuple):
    """One batch of one rank, on the renderer's device.

    Attributes:
        views: two per sample from the loader's plan, then two from each further plan; each (b, C, size, size) float32.
        labels: (b,) int64.
        ids: (b,) int64 sample ids.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    ids: Tensor


@dataclass(eq=False)
class ViewLoader:
    """Two views of each sample of a batch. Iterating yields the rest of the current epoch; the next loop starts the
    next epoch.

    Its state is `epoch` and `position`, the number of batches of that epoch already yielded. Batches that were only
    prefetched do not count.

    Args:
        split: the images.
        plan: seed and spec; the plan's seed also determines the order of samples.
        batch_size: samples per batch, over all ranks; the last incomplete batch of an epoch is dropped.
        order: "shuffled": a permutation of the samples each epoch. "balanced": each batch drawn independently, without
            replacement, with probabilities inverse to the class sizes (the paper's main runs).
        renderer: for the same split and spec; default: torchvision's, on the CPU.
        others: further plans with other seeds; a batch also holds their views of the same samples.
        rank, world_size: this process's rank and the number of processes that share each batch: rank r gets the r-th
            of world_size parts, so that the parts concatenated in rank order are a single process's batch. Their sizes
            differ by one sample at most.
        workers: 0 renders each batch on demand. Otherwise torchvision's renderer prefetches in that many processes,
            any other renderer in one thread. More than this rank's share of the cores gives a warning, more than 16
            times the cores an error.
        depth: batches that each worker may be ahead, at most 1,000.

    Raises:
        FastclError: an unknown order, a batch larger than the split or smaller than the number of ranks, an invalid
            rank, number of workers or depth.
    """

    split: Split
    plan: ViewPlan
    batch_size: int
    order: Order = "shuffled"
    _: KW_ONLY
    renderer: Renderer = cast(Renderer, None)
    others: Sequence[ViewPlan] = ()
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    depth: int = 2

    def __post_init__(self) -> None:
        for name in ("batch_size", "rank", "world_size"):
            check_integer(getattr(self, name), name)
        if self.order not in ORDERS:
            raise FastclError(one_of("data.order", ORDERS, self.order))
        n = len(self.split.ids)
        if not 0 < self.batch_size <= n:
            raise FastclError(f"train.batch_size must be in [1, {n}] (training images), got {self.batch_size}")
        if not 0 <= self.rank < self.world_size:
            raise FastclError(f"rank must be in [0, world_size), got {self.rank} with world_size {self.world_size}")
        if self.batch_size < self.world_size:
            raise FastclError(
                f"train.batch_size must be at least world_size, an image for each rank, got {self.batch_size} and "
                f"{self.world_size}"
            )
        check_workers(self.workers, ranks=self.world_size)
        check_depth(self.depth)
        self.renderer = self.renderer or TorchvisionRenderer(self.split, self.plan.spec, _CPU)
        if any(spec != self.plan.spec for spec in (self.renderer.spec, *(plan.spec for plan in self.others))):
            raise FastclError("the renderer and all other plans must have the same spec as the loader's plan")
        if self.renderer.split is not self.split:
            raise FastclError("the renderer must have been made for the loader's split")
        self.epoch = self.position = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.split.ids) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        return Closing(self._rest(self.epoch, self.position))

    def _rest(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        with closing(self.batches(epoch, start)) as batches:
            for done, batch in enumerate(batches, start + 1):
                self.epoch, self.position = (epoch, done) if done < len(self) else (epoch + 1, 0)
                yield batch

    def state_dict(self) -> dict[str, int]:
        """{"epoch", "position"}: all that `load_state_dict` needs to continue with the same batches."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where another loader was. Raises FastclError for an invalid state or a batch that does not exist."""
        if not isinstance(state, Mapping) or not {"epoch", "position"} <= set(state):
            raise FastclError(f"state must have the keys epoch and position, got {state!r}")
        epoch, position = state["epoch"], state["position"]
        check_integer(epoch, "epoch")
        check_integer(position, "position")
        if epoch < 0 or not 0 <= position < len(self):
            raise FastclError(f"epoch must be >= 0 and position in [0, {len(self)}), got {epoch} and {position}")
        self.epoch, self.position = epoch, position

    def batches(self, epoch: int, start: int = 0) -> Closing[Batch]:
        """The batches of an epoch from index start on, independent of the loader's state; close it to end its workers.

        Raises:
            FastclError: start outside [0, len(self)], an image that cannot be decoded (named), workers that cannot be
                started, or a worker that died.
        """
        return Closing(self._batches(epoch, start))

    def _batches(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        check_integer(start, "start")
        if not 0 <= start <= len(self):
            raise FastclError(f"start must be in [0, {len(self)}] (batches of an epoch), got {start}")

        def job(step: int) -> tuple[np.ndarray, list[ViewParams]]:
            positions = self.batch(epoch, step)
            return positions, self._params(positions, epoch)

        steps = range(start, len(self))
        with closing(rendered(self.renderer, job, steps, self.workers, self.depth)) as results:
            for positions, views in results:
                facts = (torch.from_numpy(a[positions]) for a in (self.split.labels, self.split.ids))
                yield Batch(views, *(to_device(fact, views[0].device) for fact in facts))

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """This rank's samples of one batch: (b,) positions in the split.

        Args:
            epoch: from 0.
            step: 0 <= step < len(self), within the epoch.

        Raises:
            FastclError: a step outside this range.
        """
        check_integer(step, "step")
        check_integer(epoch, "epoch")  # checked here because the cache of orders treats 1.0 as 1
        if not 0 <= step < len(self):
            raise FastclError(f"step must be in [0, {len(self)}) (batches of an epoch), got {step}")
        first, last = ((self.rank + k) * self.batch_size // self.world_size for k in (0, 1))
        return self._whole_batch(epoch, step)[first:last]

    def views(self, positions: np.ndarray, epoch: int) -> tuple[Tensor, ...]:
        """Both views of the given samples, then those of the further plans, each (b, C, size, size) float32.

        Args:
            positions: (b,) positions in the split.
            epoch: from 0.
        """
        return self.renderer(positions, self._params(positions, epoch))

    def _params(self, positions: np.ndarray, epoch: int) -> list[ViewParams]:
        check_positions(self.split, positions)
        ids, sizes = self.split.ids[positions], self.split.sizes[positions]
        return [plan.draw(epoch, ids, view, sizes) for plan in (self.plan, *self.others) for view in range(_VIEWS)]

    def _whole_batch(self, epoch: int, step: int) -> np.ndarray:
        n, seed = len(self.split.ids), self.plan.seed
        if self.order == "shuffled":
            return _shuffled(n, seed, epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        # Weighted sampling without replacement (Efraimidis and Spirakis 2006): take the largest u^(1/w), that is the
        # smallest -log(u)/w.
        random = keys(n, seed=seed, stream=Stream.BATCH, epoch=epoch * len(self) + step)
        u = (random.astype(np.float64) + 0.5) * 2.0**-64
        class_sizes = np.bincount(self.split.labels)[self.split.labels]
        return np.argsort(-np.log(u) * class_sizes, kind="stable")[: self.batch_size]


@dataclass(frozen=True)
class EvalViews:
    """The unaugmented views of a split (see `center_view`), used for evaluation.

    Args:
        split: the images.
        plan: only its spec is used; nothing is drawn.
        renderer: for the same split and spec; None: torchvision's, on the CPU.
        workers, depth: as for `ViewLoader`.
    """

    split: Split
    plan: ViewPlan
    renderer: Renderer | None = None
    workers: int = 0
    depth: int = 2

    def __post_init__(self) -> None:
        check_workers(self.workers)
        check_depth(self.depth)

    def batches(self, batch_size: int) -> Closing[Tensor]:
        """The whole split in order, in batches of (b, C, size, size) float32 on the renderer's device.

        Raises:
            FastclError: batch_size below 1.
        """
        check_integer(batch_size, "batch_size")
        if batch_size < 1:
            raise FastclError(f"batch_size must be at least 1, got {batch_size}")
        n = len(self.split.ids)
        return self.of([np.arange(k, min(k + batch_size, n)) for k in range(0, n, batch_size)])

    def of(self, batches: Sequence[np.ndarray]) -> Closing[Tensor]:
        """The views of given batches of positions, (b, C, size, size) float32 each."""
        return Closing(self._of(batches))

    def _of(self, batches: Sequence[np.ndarray]) -> Generator[Tensor, None, None]:
        spec = self.plan.spec

        def job(step: int) -> tuple[np.ndarray, list[ViewParams]]:
            check_positions(self.split, batches[step])
            return batches[step], [center_view(spec, self.split.sizes[batches[step]])]

        renderer = self.renderer or TorchvisionRenderer(self.split, spec, _CPU)
        steps = range(len(batches))
        with closing(rendered(renderer, job, steps, self.workers, self.depth)) as results:
            for _, (views,) in results:
                yield views


@lru_cache(maxsize=1)
def _shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    order = permutation(n, seed=seed, stream=Stream.ORDER, epoch=epoch)
    order.setflags(write=False)  # the array is cached, and slices of it are returned
    return order
