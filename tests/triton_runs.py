"""What the tests of the Triton backend share: runs with recorded launches and poisoned memory, against float64."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
from reference import (
    Masks,
    Truth,
    assert_gradients,
    assert_loss,
    assert_rows,
    assert_temperature,
    masks,
    normal,
    row_losses,
    solve,
)
from test_rowstats import expected
from torch import Tensor
from triton.runtime import interpreter

import fastcl
from fastcl.kernels.common import launch
from fastcl.losses.objectives import ObjectiveLike
from fastcl.rowstats.triton import backward, forward, operand, replay, two_models, weighted, wide, working_order

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


def plain(argument: Any) -> Any:
    """An argument with the constants in it as numbers."""
    if isinstance(argument, tuple):
        return getattr(argument, "_make", tuple)(map(plain, argument))
    return argument.value if isinstance(argument, triton.language.constexpr) else argument


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
        for module in (launch, forward, backward, weighted, wide, two_models, working_order):
            start = module.launch

            def recorded(kernel: Any, grid: tuple[int, ...], *options: int, start=start, **arguments: Any) -> None:
                seen.append(Ran(kernel.fn.__name__, grid, {k: plain(v) for k, v in arguments.items()}))
                start(kernel, grid, *options, **arguments)

            patch.setattr(module, "launch", recorded)
        patch.setattr(replay, "MOST_ROWS", 0)
        patch.setattr(torch, "empty", poisoned)
        if DEVICE.type == "cpu":
            patch.setattr(interpreter, "_convert_float", convert_as_a_gpu)
        yield seen


def _sized(block_r: int, block_s: int, apart: bool = False) -> Callable[..., launch.Config | None]:
    """A launch table of one size."""

    def config(kernel: str, *_: Any) -> launch.Config | None:
        sizes = block_r, block_s, 128 if kernel == "product" else 64, 4, 1  # a product's last block of columns is cut
        absent = () if apart else ("forward_plain", "forward_masked", "backward_masked")
        return None if kernel in absent or kernel.endswith("_joint") else launch.Config(*sizes)

    return config


@contextmanager
def tiles(block_r: int, block_s: int, apart: bool = False) -> Iterator[None]:
    """Inside, all tiles have this size, which divides 128; apart: masked ones have launches of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operand, "config", _sized(block_r, block_s, apart))
        yield


@contextmanager
def tables_own_tiles() -> Iterator[None]:
    """Inside, tiles are those of the launch table again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operand, "config", launch.config)
        yield


@contextmanager
def workspace(size: int) -> Iterator[None]:
    """Inside, partial results may take this many bytes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (forward, backward, wide):
            patch.setattr(module, "WORKSPACE", size)
        yield


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter runs programs one after the other and minds no registers: here each does as much as it may."""
    if DEVICE.type == "cpu":
        row_block = operand.row_block
        for module in (backward, operand):
            monkeypatch.setattr(module, "row_block", lambda d, *_: row_block(d, 2**16))
        monkeypatch.setattr(operand, "config", _sized(128, 128))
    replay.forget()
    yield
    replay.forget()


def leaf(v: Tensor) -> Tensor:
    """A copy on the device of which gradients are taken."""
    return v.detach().to(DEVICE, copy=True).requires_grad_()


def row_weights(n: int) -> Tensor:
    """A weight for each row, (n,) float32; they add up to about 1."""
    return (torch.rand(n, generator=torch.Generator().manual_seed(5)) + 0.5) / n


def check(
    names: Sequence[str], z: Tensor, sample: Tensor, labels: Tensor | None, temperature: float | Tensor,
    precision: str = "fp32", normalize: bool = True, weights: Tensor | None = None, within: str | None = None,
) -> Launches:  # fmt: skip
    """Objectives of the table, from one pass, against their formulas: values, and the gradient of a sum of them.

    Args:
        temperature: a tensor: learnable, and its gradient is compared too.
        weights: of the rows in the loss; None: `row_weights`. The k-th objective counts k + 1 times.
        within: the precision whose bounds hold; None: that of the call.
    """
    ids = [None if v is None else v.to(DEVICE) for v in (sample, labels)]
    weights = row_weights(len(z)) if weights is None else weights
    with launches() as ran:
        leaves, t = _leaves(z, temperature)
        losses = fastcl.contrastive_losses(leaves[0], *ids, names, t, "none", normalize, precision)
        truths, total = [], 0.0
        for k, (name, rows) in enumerate(losses.items()):
            formula, weight = row_losses(name, masks(sample, labels)), weights * (k + 1)
            truth = solve(formula, z, float(temperature), None, weight, normalize, subtracts=name == "supcon")
            total = total + compare_rows(rows, truth, weight, within or precision)
            truths.append(truth)
        compare_gradients(total, leaves, combined(truths), within or precision)
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
        row_formula = row_losses(formula, masks(sample, labels))
        truth = solve(row_formula, z, float(temperature), weights=weights, subtracts=True)
        compare_gradients(compare_rows(rows, truth, weights, precision), leaves, truth, precision)
    return ran


def _leaves(z: Tensor, temperature: float | Tensor) -> tuple[list[Tensor], float | Tensor]:
    """What the gradient is taken of, and the temperature to call with."""
    if isinstance(temperature, Tensor):
        temperature = leaf(temperature)
        return [leaf(z), temperature], temperature
    return [leaf(z)], temperature


def combined(truths: Sequence[Truth]) -> Truth:
    """What is known about the gradient of a sum of losses."""

    def total(field: str) -> Any:
        first, *rest = (getattr(truth, field) for truth in truths)
        if isinstance(first, tuple):
            return tuple(sum(values) for values in zip(first, *rest, strict=True))
        return sum(rest, first)

    fields = ("grads", "grad_scales", "blurs", "grad_temperature", "temperature_scale", "temperature_blur")
    return replace(truths[0], **{field: total(field) for field in fields})


def compare_rows(rows: Tensor, truth: Truth, weights: Tensor, precision: str) -> Tensor:
    """Row losses and their weighted sum, which is returned, agree with the formula's."""
    loss = (rows * weights.to(DEVICE)).sum()
    assert rows.dtype == torch.float32
    assert_rows(rows.cpu(), truth, precision)
    assert_loss(loss.cpu(), truth, precision)
    return loss


