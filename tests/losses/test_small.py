"""Few rows in pairs on a CPU, which take the whole matrix at once: against formulas and tiles, at their edges."""

import itertools
import math
from functools import partial

import pytest
import test_rowstats
import torch
from reference import (
    DTYPES,
    FORMULAS,
    assert_gradients,
    assert_loss,
    assert_rows,
    assert_temperature,
    clip_formula,
    masks,
    normal,
    row_losses,
    small_tiles,
    solve,
)
from test_objectives import OWN, check, simplex
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastcl
from fastcl import FastclError, RowStats
from fastcl.rowstats import chunked
from fastcl.rowstats.small import whole

every_objective = pytest.mark.parametrize("name", FORMULAS)
SAMPLE = torch.arange(9).repeat(2)
CLASS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, -1]).repeat(2)


def pairs(samples: int, shuffled: bool) -> tuple[Tensor, Tensor]:
    """Sample ids, two of each, and labels: four classes, a class of one sample, unlabelled ones."""
    labels = torch.arange(samples) % 4
    labels[:: max(2, samples // 3)] = -1
    labels[-1] = 4
    order = torch.arange(2 * samples)
    if shuffled:
        order = torch.randperm(2 * samples, generator=torch.Generator().manual_seed(samples))
    return (5 * torch.arange(samples) - 7).repeat(2)[order], labels.repeat(2)[order]


@every_objective
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(name: str, dtype: torch.dtype, tiled: list[int]) -> None:
    for temperature, samples, shuffled in itertools.product((1 / 59, 0.1, 10.0), (3, 33), (False, True)):
        check("chunked", name, normal(2 * samples, 24).to(dtype), *pairs(samples, shuffled), temperature, tile=None)
    assert not tiled


@every_objective
def test_masks_of_samples(name: str, monkeypatch: pytest.MonkeyPatch, tiled: list[int]) -> None:
    """Above some number of samples, masks hold pairs of samples, not of rows."""
    monkeypatch.setattr(whole, "SPELLED_OUT", 0)
    for samples, dtype in itertools.product((3, 33), (torch.float64, torch.float32)):
        check("chunked", name, normal(2 * samples, 24).to(dtype), *pairs(samples, True), 0.1, tile=None)
    assert not tiled


@every_objective
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_rows_that_are_not_normalised(name: str, dtype: torch.dtype, tiled: list[int]) -> None:
    check("chunked", name, (normal(38, 24) * 0.3).to(dtype), *pairs(19, True), 0.5, normalize=False, tile=None)
    assert not tiled
    check("chunked", name, (normal(38, 24) * 2).to(dtype), *pairs(19, True), 0.5, normalize=False, tile=None)
    assert tiled  # logits up to 400


@every_objective
def test_the_mean_and_its_gradients(name: str, tiled: list[int]) -> None:
    """The gradients of a mean are there before the backward pass."""
    sample, labels = pairs(17, False)
    for shuffled, dtype in itertools.product((False, True), DTYPES):
        order = torch.randperm(34, generator=torch.Generator().manual_seed(2)) if shuffled else torch.arange(34)
        wide = dtype if dtype == torch.float64 else torch.float32
        z, t = normal(34, 24).to(dtype).requires_grad_(), torch.tensor([0.2], dtype=wide, requires_grad=True)
        ids = sample[order], labels[order]
        truth = solve(row_losses(name, masks(*ids)), z, t.item(), subtracts=name == "supcon")
        loss = fastcl.contrastive_loss(z, *ids, name, t)
        total = fastcl.contrastive_loss(z, *ids, name, t, "sum")
        assert_loss(loss, truth, dtype)
        grads = torch.autograd.grad(loss, (z, t), retain_graph=True)
        again = torch.autograd.grad(loss * 2.0**-60, (z, t))
        assert_gradients(grads[:1], truth)
        assert_temperature(grads[1], truth, dtype)
        if dtype.itemsize > 2:
            assert all(torch.equal(a * 2.0**-60, b) for a, b in zip(grads, again, strict=True))
            assert_gradients([torch.autograd.grad(total, z)[0] / 34], truth)
    assert not tiled


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", (True, False))
def test_clip(dtype: torch.dtype, normalize: bool, tiled: list[int]) -> None:
    wide = dtype if dtype == torch.float64 else torch.float32
    for scale, rows in itertools.product((0.5, 14.3), (2, 3, 33)):
        image, text = (normal(rows, 20, seed=k).to(dtype).mul(0.4).requires_grad_() for k in (0, 1))
        factor = torch.tensor(scale, dtype=wide, requires_grad=True)
        truth = solve(clip_formula, image, 1 / factor.item(), text, normalize=normalize)
        loss = fastcl.clip_loss(image, text, factor, normalize)
        *grads, grad_factor = torch.autograd.grad(loss, (image, text, factor))
        assert_loss(loss, truth, dtype)
        assert_gradients(grads, truth)
        assert_temperature(-(factor**2) * grad_factor, truth, dtype)
    assert not tiled


def test_a_temperature_that_leaves_no_room_takes_what_the_logits_need(tiled: list[int]) -> None:
    """1 / 0.01 is beyond bare exponentials; rows of 256 columns at random are far from it, but for the views."""
    sample, labels = pairs(20, False)
    z = normal(20, 256).repeat(2, 1) + 0.01 * normal(40, 256, seed=1)
    for name in FORMULAS:
        check("chunked", name, z.float(), sample, labels, 0.01, tile=None)
    assert not tiled
    check("chunked", "ntxent", normal(40, 2).float(), sample, labels, 0.01, tile=None)
    assert tiled == [40]


@every_objective
@pytest.mark.parametrize("value", (0.0, math.nan, math.inf, 1e-20, 1e20))
def test_rows_that_take_more_care_go_to_the_tiles(value: float, name: str, tiled: list[int]) -> None:
    z = normal(18, 6).float()
    z[3] = z[3] * value if value and math.isfinite(value) else value
    results = []
    for tiles in (False, True):
        x = z.clone().requires_grad_()
        with small_tiles(chunked, 256, 2048) if tiles else pytest.MonkeyPatch.context():
            rows = fastcl.contrastive_loss(x, SAMPLE, CLASS, name, 0.2, "none")
        results.append((rows.detach(), *torch.autograd.grad(rows.sum(), x)))
    assert tiled == [18, 18]
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*results, strict=True))


