"""Validates a render request: one parameter row per image, positions in the split, boxes inside the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastcl.data.plan import ViewParams, ViewSpec
from fastcl.data.sources.load import Split
from fastcl.errors import FastclError


def check_positions(split: Split, positions: np.ndarray) -> None:
    """Raise FastclError unless positions are (n,) integers, n >= 1, within the split."""
    if positions.ndim != 1 or not len(positions) or positions.dtype.kind not in "iu":
        raise FastclError(
            f"positions must be a non-empty (n,) array of integers, got {positions.shape} {positions.dtype}"
        )
    if not 0 <= positions.min() <= positions.max() < len(split):
        raise FastclError(f"positions must be in [0, {len(split)}), got {positions.min()} to {positions.max()}")


def check_request(split: Split, spec: ViewSpec, positions: np.ndarray, params: Sequence[ViewParams]) -> None:
    """Check the arguments of a `Renderer`'s call.

    Raises:
        FastclError: no positions or no parameters, parameters and positions of different lengths, a position that is
            not an integer or is outside the split, a box that is not in whole pixels within its image, or a rotated
            view although views.rotation is 0.
    """
    lengths = [len(p) for p in params]
    if not lengths or not len(positions) or set(lengths) != {len(positions)}:
        raise FastclError(f"each view must have one row of parameters per position ({len(positions)}), got {lengths}")
    check_positions(split, positions)
    height, width = split.sizes[positions].T
    for p in params:
        top, left, high, wide = p.box.T
        outside = (top < 0) | (left < 0) | (high < 1) | (wide < 1) | (top + high > height) | (left + wide > width)
        outside |= (p.box != np.floor(p.box)).any(1)
        if outside.any():
            k = int(outside.argmax())
            raise FastclError(
                f"box (top, left, height, width) must be whole pixels within the {height[k]}x{width[k]} image, "
                f"got {p.box[k].tolist()}"
            )
        if spec.rotation == 0 and p.angle.any():
            raise FastclError(f"views.rotation is 0, but a view is rotated by {p.angle[p.angle != 0][0]} degrees")
