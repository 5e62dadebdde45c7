"""Batches at the edge: too few rows, zero and huge rows, NaN, one class, rows in one place, extreme gradients."""

import math

import pytest
import torch
from reference import (
    FORMULAS,
    Masks,
    assert_gradients,
    assert_loss,
    assert_rows,
    masks,
    normal,
    row_losses,
    small_tiles,
    solve,
)
from torch import Tensor

import fastcl
from fastcl.rowstats import chunked

BACKENDS = ("dense", "chunked")
LABELLED = [name for name in FORMULAS if name not in ("ntxent", "dcl")]
both_backends = pytest.mark.parametrize("backend", BACKENDS)
every_objective = pytest.mark.parametrize("name", FORMULAS)
both_paths = pytest.mark.parametrize("temperature", (0.01, 0.2))  # log-sum-exp and bare exponentials


def rows_and_grad(
    backend: str, name: str, z: Tensor, sample: Tensor, labels: Tensor, temperature: float, upstream: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Row losses, and the gradient of their mean times `upstream`."""
    z = z.detach().requires_grad_()
    with fastcl.backend(backend), small_tiles(chunked, 5, 7):
        rows = fastcl.contrastive_loss(z, sample, labels, name, temperature, "none")
        (grad,) = torch.autograd.grad(rows.mean() * upstream, z)
    return rows.detach(), grad


def agree(backend: str, name: str, z: Tensor, sample: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Row losses and gradient agree with the formula's. Returns the gradient."""
    truth = solve(row_losses(name, masks(sample, labels)), z, temperature, subtracts=name == "supcon")
    rows, grad = rows_and_grad(backend, name, z, sample, labels, temperature)
    assert_rows(rows, truth, z.dtype)
    assert_gradients([grad], truth)
    return grad


SAMPLE = torch.arange(9).repeat(2)  # 18 rows, two views each
CLASS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, -1]).repeat(2)


@both_backends
@every_objective
@pytest.mark.parametrize("sample", ([0], [0, 0], [0, 1], [0, 0, 0]))
def test_too_few_rows_for_a_positive_and_a_negative(sample: list[int], name: str, backend: str) -> None:
    ids = torch.tensor(sample)
    z = normal(len(ids), 3).float()
    for labels in (ids, torch.zeros_like(ids)):
        rows, grad = rows_and_grad(backend, name, z, ids, labels, 0.5)
        assert not rows.any() and not grad.any()


@both_backends
@every_objective
def test_rows_that_count_without_contributing(name: str, backend: str) -> None:
    """A sample of one view and a class of its own has no positive: loss 0, and it stays in the mean's count."""
    sample, labels = torch.cat([SAMPLE, torch.tensor([9])]), torch.cat([CLASS, torch.tensor([8])])
    z = normal(19, 4)
    agree(backend, name, z, sample, labels, 0.2)
    with fastcl.backend(backend):
        rows = fastcl.contrastive_loss(z, sample, labels, name, 0.2, "none")
        mean = fastcl.contrastive_loss(z, sample, labels, name, 0.2)
    assert rows[-1] == 0 and (rows[:-1] != 0).all()
    assert math.isclose(mean, rows.sum() / 19, rel_tol=1e-12)


@both_backends
@every_objective
@both_paths
def test_one_class_in_the_batch(temperature: float, name: str, backend: str) -> None:
    labels = torch.zeros_like(SAMPLE)
    rows, grad = rows_and_grad(backend, name, normal(18, 4).float(), SAMPLE, labels, temperature)
    assert bool(rows.any()) == bool(grad.any()) == (name not in LABELLED)
    assert rows.isfinite().all() and grad.isfinite().all()


@both_backends
@every_objective
@both_paths
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_rows_in_one_place(dtype: torch.dtype, temperature: float, name: str, backend: str) -> None:
    everywhere = normal(1, 6).expand(18, 6).to(dtype)
    views = normal(9, 6).repeat(2, 1).to(dtype)
    for z in (everywhere, views):
        agree(backend, name, z, SAMPLE, CLASS, temperature)
    three = torch.arange(6).repeat(3)
    agree(backend, name, normal(6, 6).repeat(3, 1).to(dtype), three, three % 2, temperature)