@every_objective
@pytest.mark.parametrize("upstream", (1e-30, 1e30))
def test_upstream_gradients_of_any_size(upstream: float, name: str, tiled: list[int]) -> None:
    z = normal(18, 6).float().requires_grad_()
    for reduction in ("mean", "none"):
        grads = []
        for factor in (1.0, upstream):
            loss = fastcl.contrastive_loss(z, SAMPLE, CLASS, name, 0.02, reduction).mean() * factor
            grads.append(torch.autograd.grad(loss, z)[0].double() / factor)
        assert (grads[1] - grads[0]).norm() <= 1e-6 * grads[0].norm()
    weights = 10.0 ** torch.linspace(-25, 5, 18)
    truth = solve(row_losses(name, masks(SAMPLE, CLASS)), z, 0.2, weights=weights, subtracts=name == "supcon")
    loss = (fastcl.contrastive_loss(z, SAMPLE, CLASS, name, 0.2, "none") * weights).sum()
    assert_loss(loss, truth, z.dtype)
    assert_gradients(torch.autograd.grad(loss, z), truth)
    assert not tiled


@pytest.mark.parametrize("copies", (2, 4))
@every_objective
def test_converged(name: str, copies: int, tiled: list[int]) -> None:
    labels = torch.arange(12).repeat(copies)
    sample = torch.arange(6 * copies).repeat(2) if name.startswith("supcon") or copies == 4 else labels
    for noise in (1e-3, 1e-4):
        check("chunked", name, simplex(12, copies, noise), sample, labels, 0.1, tile=None)
    assert not tiled


@every_objective
def test_rows_without_a_positive_or_a_negative(name: str, tiled: list[int]) -> None:
    z = normal(8, 3).float()
    for labels in (torch.zeros(8).long(), torch.arange(4).repeat(2), torch.full((8,), -1), torch.full((8,), -2)):
        for reduction in ("mean", "none"):
            x = z.clone().requires_grad_()
            loss = fastcl.contrastive_loss(x, torch.arange(4).repeat(2), labels, name, 0.5, reduction)
            (grad,) = torch.autograd.grad(loss.sum(), x)
            empty = name not in ("ntxent", "dcl") and labels.eq(labels[0]).all() and labels[0] != -1
            assert bool(loss.any()) == bool(grad.any()) != bool(empty) and grad.isfinite().all()
    check("chunked", "nscl", z, SAMPLE[:8] % 4, torch.arange(8) % 4, 0.5, tile=None)


