"""Views by Triton, from images kept on the device: fused crop, resize, flip, rotation and colour operations.

The pixels equal those of `render_torchvision` within the bounds in tests/data/test_triton_views.py. A view depends
only on its image and parameters, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastcl.data.limits import check_workers
from fastcl.data.plan import ViewParams, ViewSpec
from fastcl.data.renderers.transfer import to_device
from fastcl.data.renderers.validate import check_request
from fastcl.data.sources.load import Split
from fastcl.errors import FastclError

MEMORY_SHARE = 0.25  # of the device's memory may hold the images; the rest is left for training
_CONTRAST = 1  # its number in `ViewParams.order`


class TritonRenderer:
    """Renders a split of equally sized images, which are read once and kept on the device as uint8.

    Args:
        split: the images.
        spec: output size, rotation, blur kernel and normalisation.
        device: device of the images and views.
        threads: number of threads that read the images, once; 0 means 1. Does not change the pixels.

    Raises:
        FastclError: the renderer cannot be used here (see `obstacle`), mean and std do not match the number of
            channels, or an image cannot be read (named).
    """

    def __init__(self, split: Split, spec: ViewSpec, device: torch.device | str, *, threads: int = 0) -> None:
        check_workers(threads, "threads")
        device = torch.device(device)
        reason = obstacle(split, spec, device)
        if reason:
            raise FastclError(f"data.renderer 'triton': {reason}")
        self.split, self.spec, self.device = split, spec, device
        channels = split.image(0).shape[2]
        if len(spec.mean) not in (1, channels):
            raise FastclError(f"views.mean must have 1 value or one per channel ({channels}), got {len(spec.mean)}")
        self._images = torch.from_numpy(_read(split, channels, threads)).to(device)
        self._statistics = torch.tensor([spec.mean, spec.std], dtype=torch.float32, device=device)
        self._statistics = self._statistics.expand(2, 3 if len(spec.mean) == 1 else -1).contiguous()

    def __call__(self, positions: np.ndarray, params: Sequence[ViewParams]) -> tuple[Tensor, ...]:
        """Views of the samples.

        Args:
            positions: (b,) positions in the split.
            params: parameters of each view, b rows each, boxes in whole pixels.

        Returns:
            One (b, C, size, size) float32 tensor per view, on the device.

        Raises:
            FastclError: as for `check_request`.
        """
        from fastcl.data.renderers.triton_launch import render

        positions = np.asarray(positions)
        check_request(self.split, self.spec, positions, params)
        table = np.concatenate([_rows(positions, p) for p in params])
        blurred = np.flatnonzero(np.concatenate([p.blur_sigma > 0 for p in params])).astype(np.int32)
        # One transfer: the views' parameters, then the indices of the blurred views.
        words = to_device(torch.from_numpy(np.concatenate([table.ravel(), blurred])), self.device)
        with torch.cuda.device_of(words):
            views = render(
                self._images, words[: table.size].view(table.shape), self._statistics, words[table.size :],
                self.spec.size, self.spec.rotation > 0, self.spec.blur_kernel,
            )  # fmt: skip
        return views.view(len(params), len(positions), *views.shape[1:]).unbind(0)


def obstacle(split: Split, spec: ViewSpec, device: torch.device | str) -> str | None:
    """Reason why this renderer cannot render the split here, or None. Reads one image."""
    device = torch.device(device)
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        slowly = "to run it on a CPU, slowly, set TRITON_INTERPRET=1 before Python starts"
        return f"it needs a CUDA device, not {device.type} ({slowly})"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    if not len(split):
        return "the split has no images"
    other = np.flatnonzero((split.sizes != split.sizes[0]).any(1))
    if len(other):
        (h0, w0), (h1, w1) = split.sizes[0], split.sizes[other[0]]
        return f"images must all have the same size, got {h0}x{w0} and {h1}x{w1} pixels"
    channels = split.image(0).shape[2]
    if channels not in (1, 3):
        return f"images must have 1 or 3 channels, got {channels}"
    if device.type == "cuda":
        needed = len(split) * int(split.sizes[0].prod()) * channels
        total = torch.cuda.get_device_properties(device).total_memory
        if needed > MEMORY_SHARE * total:
            return f"the images need {needed} bytes, more than {MEMORY_SHARE:.0%} of the device's {total}"
    return None


def _read(split: Split, channels: int, threads: int) -> np.ndarray:
    """All images of a split, (n, H, W, C) uint8."""
    images = np.empty((len(split), *split.sizes[0], channels), np.uint8)

    def read(i: int) -> None:
        images[i] = split.image(i)

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for _ in pool.map(read, range(len(split))):  # re-raises errors of the reads
            pass
    return images


def _rows(positions: np.ndarray, p: ViewParams) -> np.ndarray:
    """The kernels' parameter table, (b, COLUMNS) int32; see fastcl.kernels.augment.parameters."""
    from fastcl.kernels.augment import parameters as column

    table = np.zeros((len(positions), column.COLUMNS.value), np.int32)
    reals = table.view(np.float32)
    contrast_at = (p.order == _CONTRAST).argmax(1)
    others = p.order[p.order != _CONTRAST].reshape(-1, 3)
    factors = np.stack([p.brightness, p.contrast, p.saturation, p.hue], 1)
    angle = np.radians(p.angle)
    table[:, column.IMAGE.value] = positions
    table[:, column.TOP.value : column.WIDTH.value + 1] = p.box
    table[:, column.FLIP.value] = p.flip
    reals[:, column.COS.value], reals[:, column.SIN.value] = np.cos(angle), np.sin(angle)
    table[:, column.BEFORE.value] = np.where(p.jitter, contrast_at, 0)
    table[:, column.COUNT.value] = np.where(p.jitter, 3, 0)
    table[:, column.OPERATION.value : column.FACTOR.value] = others
    reals[:, column.FACTOR.value : column.CONTRAST.value] = np.take_along_axis(factors, others, 1)
    reals[:, column.CONTRAST.value] = np.where(p.jitter, p.contrast, 1)
    table[:, column.GRAYSCALE.value] = p.grayscale
    reals[:, column.SIGMA.value] = p.blur_sigma
    table[:, column.SOLARIZE.value] = p.solarize
    return table