def compare_gradients(loss: Tensor, leaves: Sequence[Tensor], truth: Truth, precision: str) -> None:
    """Gradients agree with the formula's; a leaf beyond those whose gradients the truth knows is the temperature."""
    grads = [g.cpu() for g in torch.autograd.grad(loss, leaves)]
    assert all(g.dtype == v.dtype for g, v in zip(grads, leaves, strict=True))
    assert_gradients(grads[: len(truth.grads)], truth, precision)
    for grad in grads[len(truth.grads) :]:
        assert_temperature(grad, truth, precision)


def check_stats(
    fields: Sequence[str],
    x: Tensor,
    y: Tensor | None,
    ids: dict[str, Tensor],
    temperature: float | Tensor,
    precision: str = "fp32",
    normalize: bool = True,
) -> Launches:
    """Fields of the row statistics, each weighted row by row, against their formulas: values, gradients, counts."""
    m = masks(**ids)
    weights = {f: torch.rand(len(x), generator=torch.Generator().manual_seed(k)) + 0.1 for k, f in enumerate(fields)}
    one = torch.ones(len(x))

    def total(s: Tensor) -> Tensor:
        return sum(weights[f].double() * expected(f, s, m) for f in fields)

    truth = solve(total, x, float(temperature), y, one, normalize)
    with launches() as ran:
        leaves, t = _leaves(x, temperature)
        other = None if y is None else leaf(y)
        leaves[1:1] = [] if other is None else [other]
        stats = fastcl.row_stats(
            leaves[0], other, **{name: v.to(DEVICE) for name, v in ids.items()}, temperature=t, normalize=normalize,
            precision=precision,
        )  # fmt: skip
        rows = torch.zeros(len(x), device=DEVICE)
        for f in fields:
            empty, value = ~getattr(m, f.split("_")[1]).any(1), getattr(stats, f)
            assert value.dtype == torch.float32
            assert (value.cpu()[empty] == (-torch.inf if f.startswith("lse") else 0)).all()
            rows = rows + weights[f].to(DEVICE) * value.masked_fill(empty.to(DEVICE), 0)
        compare_gradients(compare_rows(rows, truth, one, precision), leaves, truth, precision)
    for relation in ("view", "peer", "other"):
        assert torch.equal(getattr(stats, f"n_{relation}").cpu(), getattr(m, relation).sum(1))
    assert torch.equal(stats.valid.cpu(), m.view.any(1) & m.other.any(1))
    return ran


def uneven_batch(samples: int = 20) -> tuple[Tensor, Tensor]:
    """About two rows a sample: samples of 1, 2 and 3 views, four classes, one in ten unlabelled, shuffled."""
    views = torch.arange(samples) % 3 + 1
    views[0] = 3
    sample = torch.arange(samples).repeat_interleave(views)
    labels = (torch.arange(samples) % 4).masked_fill(torch.arange(samples) % 10 == 9, -1)[sample]
    order = torch.randperm(len(sample), generator=torch.Generator().manual_seed(3))
    return sample[order], labels[order]


def simplex(n: int, copies: int, noise: float) -> Tensor:
    """Each of n points as far from the others as can be, `copies` times, with noise; float32."""
    corners = torch.eye(n, dtype=torch.float64) - 1 / n
    return (corners.repeat(copies, 1) + noise * normal(n * copies, n)).float()
