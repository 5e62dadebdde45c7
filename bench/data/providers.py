"""The providers of the data benchmark: ways to get from stored images to two views of each on the device.

A feed is a callable of the epoch that returns an iterator of batches, tuples of tensors on the device. Creating it does
all the setup that a training run does once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bench.data import peers
from bench.data.inputs import Case, Photos
from bench.harness import suite
from fastcl.data import ViewLoader, ViewParams, ViewPlan, render_torchvision
from fastcl.data.renderers.choose import Renderer, RendererName, choose_renderer, make_renderer
from fastcl.errors import FastclError

Batch: TypeAlias = tuple[Tensor, ...]
Feed: TypeAlias = Callable[[int], Iterator[Batch]]
Open: TypeAlias = Callable[[Photos, Case, torch.device], Feed]

SEED = 0
LEVELS = 1.5  # maximum mean difference of our views from the reference function's over a batch, in grey levels


@dataclass(frozen=True)
class Provider(suite.Provider):
    """One way to make views; ours are the renderers of fastcl.

    Args:
        open: makes the feed; may raise any error of its library.
        views: whether it makes views; a provider without views measures a part, or a bound, of the others' time.
        renderer: name of the renderer if it is one of fastcl's.
        unfit: returns why it cannot run on the images, or None.
    """

    open: Open
    views: bool = True
    renderer: RendererName | None = None
    unfit: Callable[[Photos], str | None] = lambda photos: None
    ours: bool = field(default=False, kw_only=True)

    def obstacle(self, photos: Photos, case: Case, device: torch.device) -> str | None:
        """Why it cannot run on these images, or None."""
        reason = self.unfit(photos) or self.absence(device)
        return _obstacle(self.renderer, photos, case, device) if self.renderer and not reason else reason


def loader_of(photos: Photos, case: Case, renderer: Renderer | None = None) -> ViewLoader:
    """The loader of a training run, with one worker per core."""
    plan = ViewPlan(case.spec, SEED)
    return ViewLoader(photos.split, plan, case.batch, renderer=renderer, workers=peers.WORKERS)


def reference(photos: Photos, case: Case) -> Batch:
    """Both views of the first batch of epoch 0, made by the reference function on the CPU."""
    loader = loader_of(photos, case)
    images = [photos.split.image(int(p)) for p in loader.batch(0, 0)]
    return tuple(render_torchvision(images, params, case.spec) for params in _plan(loader, 0, 0))


def _plan(loader: ViewLoader, epoch: int, step: int) -> list[ViewParams]:
    split, positions = loader.split, loader.batch(epoch, step)
    return [loader.plan.draw(epoch, split.ids[positions], view, split.sizes[positions]) for view in range(2)]


def _planned(name: RendererName, photos: Photos, case: Case, device: torch.device) -> Feed:
    renderer = make_renderer(name, photos.split, case.spec, device, threads=peers.WORKERS)
    loader = loader_of(photos, case, renderer)

    def feed(epoch: int) -> Iterator[Batch]:
        for batch in loader.batches(epoch):
            yield batch.views

    return feed


def _plan_alone(photos: Photos, case: Case, device: torch.device) -> Feed:
    loader = loader_of(photos, case)

    def feed(epoch: int) -> Iterator[Batch]:
        for step in range(len(loader)):
            _plan(loader, epoch, step)
            yield ()

    return feed


def _reading_alone(photos: Photos, case: Case, device: torch.device) -> Feed:
    def feed(epoch: int) -> Iterator[Batch]:
        for k in range(len(photos.split)):
            photos.split.image(k)
        yield ()

    return feed


def _obstacle(name: RendererName, photos: Photos, case: Case, device: torch.device) -> str | None:
    try:
        choose_renderer(name, [photos.split], case.spec, device)
    except FastclError as error:
        return str(error).rpartition("cannot be used here: ")[2]
    return None


def _sizes_differ(photos: Photos) -> str | None:
    return None if photos.equally_sized else "takes batches of images of one size, and these differ"


def _nothing_to_decode(photos: Photos) -> str | None:
    return "the images are decoded beforehand" if photos.split.encoded is None else None


def _ours(name: RendererName, **fields: Any) -> Provider:
    return Provider(f"fastcl {name}", partial(_planned, name), renderer=name, ours=True, **fields)


_DALI: dict[str, Any] = {"module": "nvidia.dali", "package": "nvidia-dali"}
DALI_RENDERER, TRITON_RENDERER, DECODING = "fastcl dali", "fastcl triton", "decoding alone, DALI"
PROVIDERS = (
    _ours("torchvision"),
    _ours("dali"),
    _ours("triton", devices=("cuda", "interpreter")),
    Provider("torchvision v2, Pillow, workers", partial(peers.torchvision, True)),
    Provider("torchvision v2, tensors, workers", partial(peers.torchvision, False)),
    Provider("DALI, operator seeds", partial(peers.dali, True), **_DALI),
    Provider("kornia", peers.kornia, module="kornia", package="kornia", unfit=_sizes_differ),
    Provider("drawing the plan alone", _plan_alone, views=False),
    Provider("reading alone", _reading_alone, views=False),
    Provider(DECODING, partial(peers.dali, False), views=False, unfit=_nothing_to_decode, **_DALI),
)  # fmt: skip
