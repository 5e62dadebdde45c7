"""The sweeps of the reproduction: a row for each, all else is `fastcl sweep`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fastcl.choices import Equal

OMNIGLOT, CIFAR10, FRUITS = "omniglot_105.npz", "cifar10_jpeg75.npz", "fruits65.zip"
PAPER, PUBLISHED = ("dcl", "nscl"), ("ntxent", "nscl_with_positive")
# The pairs of objectives whose alignment the paper is about: its formulas, and those of the code published with it.
FAMILIES = {"paper": PAPER, "code": PUBLISHED}
BATCH_RULE = "lr_rule"

# Settings of every run. An hour and a half on two cores for all of them allows a small network.
NETWORK = (
    "model.cifar_stem=false",
    'model.options={ layers = [1, 1, 1, 1], channels = [16, 32, 64, 128], stem_type = "deep", stem_width = 8 }',
    'train.controls=["reseeded"]',
    "train.device=cpu",
)
_COLOUR = ("data.classes=none", "views.preset=cifar", "views.size=32")


@dataclass(frozen=True)
class Experiment:
    """One sweep.

    Attributes:
        name: also that of its folder.
        data: file of its images.
        models: objectives that are trained side by side.
        settings: overrides of the config, "KEY=VALUE".
        over: swept keys, "KEY=V1,V2,...".
        equal: what is equal in all cells.
        seeds: of each cell.
    """

    name: str
    data: str
    models: tuple[str, ...]
    settings: tuple[str, ...]
    over: tuple[str, ...] = ()
    equal: Equal = "epochs"
    seeds: int = 3


def _lasting(epochs: int, every: int) -> tuple[str, ...]:
    return (f"train.epochs={epochs}", f"train.eval_every={every}", f"train.checkpoint_every={epochs}")


def _objectives(suffix: str, family: tuple[str, str]) -> Iterator[Experiment]:
    """All objectives side by side on each data set."""
    models = (*family, "supcon", "ce")
    for name, data, settings in (
        ("omniglot", OMNIGLOT, _lasting(24, 4)),
        ("cifar10", CIFAR10, (*_COLOUR, *_lasting(15, 3))),
        ("fruits", FRUITS, (*_COLOUR, *_lasting(20, 4))),
    ):
        yield Experiment(f"{name}{suffix}", data, models, settings)


_BOTH = PAPER + PUBLISHED
EXPERIMENTS = (
    *_objectives("", PAPER),
    Experiment("cifar10-classes", CIFAR10, _BOTH, (*_COLOUR, *_lasting(10, 5)), ("data.classes=2,4,6,8,10",), "steps"),
    Experiment("omniglot-classes", OMNIGLOT, _BOTH, ("data.test_fraction=0.5", "train.batch_size=64", *_lasting(24, 6)),
        ("data.classes=10,50,200,1000",), "steps"),
    Experiment("omniglot-temperature", OMNIGLOT, _BOTH, _lasting(16, 4), ("train.temperature=0.1,0.5,1.0",)),
    Experiment("cifar10-temperature", CIFAR10, _BOTH, (*_COLOUR, *_lasting(10, 5)), ("train.temperature=0.1,0.5,1.0",)),
    Experiment("omniglot-batch", OMNIGLOT, PAPER, _lasting(16, 4),
        ("train.batch_size=64,128,256", f"{BATCH_RULE}=linear,sqrt,fourth-root")),
    # 20 images to train on, in batches of 16, and 20 to look at: too few for the other cells of omniglot-classes.
    Experiment("omniglot-two-classes", OMNIGLOT, _BOTH, ("data.classes=2", "data.test_fraction=0.5",
        "train.batch_size=16", "optim.warmup_epochs=31", *_lasting(744, 186))),
    *_objectives("-published", PUBLISHED),
)  # fmt: skip

DIGITS = "digits"
_TINY = (
    "data.source=digits",
    "data.classes=3",
    "views.preset=characters",
    "views.size=8",
    'model.options={ layers = [1, 1, 1, 1], channels = [8, 8, 8, 16], stem_type = "deep", stem_width = 4 }',
    "train.batch_size=64",
    *_lasting(2, 1),
)
_TINY_OVER = {
    "data.classes": "2,4",
    "train.temperature": "0.1,1.0",
    "train.batch_size": "32,64",
    BATCH_RULE: "linear,sqrt,fourth-root",
}


def tiny(experiment: Experiment) -> Experiment:
    """The same sweep on scikit-learn's digits: seconds a run, to see that all works."""
    keys = [item.partition("=")[0] for item in experiment.over]
    over = tuple(f"{key}={_TINY_OVER[key]}" for key in keys)
    return replace(experiment, data=DIGITS, settings=_TINY, over=over, seeds=2)
