"""The distribution of random views, and known recipes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypedDict, cast

from fastcl.config.keys import key
from fastcl.errors import FastclError, suggest


class _Stats(TypedDict):
    mean: tuple[float, ...]
    std: tuple[float, ...]


_CIFAR_STATS: _Stats = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
_IMAGENET_STATS: _Stats = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_LARGEST = 1e12  # bound on the numbers in a ViewSpec
_WIDEST = 4096  # pixels per side of a view: 64 MiB per channel in float32


@dataclass(frozen=True)
class ViewSpec:
    """The distribution of random views. Probabilities and strengths are defined as in torchvision's transforms.

    Order of operations: crop and resize, flip, rotation, colour jitter in random order, grayscale, blur, solarise,
    normalise.

    Raises:
        FastclError: a value of the wrong type, a probability outside [0, 1], an empty or reversed range, an invalid
            size or kernel.
    """

    size: int = key(32, "side of a view in pixels; views are square")
    scale: tuple[float, float] = key((0.08, 1.0), "smallest and largest crop area, as a fraction of the image's area")
    ratio: tuple[float, float] = key((3 / 4, 4 / 3), "smallest and largest aspect ratio of a crop, width / height")
    flip: float = key(0.5, "probability of a horizontal flip")
    rotation: float = key(0.0, "largest rotation in degrees; the angle is uniform in [-rotation, rotation]")
    jitter: float = key(0.8, "probability of colour jitter: brightness, contrast, saturation and hue")
    brightness: float = key(0.4, "strength; the factor is uniform in [max(0, 1 - brightness), 1 + brightness]")
    contrast: float = key(0.4, "strength, as for brightness")
    saturation: float = key(0.4, "strength, as for brightness")
    hue: float = key(0.1, "largest hue shift in turns; the shift is uniform in [-hue, hue]")
    grayscale: float = key(0.2, "probability of conversion to greyscale")
    blur: float = key(0.0, "probability of a Gaussian blur")
    blur_sigma: tuple[float, float] = key((0.1, 2.0), "smallest and largest standard deviation of the blur, in pixels")
    blur_kernel: int = key(3, "side of the blur kernel in pixels, odd")
    solarize: float = key(0.0, "probability of solarisation: values from 128 of 255 up are inverted")
    mean: tuple[float, ...] = key(
        (0.5,), "mean to subtract from pixels in [0, 1]: one value for all channels or one per channel"
    )
    std: tuple[float, ...] = key(
        (0.5,), "standard deviation to divide by: one value for all channels or one per channel"
    )
    eval_crop: float = key(
        1.0, "side of the central square crop in evaluation, as a fraction of the image's shorter side"
    )

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
            raise FastclError(f"views.hue must be in [0, 0.5] turns, got {self.hue}")
        if not 2 <= self.size <= _WIDEST:
            raise FastclError(f"views.size must be in [2, {_WIDEST}] pixels, got {self.size}")
        if not 0 < self.eval_crop <= 1:
            raise FastclError(f"views.eval_crop must be in (0, 1], got {self.eval_crop}")
        if self.scale[1] > 1:
            raise FastclError(f"views.scale must be at most 1, got {self.scale}")
        if self.blur_kernel % 2 == 0 or self.blur_kernel < 1:
            raise FastclError(f"views.blur_kernel must be odd and positive, got {self.blur_kernel}")
        if self.blur and self.blur_kernel >= 2 * self.size:
            raise FastclError(
                f"views.blur_kernel must be less than 2 * views.size, got {self.blur_kernel} and size {self.size}"
            )
        if len(self.mean) != len(self.std):
            raise FastclError(f"views.mean and views.std must have the same length, got {self.mean} and {self.std}")
        if not all(s > 0 for s in self.std):
            raise FastclError(f"views.std must be positive, got {self.std}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ViewSpec:
        """A known recipe, with fields replaced.

        Args:
            name: "cifar", "tiny-imagenet", "imagenet" (these three as in the code of arXiv 2510.08852), "simclr" (Chen
                et al. 2020, 224 pixels), or "characters" (grey glyphs: no flip, no colour).
            overrides: fields of ViewSpec.

        Raises:
            FastclError: an unknown preset or field (the message suggests the nearest known one).
        """
        if name not in PRESETS:
            raise FastclError(f"unknown view preset {name!r}{suggest(name, PRESETS)}")
        known = [f.name for f in dataclasses.fields(cls)]
        for field in overrides:
            if field not in known:
                raise FastclError(f"unknown key 'views.{field}'{suggest(field, known)}")
        return dataclasses.replace(PRESETS[name], **overrides)


def _check_type(name: str, value: Any, default: object) -> None:
    """Check that a field's value is finite and of its default's kind: an integer, a number or a tuple of numbers."""
    kind, form, items = Real, "a number", (value,)
    if isinstance(default, int):
        kind, form = Integral, "an integer"
    elif isinstance(default, tuple):
        pair = len(default) == 2  # a range; otherwise one value per channel
        form = f"a tuple of {'two numbers' if pair else 'numbers'}"
        items = value if isinstance(value, tuple) and (len(value) == 2 if pair else value) else cast(Any, (None,))
    if not all(isinstance(v, kind) and not isinstance(v, bool) for v in items):
        raise FastclError(f"views.{name} must be {form}, got {value!r}")
    if not all(-_LARGEST < v < _LARGEST for v in items):  # False for NaN
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