def test_an_own_objective_on_one_class_has_finite_gradients(tiled: list[int]) -> None:
    x = normal(8, 3).float().requires_grad_()

    def guarded(s: RowStats) -> Tensor:
        return torch.where(s.n_other > 0, s.lse_other, 0) + torch.where(s.n_peer > 0, s.lse_peer, 0) - s.mean_view

    for labels in (torch.zeros(8).long(), torch.arange(4).repeat(2)):
        loss = fastcl.contrastive_loss(x, torch.arange(4).repeat(2), labels, guarded)
        (grad,) = torch.autograd.grad(loss, x)
        assert loss.isfinite() and grad.isfinite().all() and grad.any()
    assert not tiled


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("field", test_rowstats.FIELDS)
def test_statistics(field: str, dtype: torch.dtype, tiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for shuffled, labelled in itertools.product((False, True), (False, True)):
        sample, labels = pairs(15, shuffled)
        ids = {"sample": sample, "labels": labels} if labelled else {"sample": sample}
        with monkeypatch.context() as patch:
            patch.setattr(test_rowstats, "small_tiles", lambda *_: pytest.MonkeyPatch.context())
            stats = test_rowstats.check("chunked", (field,), normal(30, 9).to(dtype), None, ids, 0.2)
        assert isinstance(stats, RowStats) and not stats.spread_view.any()
    assert not tiled


def test_objectives_of_ones_own(tiled: list[int]) -> None:
    sample = torch.arange(24).repeat(2)
    for formula, own in OWN:
        check("chunked", formula, normal(48, 24), sample, sample % 5, 0.2, objective=own, tile=None)
    assert not tiled


@pytest.mark.parametrize("sample", (SAMPLE, SAMPLE // 2, SAMPLE.flip(0)), ids=("stacked", "four views", "any order"))
def test_a_second_derivative_is_refused_and_never_zero(sample: Tensor) -> None:
    z, t = normal(18, 4).requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    refused = partial(pytest.raises, FastclError, match="chunked .* second derivatives")
    with refused():
        torch.autograd.functional.hessian(lambda x: fastcl.contrastive_loss(x, sample), z)
    for reduction, leaf in itertools.product(("mean", "none"), (z, t)):
        loss = fastcl.contrastive_loss(z, sample, temperature=t, reduction=reduction).sum()
        for grad in torch.autograd.grad(loss, (z, t), create_graph=True):
            with refused():  # a penalty, which would be lost beside another term
                torch.autograd.grad(grad.square().sum() + leaf.square().sum(), leaf, retain_graph=True)


def test_differentiable_once() -> None:
    z = normal(18, 4).requires_grad_()
    (grad,) = torch.autograd.grad(fastcl.contrastive_loss(z, SAMPLE // 2), z, create_graph=True)  # four views
    with pytest.raises(FastclError, match="chunked .* second derivatives.*'dense'"):
        grad.sum().backward()
    for reduction in ("mean", "none"):
        loss = fastcl.contrastive_loss(z, SAMPLE, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, z, create_graph=True)
        torch.testing.assert_close(grad, torch.autograd.grad(fastcl.contrastive_loss(z, SAMPLE) * 18 ** (
            reduction == "none"), z)[0])  # fmt: skip
        with pytest.raises(FastclError, match="chunked .* second derivatives.*'dense'"):
            grad.sum().backward()


def test_nothing_that_needs_no_gradient_has_one() -> None:
    z, t = normal(18, 4), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert not fastcl.contrastive_loss(z, SAMPLE).requires_grad
    with torch.no_grad():
        assert not fastcl.contrastive_loss(z, SAMPLE, temperature=t).requires_grad
    fastcl.ntxent_loss(z[:9].requires_grad_(), z[9:].detach(), t).backward()
    assert t.grad is not None


def test_the_same_twice_and_under_autocast_and_deterministic_algorithms() -> None:
    found = []
    for kind in ("plain", "again", "autocast", "deterministic"):
        z = normal(300, 16).float().requires_grad_()
        torch.use_deterministic_algorithms(kind == "deterministic")
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                losses = fastcl.contrastive_losses(z, torch.arange(300) // 2, torch.arange(300) // 2 % 7, FORMULAS)
                sum(losses.values()).backward()
        finally:
            torch.use_deterministic_algorithms(False)
        found.append((*losses.values(), z.grad))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_compiled_whole() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(fastcl.ntxent_loss, fullgraph=True, backend=counter)
    z = normal(18, 4).float()
    torch.testing.assert_close(compiled(z[:9], z[9:]), fastcl.ntxent_loss(z[:9], z[9:]), rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1 and fastcl.last_backend() == "chunked"


def test_rows_agree_with_tiles_of_the_real_size() -> None:
    z, sample = normal(1100, 32).float(), torch.arange(550).repeat(2)
    losses = {}
    for tiles in (False, True):
        with small_tiles(chunked, 256, 2048) if tiles else pytest.MonkeyPatch.context():
            losses[tiles] = fastcl.contrastive_losses(z, sample, sample % 90, FORMULAS, 0.1, "none")
    for name in FORMULAS:
        torch.testing.assert_close(losses[False][name], losses[True][name], rtol=3e-6, atol=3e-6)
    truth = solve(row_losses("nscl", masks(sample, sample % 90)), z, 0.1)
    assert_rows(losses[False]["nscl"], truth, z.dtype)
