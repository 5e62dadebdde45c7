"""The implementations of the objectives that the benchmark compares, with their costs and requirements."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

import fastcl
from bench.harness.ceilings import NARROW
from bench.losses import peers, plain
from fastcl.kernels.common import launch

OBJECTIVES = ("ntxent", "nscl", "supcon", "clip", "ntxent+supcon")  # the last: the mean of two, one pass in fastcl

# Relative errors of the loss and of the gradient in Euclidean norm. float32 has about 1e-6, half precision the rounding
# of its products; gradients summed in bfloat16, as in some providers, are the worst.
TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 2e-3, "bf16": 5e-2}

Loss: TypeAlias = Callable[[Tensor, Tensor, str], Tensor]


def absence(devices: Sequence[str], module: str | None, package: str | None, device: torch.device) -> str | None:
    """Why something cannot run on a device at all, or None. Arguments as in `Provider`."""
    kinds = {device.type}
    if os.environ.get("TRITON_INTERPRET") == "1":
        kinds.add("interpreter")
    if not kinds & set(devices):
        return f"timed on {'CUDA' if 'cuda' in devices else 'a CPU'} only"
    if module and importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    return None


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Args:
        loss: takes z (N, D), labels (N / 2,) and the objective's name.
        floats: from n and d, peak memory beyond the inputs in float32 values: measured on a CPU, or counted for
            CUDA-only providers.
        work: from the objective and d, operations of the forward and the backward pass in units of N x N x D (clip: of
            a quarter of it); a multiply-add is two operations, recomputation and split precision are included.
        precision: of the products; a key of TOLERANCES.
        devices: where it is timed: "cpu", "cuda", and "interpreter" for kernels under TRITON_INTERPRET=1 on a CPU.
        capture: whether a CUDA graph can capture it; stated here, since a failed capture may harm later ones.
        module, package: the module it imports and the package that contains it.
        ours: whether a failure or a disagreement sets the benchmark's exit status to 1.
    """

    name: str
    loss: Loss
    floats: Callable[[int, int], float]
    work: Callable[[str, int], tuple[float, float]]
    objectives: tuple[str, ...] = OBJECTIVES
    precision: str = "fp32"
    devices: tuple[str, ...] = ("cpu", "cuda")
    capture: bool = True
    module: str | None = None
    package: str | None = None
    ours: bool = True

    def obstacle(self, device: torch.device, objective: str) -> str | None:
        """Why it cannot run at any size, or None."""
        if objective not in self.objectives:
            return f"has no {objective}"
        return absence(self.devices, self.module, self.package, device)


def _fastcl(backend: str, z: Tensor, labels: Tensor, objective: str) -> Tensor:
    with fastcl.backend(backend):
        return _direct(z.chunk(2), z, labels, objective)


