"""The implementations of the objectives that the benchmark compares, with their costs and requirements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

import fastcl
from bench.harness import suite
from bench.harness.ceilings import NARROW
from bench.losses import peers, plain
from fastcl.kernels.common import launch

TOWERS = ("clip", "sigmoid")  # of two sets of rows, which have no mirror image
OBJECTIVES = ("ntxent", "nscl", "supcon", *TOWERS, "ntxent+supcon")  # the last: the mean of two, one pass in fastcl

# Relative errors of the loss and of the gradient in Euclidean norm. float32 has about 1e-6, half precision the rounding
# of its products; gradients summed in bfloat16, as in some providers, are the worst.
TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 2e-3, "bf16": 5e-2}

Loss: TypeAlias = Callable[[Tensor, Tensor, str], Tensor]


@dataclass(frozen=True)
class Provider(suite.Provider):
    """One implementation.

    Args:
        loss: takes z (N, D), labels (N / 2,) and the objective's name.
        floats: from n and d, peak memory beyond the inputs in float32 values: measured on a CPU, or counted for
            CUDA-only providers.
        work: from the objective and d, operations of the forward and the backward pass in units of N x N x D (two
            towers: of a quarter of it); a multiply-add is two operations, recomputation and split precision are
            included.
    """

    loss: Loss
    floats: Callable[[int, int], float]
    work: Callable[[str, int], tuple[float, float]]
    objectives: tuple[str, ...] = OBJECTIVES

    def obstacle(self, device: torch.device, objective: str) -> str | None:
        """Why it cannot run at any size, or None."""
        return self.absence(device) if objective in self.objectives else f"has no {objective}"


def _chunked(z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """As users call it on a CPU, where this backend is the default: entering a block would cost a few small sums."""
    if z.device.type == "cpu":
        return _direct(z.chunk(2), z, labels, objective)
    with fastcl.backend("chunked"):
        return _direct(z.chunk(2), z, labels, objective)


def _dense(z: Tensor, labels: Tensor, objective: str) -> Tensor:
    with fastcl.backend("dense"):
        return _direct(z.chunk(2), z, labels, objective)


def fused(half: bool, z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """The Triton backend on two views: "fp16" under autocast if `half`, else "fp32"; other arguments as in `Loss`."""
    views = z.view(2, -1, z.shape[1]).unbind()
    with fastcl.backend("triton"), torch.autocast(z.device.type, torch.float16, enabled=half):
        return _direct(views, z, labels, objective)


def _direct(views: Sequence[Tensor], z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """The loss function of two views in known order; joined objectives share one set of row statistics."""
    if "+" in objective:
        sample, classes = torch.arange(len(labels), device=z.device).repeat(2), labels.repeat(2)
        values = fastcl.contrastive_losses(z, sample, classes, objective.split("+"), plain.TEMPERATURE).values()
        return sum(values) / len(values)
    unlike = {"ntxent": (plain.TEMPERATURE,), "clip": (1 / plain.TEMPERATURE,), "sigmoid": (plain.SCALE, plain.BIAS)}
    return getattr(fastcl, f"{objective}_loss")(*views, *unlike.get(objective, (labels, plain.TEMPERATURE)))


def _plain(prefix: str, z: Tensor, labels: Tensor, objective: str) -> Tensor:
    return plain.mean_of(prefix + objective, z, labels)


def _counts(
    views: tuple[float, float], clip: tuple[float, float], sigmoid: tuple[float, float] = (2, 4)
) -> Callable[[str, int], tuple[float, float]]:
    return lambda objective, d: {"clip": clip, "sigmoid": sigmoid}.get(objective, views)


def _fused_work(half: bool, objective: str, d: int) -> tuple[float, float]:
    """Half the tiles forward; all tiles backward, or half if the rows are too wide for one program; towers: always all.

    Split precision takes three products for one. The additional products of supcon's same-class tiles in half precision
    are not counted.
    """
    products = 1 if half else 3
    if objective in TOWERS:
        return 2 * products, 8 * products
    modes = (("none", "peers") if "supcon" in objective else ("none",)) if half else ("all",)
    sm = launch.architecture(torch.cuda.get_device_capability() if torch.cuda.is_available() else None)
    one_program = d <= NARROW and all(launch.config("backward", sm, mode, d, 4096) for mode in modes)
    return products, (4 if one_program else 3) * products


def _fused_floats(n: int, d: int) -> float:
    return 4 * n * d + 2 * 2**26  # working copies, gradients, and two workspaces of 256 MiB


def _chunk_floats(n: int, d: int) -> float:
    return 6 * peers.chunk_rows(n) * n + 6 * n * d


CHUNKED, FUSED = "fastcl chunked", "fastcl fp16"
_DENSE = _counts((2, 4), (2, 4))
_CUDA, _KERNELS = ("cuda",), ("cuda", "interpreter")

PROVIDERS = (
    Provider(CHUNKED, _chunked, lambda n, d: 8 * n * d + 8 * min(n, 4096) ** 2,
        _counts((1, 3), (4, 12), (2, 6)), capture=False),
    Provider(FUSED, partial(fused, True), _fused_floats, partial(_fused_work, True), precision="fp16",
        devices=_KERNELS),
    Provider("fastcl fp32", partial(fused, False), _fused_floats, partial(_fused_work, False), devices=_KERNELS),
    Provider("fastcl dense", _dense, lambda n, d: 10.9 * n * n, _counts((2, 4), (4, 8)),
        capture=False, devices=("cpu",)),
    Provider("plain PyTorch", partial(_plain, ""), lambda n, d: 4.8 * n * n, _DENSE),
    Provider("plain PyTorch bf16", peers.autocast, lambda n, d: 5 * n * n, _DENSE, precision="bf16", ours=False),
    Provider("torch.compile bf16", peers.compiled, lambda n, d: 5 * n * n, _DENSE, precision="bf16", devices=_CUDA,
        ours=False),
    Provider("chunked bf16", peers.chunked, _chunk_floats, _counts((2, 6), (4, 12)),
        ("ntxent", "nscl", "supcon", "clip", "ntxent+supcon"), precision="bf16", ours=False),
    Provider("flex_attention bf16", peers.flex, lambda n, d: 8 * n * d, _counts((2, 8), (4, 16)),
        ("ntxent", "nscl", "clip"), precision="bf16", devices=_CUDA, ours=False),
    Provider("Inf-CL", peers.inf_cl, lambda n, d: 8 * n * d, _counts((2, 8), (4, 16)), ("ntxent", "clip"),
        precision="tf32", devices=_CUDA, module="inf_cl", package="inf-cl", ours=False),
    Provider("cut-cross-entropy", peers.cut_cross_entropy, lambda n, d: 6 * n * d, _counts((4, 12), (4, 12)), ("clip",),
        precision="bf16", devices=_CUDA, module="cut_cross_entropy", package="cut-cross-entropy", ours=False,
        capture=False),
    Provider("lightly", peers.lightly, lambda n, d: 5 * n * n, _DENSE, ("ntxent",), module="lightly", package="lightly",
        ours=False, capture=False),
    Provider("pytorch-metric-learning", peers.metric_learning, lambda n, d: 12.6 * n * n, _DENSE, ("ntxent", "supcon"),
        module="pytorch_metric_learning", package="pytorch-metric-learning", ours=False, capture=False),
    Provider("open_clip", peers.open_clip, lambda n, d: 1.5 * n * n, _DENSE, ("sigmoid",), module="open_clip",
        package="open-clip-torch", ours=False, capture=False),
    Provider("authors' formulation", partial(_plain, "broadcast_"), lambda n, d: 6.07 * n * n * d, _DENSE,
        ("ntxent", "nscl")),
)  # fmt: skip
PACKAGES = ("triton", *(p.package for p in PROVIDERS if p.package))


def passes(loss: Loss, z: Tensor, labels: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """One forward and backward pass: the loss and the gradient of z."""
    value = loss(z, labels, objective)
    return value.detach(), torch.autograd.grad(value, z)[0]
