"""Twins: networks with the same initial weights and the same views, each trained with its own objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastcl import OBJECTIVES, RowStats, same_class_mass
from fastcl.config.settings import Config, OptimConfig
from fastcl.errors import FastclError, brief, one_of, suggest
from fastcl.losses.objectives import SYNONYMS
from fastcl.train.network import Network, build_network, copy_network

IDENTITY, RESEEDED = "identity", "reseeded"
CROSS_ENTROPY = "ce"
STEP_VALUES = ("loss", "dcl_loss", "nscl_loss", "loss_gap", "same_class_mass")
_OPTIMIZERS = ("lars", "sgd", "adamw")


@dataclass(eq=False)
class Twin:
    """One model of a run.

    `objective` is a name of OBJECTIVES or "ce". `reseeded`: it sees views from another seed (the noise floor).
    `lowered`: its network trains in bfloat16 by autocast. `joint`: both views go through it in one pass. `compiled`: it
    trains under torch.compile.
    """

    name: str
    objective: str
    network: Network
    optimizer: torch.optim.Optimizer
    reseeded: bool
    lowered: bool
    joint: bool = True
    compiled: bool = False

    def __post_init__(self) -> None:
        # With static shapes: a batch has one size, its parts at most two. Evaluations run the network itself, because
        # they ask for its encoder or hook its layers.
        self._forward = torch.compile(self.network, dynamic=False) if self.compiled else self.network

    def embed(self, views: tuple[Tensor, Tensor]) -> Tensor:
        """Embeddings (2B, projection) float32 of two views (B, C, S, S), in training mode; the first view's rows come
        first."""
        self.network.train()
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=self.lowered):
            if self.joint:
                return self._forward(torch.cat(views)).float()
            return torch.cat([self._forward(view) for view in views]).float()

    def rows(self, z: Tensor) -> Tensor:
        """Embeddings for the row statistics, detached unless the twin's loss is computed from these statistics."""
        return z.detach() if self.objective == CROSS_ENTROPY else z

    def loss(self, z: Tensor, stats: RowStats, labels: Tensor) -> Tensor:
        """The twin's training loss, a scalar.

        Args:
            z: embeddings from `embed`.
            stats: row statistics of `rows(z)`.
            labels: (B,) int64.
        """
        if self.objective == CROSS_ENTROPY:
            return cross_entropy(self.network.logits(z), labels.repeat(2))
        return OBJECTIVES[self.objective](stats).mean()


def step_values(loss: Tensor, stats: RowStats) -> Tensor:
    """STEP_VALUES of a twin, (5,) float64 without a graph.

    The DCL and NSCL losses, their gap and the same-class softmax mass are computed on its embeddings, whatever its own
    objective is.

    Args:
        loss: loss from `Twin.loss`.
        stats: row statistics of its embeddings.
    """
    with torch.no_grad():
        dcl, nscl = OBJECTIVES["dcl"](stats).mean(), OBJECTIVES["nscl"](stats).mean()
        return torch.stack([loss, dcl, nscl, dcl - nscl, same_class_mass(stats).mean()]).double()


def make_twins(config: Config, channels: int, classes: int, device: torch.device) -> list[Twin]:
    """The models of a run, all from one initialisation, then the controls, which are copies of the first model.

    Raises:
        FastclError: an unknown or repeated model, control or optimiser.
    """
    models, controls = config.train.models, config.train.controls
    _check_names(models, (*OBJECTIVES, CROSS_ENTROPY), "train.models")
    _check_names(controls, (IDENTITY, RESEEDED), "train.controls")
    if not models:
        raise FastclError("train.models is empty: name at least one objective")
    objectives = {name: name for name in models} | {name: models[0] for name in controls}
    initial = build_network(config.model, channels, config.views.size, config.train.seed)
    twins = []
    for name, objective in objectives.items():
        head = classes if objective == CROSS_ENTROPY else None
        network = copy_network(initial, head, config.train.seed).to(device)
        if device.type == "cuda":  # the layout that tensor cores use; activations follow the weights
            network.to(memory_format=torch.channels_last)
        t, optimizer = config.train, make_optimizer(network, config.optim)
        twins.append(
            Twin(
                name, objective, network, optimizer, reseeded=name == RESEEDED, lowered=t.precision == "bf16",
                joint=t.joint_views, compiled=t.compile,
            )
        )  # fmt: skip
    return twins


def make_optimizer(network: Network, config: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimiser of that name. Weight decay excludes biases and norms, as is timm's default. On a GPU, one that
    has no fused kernel, or is not to use it, updates lists of weights at a time, as is PyTorch's and timm's default.

    Raises:
        FastclError: another name, or values that the optimiser rejects.
    """
    if config.name not in _OPTIMIZERS:
        raise FastclError(one_of("optim.name", _OPTIMIZERS, config.name))
    # timm's sgd uses Nesterov momentum, which must not be zero; without momentum both are plain gradient descent
    name = "momentum" if config.name == "sgd" and not config.momentum else config.name
    on_gpu = next(network.parameters()).device.type == "cuda"
    fused: dict[str, Any] = {"fused": True} if on_gpu and config.fused and config.name != "lars" else {}
    try:
        return create_optimizer_v2(
            network, opt=name, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, **fused
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise FastclError(f"optim: {config.name} rejects these values: {error}, got {config}") from error


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up to the peak over warmup_epochs, then half a cosine that reaches 0 at the end of the run.

    Args:
        step: index from 0 over the whole run.
    """
    warmup = config.optim.warmup_epochs * steps_per_epoch
    if step + 1 < warmup:
        return config.optim.lr * (step + 1) / warmup
    total = config.train.epochs * steps_per_epoch
    return config.optim.lr * 0.5 * (1 + math.cos(math.pi * max(0.0, step - warmup) / max(1.0, total - warmup)))


def _check_names(names: tuple[str, ...], known: tuple[str, ...], key: str) -> None:
    for name in names:
        if name not in known:
            raise FastclError(f"{key}: unknown name {brief(name)}{suggest(name, known, synonyms=SYNONYMS)}")
    if len(set(names)) != len(names):
        raise FastclError(f"{key} must not repeat a name, got {', '.join(names)}")
