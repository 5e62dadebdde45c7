"""Logits of any size, rows that are not finite, numbers of several dtypes: what is known of the gradients, and how."""

import pytest
import torch
from reference import clip_formula, masks, normal, row_losses, solve, unit_rows
from triton_runs import DEVICE, few_programs  # noqa: F401

import fastcl
from fastcl import OBJECTIVES

pytestmark = pytest.mark.usefixtures("few_programs")
BACKENDS = ("dense", "chunked", "triton")
SAMPLE = torch.arange(16).repeat(2)
LABELS = SAMPLE % 5
UNIT = 2.0**-24


def gradient(x, backend, objective, temperature=1.0, normalize=True, sample=SAMPLE, labels=LABELS):
    """Row losses and the gradient of their mean."""
    x = x.to(DEVICE).requires_grad_()
    with fastcl.backend(backend):
        rows = fastcl.contrastive_loss(
            x, sample.to(DEVICE), labels.to(DEVICE), objective, temperature, "none", normalize
        )
        (grad,) = torch.autograd.grad(rows.mean(), x)
    return rows.detach().cpu(), grad.cpu()


def of_any_size(name, m):
    """Row losses from logits whose exponentials overflow even float64; every row has a positive and a negative."""
    objective = OBJECTIVES[name]
    below, above = (sum(getattr(m, r) for r in sets) > 0 for sets in (objective.denominator, objective.positives))

    def rows(s):
        return s.masked_fill(~below, -torch.inf).logsumexp(1) - (s * above).sum(1) / above.sum(1)

    return rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("largest", [50.0, 4e2, 4.5e4])
def test_rows_that_are_not_normalised_are_known_to_the_rounding_of_a_logit(largest, backend):
    """1e-5 + 2^-24 |logit|, as `row_stats` says, for pairs of near rows, whose softmaxes are not those of one row."""
    z = normal(4, 24)[torch.arange(32) % 4] + 2e-3 * normal(32, 24, seed=1) * (50 / largest) ** 0.5
    z = (z * (largest / (z @ z.T).max()) ** 0.5).float()
    for name in ("ntxent", "supcon"):
        rows_of = of_any_size(name, masks(SAMPLE, LABELS))
        truth = solve(rows_of, z, 1.0, normalize=False)
        _, grad = gradient(z, backend, name, normalize=False)
        error = float((grad.double() - truth.grads[0]).norm() / truth.grad_scales[0])
        assert error <= 1e-5 + UNIT * largest, (name, error)
        # Rows that differ in a last bit alone have gradients as far apart: float32 cannot do much better.
        if largest > 1e4:
            other = (z.double() * (1 + UNIT * normal(32, 24, seed=2).sign())).requires_grad_()
            loss = rows_of(other @ other.T).mean()
            moved = float((torch.autograd.grad(loss, other)[0] - truth.grads[0]).norm() / truth.grad_scales[0])
            assert error <= 30 * moved, (name, error, moved)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-3])
def test_the_spread_of_near_views_is_known_to_the_rounding_of_their_logits(noise, backend):
    """1e-5 + 2^-24 / f, where the views' logits differ by a fraction f of their size, as `row_stats` says."""
    sample = torch.arange(12).repeat(3)
    m = masks(sample)
    z = (normal(12, 24)[sample] + noise * normal(36, 24, seed=1)).float()
    u = unit_rows(z.double())
    logits = (u @ u.T).masked_fill(~m.view, torch.nan)
    differ = float(logits[m.view].view(36, 2).std(1).square().mean().sqrt())

    def spread(s, m):
        return (s.exp() * m.view).sum(1).log() - (s * m.view).sum(1) / 2, m.view, m.view

    truth = solve(row_losses(spread, m), z, 0.1)
    for objective in (fastcl.Objective(("view",), ("view",)), lambda r: r.spread_view):
        _, grad = gradient(z, backend, objective, 0.1, sample=sample, labels=sample)
        error = float(((grad.double() - truth.grads[0]) * truth.sizes[0]).norm() / truth.grad_scales[0])
        assert error <= 1e-5 + UNIT / differ, (error, differ)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("broken", [float("inf"), -float("inf"), float("nan")])
def test_a_row_that_is_not_finite_shows_alike_on_all_backends(broken, normalize):
    z = normal(32, 6).float()
    z[3, 2] = broken
    for name in ("ntxent", "nscl", "supcon"):
        found = [[v.isnan() for v in gradient(z, b, name, 0.5, normalize)] for b in BACKENDS]
        apart = (LABELS == LABELS[3]) & (SAMPLE != SAMPLE[3]) & (name == "nscl")  # peers, which NSCL does not look at
        for rows, grad in found:
            assert torch.equal(rows, ~apart), name
            assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.3, 0.07])
@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_a_narrow_temperature_is_a_number_like_any_other(backend, temperature, dtype):
    z, t = normal(32, 6), torch.tensor(temperature, dtype=dtype)
    for name in ("ntxent", "nscl", "supcon"):
        truth = solve(row_losses(name, masks(SAMPLE, LABELS)), z, t.item())
        rows, grad = gradient(z, backend, name, t)
        torch.testing.assert_close(rows, truth.rows, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(grad, truth.grads[0], rtol=1e-12, atol=1e-14)
    u, scale = unit_rows(z), (1 / t.double()).to(dtype)
    with fastcl.backend(backend):
        loss = fastcl.clip_loss(z[:16], z[16:], scale)
        twins = fastcl.twin_stats(z, z.flip(0), SAMPLE, LABELS, temperature=t)
        plain = fastcl.row_stats(z, sample=SAMPLE, labels=LABELS, temperature=t.item())
    assert float(loss - clip_formula(u[:16] @ u[16:].T * scale.double()).mean()) == pytest.approx(0, abs=1e-13)
    torch.testing.assert_close(twins.a.lse_other, plain.lse_other, rtol=1e-14, atol=1e-14)
