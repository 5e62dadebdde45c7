"""A seeded choice of a data set's images, and what encoders make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from fastcl import LayerCKA, layer_cka
from fastcl.choices import DataPart
from fastcl.data import Dataset, Split
from fastcl.errors import FastclError
from fastcl.similarity.layers import match_layers
from fastcl.train.measures.layer_table import encoder_layers
from fastcl.zoo.encoders import Encoder

_BATCH = 64  # images


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a data set as PIL images in RGB, in the order of their sample ids."""

    places: Sequence[tuple[Split, int]]

    @classmethod
    def chosen(cls, data: Dataset, part: DataPart, samples: int | None, seed: int) -> Images:
        """Random images of a part of a data set; None: all of them.

        Raises:
            FastclError: more samples than images, or fewer than 4, which CKA needs.
        """
        splits = {"all": (data.train, data.test), "train": (data.train,), "test": (data.test,)}[part]
        places = [(split, i) for split in splits for i in range(len(split))]
        places.sort(key=lambda place: int(place[0].ids[place[1]]))
        wanted = len(places) if samples is None else samples
        if not 4 <= wanted <= len(places):
            which = "" if part == "all" else f"{part} "
            raise FastclError(f"--samples must be in [4, {len(places)}] ({which}images of {data.name}), got {wanted}")
        generator = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(len(places), generator=generator, dtype=torch.int64, device="cpu")
        return cls([places[i] for i in sorted(order[:wanted].tolist())])

    def __len__(self) -> int:
        return len(self.places)

    def batches(self) -> Iterator[Tensor]:
        """The positions of all images, in batches of nearly equal size."""
        count = -(-len(self) // _BATCH)
        return iter(torch.from_numpy(part) for part in np.array_split(np.arange(len(self)), count))

    def read(self, positions: Tensor) -> list[Image.Image]:
        """The images at some positions. Raises FastclError for one that cannot be decoded."""
        found = []
        for k in positions.tolist():
            split, i = self.places[k]
            pixels = split.image(i)
            found.append(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB"))
        return found


def features_of(encoders: Sequence[Encoder], images: Images, device: torch.device) -> dict[str, Tensor]:
    """By name, the (n, d) float32 features of all images, which are decoded once for all encoders; with a progress bar
    if standard error is a terminal.

    Raises:
        FastclError: an image that cannot be decoded, or as `Encoder.features`.
    """
    parts: dict[str, list[Tensor]] = {encoder.name: [] for encoder in encoders}
    with tqdm(total=len(images), desc="features", unit="image", disable=None) as bar:
        for positions in images.batches():
            batch = images.read(positions)
            for encoder in encoders:
                parts[encoder.name].append(encoder.features(batch, device))
            bar.update(len(batch))
    return {name: torch.cat(found) for name, found in parts.items()}


class _Reader(nn.Module):
    """An encoder that takes the positions of images: each model prepares them in its own way."""

    def __init__(self, encoder: Encoder, images: Images, device: torch.device) -> None:
        super().__init__()
        self.encoder = encoder.module
        self._reads, self._device = (encoder, images), device

    def forward(self, positions: Tensor) -> Tensor:
        """(b, d) features of the images at (b,) positions."""
        encoder, images = self._reads
        return encoder.features(images.read(positions), self._device)


def layers_of(
    first: Encoder, second: Encoder, images: Images, patterns: Sequence[str], device: torch.device
) -> LayerCKA:
    """`fastcl.layer_cka` of two encoders on the same images, each prepared for the model that takes it.

    Args:
        patterns: names of layers, as for `layer_cka`, each in one model or in both; empty: the stages of both.

    Raises:
        FastclError: a pattern that matches in neither model, a model in which none matches, and as `layer_cka` and
            `features_of`.
    """
    encoders = (first, second)
    readers = [_Reader(encoder, images, device) for encoder in encoders]
    wanted = [encoder_layers(encoder.module) for encoder in encoders] if not patterns else _matched(encoders, patterns)
    batches = list(images.batches())
    found = layer_cka(readers[0], readers[1], batches, wanted[0], wanted[1], progress=True)
    names = [tuple(map(_own_name, names)) for names in (found.names_a, found.names_b)]
    why = [{_own_name(name): reason for name, reason in u.items()} for u in (found.undefined_a, found.undefined_b)]
    left_out = tuple(map(_own_name, found.left_out))
    return replace(found, names_a=names[0], names_b=names[1], left_out=left_out, undefined_a=why[0], undefined_b=why[1])


def _own_name(layer: str) -> str:
    """A layer's name in its encoder, from that in the reader."""
    return layer.removeprefix("encoder.")


def _matched(encoders: Sequence[Encoder], patterns: Sequence[str]) -> list[list[str]]:
    """Per encoder the names, in its reader, of the layers that the patterns match."""
    found: list[list[str]] = [[] for _ in encoders]
    for pattern in patterns:
        misses = []
        for encoder, names in zip(encoders, found, strict=True):
            try:
                names += [f"encoder.{name}" for name in match_layers(encoder.module, [pattern], "--layers")]
            except FastclError as error:
                misses.append(error)
        if len(misses) == len(encoders):
            raise misses[0]
    for encoder, names in zip(encoders, found, strict=True):
        if not names:
            raise FastclError(f"--layers: none of the patterns {', '.join(patterns)} matches a layer of {encoder.name}")
    return found
