"""Seeded draws of training samples, class by class. They depend on which samples there are, not on the order of rows
and not on the features, so all models of a run get the same ones."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from fastcl.errors import FastclError, brief
from fastcl.evaluation.frozen import FrozenFeatures


class Purpose(IntEnum):
    """What is drawn; different purposes of one seed have nothing in common."""

    HELD_OUT = 0
    SHOTS = 1


def held_out_rows(data: FrozenFeatures, fraction: float, seed: int) -> Tensor:
    """(n,) bool on the device of the features: that fraction of each class, rounded, but at least one row of a class
    and never all. A class of one row is not held out.

    Raises:
        FastclError: a fraction that is not between 0 and 1, or no class with two rows.
    """
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise FastclError(f"held_out must be a number between 0 and 1, got {brief(fraction)}")
    index = data.index.cpu().numpy()
    sizes = np.bincount(index)
    if sizes.max() < 2:
        raise FastclError(
            f"the penalty cannot be chosen on held-out rows: none of the {len(sizes)} classes has 2 training rows; "
            "give a single penalty"
        )
    wanted = np.minimum(np.maximum(np.rint(fraction * sizes), 1), sizes - 1)
    places = _places(index, data.ids.numpy(), seed, Purpose.HELD_OUT, 0)
    return torch.from_numpy(places < wanted[index]).to(data.index.device)


def shot_rows(data: FrozenFeatures, shots: int, seed: int, repeat: int) -> Tensor:
    """(n,) bool on the device of the features: so many rows of each class (all of a class that has fewer). Those of
    fewer shots are among them."""
    places = _places(data.index.cpu().numpy(), data.ids.numpy(), seed, Purpose.SHOTS, repeat)
    return torch.from_numpy(places < shots).to(data.index.device)


def _places(index: np.ndarray, ids: np.ndarray, seed: int, purpose: Purpose, repeat: int) -> np.ndarray:
    """(n,) place of each row in a random order of its class."""
    keys = np.empty(len(ids))
    keys[np.argsort(ids)] = np.random.default_rng([seed, purpose, repeat]).random(len(ids))
    order = np.lexsort((keys, index))
    sizes = np.bincount(index)
    places = np.empty(len(ids), np.int64)
    places[order] = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return places
