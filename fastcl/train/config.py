"""A run as one tree of frozen dataclasses, read from TOML and `--set key=value`."""

from __future__ import annotations

import dataclasses
import math
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastcl.data.plan import ViewSpec
from fastcl.errors import FastclError, suggest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file.

    Args:
        path: the file. Its tables are data, views (with `preset = NAME` to start from a known recipe), model, optim and
            train.
        overrides: "table.key=value" items, which win; the value is TOML, or a bare string.

    Raises:
        FastclError: a file that cannot be read or parsed, an unknown key (the nearest known one is named), a value of
            the wrong type or out of range.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FastclError(f"cannot read config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FastclError(f"config {path} is not valid TOML: {error}") from None
    for item in overrides or []:
        _override(tables, item)
    return parse_config(tables)


def parse_config(tables: dict[str, Any]) -> Config:
    """A Config from nested tables. Raises FastclError as `load_config`."""
    sections = {f.name: typing.get_type_hints(Config)[f.name] for f in dataclasses.fields(Config)}
    _check_known(tables, sections, "")
    parts: dict[str, Any] = {}
    for name, kind in sections.items():
        table = tables.get(name, {})
        if not isinstance(table, dict):
            raise FastclError(f"{name} must be a table, got {table!r}")
        table = dict(table)
        preset = table.pop("preset", None) if kind is ViewSpec else None
        if not isinstance(preset, str | None):
            raise FastclError(f"views.preset must be a name, got {preset!r}")
        hints = typing.get_type_hints(kind)
        _check_known(table, hints, f"{name}.")
        values = {key: _convert(value, hints[key], f"{name}.{key}") for key, value in table.items()}
        parts[name] = kind(**values) if preset is None else ViewSpec.preset(preset, **values)
    config = Config(**parts)
    _check_ranges(config)
    return config


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


def _override(tables: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise FastclError(f"--set takes table.key=value, got {item!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = tables
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise FastclError(f"--set {item}: {part!r} is not a table")
    table[parts[-1]] = value


def _check_known(table: dict[str, Any], known: dict[str, Any], prefix: str) -> None:
    for key in table:
        if key not in known:
            raise FastclError(f"unknown key '{prefix}{key}'{suggest(key, known, prefix)}")


def _convert(value: Any, hint: Any, name: str) -> Any:
    """A TOML value as the field's type; numbers are not taken for booleans nor strings for numbers."""
    options = typing.get_args(hint) if typing.get_origin(hint) not in (tuple, dict) else ()
    base = next((o for o in options if o is not type(None)), hint)
    if value == "none" and type(None) in options:
        return None
    if typing.get_origin(base) is tuple:
        if isinstance(value, list):
            kinds = [k for k in typing.get_args(base) if k is not Ellipsis]
            fixed = Ellipsis not in typing.get_args(base)
            if not fixed or len(value) == len(kinds):
                kinds = kinds if fixed else kinds * len(value)
                return tuple(_convert(v, k, f"{name}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
        raise FastclError(f"{name} must be a list of the form {base}, got {value!r}")
    plain = typing.get_origin(base) or base
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise FastclError(f"{name} must be {plain.__name__}, got {value!r}")
    if plain is float and not math.isfinite(value):
        raise FastclError(f"{name} must be finite, got {value}")
    return value


def _check_ranges(config: Config) -> None:
    train, optim, model = config.train, config.optim, config.model
    positive = {
        "train.batch_size": train.batch_size - 1,  # one sample has no negatives
        "train.epochs": train.epochs,
        "train.eval_every": train.eval_every,
        "train.checkpoint_every": train.checkpoint_every,
        "train.temperature": train.temperature,
        "optim.lr": optim.lr,
        "model.hidden": model.hidden,
        "model.projection": model.projection,
    }
    for name, value in positive.items():
        if not value > 0:
            table, key = name.split(".")
            raise FastclError(f"{name} is too small: {getattr(getattr(config, table), key)}")
    for key in ("warmup_epochs", "weight_decay", "momentum"):
        if getattr(optim, key) < 0:
            raise FastclError(f"optim.{key} must not be negative, got {getattr(optim, key)}")
    if train.precision not in PRECISIONS:
        raise FastclError(f"train.precision must be one of {', '.join(PRECISIONS)}; got {train.precision!r}")
    if not 0 <= train.seed < 1 << 32:
        raise FastclError(f"train.seed must lie in [0, 2**32), got {train.seed}")
