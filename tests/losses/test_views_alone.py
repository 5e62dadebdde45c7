"""Losses of few rows whose only positive is the view: the range in which they are computed at once, scales as given."""

import pytest
import torch
from reference import assert_gradients, assert_loss, clip_formula, normal, solve
from torch import Tensor

import fastcl
from fastcl.choices import ObjectiveName
from fastcl.rowstats.small import views_alone, whole

LARGE = 400.0  # exponentials overflow float32


def one_way(s: Tensor) -> Tensor:
    """InfoNCE of anchors k, whose views are candidates k; the exponentials of views overflow nothing."""
    return s.logsumexp(1) - s.diagonal()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("sign", (1, -1))
def test_logits_of_views_may_have_any_size(sign: int, dtype: torch.dtype, tiled: list[int]) -> None:
    q, _ = torch.linalg.qr(normal(12, 12))
    rows = (LARGE**0.5 * q[:6]).to(dtype)
    near = (sign * rows.double() + 0.05 * normal(6, 12, seed=1)).to(dtype)
    x, y = rows.requires_grad_(), near.requires_grad_()
    for anchors, loss in ((6, fastcl.contrastive_loss((x, y), None, None, "ntxent", 1.0, "mean", False)),
                          (12, fastcl.clip_loss(x, y, 1.0, normalize=False))):  # fmt: skip
        formula = one_way if anchors == 6 else clip_formula
        truth = solve(formula, x, 1.0, y, normalize=False, subtracts=True)
        assert_loss(loss, truth, dtype)
        assert_gradients(torch.autograd.grad(loss, (x, y)), truth)
    assert not tiled


@pytest.mark.parametrize("name", ("ntxent", "dcl"))
def test_two_views_of_any_size(name: ObjectiveName, tiled: list[int]) -> None:
    q, _ = torch.linalg.qr(normal(12, 12))
    near = LARGE**0.5 * q[:6] + 0.05 * normal(6, 12, seed=1)
    z = torch.cat([LARGE**0.5 * q[:6], near]).float().requires_grad_()
    itself, view = torch.eye(12, dtype=torch.bool), torch.eye(12, dtype=torch.bool).roll(6, 1)

    def rows(s: Tensor) -> Tensor:
        below = ~itself if name == "ntxent" else ~(itself | view)
        return s.masked_fill(~below, -torch.inf).logsumexp(1) - s[view]

    loss = fastcl.contrastive_loss(z, torch.arange(6).repeat(2), None, name, 1.0, "mean", False)
    truth = solve(rows, z, 1.0, normalize=False, subtracts=True)
    assert_loss(loss, truth, torch.float32)
    assert_gradients(torch.autograd.grad(loss, (z,)), truth)
    assert not tiled


def test_sums_that_leave_the_range_are_left_to_tiles(tiled: list[int]) -> None:
    x = (normal(6, 8) * LARGE**0.5).float()
    way = whole.Way(1.0, False, True, False)
    form = fastcl.OBJECTIVES["ntxent"]
    assert views_alone.reduced(form, x, x.flip(0), way, True, None) is None
    loss = fastcl.contrastive_loss((x, x.flip(0)), None, None, "ntxent", 1.0, "mean", False)
    truth = solve(one_way, x, 1.0, x.flip(0), normalize=False, subtracts=True)
    assert_loss(loss, truth, torch.float32)
    assert tiled


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("frozen", (True, False))
def test_the_gradient_of_a_scale(frozen: bool, normalize: bool, tiled: list[int]) -> None:
    """As it is given: in its shape and dtype, whether rows need a gradient or not."""
    x, y = (normal(7, 5, seed=seed).double().requires_grad_(not frozen) for seed in (0, 1))
    scale = torch.tensor([2.5], dtype=torch.float64, requires_grad=True)
    fastcl.clip_loss(x, y, scale, normalize=normalize).mul(3).backward()
    truth = solve(clip_formula, x, 1 / 2.5, y, normalize=normalize)
    assert scale.grad is not None and scale.grad.shape == (1,)
    want = -3 * truth.grad_temperature / 2.5**2
    torch.testing.assert_close(scale.grad.item(), float(want), rtol=1e-12, atol=1e-14)
    assert not tiled