@both_backends
@every_objective
@both_paths
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_zero_rows(dtype: torch.dtype, temperature: float, name: str, backend: str) -> None:
    z = normal(18, 6).to(dtype)
    zero = torch.arange(18)[:, None] % 7 == 2
    grad = agree(backend, name, z.masked_fill(zero, 0), SAMPLE, CLASS, temperature)
    assert not grad[zero.squeeze()].any() and (grad[~zero.squeeze()] != 0).any(1).all()
    grad = agree(backend, name, torch.zeros_like(z), SAMPLE, CLASS, temperature)
    assert not grad.any()


@both_backends
@every_objective
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    (
        (torch.float32, (1e20, 1e-20)),
        (torch.float32, (1e37, 1.0, 1e-37)),
        (torch.bfloat16, (1e37, 1e-30)),
        (torch.float16, (2e4,)),
        (torch.float16, (1e-6,)),
        (torch.float16, (1e4, 1e-2)),
    ),
    ids=str,
)
def test_rows_of_any_size(dtype: torch.dtype, sizes: tuple[float, ...], name: str, backend: str) -> None:
    unit = normal(18, 6)
    unit *= 3 / unit.abs().amax(1, keepdim=True)  # the largest float16 entries are 6e4
    z = (unit * torch.tensor(sizes, dtype=torch.float64).repeat(18)[:18, None]).to(dtype)
    assert z.isfinite().all() and z.any(1).all()
    grad = agree(backend, name, z, SAMPLE, CLASS, 0.5)
    assert grad.isfinite().all()


@both_backends
def test_the_values_of_the_smallest_and_the_largest_rows(backend: str) -> None:
    """Gradients of such rows are beyond float32; their direction is not."""
    info = torch.finfo(torch.float32)
    for size in (info.tiny * info.eps * 1000, info.max):
        z = (normal(18, 6).clamp(-1, 1) * size).float()
        truth = solve(row_losses("nscl", masks(SAMPLE, CLASS)), z, 0.5)
        with fastcl.backend(backend):
            assert_rows(fastcl.contrastive_loss(z, SAMPLE, CLASS, "nscl", 0.5, "none"), truth, z.dtype)


def used(name: str, m: Masks) -> Tensor:
    """(N, N) mask of the candidates that an objective looks at."""
    peers = m.peer if name in ("ntxent", "dcl", "supcon", "supcon_in", "supcon_negatives") else m.peer & False
    return m.view | peers | m.other


@both_backends
@every_objective
@both_paths
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_a_broken_row_shows_in_all_that_meet_it_and_in_no_other(
    value: float, temperature: float, name: str, backend: str
) -> None:
    z = normal(18, 6).float()
    clean, _ = rows_and_grad(backend, name, z, SAMPLE, CLASS, temperature)
    z[3, 1] = value
    rows, grad = rows_and_grad(backend, name, z, SAMPLE, CLASS, temperature)
    meets = used(name, masks(SAMPLE, CLASS))[:, 3] | (torch.arange(18) == 3)
    assert torch.equal(rows.isnan(), meets)
    torch.testing.assert_close(rows[~meets], clean[~meets], rtol=1e-5, atol=1e-5)
    assert grad[3].isnan().all() and rows.mean().isnan()


@both_backends
@every_objective
@pytest.mark.parametrize("temperature", (0.01, 0.02, 0.2))  # exp(-lse) is 1e-22 at the second
@pytest.mark.parametrize("upstream", (1e-30, 1e30))
def test_upstream_gradients_of_any_size(upstream: float, temperature: float, name: str, backend: str) -> None:
    z = normal(18, 6).float()
    _, plain = rows_and_grad(backend, name, z, SAMPLE, CLASS, temperature)
    _, scaled = rows_and_grad(backend, name, z, SAMPLE, CLASS, temperature, upstream)
    assert plain.norm() > 1e-4
    assert ((scaled.double() / upstream - plain.double()).norm() <= 1e-6 * plain.norm()).item()


