"""Renderers by name, and which of them a machine and a data set allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from fastcl.data.limits import check_workers
from fastcl.data.plan import ViewParams, ViewSpec
from fastcl.data.renderers.torchvision import render_torchvision
from fastcl.data.renderers.validate import check_request
from fastcl.data.sources.load import Split
from fastcl.errors import FastclError, suggest

_LOOKED_AT = 16  # images, for the choice of a renderer
RendererName: TypeAlias = Literal["auto", "triton", "dali", "torchvision"]
RENDERERS = get_args(RendererName)[1:]  # "auto" takes the first that a CUDA device allows


class Renderer(Protocol):
    """Applies a plan to the images of a split; draws nothing itself."""

    split: Split
    spec: ViewSpec
    device: torch.device

    def __call__(self, positions: np.ndarray, params: Sequence[ViewParams]) -> tuple[Tensor, ...]:
        """Views of b images, each read once.

        Args:
            positions: (b,) positions in the split.
            params: of each view, b rows.

        Returns:
            For each of params (b, C, size, size) float32 on the renderer's device.

        Raises:
            FastclError: as `check_request`, or an image that cannot be decoded (named).
        """
        ...


class TorchvisionRenderer:
    """`render_torchvision` over the images of a split: any image, on the CPU; the views are then moved to the device.

    Args:
        split: the images.
        spec: output size, blur kernel and normalisation.
        device: where the views go.
        threads: size of a pool that reads and decodes the images; 0 reads them one after the other.

    Raises:
        FastclError: when it is called: as `check_request`, or an image that cannot be decoded (named).
    """

    def __init__(self, split: Split, spec: ViewSpec, device: torch.device | str, *, threads: int = 0) -> None:
        check_workers(threads, "threads")
        self.split, self.spec, self.device, self.threads = split, spec, torch.device(device), threads

    def __call__(self, positions: np.ndarray, params: Sequence[ViewParams]) -> tuple[Tensor, ...]:
        """Views of b images; see `Renderer`."""
        positions = np.asarray(positions)
        check_request(self.split, self.spec, positions, params)
        where = positions.tolist()
        if self.threads:
            with ThreadPoolExecutor(self.threads) as pool:  # made anew: a forked process has no threads of its parent's
                images = list(pool.map(self.split.image, where))
        else:
            images = [self.split.image(p) for p in where]
        for image, size, i in zip(images, self.split.sizes[positions].tolist(), self.split.ids[positions], strict=True):
            if image.shape[:2] != tuple(size):  # the file has been replaced
                raise FastclError(f"image of sample id {i} is {image.shape[:2]}, its header said {tuple(size)}")
        return tuple(render_torchvision(images, p, self.spec).to(self.device) for p in params)


def choose_renderer(name: str, splits: Sequence[Split], spec: ViewSpec, device: torch.device | str) -> str:
    """The name of the renderer to use for all of some splits, so that they get the same pixels from the same image.

    Args:
        name: one of RENDERERS; or "auto": on a CUDA device the first of them that nothing stands in the way of
            (DALI only for files of JPEG images), else "torchvision".
        splits: what it will render.
        spec: of the views.
        device: where they are wanted.

    Raises:
        FastclError: an unknown name, or a renderer that cannot be used here (says why).
    """
    device = torch.device(device)
    if name == "auto":
        if device.type != "cuda":
            return "torchvision"
        return next(n for n in RENDERERS if all(_suits(n, split, spec, device) for split in splits))
    if name not in RENDERERS:
        raise FastclError(f"data.renderer: unknown {name!r}{suggest(name, ('auto', *RENDERERS))}")
    for split in splits:
        if reason := obstacle(name, split, spec, device):
            raise FastclError(f"data.renderer: {name!r} cannot be used here: {reason}")
    return name


def make_renderer(
    name: RendererName, split: Split, spec: ViewSpec, device: torch.device | str, threads: int = 0
) -> Renderer:
    """A renderer of a split.

    Args:
        name: as `choose_renderer` takes it.
        split: the images.
        spec: of the views.
        device: where the views are wanted.
        threads: of the renderer's own pool, where it has one.

    Raises:
        FastclError: as `choose_renderer`.
    """
    return _kind(choose_renderer(name, [split], spec, device))(split, spec, torch.device(device), threads=threads)


def obstacle(name: str, split: Split, spec: ViewSpec, device: torch.device | str) -> str | None:
    """Why one of RENDERERS cannot render these views of this split on this device; None where it can."""
    try:
        if name == "triton":
            from fastcl.data.renderers import triton as module
        elif name == "dali":
            from fastcl.data.renderers import dali as module
        else:
            return None
    except ImportError as error:
        return f"what it needs cannot be imported ({error})"
    return module.obstacle(split, spec, device)


def _kind(name: str) -> Callable[..., Renderer]:
    """A renderer's class; imported only now, since the others need more than torchvision."""
    if name == "triton":
        from fastcl.data.renderers.triton import TritonRenderer

        return TritonRenderer
    if name == "dali":
        from fastcl.data.renderers.dali import DaliRenderer

        return DaliRenderer
    return TorchvisionRenderer


def _suits(name: str, split: Split, spec: ViewSpec, device: torch.device | str) -> bool:
    if name == "dali" and not _mostly_encoded(split):
        return False  # little for it to decode: images come from the split's own reader, through the host
    return obstacle(name, split, spec, device) is None


def _mostly_encoded(split: Split) -> bool:
    """Whether most of some images from all over the split are files for a decoder."""
    some = np.unique(np.linspace(0, len(split) - 1, _LOOKED_AT).astype(int)).tolist()
    return split.encoded is not None and 2 * sum(split.file(i) is not None for i in some) > len(some)
