"""The colour stage of the torchvision and DALI renderers: jitter, grayscale, blur, solarise and normalise, in torch.

The formulas are torchvision's for float images in [0, 1]. Everything is elementwise (the blur on shifted copies)
except the mean that contrast needs, which is a sum of integers, so a pixel does not depend on the rest of the batch or
the number of threads.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fastcl.data.plan import ViewParams, ViewSpec
from fastcl.data.renderers.transfer import to_device
from fastcl.errors import FastclError

_GRAY = (0.2989, 0.587, 0.114)  # torchvision's luma weights
_MEAN_STEPS = 1 << 20  # resolution of the integer mean: far finer than a grey level
_SOLARIZE_THRESHOLD = 128 / 255


def colour_stage(images: Tensor, params: ViewParams, spec: ViewSpec) -> Tensor:
    """Apply the colour part of n views.

    Args:
        images: (n, C, H, W) uint8, C = 1 or 3.
        params: parameters of the n views.
        spec: gives the blur's kernel size and the normalisation.

    Returns:
        (n, C, H, W) float32, normalised.

    Raises:
        FastclError: mean and std do not match the number of channels.
    """
    channels = images.shape[1]
    if len(spec.mean) not in (1, channels):
        raise FastclError(f"views.mean must have 1 value or one per channel ({channels}), got {len(spec.mean)}")
    x = images.float() / 255
    for place in range(4):
        for number, (name, operation) in enumerate(_JITTER):
            _update(x, params.jitter & (params.order[:, place] == number), operation, getattr(params, name))
    _update(x, params.grayscale, lambda v, _: gray(v).expand_as(v))
    _update(x, params.blur_sigma > 0, lambda v, sigma: blur(v, sigma, spec.blur_kernel), params.blur_sigma)
    _update(x, params.solarize, lambda v, _: torch.where(v >= _SOLARIZE_THRESHOLD, 1 - v, v))
    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (spec.mean, spec.std))
    return (x - mean) / std


def gray(x: Tensor) -> Tensor:
    """(n, 1, H, W) luma of (n, C, H, W)."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.unbind(1)
    return (_GRAY[0] * red + _GRAY[1] * green + _GRAY[2] * blue)[:, None]


def blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Gaussian blur with one sigma per image and reflected borders: sums shifted copies along rows, then columns."""
    half = kernel // 2
    offsets = torch.arange(-half, half + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma.reshape(-1, 1)) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    for dim, margins in ((3, (half, half, 0, 0)), (2, (0, 0, half, half))):
        padded, length = pad(x, margins, mode="reflect"), x.shape[dim]
        x = reduce(torch.add, (weights[:, k, None, None, None] * padded.narrow(dim, k, length) for k in range(kernel)))
    return x


def _update(x: Tensor, chosen: np.ndarray, operation, values: np.ndarray | None = None) -> None:
    """Replace the chosen images by operation(images, their values as (k, 1, 1, 1) float32)."""
    (index,) = np.nonzero(chosen)
    if not len(index):
        return
    where = to_device(torch.from_numpy(index), x.device)
    value = None
    if values is not None:
        value = to_device(torch.from_numpy(values[index].astype(np.float32)), x.device).reshape(-1, 1, 1, 1)
    x[where] = operation(x[where], value)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    steps = (gray(x) * _MEAN_STEPS).round().long().sum((1, 2, 3), keepdim=True)
    mean = steps.double() / (_MEAN_STEPS * x.shape[2] * x.shape[3])
    return _blend(x, mean.float(), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return x if x.shape[1] == 1 else _blend(x, gray(x), factor)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue in HSV space."""
    if x.shape[1] == 1:
        return x
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    divisor = chroma.where(chroma > 0, 1)
    saturation = chroma / high.where(high > 0, 1)
    red, green, blue = ((high - c) / divisor for c in x.unbind(1))
    hue = torch.where(x[:, 0] == high, blue - green, torch.where(x[:, 1] == high, 2 + red - blue, 4 + green - red))
    hue = (hue / 6 + 1 + shift[:, 0]) % 1
    # Channel n of HSV -> RGB: v - v s max(0, min(k, 4 - k, 1)) with k = (n + 6 h) mod 6, n = 5, 3, 1.
    n = torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device)
    k = (n[:, None, None] + 6 * hue[:, None]) % 6
    return (high * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1).transpose(0, 1))).transpose(0, 1)


_JITTER = (("brightness", _brightness), ("contrast", _contrast), ("saturation", _saturation), ("hue", _hue))
