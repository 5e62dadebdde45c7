"""The published curves of alignment, each with the settings that it was made with.

The numbers are in `targets.json`; the settings are those of a preset of fastcl, with a few keys replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from fastcl.config.settings import Config
from fastcl.config.tables import load_config
from fastcl.config.written import preset_file, toml
from fastcl.errors import FastclError, suggest

MEASURES = {"cka": "CKA", "rsa": "RSA"}  # as a run's records name them
HELD_OUT, TRAINING = "test", "train"


@dataclass(frozen=True)
class Curve:
    """Alignment of one supervised model with CL over training.

    Attributes:
        measure: "cka" (linear, biased) or "rsa" (cosine, Pearson).
        model: "nscl", "supcon" (the paper's SCL) or "ce".
        split: the images measured on, "train" or "test".
        points: completed epochs -> value, ascending.
        misplaced: points that the figure draws at epochs that are not theirs; they are in no comparison.
    """

    measure: str
    model: str
    split: str
    points: dict[int, float]
    misplaced: dict[int, float] = field(default_factory=dict)

    def at(self, epoch: int) -> float | None:
        """The value at an epoch, between two published ones by linear interpolation; None outside of them."""
        if epoch in self.points:
            return self.points[epoch]
        before = max((e for e in self.points if e < epoch), default=None)
        after = min((e for e in self.points if e > epoch), default=None)
        if before is None or after is None:
            return None
        share = (epoch - before) / (after - before)
        return (1 - share) * self.points[before] + share * self.points[after]


@dataclass(frozen=True)
class Target:
    """The curves of one published run.

    Attributes:
        name: as `fastcl compare --target` takes it.
        figure: of the paper.
        data: its data set: "cifar100", "mini-imagenet", "tiny-imagenet" or "imagenet-1k".
        classes: number of classes.
        preset: the preset of fastcl with its settings.
        overrides: "table.key" -> value, where it differs from the preset.
        error: of the numbers, from reading them off a picture.
        remarks: what is known to be wrong or doubtful about it.
        curves: one for each measure, model and split.
    """

    name: str
    figure: str
    data: str
    classes: int
    preset: str
    overrides: dict[str, Any]
    error: float
    remarks: tuple[str, ...]
    curves: tuple[Curve, ...]

    def config(self) -> Config:
        """Its settings, as far as fastcl has them."""
        with preset_file(self.preset) as path:
            return load_config(path, [f"{key}={toml(value)}" for key, value in self.overrides.items()])

    def curve(self, measure: str, model: str, split: str) -> Curve | None:
        """Its curve of a measure and a model on that split of the images, or else on the other one."""
        found = [curve for curve in self.curves if (curve.measure, curve.model) == (measure, model)]
        return next((curve for curve in found if curve.split == split), found[0] if found else None)

    def summary(self) -> str:
        """One line: what it shows, of which setting, and how far it goes."""
        t = self.config().train
        names = [MEASURES[key] for key in MEASURES if any(curve.measure == key for curve in self.curves)]
        models = list(dict.fromkeys(curve.model for curve in self.curves))
        epochs = [epoch for curve in self.curves for epoch in curve.points]
        rate = f", learning rate {self.overrides['optim.lr']:g}" if "optim.lr" in self.overrides else ""
        return (
            f"{self.figure}: {' and '.join(names)} of {', '.join(models)} with CL; {self.data}, {self.classes} "
            f"classes, temperature {t.temperature:g}, batch {t.batch_size}{rate}; epochs {min(epochs)} to {max(epochs)}"
        )


@dataclass(frozen=True)
class Published:
    """All that `targets.json` holds.

    Attributes:
        about: where the numbers come from.
        above: how far the published curves of held-out images lie above those of training images, least and most.
        targets: by name.
    """

    about: str
    above: tuple[float, float]
    targets: Mapping[str, Target]


@cache
def published() -> Published:
    """What has been published, read once."""
    tree = json.loads((resources.files("fastcl.paper") / "targets.json").read_text(encoding="utf-8"))
    errors, remarks = tree["reading_error"], tree["remarks"]
    found = {
        name: Target(
            name, one["figure"], one["data"], one["classes"], one["preset"], one["overrides"], errors[one["drawn"]],
            tuple(remarks[key] for key in one["remarks"]), tuple(map(_curve, one["curves"])),
        )
        for name, one in tree["targets"].items()
    }  # fmt: skip
    low, high = tree["held_out_above_train"]
    return Published(tree["about"], (low, high), found)


def targets() -> dict[str, Target]:
    """The published runs by name, in the order of their figures."""
    return dict(published().targets)


def target_named(name: str) -> Target:
    """A published run. Raises FastclError for an unknown name (and suggests the nearest one)."""
    found = published().targets.get(name)
    if found is None:
        raise FastclError(f"--target: unknown target {name!r}{suggest(name, published().targets)}")
    return found


def _curve(one: dict[str, Any]) -> Curve:
    points, misplaced = ({int(e): v for e, v in one.get(key, {}).items()} for key in ("points", "misplaced"))
    return Curve(one["measure"], one["model"], one["split"], points, misplaced)
