"""The config of a run: a tree of frozen dataclasses. `tables` reads it from TOML and `--set key=value`."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from fastcl.config.keys import key
from fastcl.config.view_spec import ViewSpec

PRECISIONS = ("fp32", "bf16")
MAX_PIXELS = 1 << 26  # default limit per image: 8,192 x 8,192; decoding takes about 7 bytes per pixel


@dataclass(frozen=True)
class DataConfig:
    """Where images come from; see `fastcl.data.load`."""

    source: str = key("digits", "digits | folder:PATH | torchvision:NAME | cifar10:FILE.npz | omniglot:FILE.npz")
    root: str | None = key(None, "folder of torchvision data sets")
    download: bool = key(False, "let torchvision download the data set into root")
    classes: int | None = key(None, "how many classes, the first of a seeded permutation; none: all")
    test_fraction: float = key(0.2, "share of each class that is held out, where the source has no split of its own")
    order: str = key("shuffled", "shuffled | balanced: draw batches with probabilities inverse to the class sizes")
    corrupt: str = key(
        "stop", "at an image that cannot be decoded: stop | skip: check all first, leave the bad ones out"
    )
    max_pixels: int = key(MAX_PIXELS, "an image with more pixels counts as one that cannot be decoded")
    renderer: str = key("auto", "torchvision | dali | triton | auto: the fastest that device and images allow")
    workers: int | None = key(
        None, "processes that render ahead (dali, triton: a thread); none: 0 on a CPU, else cores - 1"
    )


@dataclass(frozen=True)
class ModelConfig:
    """The encoder (timm) and the SimCLR projector."""

    name: str = key("resnet18", "a model of timm")
    options: dict[str, Any] = key({}, "further arguments of timm.create_model")
    cifar_stem: bool = key(True, "of a ResNet: 3 x 3 stride-1 first convolution and no max-pool")
    hidden: int = key(2048, "width of the projector's hidden layer")
    projection: int = key(128, "width of the embeddings that enter the loss")


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule: linear warm-up, then cosine to zero, per step."""

    name: str = key("lars", "lars | sgd | adamw")
    lr: float = key(1.2, "peak of the learning rate")
    momentum: float = key(0.9, "of lars and sgd")
    weight_decay: float = key(1e-6, "of all weights but biases and norms")
    warmup_epochs: float = key(10.0, "epochs in which the learning rate rises to its peak")


@dataclass(frozen=True)
class TrainConfig:
    """Which models, and for how long."""

    models: tuple[str, ...] = key(
        ("dcl", "nscl", "supcon", "ce"), "names of fastcl.OBJECTIVES, or ce: cross-entropy; the first is the reference"
    )
    controls: tuple[str, ...] = key(
        ("identity", "reseeded"), "copies of the reference: identity must equal it, reseeded sees other views"
    )
    temperature: float = key(0.5, "of the contrastive losses")
    precision: str = key(
        "fp32", "of the networks in training: fp32 | bf16, by autocast; losses and evaluations stay fp32"
    )
    batch_size: int = key(256, "images in a batch; an epoch leaves out the last incomplete one")
    epochs: int = key(100, "passes over the training images")
    eval_every: int = key(1, "epochs between evaluations; epoch 0 and the last are always measured")
    checkpoint_every: int = key(1, "epochs between checkpoints")
    layers: tuple[str, ...] = key(
        (), "names or patterns for the layers' CKA at the end, such as encoder.layer*; empty: the stages"
    )
    seed: int = key(0, "of initial weights, views, batches and drawn splits")
    device: str = key("auto", "auto | cpu | cuda")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    views: ViewSpec = field(default_factory=ViewSpec)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def tables_of() -> dict[str, type]:
    """The dataclass of each table of a config."""
    return {f.name: typing.get_type_hints(Config)[f.name] for f in dataclasses.fields(Config)}
