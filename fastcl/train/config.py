"""A run as one tree of frozen dataclasses; `tables` reads it from TOML and `--set key=value`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fastcl.data.limits import MAX_PIXELS
from fastcl.data.plan import ViewSpec

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from; see `fastcl.data.load`."""

    source: str = "digits"  # digits | omniglot:PATH | cifar10:PATH | folder:PATH | torchvision:NAME
    root: str | None = None  # folder of torchvision data sets
    download: bool = False
    classes: int | None = None  # the first so many of a seeded permutation of the classes; none: all
    test_fraction: float = 0.2  # of each class, where the source has no split of its own
    order: str = "shuffled"  # or "balanced"
    corrupt: str = "stop"  # at an image that cannot be decoded; or "skip": all are checked first, the bad ones left out
    max_pixels: int = MAX_PIXELS  # of an image; one with more counts as one that cannot be decoded
    renderer: str = "auto"  # torchvision | dali | triton; auto: the fastest that device and images allow
    workers: int | None = None  # that render ahead, see `ViewLoader`; none: 0 on a CPU, else the cores less one


@dataclass(frozen=True)
class ModelConfig:
    """The encoder (timm) and the SimCLR projector."""

    name: str = "resnet18"
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of timm.create_model
    cifar_stem: bool = True  # 3 x 3 stride-1 first convolution and no max-pool
    hidden: int = 2048  # width of the projector's hidden layer
    projection: int = 128  # width of the embeddings that enter the loss


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule: linear warm-up, then cosine to zero, per step."""

    name: str = "lars"  # lars | sgd | adamw
    lr: float = 1.2  # peak
    momentum: float = 0.9  # lars and sgd
    weight_decay: float = 1e-6
    warmup_epochs: float = 10.0


@dataclass(frozen=True)
class TrainConfig:
    """Which models, and for how long."""

    models: tuple[str, ...] = ("dcl", "nscl", "supcon", "ce")  # the first is the reference
    controls: tuple[str, ...] = ("identity", "reseeded")  # copies of the reference
    temperature: float = 0.5
    precision: str = "fp32"  # of the networks in training; or "bf16", by autocast: losses and evaluations stay fp32
    batch_size: int = 256
    epochs: int = 100
    eval_every: int = 1  # epochs; epoch 0 and the last are always measured
    checkpoint_every: int = 1  # epochs
    layers: tuple[str, ...] = ()  # names or patterns for the layers' CKA at the end (encoder.layer*); empty: the stages
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    views: ViewSpec = field(default_factory=ViewSpec)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up to the peak over warmup_epochs, then half a cosine that reaches 0 as the run ends.

    Args:
        step: from 0, over the whole run.
    """
    warmup = config.optim.warmup_epochs * steps_per_epoch
    if step + 1 < warmup:
        return config.optim.lr * (step + 1) / warmup
    total = config.train.epochs * steps_per_epoch
    return config.optim.lr * 0.5 * (1 + math.cos(math.pi * max(0.0, step - warmup) / max(1.0, total - warmup)))
