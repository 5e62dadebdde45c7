"""Several objectives of few rows on a CPU: one matrix for all of them, with classes or without; weights of any size."""

import itertools

import pytest
import torch
from reference import DTYPES, FORMULAS, assert_gradients, assert_loss, masks, normal, row_losses, solve
from test_small import pairs
from torch import Tensor

import fastcl
from fastcl.rowstats.small import whole

WEIGHTS = (0.7, -1.3, 2.0, 0.5, 1.0, -0.1, 3.0)


@pytest.fixture
def matrices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows of the matrices that were computed."""
    found: list[int] = []
    forward = whole.forward

    def counted(x: Tensor, *rest) -> object:
        found.append(len(x))
        return forward(x, *rest)

    monkeypatch.setattr(whole, "forward", counted)
    return found


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("names", [*itertools.combinations(FORMULAS, 2), tuple(FORMULAS)], ids="+".join)
def test_weighted_sums(names: tuple[str, ...], reduction: str, tiled: list[int], matrices: list[int]) -> None:
    for samples, shuffled, dtype in ((9, True, torch.float64), (9, False, torch.float32), (4, False, torch.float64)):
        sample, labels = pairs(samples, shuffled)
        m, weights = masks(sample, labels), dict(zip(names, WEIGHTS, strict=False))
        z = normal(len(sample), 6).to(dtype).requires_grad_()
        temperature = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        weight = 1 / len(sample) if reduction == "mean" else 1.0
        each = torch.full((len(sample),), weight, dtype=torch.float64)

        def rows(s: Tensor, m=m, weights=weights) -> Tensor:
            return sum((w * row_losses(name, m)(s) for name, w in weights.items()), start=torch.zeros_like(s[:, 0]))

        truth = solve(rows, z, temperature.item(), weights=each, subtracts=True)
        matrices.clear()
        found = fastcl.contrastive_losses(z, sample, labels, names, temperature, reduction)
        assert len(matrices) == 1
        loss = sum((w * found[name].sum() for name, w in weights.items()), start=torch.zeros((), dtype=dtype))
        *grads, d_temperature = torch.autograd.grad(loss, (z, temperature))
        assert_loss(loss, truth, dtype)
        assert_gradients(grads, truth)
        error = abs(d_temperature.double() - truth.grad_temperature)
        assert error <= 1e3 * torch.finfo(dtype).eps * truth.temperature_scale
    assert not tiled


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_of_them_and_weights_of_any_size(dtype: torch.dtype) -> None:
    names, (sample, labels) = ("ntxent", "supcon"), pairs(9, True)
    z = normal(18, 6).to(dtype).requires_grad_()
    for reduction, name in itertools.product(("mean", "none"), names):
        truth = solve(row_losses(name, masks(sample, labels)), z, 0.3, subtracts=name == "supcon")
        losses = fastcl.contrastive_losses(z, sample, labels, names, 0.3, reduction)
        loss, other = (losses[one].mean() for one in (name, *(set(names) - {name})))
        assert_loss(loss, truth, dtype)
        (alone,) = torch.autograd.grad(loss, z, retain_graph=True)
        assert_gradients([alone], truth)
        for factor in (0.0, -1.0, *((2.0**-90, 2.0**90) if dtype.itemsize > 2 else ())):
            (grad,) = torch.autograd.grad(other * 0 + loss * factor, z, retain_graph=True)
            assert torch.equal(grad, alone * factor)


def test_rows_of_one_class_or_none(tiled: list[int]) -> None:
    z, sample = normal(12, 4), torch.arange(6).repeat(2)
    for labels in (torch.zeros(12).long(), torch.full((12,), -1), torch.arange(6).repeat(2)):
        for reduction in ("mean", "none"):
            x = z.clone().requires_grad_()
            together = fastcl.contrastive_losses(x, sample, labels, FORMULAS, 0.5, reduction)
            for name, loss in together.items():
                alone = fastcl.contrastive_loss(x, sample, labels, name, 0.5, reduction)
                grads = (torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in (loss, alone))
                torch.testing.assert_close(loss, alone, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    assert not tiled
