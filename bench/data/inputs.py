"""The images of the data benchmark: real ones if available, else synthetic ones that are labelled as such."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastcl.data import Split, ViewSpec, load
from fastcl.data.philox import Stream, permutation
from fastcl.data.sources.subset import part

MADE_UP_CLASSES, QUALITY = 4, 75
CIFAR_CLASS = 5000  # training images per class; at least two classes are loaded, decoded beforehand


@dataclass(frozen=True)
class Case:
    """One measured case: a pass over some images.

    Args:
        size: side of the views.
        file: file of the real images.
        sides: heights and widths of the synthetic images.
        preset: recipe of the views.
        images, batch: images in a pass and in a batch.
    """

    size: int
    file: str
    sides: tuple[tuple[int, int], ...]
    preset: str
    images: int
    batch: int

    @property
    def spec(self) -> ViewSpec:
        """The view settings at this size."""
        return ViewSpec.preset(self.preset, size=self.size)

    def __str__(self) -> str:
        return f"{self.size} x {self.size}"


CASES: dict[str, tuple[Case, ...]] = {
    "cpu": (
        Case(32, "cifar10_jpeg75.npz", ((32, 32),), "cifar", 2048, 256),
        Case(96, "fruits65.zip", ((100, 100),), "tiny-imagenet", 512, 64),
        Case(224, "clothing10.zip", ((533, 400),), "simclr", 128, 32),
    )
}
# 16 batches of each: DataLoader workers make whole ones.
_COUNTS = ((32768, 2048), (2048, 128), (704, 44))
CASES["cuda"] = tuple(replace(c, images=n, batch=b) for c, (n, b) in zip(CASES["cpu"], _COUNTS, strict=True))
TINY = (Case(12, "", ((16, 16),), "cifar", 8, 4), Case(20, "", ((24, 30), (30, 24)), "simclr", 8, 4))


@dataclass(frozen=True)
class Photos:
    """Images of a case, as in a training run.

    Args:
        source: the whole data set, for `fastcl.data.load`.
        name: name in the report.
        split: the images of a pass: a whole number of batches, drawn from the training images.
    """

    source: str
    name: str
    split: Split

    @property
    def equally_sized(self) -> bool:
        """Whether all images have the same size."""
        return bool((self.split.sizes == self.split.sizes[0]).all())


def read(case: Case, folder: Path, scratch: Path) -> Photos:
    """The images of a case: those in `folder` if they are there, else made up in `scratch`, an empty folder."""
    real = folder / case.file
    if case.file and real.is_file():
        decoded, name = real.suffix == ".npz", real.stem
        source = f"{'cifar10' if decoded else 'folder'}:{real}"
        train = load(source, classes=max(2, -(-case.images // CIFAR_CLASS)) if decoded else None).train
        # Only the most frequent size: some renderers need equal sizes, and all should make the same views.
        _, which, counts = np.unique(train.sizes, axis=0, return_inverse=True, return_counts=True)
        train = part(train, np.flatnonzero(which.reshape(-1) == counts.argmax()))
    else:
        _make_up(case, scratch)
        source, name = f"folder:{scratch}", f"MADE-UP pictures ({f'{case.file} is not there' if case.file else 'tiny'})"
        train = load(source).train
    chosen = permutation(len(train), seed=0, stream=Stream.ORDER)[: case.images]
    split = part(train, chosen[: len(chosen) // case.batch * case.batch])
    return Photos(source, f"{name}, {'encoded' if split.encoded else 'decoded beforehand'}", split)


def _make_up(case: Case, folder: Path) -> None:
    """Write an image tree of smooth colours with noise, which JPEG compresses about as well as photographs."""
    random = np.random.default_rng(0)
    for k in range(2 * case.images):
        height, width = case.sides[k % len(case.sides)]
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
        pixels = (smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        target = folder / f"class{k % MADE_UP_CLASSES}"
        target.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(target / f"{k:05}.jpg", quality=QUALITY)