@both_backends
@every_objective
@both_paths
def test_upstream_gradients_of_very_different_sizes(temperature: float, name: str, backend: str) -> None:
    z = normal(18, 6).float().requires_grad_()
    weights = 10.0 ** torch.linspace(-25, 5, 18)
    truth = solve(row_losses(name, masks(SAMPLE, CLASS)), z, temperature, weights=weights, subtracts=name == "supcon")
    with fastcl.backend(backend), small_tiles(chunked, 5, 7):
        loss = (fastcl.contrastive_loss(z, SAMPLE, CLASS, name, temperature, "none") * weights).sum()
    assert_loss(loss, truth, z.dtype)
    assert_gradients(torch.autograd.grad(loss, z), truth)


@both_backends
@every_objective
@pytest.mark.parametrize("temperature", (1 / 59, 1 / 61, 0.004, 1000.0))
def test_temperatures_at_the_limits(temperature: float, name: str, backend: str) -> None:
    """Both sides of the limit of bare exponentials, with rows that reach it in both directions."""
    z = normal(18, 3).float()
    z[9:] = z[:9] + 0.01 * z[9:]
    z[5], z[14] = -z[0], z[0]
    agree(backend, name, z, SAMPLE, CLASS, temperature)


@both_backends
@every_objective
def test_views_of_one_sample_far_apart(name: str, backend: str) -> None:
    """Three views, one of them opposite: their logits differ from their mean by more than float32's exp can take."""
    sample, temperature = torch.arange(6).repeat(3), 0.004
    z = normal(6, 4).repeat(3, 1)
    z[12:] *= -1
    z = (z + 0.01 * normal(18, 4, seed=1)).float()
    u = z.double() / z.double().norm(dim=1, keepdim=True)
    s, view = u @ u.T / temperature, masks(sample).view
    assert (s - ((s * view).sum(1) / view.sum(1))[:, None])[view].max() > 100 > math.log(torch.finfo(torch.float32).max)
    agree(backend, name, z, sample, sample % 3, temperature)


@both_backends
@every_objective
def test_logits_of_hundreds(name: str, backend: str) -> None:
    """Rows that are not normalised, of sizes from 0.02 to 17."""
    size = 17 * torch.rand(18, 1, generator=torch.Generator().manual_seed(1)).double() ** 3
    unit = normal(18, 6)
    z = (unit / unit.norm(dim=1, keepdim=True) * size).float().requires_grad_()
    truth = solve(row_losses(name, masks(SAMPLE, CLASS)), z, 0.5, normalize=False, subtracts=name == "supcon")
    with fastcl.backend(backend), small_tiles(chunked, 5, 7) as paths:
        rows = fastcl.contrastive_loss(z, SAMPLE, CLASS, name, 0.5, "none", normalize=False)
        (grad,) = torch.autograd.grad(rows.mean(), z)
    assert paths == ([False] * 2 if backend == "chunked" else [])
    assert_rows(rows, truth, z.dtype)
    assert_gradients([grad], truth)


@both_backends
def test_same_class_mass_of_rows_without_peers_and_without_others(backend: str) -> None:
    z = normal(6, 3)
    with fastcl.backend(backend):
        alone = fastcl.row_stats(z, sample=torch.arange(3).repeat(2), labels=torch.arange(3).repeat(2), temperature=1.0)
        together = fastcl.row_stats(z, sample=torch.arange(3).repeat(2), labels=torch.zeros(6).long(), temperature=1.0)
    assert (fastcl.same_class_mass(alone) == 0).all() and (fastcl.same_class_mass(together) == 1).all()
    assert not alone.n_peer.any() and not together.valid.any() and alone.valid.all()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_normalised_rows(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    unit = normal(4, 5).clamp(-1, 1).to(dtype)
    x = torch.cat([unit, unit * info.max, unit * info.tiny, unit * 0])
    u = fastcl.normalize_rows(x)
    assert u.dtype == (dtype if dtype == torch.float64 else torch.float32) and not u[-4:].any()
    wide = x[:-4].double() / x[:-4].double().abs().amax(1, keepdim=True)
    torch.testing.assert_close(
        u[:-4].double(), wide / wide.norm(dim=1, keepdim=True), rtol=2 * info.eps, atol=info.tiny
    )


@pytest.mark.parametrize("temperature", (1 / 61, 1 / 84))
def test_many_equal_rows_do_not_overflow(temperature: float) -> None:
    rows = torch.ones(256, 4)
    assert fastcl.dcl_loss(rows, rows, temperature).item() == pytest.approx(math.log(510), abs=1e-4)
