"""Layers of the finished models: CKA of every layer of the reference with every layer of each other model."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from fastcl import layer_cka
from fastcl.data import EvalViews
from fastcl.errors import FastclError
from fastcl.similarity.layers import match_layers
from fastcl.train.models import IDENTITY, Twin
from fastcl.train.run_folder.records import write_atomic

log = logging.getLogger("fastcl")
LAYER_IMAGES = 1024  # maximum number of held-out images, evenly spaced over the split
_BATCH = 256


def write_layers(path: Path, twins: Sequence[Twin], views: EvalViews, layers: Sequence[str]) -> None:
    """Write layers.json: minibatch CKA (see `fastcl.layer_cka`) of the first twin's layers with those of the others.

    The reseeded twin is included as the noise floor. The identity twin is left out, and so, with a warning, is a model
    whose CKA is undefined for all layers; if no model remains, nothing is written. A layer whose CKA is undefined gets
    nulls, with a warning. The same weights give the same bytes.

    Args:
        path: the file: {"reference", "samples", "batches", "models": {name: {"layers": rows (of the reference),
            "other_layers": columns, "cka": rows of numbers}}}.
        views: views of the held-out split.
        layers: patterns for layer names in a twin's network, as for `layer_cka`; empty: `encoder_layers`.
    """
    reference, *others = (twin for twin in twins if twin.name != IDENTITY)
    patterns = layers or encoder_layers(reference.network.encoder)
    images = _Images(views)
    models = {}
    for other in others:
        try:
            found = layer_cka(reference.network, other.network, images, patterns)
        except FastclError as error:
            log.warning("layers of %s, %s: %s", reference.name, other.name, error)
            continue
        for model, undefined in ((reference, found.undefined_a), (other, found.undefined_b)):
            if undefined:
                more = f" (and {len(undefined) - 1} more layers)" if len(undefined) > 1 else ""
                reason = next(iter(undefined.values()))
                log.warning("layers of %s, %s: in %s, %s%s", reference.name, other.name, model.name, reason, more)
        if found.matrix.isnan().all():
            continue
        cka = [[None if math.isnan(value) else value for value in row] for row in found.matrix.tolist()]
        rows = {"layers": found.names_a, "other_layers": found.names_b, "cka": cka}
        models[other.name] = rows
        table = {"reference": reference.name, "samples": found.samples, "batches": found.batches, "models": models}
    if models:
        write_atomic(path, (json.dumps(table, allow_nan=False) + "\n").encode())


def check_layers(twin: Twin, layers: Sequence[str]) -> None:
    """Refuse patterns that match no layer, before a run starts. Raises FastclError."""
    if layers:
        match_layers(twin.network, layers, "train.layers")


def encoder_layers(encoder: nn.Module, prefix: str = "encoder") -> list[str]:
    """Names of an encoder's stages: its children, with each Sequential expanded, without Identity and Dropout."""
    names = []
    for name, child in encoder.named_children():
        if isinstance(child, nn.Sequential) and len(child):
            names += [f"{prefix}.{name}.{inner}" for inner, _ in child.named_children()]
        elif not isinstance(child, nn.Identity | nn.Dropout):
            names.append(f"{prefix}.{name}")
    return names


@dataclass(frozen=True)
class _Images:
    """A sample of a split in batches of nearly equal size; rendered anew for each pass to save memory."""

    views: EvalViews

    def __iter__(self) -> Iterator[Tensor]:
        n = len(self.views.split)
        count = min(n, LAYER_IMAGES)
        chosen = np.arange(count) * n // count
        return self.views.of(np.array_split(chosen, math.ceil(count / _BATCH)))
