"""Renderers by name, and which of them can be used for a device and data set."""

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
from fastcl.data.renderers.transfer import to_device
from fastcl.data.renderers.validate import check_request
from fastcl.data.sources.load import Split
from fastcl.errors import FastclError, suggest

_LOOKED_AT = 16  # images sampled to choose a renderer
RendererName: TypeAlias = Literal["auto", "triton", "dali", "torchvision"]
RENDERERS = get_args(RendererName)[1:]  # "auto" on CUDA takes the first that can be used


class Renderer(Protocol):
    """Applies a plan to the images of a split; draws no random numbers itself."""

    split: Split
    spec: ViewSpec
    device: torch.device

    def __call__(self, positions: np.ndarray, params: Sequence[ViewParams]) -> tuple[Tensor, ...]:
        """Views of b images, each read once.

        Args:
            positions: (b,) positions in the split.
            params: parameters of each view, b rows each.

        Returns:
            One (b, C, size, size) float32 tensor per entry of params, on the renderer's device.

        Raises:
            FastclError: as for `check_request`, or an image that cannot be decoded (named).
        """
        ...


class TorchvisionRenderer:
    """Renders the images of a split with `render_torchvision`: any image, on the CPU; then moves views to the device.

    Args:
        split: the images.
        spec: output size, blur kernel and normalisation.
        device: device of the views.
        threads: size of the pool that reads and decodes images; 0 reads them one by one.

    Raises:
        FastclError: when called: as for `check_request`, or an image that cannot be decoded (named).
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
            with ThreadPoolExecutor(self.threads) as pool:  # one per call: a fork does not copy threads
                images = list(pool.map(self.split.image, where))
        else:
            images = [self.split.image(p) for p in where]
        for image, size, i in zip(images, self.split.sizes[positions].tolist(), self.split.ids[positions], strict=True):
            if image.shape[:2] != tuple(size):  # the file has changed since its header was read
                raise FastclError(
                    f"image of sample id {i} has size {image.shape[:2]}, but its header said {tuple(size)}"
                )
        return tuple(to_device(render_torchvision(images, p, self.spec), self.device) for p in params)


def choose_renderer(name: str, splits: Sequence[Split], spec: ViewSpec, device: torch.device | str) -> str:
    """The name of one renderer for all splits, so that the same image gives the same pixels in each.

    Args:
        name: one of RENDERERS, or "auto": on a CUDA device the first of them that can be used (DALI only if most
            images are JPEG files), otherwise "torchvision".
        splits: splits to render.
        spec: spec of the views.
        device: device of the views.

    Raises:
        FastclError: an unknown name, or a renderer that cannot be used here (with the reason).
    """
    device = torch.device(device)
    if name == "auto":
        if device.type != "cuda":
            return "torchvision"
        return next(n for n in RENDERERS if all(_suits(n, split, spec, device) for split in splits))
    if name not in RENDERERS:
        raise FastclError(f"data.renderer: unknown renderer {name!r}{suggest(name, ('auto', *RENDERERS))}")
    for split in splits:
        if reason := obstacle(name, split, spec, device):
            raise FastclError(f"data.renderer: {name!r} cannot be used here: {reason}")
    return name


def make_renderer(
    name: RendererName, split: Split, spec: ViewSpec, device: torch.device | str, threads: int = 0
) -> Renderer:
    """A renderer for a split.

    Args:
        name: as for `choose_renderer`.
        split: the images.
        spec: spec of the views.
        device: device of the views.
        threads: size of the renderer's own thread pool.

    Raises:
        FastclError: as for `choose_renderer`.
    """
    return _kind(choose_renderer(name, [split], spec, device))(split, spec, torch.device(device), threads=threads)


def obstacle(name: str, split: Split, spec: ViewSpec, device: torch.device | str) -> str | None:
    """Reason why a renderer cannot render these views of this split on this device, or None."""
    try:
        if name == "triton":
            from fastcl.data.renderers import triton as module
        elif name == "dali":
            from fastcl.data.renderers import dali as module
        else:
            return None
    except ImportError as error:
        return f"a module that it needs cannot be imported ({error})"
    return module.obstacle(split, spec, device)


def _kind(name: str) -> Callable[..., Renderer]:
    """A renderer's class. Imported on demand, since the others need more packages than torchvision."""
    if name == "triton":
        from fastcl.data.renderers.triton import TritonRenderer

        return TritonRenderer
    if name == "dali":
        from fastcl.data.renderers.dali import DaliRenderer

        return DaliRenderer
    return TorchvisionRenderer


def _suits(name: str, split: Split, spec: ViewSpec, device: torch.device | str) -> bool:
    if name == "dali" and not _mostly_encoded(split):
        return False  # DALI has little to decode: the split's own reader reads the images on the host
    return obstacle(name, split, spec, device) is None


def _mostly_encoded(split: Split) -> bool:
    """Whether most images of an evenly spaced sample are JPEG files."""
    some = np.unique(np.linspace(0, len(split) - 1, _LOOKED_AT).astype(int)).tolist()
    return split.encoded is not None and 2 * sum(split.file(i) is not None for i in some) > len(some)
