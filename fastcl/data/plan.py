"""The view plan: augmentation parameters as data, each a pure function of (seed, epoch, sample, view).

Nothing here looks at pixels. Renderers apply a plan and draw no random numbers, so views do not depend on the model,
batch size, worker count, rank or resume point.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np

from fastcl.config.view_spec import ViewSpec
from fastcl.data.philox import Stream, uniforms
from fastcl.errors import FastclError

_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
_CHUNK = 2048  # samples drawn at a time, so that their random words fit in a core's cache
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int64)

# Each parameter has its own random word, so switching one option on or off changes no other parameter.
_FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _ORDER, _GRAY, _BLUR, _SIGMA, _SOLARIZE, _ANGLE = range(12)
_TOP, _LEFT, _AREA = 12, 13, 14
_RATIO = _AREA + _CROP_ATTEMPTS
_SLOTS = _RATIO + _CROP_ATTEMPTS


@dataclass(frozen=True)
class ViewParams:
    """Parameters of n views: a struct of arrays with one row per view."""

    box: np.ndarray  # (n, 4) float64 top, left, height, width; in pixels, or without sizes in a unit square
    flip: np.ndarray  # (n,) bool
    angle: np.ndarray  # (n,) float64 degrees, counter-clockwise; 0: none
    jitter: np.ndarray  # (n,) bool: whether the next five apply
    order: np.ndarray  # (n, 4) int64: operations (0 brightness, 1 contrast, 2 saturation, 3 hue) in order
    brightness: np.ndarray  # (n,) float64 factor; likewise contrast and saturation
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray  # (n,) float64 turns
    grayscale: np.ndarray  # (n,) bool
    blur_sigma: np.ndarray  # (n,) float64 pixels; 0: no blur
    solarize: np.ndarray  # (n,) bool

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, index: slice | np.ndarray) -> ViewParams:
        """The views of a slice or an index array."""
        return ViewParams(**{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class ViewPlan:
    """All views of a run: `draw` is a pure function of its arguments, the spec and the seed."""

    spec: ViewSpec
    seed: int

    def draw(self, epoch: int, samples: np.ndarray, view: int, sizes: np.ndarray | None = None) -> ViewParams:
        """Parameters of one view of each sample.

        Args:
            epoch: 0 <= epoch < 2**32.
            samples: (n,) sample ids in [0, 2**32).
            view: 0, 1, ... < 2**16.
            sizes: (n, 2) integer height and width of the images; boxes are then in whole pixels. Without sizes, boxes
                are drawn in a unit square. These are not the same crops rescaled, since whether a crop is accepted
                depends on the aspect ratio.

        Returns:
            ViewParams with n rows.

        Raises:
            FastclError: a value outside its range.
        """
        samples = np.asarray(samples)
        if samples.ndim != 1:
            raise FastclError(f"samples must have shape (n,), got {samples.shape}")
        sizes = None if sizes is None else np.asarray(sizes)
        if sizes is not None and sizes.shape != (len(samples), 2):
            raise FastclError(f"sizes must have shape ({len(samples)}, 2), got {sizes.shape}")
        if sizes is not None and sizes.size and (sizes.dtype.kind not in "iu" or sizes.min() < 1):
            raise FastclError(f"sizes must be integers >= 1, got {sizes.dtype} with minimum {sizes.min()}")
        starts = range(0, max(1, len(samples)), _CHUNK)
        parts = [
            self._draw(epoch, samples[k : k + _CHUNK], view, None if sizes is None else sizes[k : k + _CHUNK])
            for k in starts
        ]
        return ViewParams(
            **{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(ViewParams)}
        )

    def _draw(self, epoch: int, samples: np.ndarray, view: int, sizes: np.ndarray | None) -> ViewParams:
        spec = self.spec
        u = uniforms(_SLOTS, seed=self.seed, stream=Stream.VIEW, index=samples, epoch=epoch, view=view)

        def factor(slot: int, strength: float) -> np.ndarray:
            low = max(0.0, 1 - strength)
            return low + u[:, slot] * (1 + strength - low)

        low, high = spec.blur_sigma
        sigma = low + u[:, _SIGMA] * (high - low)
        return ViewParams(
            box=_crop_boxes(u, spec, sizes),
            flip=u[:, _FLIP] < spec.flip,
            angle=(2 * u[:, _ANGLE] - 1) * spec.rotation,
            jitter=u[:, _JITTER] < spec.jitter,
            order=_ORDERS[(u[:, _ORDER] * len(_ORDERS)).astype(np.int64)],
            brightness=factor(_BRIGHTNESS, spec.brightness),
            contrast=factor(_CONTRAST, spec.contrast),
            saturation=factor(_SATURATION, spec.saturation),
            hue=(2 * u[:, _HUE] - 1) * spec.hue,
            grayscale=u[:, _GRAY] < spec.grayscale,
            blur_sigma=np.where(u[:, _BLUR] < spec.blur, sigma, 0.0),
            solarize=u[:, _SOLARIZE] < spec.solarize,
        )


def center_view(spec: ViewSpec, sizes: np.ndarray) -> ViewParams:
    """The view used for evaluation: a central square crop (the whole image if eval_crop is 1), colours unchanged.

    Args:
        sizes: (n, 2) integer height and width.
    """
    n = len(sizes)
    extent = np.asarray(sizes, np.float64)
    if spec.eval_crop < 1:
        extent = np.repeat(np.rint(spec.eval_crop * extent.min(1))[:, None], 2, axis=1).clip(1)
    corner = np.floor((sizes - extent) / 2)
    no, one = np.zeros(n, bool), np.ones(n)
    return ViewParams(
        box=np.concatenate([corner, extent], 1), flip=no, angle=np.zeros(n), jitter=no,
        order=np.repeat(_ORDERS[:1], n, 0), brightness=one, contrast=one, saturation=one, hue=np.zeros(n),
        grayscale=no, blur_sigma=np.zeros(n), solarize=no,
    )  # fmt: skip


def _crop_boxes(u: np.ndarray, spec: ViewSpec, sizes: np.ndarray | None) -> np.ndarray:
    """Random resized crops as in torchvision: the first of ten attempts that fits, otherwise a central crop."""
    snap = np.rint if sizes is not None else np.asarray
    height, width = np.ones((2, len(u))) if sizes is None else np.asarray(sizes, np.float64).T
    area = (spec.scale[0] + u[:, _AREA:_RATIO] * (spec.scale[1] - spec.scale[0])) * (height * width)[:, None]
    low, high = np.log(spec.ratio)
    ratio = np.exp(low + u[:, _RATIO:_SLOTS] * (high - low))
    w, h = snap(np.sqrt(area * ratio)), snap(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.argmax(1)[:, None]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    # No attempt fits: take the largest central crop with an allowed aspect ratio.
    central = ~fits.any(1)
    w = np.where(central, np.minimum(width, snap(height * spec.ratio[1])), w)
    h = np.where(central, np.minimum(height, snap(width / spec.ratio[0])), h)
    if sizes is not None:  # a thin image and narrow ratios can round to zero pixels
        w, h = np.maximum(w, 1), np.maximum(h, 1)
    room_h, room_w = height - h, width - w
    if sizes is None:
        top, left = u[:, _TOP] * room_h, u[:, _LEFT] * room_w
    else:
        top, left = np.floor(u[:, _TOP] * (room_h + 1)), np.floor(u[:, _LEFT] * (room_w + 1))
    top, left = np.where(central, snap(room_h / 2), top), np.where(central, snap(room_w / 2), left)
    return np.stack([top, left, h, w], 1)
