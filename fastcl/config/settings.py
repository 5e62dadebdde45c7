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
    root: str | None = key(None, "folder of the torchvision data set")
    download: bool = key(False, "whether torchvision may download the data set into root")
    classes: int | None = key(None, "number of classes, the first of a seeded permutation; none: all")
    test_fraction: float = key(0.2, "fraction of each class to hold out if the source has no test split")
    test_images: int | None = key(
        None, "maximum number of held-out images, so that runs are evaluated on equally many; none: all"
    )
    order: str = key(
        "shuffled", "shuffled | balanced: images are drawn with probability inverse to the size of their class"
    )
    corrupt: str = key(
        "stop", "if an image cannot be decoded: stop | skip: check all images first, leave out the bad ones"
    )
    max_pixels: int = key(MAX_PIXELS, "maximum pixels per image; larger images count as undecodable")
    renderer: str = key(
        "auto", "torchvision | dali | triton | auto: the fastest that supports the device and the images"
    )
    workers: int | None = key(
        None, "worker processes that render ahead (dali, triton: a thread); none: 0 on a CPU, else cores - 1"
    )


@dataclass(frozen=True)
class ModelConfig:
    """The encoder (timm) and the SimCLR projector."""

    name: str = key("resnet18", "name of a timm model")
    options: dict[str, Any] = key({}, "extra arguments for timm.create_model")
    cifar_stem: bool = key(True, "ResNets only: 3 x 3 stride-1 first convolution, no max-pool")
    hidden: int = key(2048, "width of the projector's hidden layer")
    projection: int = key(128, "width of the embeddings passed to the loss")


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule: linear warm-up, then cosine to zero, per step."""

    name: str = key("lars", "lars | sgd | adamw")
    lr: float = key(1.2, "peak learning rate")
    momentum: float = key(0.9, "momentum of lars and sgd")
    weight_decay: float = key(1e-6, "weight decay, for all weights except biases and norms")
    fused: bool = key(True, "on a GPU, sgd and adamw update all weights of a model in one kernel; lars has none")
    warmup_epochs: float = key(10.0, "epochs of linear warm-up to the peak learning rate")


@dataclass(frozen=True)
class TrainConfig:
    """Which models, and for how long."""

    models: tuple[str, ...] = key(
        ("dcl", "nscl", "supcon", "ce"),
        "one model each: names from fastcl.OBJECTIVES, or ce (cross-entropy); the first is the reference",
    )
    controls: tuple[str, ...] = key(
        ("identity", "reseeded"),
        "extra copies of the reference: identity (must stay equal), reseeded (sees other views)",
    )
    temperature: float = key(0.5, "temperature of the contrastive losses")
    precision: str = key(
        "fp32", "precision of the networks in training: fp32 | bf16 (autocast); losses and evaluation stay fp32"
    )
    batch_size: int = key(256, "images per batch; the last incomplete batch of an epoch is dropped")
    micro_batch: int | None = key(
        None, "images whose activations are held at a time, by a second forward pass; none: the whole batch"
    )
    joint_views: bool = key(
        True, "both views of a batch in one forward pass; false: one pass each, with batch statistics of their own"
    )
    compile: bool = key(False, "whether torch.compile compiles the networks for their training steps")
    epochs: int = key(100, "passes over the training images")
    eval_every: int = key(1, "epochs between evaluations; epoch 0 and the last are always evaluated")
    checkpoint_every: int = key(1, "epochs between checkpoints")
    log_every: int = key(
        10, "steps between reads of the measured values: progress bar, curves, check that they are finite"
    )
    layers: tuple[str, ...] = key(
        (), "layers compared by CKA at the end: names or patterns such as encoder.layer*; empty: the stages"
    )
    seed: int = key(0, "seed of the initial weights, views, batches and random splits")
    device: str = key("auto", "auto | cpu | cuda")
    timeout: float = key(600.0, "seconds that the ranks of a run under torchrun wait for each other before it ends")


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
