"""The networks: a timm encoder, the SimCLR projector, and a linear head for cross-entropy."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import timm
import torch
from torch import Tensor, nn

from fastcl import normalize_rows
from fastcl.config.settings import ModelConfig
from fastcl.errors import FastclError, brief

log = logging.getLogger("fastcl")
_OURS = ("in_chans", "num_classes", "model_name")  # arguments of timm.create_model that fastcl sets itself


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Use float32 and the CPU as PyTorch's defaults, whatever the process has set: modules and optimisers of timm and
    PyTorch create their tensors with these defaults."""
    dtype = torch.get_default_dtype()
    on_cpu = torch.get_default_device().type == "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with nullcontext() if on_cpu else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


class Network(nn.Module):
    """Encoder h = f(x), projector z = g(h), and for cross-entropy a linear head on the normalised rows of z.

    The head takes the normalised projection, as in the code of arXiv 2510.08852, so that all objectives train both
    encoder and projector.
    """

    def __init__(self, encoder: nn.Module, width: int, hidden: int, projection: int) -> None:
        super().__init__()
        self.encoder = encoder
        last = nn.BatchNorm1d(projection)
        last.bias.requires_grad_(False)
        self.projector = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, projection, bias=False),
            last,
        )
        self.head: nn.Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings (n, projection) of images (n, C, H, W)."""
        return self.projector(self.encoder(x))

    def logits(self, z: Tensor) -> Tensor:
        """Class logits (n, classes) of embeddings; the network must have a head."""
        return self.head(normalize_rows(z))


@plain_defaults()
def build_network(config: ModelConfig, channels: int, size: int, seed: int) -> Network:
    """A network with seeded weights.

    Args:
        config: names the timm model.
        channels, size: channels and side in pixels of the images.
        seed: seed of the initial weights.

    Raises:
        FastclError: timm does not know the model or an option, the model has no stem to replace by the CIFAR stem, or
            the encoder does not map images of that size to one vector each.
    """
    for option in _OURS:
        if option in config.options:
            raise FastclError(f"model.options.{option} is set from the data and the projector; leave it out")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            if _asks_hub(config):
                log.info("asking the model hub for %s; without a network this takes a minute", config.name)
            with quiet_hub():
                encoder = timm.create_model(config.name, in_chans=channels, num_classes=0, **config.options)
        except Exception as error:  # from timm, the hub that it fetches weights from, or a model's own code
            raise FastclError(_refusal(config, error)) from error
        if config.cifar_stem:
            _use_cifar_stem(encoder, config.name, channels)
        width = _width(encoder, config.name, channels, size)
        try:
            return Network(encoder, width, config.hidden, config.projection)
        except (RuntimeError, MemoryError) as error:
            raise FastclError(
                f"not enough memory for model.hidden = {config.hidden} and model.projection = {config.projection}"
            ) from error


def _asks_hub(config: ModelConfig) -> bool:
    return bool(config.options.get("pretrained")) or config.name.startswith(("hf-hub:", "hf_hub:"))


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the hub client's retry messages; without a network a single error is enough."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "timm")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _refusal(config: ModelConfig, error: Exception) -> str:
    asked, why = f"{config.name!r} with model.options = {brief(config.options)}", first_line(error)
    if _asks_hub(config) or "checkpoint_path" in config.options:
        return (
            f"timm cannot create {asked}, because it cannot get the weights or settings: {why.rstrip('.')}. "
            "Without a network, use a plain model name and load weights from a file with "
            'model.options = { checkpoint_path = "FILE" }'
        )
    return f"timm cannot create {asked}: {why}"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), "") or type(error).__name__


@plain_defaults()
def copy_network(network: Network, head_classes: int | None, seed: int) -> Network:
    """A copy of the network; with `head_classes` it also gets a head with that many logits, drawn from the seed."""
    twin = copy.deepcopy(network)
    if head_classes is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            twin.head = nn.Linear(network.projector[-1].num_features, head_classes)
    return twin


def _width(encoder: nn.Module, name: str, channels: int, size: int) -> int:
    """Width of the encoder's output, from a trial forward pass: timm's num_features is wrong for some models."""
    try:
        with torch.no_grad():
            h = encoder.eval()(torch.zeros(1, channels, size, size, dtype=torch.float32, device="cpu"))
    except Exception as error:  # a model's own code may raise anything
        why = first_line(error)
        raise FastclError(f"model {name!r} does not accept images of {size} x {size} pixels: {why}") from error
    encoder.train()
    if not isinstance(h, Tensor) or h.ndim != 2 or not h.shape[1]:
        gives = f"{tuple(h.shape[1:])}" if isinstance(h, Tensor) else f"a {type(h).__name__}"
        raise FastclError(f"model {name!r} must return one vector per image, got {gives}")
    return h.shape[1]


def _use_cifar_stem(encoder: nn.Module, name: str, channels: int) -> None:
    """For small images: replace the strided stem by a 3 x 3 stride-1 convolution, and remove the max-pool."""
    if not all(hasattr(encoder, part) for part in ("conv1", "bn1", "maxpool")):
        raise FastclError(f"model.cifar_stem requires a timm ResNet; {name!r} has no conv1, bn1 and maxpool")
    encoder.conv1 = nn.Conv2d(channels, encoder.bn1.num_features, 3, stride=1, padding=1, bias=False)
    encoder.maxpool = nn.Identity()
