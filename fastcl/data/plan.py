"""The view plan: augmentation parameters as data, each a pure function of (seed, epoch, sample, view).

Nothing here looks at pixels. Renderers apply a plan and draw nothing, so every model, batch size, worker count, rank
and resume point sees the same views.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypedDict, cast

import numpy as np

from fastcl.data.philox import Stream, uniforms
from fastcl.errors import FastclError, suggest


class _Stats(TypedDict):
    mean: tuple[float, ...]
    std: tuple[float, ...]


_CIFAR_STATS: _Stats = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
_IMAGENET_STATS: _Stats = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_LARGEST = 1e12  # of a field of ViewSpec
_WIDEST = 4096  # pixels of a view: 64 MiB a channel in float32
_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
_CHUNK = 2048  # samples drawn at a time: their random words stay in a core's cache, whatever the number of samples
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int64)

# Each parameter has its own random word: switching one option on or off leaves all others as they were.
_FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _ORDER, _GRAY, _BLUR, _SIGMA, _SOLARIZE, _ANGLE = range(12)
_TOP, _LEFT, _AREA = 12, 13, 14
_RATIO = _AREA + _CROP_ATTEMPTS
_SLOTS = _RATIO + _CROP_ATTEMPTS


@dataclass(frozen=True)
class ViewSpec:
    """What a random view is drawn from. Probabilities and strengths as torchvision's transforms define them.

    Order of operations: crop and resize, flip, rotation, colour jitter in a drawn order, grayscale, blur, solarise,
    normalise.

    Raises:
        FastclError: a value of another type, a probability outside [0, 1], an empty or reversed range, a size or kernel
            that cannot be.
    """

    size: int = 32  # pixels, square
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area that a crop takes
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of a crop
    flip: float = 0.5  # probability, horizontal
    rotation: float = 0.0  # degrees, uniform in [-rotation, rotation]
    jitter: float = 0.8  # probability of the four colour operations
    brightness: float = 0.4  # factor uniform in [max(0, 1 - b), 1 + b]; so contrast and saturation
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # shift uniform in [-hue, hue] turns
    grayscale: float = 0.2  # probability
    blur: float = 0.0  # probability
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    blur_kernel: int = 3  # pixels, odd
    solarize: float = 0.0  # probability, threshold 128 of 255
    mean: tuple[float, ...] = (0.5,)  # one value for all channels, or one each
    std: tuple[float, ...] = (0.5,)
    eval_crop: float = 1.0  # side of the central square crop that evaluation takes, as a share of the shorter side

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_type(f.name, getattr(self, f.name), f.default)
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise FastclError(f"views.{name} must be a probability in [0, 1], got {getattr(self, name)}")
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise FastclError(f"views.{name} must be (low, high) with 0 < low <= high, got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation", "rotation"):
            if getattr(self, name) < 0:
                raise FastclError(f"views.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise FastclError(f"views.hue must lie in [0, 0.5] turns, got {self.hue}")
        if self.size > _WIDEST:
            raise FastclError(f"views.size must be at most {_WIDEST} pixels, got {self.size}")
        if self.size < 2 or not 0 < self.eval_crop <= 1 or self.scale[1] > 1:
            raise FastclError(
                f"views.size must be at least 2, eval_crop in (0, 1] and scale at most 1; "
                f"got {self.size}, {self.eval_crop} and {self.scale}"
            )
        if self.blur_kernel % 2 == 0 or self.blur_kernel < 1 or (self.blur and self.blur_kernel >= 2 * self.size):
            raise FastclError(
                f"views.blur_kernel must be odd and, where views blur, below 2 * size; got {self.blur_kernel} "
                f"for {self.size} pixels"
            )
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise FastclError(f"views.mean and std must have one length and std be positive: {self.mean}, {self.std}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ViewSpec:
        """A known recipe, with fields replaced.

        Args:
            name: "cifar", "tiny-imagenet", "imagenet" (as the code of arXiv 2510.08852 has them), "simclr" (Chen et al.
                2020, 224 pixels), or "characters" (grey glyphs: no flip, no colour).
            overrides: fields of ViewSpec.

        Raises:
            FastclError: an unknown preset or field (the nearest known one is named).
        """
        if name not in PRESETS:
            raise FastclError(f"unknown view preset {name!r}{suggest(name, PRESETS)}")
        known = [f.name for f in dataclasses.fields(cls)]
        for key in overrides:
            if key not in known:
                raise FastclError(f"unknown key 'views.{key}'{suggest(key, known)}")
        return dataclasses.replace(PRESETS[name], **overrides)


def _check_type(name: str, value: Any, default: object) -> None:
    """A field's value is of its default's form, an integer, a number or a tuple of numbers, and finite."""
    kind, form, items = Real, "a number", (value,)
    if isinstance(default, int):
        kind, form = Integral, "an integer"
    elif isinstance(default, tuple):
        pair = len(default) == 2  # a range; else one value a channel
        form = f"a tuple of {'two numbers' if pair else 'numbers'}"
        items = value if isinstance(value, tuple) and (len(value) == 2 if pair else value) else cast(Any, (None,))
    if not all(isinstance(v, kind) and not isinstance(v, bool) for v in items):
        raise FastclError(f"views.{name} must be {form}, got {value!r}")
    if not all(-_LARGEST < v < _LARGEST for v in items):  # NaN does not
        raise FastclError(f"views.{name} must be finite, got {value}")


PRESETS: dict[str, ViewSpec] = {
    "cifar": ViewSpec(size=32, **_CIFAR_STATS),
    "tiny-imagenet": ViewSpec(size=64, **_IMAGENET_STATS),
    "imagenet": ViewSpec(
        size=224, jitter=1.0, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.1, blur_sigma=(1.5, 1.5),
        eval_crop=0.875, **_IMAGENET_STATS,
    ),
    "simclr": ViewSpec(
        size=224, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5, blur_kernel=23, eval_crop=0.875,
        **_IMAGENET_STATS,
    ),
    "characters": ViewSpec(size=28, scale=(0.4, 1.0), flip=0.0, rotation=15.0, jitter=0.0, grayscale=0.0),
}  # fmt: skip


@dataclass(frozen=True)
class ViewParams:
    """Parameters of n views: a struct of arrays, one row a view. Neutral values change nothing."""

    box: np.ndarray  # (n, 4) float64 top, left, height, width; pixels, or shares of a unit square without sizes
    flip: np.ndarray  # (n,) bool
    angle: np.ndarray  # (n,) float64 degrees, counter-clockwise; 0 is neutral
    jitter: np.ndarray  # (n,) bool: whether the next five apply
    order: np.ndarray  # (n, 4) int64: the operation (0 brightness, 1 contrast, 2 saturation, 3 hue) at each place
    brightness: np.ndarray  # (n,) float64 factor; so contrast and saturation
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray  # (n,) float64 turns
    grayscale: np.ndarray  # (n,) bool
    blur_sigma: np.ndarray  # (n,) float64 pixels; 0 is no blur
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
            sizes: (n, 2) integer height and width of the images; boxes are then whole pixels. Without sizes boxes are
                shares of a unit square, since a crop's acceptance depends on the aspect ratio.

        Returns:
            ViewParams of n rows.

        Raises:
            FastclError: a value outside its range.
        """
        samples = np.asarray(samples)
        if samples.ndim != 1:
            raise FastclError(f"samples must be (n,) sample ids, got {samples.shape}")
        sizes = None if sizes is None else np.asarray(sizes)
        if sizes is not None and sizes.shape != (len(samples), 2):
            raise FastclError(f"sizes must be ({len(samples)}, 2) for {len(samples)} samples, got {sizes.shape}")
        if sizes is not None and sizes.size and (sizes.dtype.kind not in "iu" or sizes.min() < 1):
            raise FastclError(f"sizes must be whole pixels, at least 1; got {sizes.dtype} from {sizes.min()}")
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
    """The view that evaluation takes: a central square crop (the whole image where eval_crop is 1), colours kept.

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
    """Random resized crops as torchvision draws them: the first of ten attempts that fits, else a central crop."""
    snap = np.rint if sizes is not None else np.asarray
    height, width = np.ones((2, len(u))) if sizes is None else np.asarray(sizes, np.float64).T
    area = (spec.scale[0] + u[:, _AREA:_RATIO] * (spec.scale[1] - spec.scale[0])) * (height * width)[:, None]
    low, high = np.log(spec.ratio)
    ratio = np.exp(low + u[:, _RATIO:_SLOTS] * (high - low))
    w, h = snap(np.sqrt(area * ratio)), snap(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.argmax(1)[:, None]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    # No attempt fits: the largest central crop whose ratio is allowed.
    central = ~fits.any(1)
    w = np.where(central, np.minimum(width, snap(height * spec.ratio[1])), w)
    h = np.where(central, np.minimum(height, snap(width / spec.ratio[0])), h)
    if sizes is not None:  # a thin image and narrow ratios round to no pixel at all
        w, h = np.maximum(w, 1), np.maximum(h, 1)
    room_h, room_w = height - h, width - w
    if sizes is None:
        top, left = u[:, _TOP] * room_h, u[:, _LEFT] * room_w
    else:
        top, left = np.floor(u[:, _TOP] * (room_h + 1)), np.floor(u[:, _LEFT] * (room_w + 1))
    top, left = np.where(central, snap(room_h / 2), top), np.where(central, snap(room_w / 2), left)
    return np.stack([top, left, h, w], 1)
