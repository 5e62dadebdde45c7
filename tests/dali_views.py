"""Splits of JPEG files and arrays, drawn views, and the differences between two renderers of them."""

import io

import numpy as np
import torch
from PIL import Image
from small_images import noise

from fastcl.data import Split, ViewPlan, load, render_torchvision
from fastcl.data.renderers.dali import DaliRenderer

PLAIN = {"mean": (0.0,), "std": (1.0,), "jitter": 0.0, "grayscale": 0.0, "flip": 0.0}
REAL = ("clothing10.zip", "fruits65.zip", "cifar10_jpeg75.npz")


def jpeg(pixels, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def photo(seed, height=60, width=44):
    """Smooth colours: what JPEG is for."""
    return np.asarray(Image.fromarray(noise(seed, 6, 5)).resize((width, height), Image.Resampling.BICUBIC))


def array_split(images):
    sizes = np.array([image.shape[:2] for image in images])
    return Split(np.arange(len(images)) * 5 + 2, np.zeros(len(images), np.int64), sizes, lambda i: images[i])


def file_split(files):
    def pixels(i):
        return np.asarray(Image.open(io.BytesIO(files[i])).convert("RGB"))

    sizes = np.array([pixels(i).shape[:2] for i in range(len(files))])
    return Split(np.arange(len(files)), np.zeros(len(files), np.int64), sizes, pixels, lambda i: files[i])


def take(split, n):
    """n positions spread over the split."""
    return np.linspace(0, len(split) - 1, n).astype(np.int64)


def drawn(split, positions, spec, views=2, epoch=0, seed=0):
    plan = ViewPlan(spec, seed)
    return [plan.draw(epoch, split.ids[positions], view, split.sizes[positions]) for view in range(views)]


def levels(got, expected, spec):
    """(greatest, mean) absolute difference in grey levels before normalisation."""
    difference = (got - expected).abs() * torch.tensor(spec.std)[:, None, None] * 255
    return difference.max().item(), difference.mean().item()


def against_torchvision(split, positions, params, spec, renderer=None):
    got = (renderer or DaliRenderer(split, spec, "cpu", threads=2))(positions, params)
    images = [split.image(int(p)) for p in positions]
    expected = [render_torchvision(images, p, spec) for p in params]
    assert len(got) == len(params)
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(got, expected, strict=True))
    return levels(torch.stack(got), torch.stack(expected), spec)


def real_split(path):
    """A training split with JPEG bytes; of CIFAR-10's archive 100 images."""
    if path.suffix == ".zip":
        return load(f"folder:{path}").train
    with np.load(path) as archive:
        data, offset = archive["jpeg"], archive["offset"]
    return file_split([data[offset[i] : offset[i + 1]].tobytes() for i in range(0, 50000, 500)])
