"""Models of timm and torchvision without their classifiers, with the preparation of images that each was made for."""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models import load_state_dict
from torch import Tensor, nn

from fastcl.errors import FastclError, shown
from fastcl.io.arrays import file_status
from fastcl.train.network import first_line, plain_defaults, quiet_hub
from fastcl.zoo.names import ModelName


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model that gives one vector for each image.

    Attributes:
        name: how the user named it.
        module: in evaluation mode on a device; (b, C, H, W) float32 -> (b, d), the input of its classifier.
        prepare: a PIL image -> (C, H, W) float32: resized, cropped and normalised as its weights were trained.
    """

    name: str
    module: nn.Module
    prepare: Callable[[Image.Image], Tensor]

    def batch(self, images: Sequence[Image.Image]) -> Tensor:
        """Prepared images, (b, C, H, W) on the CPU."""
        return torch.stack([self.prepare(image) for image in images])

    def features(self, images: Sequence[Image.Image], device: torch.device) -> Tensor:
        """(b, d) float32 on the CPU.

        Raises:
            FastclError: the model does not take these images, or gives no vector for each of them.
        """
        batch = self.batch(images)
        try:
            with torch.no_grad():
                h = self.module(batch.to(device))
        except FastclError:  # of a hook
            raise
        except Exception as error:  # a model's own code may raise anything
            sides = " x ".join(map(str, batch.shape[2:]))
            raise FastclError(f"{self.name} does not accept images of {sides} pixels: {first_line(error)}") from error
        if not isinstance(h, Tensor) or h.ndim != 2 or not h.shape[1]:
            gives = f"{tuple(h.shape[1:])}" if isinstance(h, Tensor) else f"a {type(h).__name__}"
            raise FastclError(f"{self.name} must return one vector per image, got {gives}")
        return h.float().cpu()


@plain_defaults()
def load_encoder(name: ModelName, seed: int, pretrained: bool, device: torch.device) -> Encoder:
    """A model without its classifier.

    Args:
        seed: of random weights.
        pretrained: use the library's weights, which it may fetch, unless the name gives a file.
        device: where it will run.

    Raises:
        FastclError: the library cannot make the model or get its weights, the model has no linear classifier, a file
            that cannot be read or holds the weights of another model.
    """
    fetch = pretrained and name.weights is None
    make = _of_timm if name.library == "timm" else _of_torchvision
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            with quiet_hub():
                module, prepare, classifiers = make(name.name, fetch)
        except FastclError:
            raise
        except Exception as error:  # of the library, or of the hub that it fetches weights from
            why = first_line(error).rstrip(".")
            hint = "; without a network, leave out --pretrained or give a file: NAME=FILE" if fetch else ""
            what = "get the weights of" if fetch else "make"
            raise FastclError(f"{name.library} cannot {what} {name.name}: {why}{hint}") from error
    if name.weights is not None:
        _read_weights(module, name, name.weights, classifiers)
    return Encoder(name.text, module.eval().requires_grad_(False).to(device), prepare)


_Made = tuple[nn.Module, Callable[[Image.Image], Tensor], tuple[str, ...]]  # and the names of its classifiers


def _of_timm(name: str, pretrained: bool) -> _Made:
    module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    prepare: Any = create_transform(**resolve_data_config(model=module), is_training=False)
    classifier: Any = getattr(module, "pretrained_cfg", {}).get("classifier") or ()
    return module, prepare, (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _of_torchvision(name: str, pretrained: bool) -> _Made:
    weights = torchvision.models.get_model_weights(name).DEFAULT  # pyright: ignore[reportAttributeAccessIssue]
    module = torchvision.models.get_model(name, weights=weights if pretrained else None)
    linear = [at for at, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise FastclError(f"torchvision:{name} has no linear classifier whose input could be its features")
    module.set_submodule(linear[-1], nn.Identity())
    return module, weights.transforms(), (linear[-1],)


def _read_weights(module: nn.Module, name: ModelName, file: Path, classifiers: Sequence[str]) -> None:
    """Load a model's weights; those of its classifiers may be there or not. A run's are found behind "encoder."."""
    if not stat.S_ISREG(file_status(file).st_mode):
        raise FastclError(f"{name.name}: {shown(file)} is not a regular file")
    try:
        with quiet_hub():  # timm tells of every file
            state: dict[str, Any] = load_state_dict(str(file))
        ours = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
        found = module.load_state_dict(ours or state, strict=False)
    except Exception as error:  # of torch's or safetensors' reader, or shapes of another model
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise FastclError(f"{name.name}: {shown(file)} holds no weights of it: {'; '.join(lines[:2])}") from error
    surplus = [key for key in found.unexpected_keys if not key.startswith(tuple(f"{part}." for part in classifiers))]
    for what, keys in (("lacks", found.missing_keys), ("also has", surplus)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise FastclError(f"{name.name}: {shown(file)} {what} {keys[0]}{more}: weights of another model")
