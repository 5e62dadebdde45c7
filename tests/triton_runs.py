"""What the tests of the Triton backend share: runs with recorded launches and poisoned memory, against float64."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
from reference import (
    Masks,
    assert_gradients,
    assert_loss,
    assert_rows,
    assert_temperature,
    masks,
    row_losses,
    solve,
)
from torch import Tensor
from triton.runtime import interpreter

import fastcl
from fastcl.backends.triton import backward, forward, operand
from fastcl.kernels.contrastive.launch import Config
from fastcl.objectives import ObjectiveLike

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Ran(NamedTuple):
    """A launch that was started."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class Launches(list[Ran]):
    """Launches in their order."""

    def of(self, kernel: str) -> list[Ran]:
        return [ran for ran in self if ran.kernel == kernel]

    def flag(self) -> int | None:
        """What the flag for logits of any range says now; None: kernels without a flag ran."""
        flags = [ran.arguments["flag"] for ran in self if ran.arguments.get("flag") is not None]
        assert len({flag.data_ptr() for flag in flags}) <= 1
        return flags[-1].item() if flags else None


def poisoned(*args: Any, **kwargs: Any) -> Tensor:
    """torch.empty whose elements are NaN, or absurd: one that no kernel writes is seen."""
    memory = torch.full((), 0.0).new_empty(*args, **kwargs)
    return memory.fill_(float("nan") if memory.is_floating_point() else -7)


def convert_as_a_gpu(values: np.ndarray, source: Any, target: Any, _: Any) -> np.ndarray:
    """The interpreter's conversion between float32 and bfloat16, rounded to nearest: its own cuts digits off."""
    if target == triton.language.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()
    assert source == triton.language.bfloat16
    return values.astype(np.uint32) << 16


@contextmanager
def launches() -> Iterator[Launches]:
    """Inside, the Triton backend is on, its launches are listed, and memory that it asks for is poisoned."""
    seen = Launches()
    with fastcl.backend("triton"), pytest.MonkeyPatch.context() as patch:
        for module in (forward, backward, operand):
            start = module.launch

            def recorded(kernel: Any, grid: tuple[int, ...], *options: int, start=start, **arguments: Any) -> None:
                seen.append(Ran(kernel.fn.__name__, grid, arguments))
                start(kernel, grid, *options, **arguments)

            patch.setattr(module, "launch", recorded)
        patch.setattr(torch, "empty", poisoned)
        if DEVICE.type == "cpu":
            patch.setattr(interpreter, "_convert_float", convert_as_a_gpu)
        yield seen


@contextmanager
def tiles(block_r: int, block_s: int, block_d: int = 64) -> Iterator[None]:
    """Inside, every kernel over tiles takes tiles of this size; 128 must be a multiple of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "config", lambda *_: Config(block_r, block_s, block_d, 4, 1))
        yield


@contextmanager
def workspace(size: int) -> Iterator[None]:
    """Inside, partial results may take this many bytes, and a program of the row-wise kernels takes many rows."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (forward, backward):
            patch.setattr(module, "WORKSPACE", size)
        yield


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after the other: here one of the row-wise kernels takes many wide rows."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(operand, "_TILE", 2**16)


def row_weights(n: int) -> Tensor:
    """A weight for each row, (n,) float32; they add up to about 1."""
    return (torch.rand(n, generator=torch.Generator().manual_seed(5)) + 0.5) / n


def check(
    names: Sequence[str],
    z: Tensor,
    sample: Tensor,
    labels: Tensor | None,
    temperature: float | Tensor,
    precision: str = "fp32",
    normalize: bool = True,
    weights: Tensor | None = None,
) -> Launches:
    """Objectives of the table, from one pass, against their formulas: values and the gradient of each.

    Args:
        temperature: a tensor: learnable, and its gradient is compared too.
        weights: of the rows in the loss; None: `row_weights`.
    """
    ids = [None if v is None else v.to(DEVICE) for v in (sample, labels)]
    weights = row_weights(len(z)) if weights is None else weights
    with launches() as ran:
        leaves, t = _leaves(z, temperature)
        losses = fastcl.contrastive_losses(leaves[0], *ids, names, t, "none", normalize, precision)
        for name, rows in losses.items():
            formula = row_losses(name, masks(sample, labels))
            truth = solve(formula, z, float(t), None, weights, normalize, subtracts=name == "supcon")
            compare(rows, leaves, truth, weights, precision)
    assert fastcl.last_backend() == "triton"
    return ran


def check_own(
    formula: Callable[[Tensor, Masks], tuple[Tensor, Tensor, Tensor]],
    objective: ObjectiveLike,
    z: Tensor,
    sample: Tensor,
    labels: Tensor | None,
    temperature: float | Tensor,
    precision: str = "fp32",
) -> Launches:
    """One objective, of the table or one's own, against a formula."""
    weights = row_weights(len(z))
    ids = [None if v is None else v.to(DEVICE) for v in (sample, labels)]
    with launches() as ran:
        leaves, t = _leaves(z, temperature)
        rows = fastcl.contrastive_loss(leaves[0], *ids, objective, t, "none", precision=precision)
        truth = solve(row_losses(formula, masks(sample, labels)), z, float(t), weights=weights, subtracts=True)
        compare(rows, leaves, truth, weights, precision)
    return ran


def _leaves(z: Tensor, temperature: float | Tensor) -> tuple[list[Tensor], float | Tensor]:
    """What the gradient is taken of, and the temperature to call with."""
    leaves = [z.detach().to(DEVICE).requires_grad_()]
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(DEVICE).requires_grad_()
        leaves.append(temperature)
    return leaves, temperature


def compare(rows: Tensor, leaves: Sequence[Tensor], truth: Any, weights: Tensor, precision: str) -> None:
    """Row losses, their weighted sum and its gradients; leaves beyond those that truth knows are the temperature."""
    loss = (rows * weights.to(DEVICE)).sum()
    grads = [g.cpu() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    assert rows.dtype == torch.float32 and all(g.dtype == v.dtype for g, v in zip(grads, leaves, strict=True))
    assert_rows(rows.cpu(), truth, precision)
    assert_loss(loss.cpu(), truth, precision)
    assert_gradients(grads[: len(truth.grads)], truth, precision)
    for grad in grads[len(truth.grads) :]:
        assert_temperature(grad, truth, precision)


def uneven_batch(samples: int = 20) -> tuple[Tensor, Tensor]:
    """About two rows a sample: samples of 1, 2 and 3 views, four classes, one in ten unlabelled, shuffled."""
    views = torch.arange(samples) % 3 + 1
    views[0] = 3
    sample = torch.arange(samples).repeat_interleave(views)
    labels = (torch.arange(samples) % 4).masked_fill(torch.arange(samples) % 10 == 9, -1)[sample]
    order = torch.randperm(len(sample), generator=torch.Generator().manual_seed(3))
    return sample[order], labels[order]
