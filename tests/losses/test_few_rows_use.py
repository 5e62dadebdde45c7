"""Few rows and many are used alike: any kind of number, inputs that change afterwards, transforms that are refused."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastcl


@pytest.fixture(params=["whole", "tiles"])
def route(request, monkeypatch):
    """Both ways of computing few rows."""
    if request.param == "tiles":
        monkeypatch.setattr("fastcl.rowstats.chunked.WHOLE", 0)


def rows(n: int = 8, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(n, 5, dtype=dtype, generator=generator).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("number", [np.float16(0.1), np.float32(0.1), np.float64(0.1), Fraction(1, 10), 2], ids=repr)
def test_a_temperature_is_taken_for_its_value_whatever_kind_of_number_it_is(route, number):
    z1, z2 = rows()
    sample = torch.arange(8).repeat(3)[:16].sort().values  # three views of most samples
    for f in (
        lambda t: fastcl.ntxent_loss(z1, z2, t),
        lambda t: fastcl.clip_loss(z1, z2, t),
        lambda t: fastcl.row_stats(torch.cat([z1, z2]), sample=sample, temperature=t).lse_other.sum(),
    ):
        assert f(number).item() == f(float(number)).item()


def test_frozen_rows_of_inference_mode_serve_a_learned_temperature(route):
    with torch.inference_mode():
        z = rows()[0] * 1
    gradients = []
    for frozen in (z, z.clone()):
        temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        fastcl.supcon_loss(frozen, frozen, torch.arange(8) % 3, temperature).backward()
        gradients.append(temperature.grad.item())
    assert gradients[0] == gradients[1] != 0


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"normalize": False}, {"normalize": False, "reduction": "none"}],
    ids=str,
)
def test_who_changes_the_rows_afterwards_changes_no_gradient(route, options):
    z = rows()
    for f in (
        lambda a, b: fastcl.ntxent_loss(a, b, 0.5, **options).sum(),
        lambda a, b: fastcl.sigmoid_loss(a, b, 2.0, -1.0, **options).sum(),
        lambda a, b: fastcl.queue_loss(a, a.detach().clone(), b, 0.5, **options).sum(),
        lambda a, b: fastcl.contrastive_loss((a[:3], b), None, temperature=0.5, **options).sum(),
    ):
        wanted = torch.autograd.grad(f(*z), z)
        copies = [v * 1 for v in z]
        loss = f(*copies)
        for v in copies:
            v.detach().mul_(2)
        assert all(map(torch.equal, torch.autograd.grad(loss, z), wanted))
    x = torch.cat(z).detach().requires_grad_()
    y = x * 1
    sample = torch.arange(8).repeat(2)

    def total(v):
        return fastcl.contrastive_loss(v, sample, objective="ntxent", temperature=0.5, **options).sum()

    loss = total(y)
    y.detach().mul_(2)
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.autograd.grad(total(x), x)[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_and_second_derivatives_are_refused_by_name(route, reduction):
    z1, z2 = rows()
    loss = fastcl.ntxent_loss(z1, z2, 0.5, reduction=reduction)
    with pytest.raises(fastcl.FastclError, match="does not support batched gradients.*dense"):
        torch.autograd.grad(loss, z1, torch.ones(3, *loss.shape, dtype=loss.dtype), is_grads_batched=True)
    (first,) = torch.autograd.grad(fastcl.ntxent_loss(z1, z2, 0.5, reduction=reduction).sum(), z1, create_graph=True)
    with pytest.raises(fastcl.FastclError, match="second derivatives.*dense"):
        first.sum().backward()


def test_fake_tensors_tell_shapes():
    with FakeTensorMode():
        z, sample = torch.randn(8, 5), torch.arange(8) % 4
        assert fastcl.contrastive_loss(z, sample, sample % 2, "supcon").shape == ()
        assert fastcl.row_stats(z, sample=sample, labels=sample % 2, temperature=0.5).lse_view.shape == (8,)


def test_a_subclass_of_objective_is_evaluated_as_it_says(route):
    class Doubled(fastcl.Objective):
        def __call__(self, stats):
            return 2 * super().__call__(stats)

    z1, z2 = rows()
    x, sample = torch.cat([z1, z2]), torch.arange(8).repeat(2)
    plain, doubled = (kind(("view", "other"), ("view",)) for kind in (fastcl.Objective, Doubled))
    labels = sample % 3
    once, twice = (fastcl.contrastive_loss(x, sample, labels, o, 0.5).item() for o in (plain, doubled))
    assert twice == pytest.approx(2 * once, rel=1e-12)