def _direct(views: Sequence[Tensor], z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """The loss function of two views in known order; joined objectives share one set of row statistics."""
    if "+" in objective:
        return _joint(z, torch.arange(len(labels), device=z.device).repeat(2), labels.repeat(2), objective)
    classes = () if objective in ("ntxent", "clip") else (labels,)
    scale = 1 / plain.TEMPERATURE if objective == "clip" else plain.TEMPERATURE
    return getattr(fastcl, f"{objective}_loss")(*views, *classes, scale)


def _joint(z: Tensor, sample: Tensor, classes: Tensor | None, objectives: str) -> Tensor:
    """The mean of objectives joined by +, from one set of row statistics."""
    values = fastcl.contrastive_losses(z, sample, classes, objectives.split("+"), plain.TEMPERATURE).values()
    return sum(values) / len(values)


def fused(half: bool, z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """The Triton backend on two views: "fp16" under autocast if `half`, else "fp32"; other arguments as in `Loss`."""
    views = z.view(2, -1, z.shape[1]).unbind()
    with fastcl.backend("triton"), torch.autocast(z.device.type, torch.float16, enabled=half):
        return _direct(views, z, labels, objective)


def _plain(prefix: str, z: Tensor, labels: Tensor, objective: str) -> Tensor:
    return plain.mean_of(prefix + objective, z, labels)


def _counts(views: tuple[float, float], clip: tuple[float, float]) -> Callable[[str, int], tuple[float, float]]:
    return lambda objective, d: clip if objective == "clip" else views


def _fused_work(half: bool, objective: str, d: int) -> tuple[float, float]:
    """Half the tiles forward; all tiles backward, or half if the rows are too wide for one program; clip: always all.

    Split precision takes three products for one. The additional products of supcon's same-class tiles in half precision
    are not counted.
    """
    products = 1 if half else 3
    if objective == "clip":
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
_CUDA = ("cuda",)
_KERNELS = ("cuda", "interpreter")

PROVIDERS = (
    Provider(CHUNKED, partial(_fastcl, "chunked"), lambda n, d: 8 * n * d + 8 * min(n, 4096) ** 2,
        _counts((1, 3), (4, 12)), capture=False),
    Provider(FUSED, partial(fused, True), _fused_floats, partial(_fused_work, True), precision="fp16",
        devices=_KERNELS),
    Provider("fastcl fp32", partial(fused, False), _fused_floats, partial(_fused_work, False), devices=_KERNELS),
    Provider("fastcl dense", partial(_fastcl, "dense"), lambda n, d: 10.9 * n * n, _counts((2, 4), (4, 8)),
        devices=("cpu",), capture=False),
    Provider("plain PyTorch", partial(_plain, ""), lambda n, d: 4.8 * n * n, _DENSE),
    Provider("plain PyTorch bf16", peers.autocast, lambda n, d: 5 * n * n, _DENSE, precision="bf16", ours=False),
    Provider("torch.compile bf16", peers.compiled, lambda n, d: 5 * n * n, _DENSE, precision="bf16", devices=_CUDA,
        ours=False),
    Provider("chunked bf16", peers.chunked, _chunk_floats, _counts((2, 6), (4, 12)), precision="bf16", ours=False),
    Provider("flex_attention bf16", peers.flex, lambda n, d: 8 * n * d, _counts((2, 8), (4, 16)),
        ("ntxent", "nscl", "clip"), "bf16", _CUDA, ours=False),
    Provider("Inf-CL", peers.inf_cl, lambda n, d: 8 * n * d, _counts((2, 8), (4, 16)), ("ntxent", "clip"), "tf32",
        _CUDA, module="inf_cl", package="inf-cl", ours=False),
    Provider("cut-cross-entropy", peers.cut_cross_entropy, lambda n, d: 6 * n * d, _counts((4, 12), (4, 12)), ("clip",),
        "bf16", _CUDA, False, "cut_cross_entropy", "cut-cross-entropy", ours=False),
    Provider("lightly", peers.lightly, lambda n, d: 5 * n * n, _DENSE, ("ntxent",), capture=False,
        module="lightly", package="lightly", ours=False),
    Provider("pytorch-metric-learning", peers.metric_learning, lambda n, d: 12.6 * n * n, _DENSE, ("ntxent", "supcon"),
        capture=False, module="pytorch_metric_learning", package="pytorch-metric-learning", ours=False),
    Provider("authors' formulation", partial(_plain, "broadcast_"), lambda n, d: 6.07 * n * n * d, _DENSE,
        ("ntxent", "nscl")),
)  # fmt: skip


PACKAGES = tuple(p.package for p in PROVIDERS if p.package)


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Triton and of the providers' packages, as far as they are installed."""
    found = {}
    for package in dict.fromkeys(("triton", *packages)):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # the provider's records say so
    return found


def passes(loss: Loss, z: Tensor, labels: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """One forward and backward pass: the loss and the gradient of z, which is cleared first."""
    z.grad = None
    value = loss(z, labels, objective)
    value.backward()
    return value.detach(), z.grad
