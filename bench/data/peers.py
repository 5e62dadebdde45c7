"""The same views by other libraries, which draw their own random numbers and are imported when called.

Each function makes a feed, see `bench.data.providers`: torchvision's transforms in a DataLoader's workers, a DALI
pipeline with seeded operators, kornia on batches. The last two decode as their users usually do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from bench.data.inputs import Case, Photos
from fastcl.data import Split, ViewSpec

WORKERS = os.cpu_count() or 1


class Samples(Dataset):
    """Each image of a split as `views` results of `view` on its (C, H, W) pixels."""

    def __init__(self, split: Split, view: Callable[[Tensor], Tensor], views: int = 2) -> None:
        self.split, self.view, self.views = split, view, views

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, k: int) -> tuple[Any, ...]:
        x = torch.from_numpy(self.split.image(k)).permute(2, 0, 1)
        return tuple(self.view(x) for _ in range(self.views))


def _loader(samples: Samples, case: Case, device: torch.device) -> DataLoader:
    return DataLoader(samples, case.batch, num_workers=WORKERS, persistent_workers=WORKERS > 0,
        pin_memory=device.type == "cuda")  # fmt: skip


def torchvision_transforms(spec: ViewSpec, pillow: bool) -> nn.Module:
    """The views as a user would compose them.

    Args:
        pillow: work on Pillow images instead of uint8 tensors.
    """
    jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    steps = [
        v2.RandomResizedCrop(spec.size, spec.scale, spec.ratio, antialias=True), v2.RandomHorizontalFlip(spec.flip),
        v2.RandomApply([jitter], spec.jitter), v2.RandomGrayscale(spec.grayscale),
    ]  # fmt: skip
    if spec.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(spec.blur_kernel, spec.blur_sigma)], spec.blur))
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std)]
    return v2.Compose([*([v2.ToPILImage()] if pillow else []), *steps, *last])


def torchvision(pillow: bool, photos: Photos, case: Case, device: torch.device) -> Callable[[int], Iterator]:
    """torchvision's transforms, sample by sample, with one worker per core."""
    loader = _loader(Samples(photos.split, torchvision_transforms(case.spec, pillow)), case, device)

    def feed(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        for views in loader:
            yield tuple(v.to(device, non_blocking=True) for v in views)

    return feed


def kornia(photos: Photos, case: Case, device: torch.device) -> Callable[[int], Iterator]:
    """kornia's augmentations of whole batches on the device.

    Images decoded beforehand stay on the device as uint8; others are decoded by a DataLoader's workers.
    """
    augment = _kornia_recipe(case.spec).to(device)
    if photos.split.encoded is None:
        images = np.stack([photos.split.image(k) for k in range(len(photos.split))])
        held = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device).split(case.batch)
        source = [(part,) for part in held]
    else:
        source = _loader(Samples(photos.split, Tensor.contiguous, 1), case, device)

    def feed(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        for (pixels,) in source:
            x = pixels.to(device, non_blocking=True).float() / 255
            yield augment(x), augment(x)

    return feed


def _kornia_recipe(spec: ViewSpec) -> nn.Module:
    import kornia.augmentation as K

    steps = [
        K.RandomResizedCrop((spec.size, spec.size), spec.scale, spec.ratio), K.RandomHorizontalFlip(spec.flip),
        K.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue, p=spec.jitter),
        K.RandomGrayscale(p=spec.grayscale),
    ]  # fmt: skip
    if spec.blur:
        steps.append(K.RandomGaussianBlur((spec.blur_kernel,) * 2, spec.blur_sigma, p=spec.blur))
    return nn.Sequential(*steps, K.Normalize(torch.tensor(spec.mean), torch.tensor(spec.std)))


def dali(views: bool, photos: Photos, case: Case, device: torch.device) -> Callable[[int], Iterator]:
    """A DALI pipeline whose operators use their own seeds, as in self-supervised libraries.

    Args:
        views: make two views; otherwise only decode.
    """
    from nvidia.dali import fn, pipeline_def, types

    cuda = device.type == "cuda"
    split, encoded = photos.split, photos.split.encoded
    stored = [np.frombuffer(encoded(k), np.uint8) if encoded else split.image(k) for k in range(len(split))]
    parts = [stored[k : k + case.batch] for k in range(0, len(stored), case.batch)]

    ndim, layout = (1, None) if encoded else (3, "HWC")

    @pipeline_def(batch_size=case.batch, num_threads=WORKERS, device_id=(device.index or 0) if cuda else None, seed=0)
    def graph() -> Any:
        fed = {"source": parts, "cycle": "raise", "batch": True}
        source = fn.external_source(**fed, dtype=types.UINT8, ndim=ndim, layout=layout)
        if encoded:
            images = fn.decoders.image(source, device="mixed" if cuda else "cpu", output_type=types.RGB)
        else:
            images = source.gpu() if cuda else source
        return tuple(_dali_view(images, case.spec) for _ in range(2)) if views else images

    pipeline = graph()
    pipeline.build()

    def feed(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        try:
            while True:
                outputs = pipeline.run()
                yield tuple(map(_dali_tensor, outputs)) if views else ()
        except StopIteration:
            pipeline.reset()

    return feed


def _dali_view(images: Any, spec: ViewSpec) -> Any:
    """Crop, flip, jitter in DALI's own order and colour space, grayscale, blur, normalise."""
    from nvidia.dali import fn, types

    def coin(probability: float) -> Any:
        return fn.cast(fn.random.coin_flip(probability=probability), dtype=types.FLOAT)

    def either(heads: Any, drawn: Any, neutral: float) -> Any:
        return heads * drawn + (1 - heads) * neutral

    def factor(strength: float) -> Any:
        return fn.random.uniform(range=(max(0.0, 1 - strength), 1 + strength))

    x = fn.random_resized_crop(images, size=spec.size, random_area=spec.scale, random_aspect_ratio=spec.ratio)
    jitter, gray = coin(spec.jitter), coin(spec.grayscale)
    light, contrast = (either(jitter, factor(strength), 1) for strength in (spec.brightness, spec.contrast))
    x = fn.brightness_contrast(x, brightness=light, contrast=contrast)
    turn = either(jitter, fn.random.uniform(range=(-360 * spec.hue, 360 * spec.hue)), 0)
    x = fn.hsv(x, hue=turn, saturation=(1 - gray) * either(jitter, factor(spec.saturation), 1))
    if spec.blur:
        # DALI would derive a sigma of 0 from the window size; 0.1 leaves the pixels unchanged.
        sigma = either(coin(spec.blur), fn.random.uniform(range=spec.blur_sigma), 0.1)
        x = fn.gaussian_blur(x, sigma=sigma, window_size=spec.blur_kernel)
    scale = [[255 * v for v in values] for values in (spec.mean, spec.std)]
    return fn.crop_mirror_normalize(x, mirror=fn.random.coin_flip(probability=spec.flip), mean=scale[0], std=scale[1],
        dtype=types.FLOAT, output_layout="CHW")  # fmt: skip


def _dali_tensor(output: Any) -> Tensor:
    """A copy, since DALI reuses its buffers."""
    dense = output.as_tensor()
    return torch.from_dlpack(dense).clone()
