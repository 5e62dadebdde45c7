"""Padding of the Triton backend's tiles, and what else must not leave half precision's range or reach another row."""

import pytest
import torch
from reference import normal
from torch import Tensor
from triton_runs import DEVICE

import fastcl


def both(function, *rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients on the Triton backend in float32, and on the dense backend in float64."""
    found = []
    for backend, dtype in (("triton", torch.float32), ("dense", torch.float64)):
        leaves = [row.detach().to(DEVICE, dtype).requires_grad_() for row in rows]
        with fastcl.backend(backend):
            value = function(*leaves)
        found.append([v.detach().double() for v in (value, *torch.autograd.grad(value, leaves))])
    return tuple(found)


@pytest.mark.parametrize("d", (8, 300))  # narrow rows, wide rows
@pytest.mark.parametrize("loss", ("nscl", "clip"))
def test_padding_weighs_nothing_where_all_others_are_opposite(loss: str, d: int) -> None:
    # A row of padding has the logit 0, e^10 times what these rows' others have at a temperature of 0.1.
    labels = torch.arange(150, device=DEVICE) % 2
    sign = torch.where(labels[:, None].cpu() == 0, 1.0, -1.0)
    if loss == "nscl":
        a, b = (sign + 0.05 * normal(150, d, seed=k) for k in (1, 2))
        got, want = both(lambda p, q: fastcl.nscl_loss(p, q, labels, 0.1), a, b)
    else:
        a, b = (s + 0.05 * normal(150, d, seed=k) for k, s in ((1, 1.0), (2, -1.0)))
        got, want = both(lambda p, q: fastcl.clip_loss(p, q, 10.0), a, b)
    assert torch.allclose(got[0], want[0], rtol=1e-6)
    for gradient, truth in zip(got[1:], want[1:], strict=True):
        assert (gradient - truth).norm() < 1e-5 * truth.norm()


def test_huge_logits_have_finite_gradients() -> None:
    rows = normal(60, 9) * 3e3  # logits of 1e9, which float32 knows to about 50
    got, want = both(
        lambda z: fastcl.contrastive_loss(z, torch.arange(60, device=DEVICE) // 2, None, "dcl", 0.1, normalize=False),
        rows,
    )
    assert torch.allclose(got[0], want[0], rtol=1e-6)
    assert got[1].isfinite().all() and (got[1] - want[1]).norm() < 0.5 * want[1].norm()


def test_an_infinite_row_leaves_the_scale_of_the_others_alone() -> None:
    x = normal(60, 9).float() * 1000
    x[7] = torch.inf
    sample, labels = torch.arange(60) // 2, torch.arange(60) // 2 % 5
    found = {}
    for backend, rows in (("triton", x), ("dense", x.double())):
        with fastcl.backend(backend):
            found[backend] = fastcl.row_stats(
                rows.to(DEVICE), sample=sample.to(DEVICE), labels=labels.to(DEVICE), temperature=1e5, normalize=False
            )
    apart = labels != labels[7]  # these rows' peers are all finite
    got, want = (found[b].mean_peer.cpu().double()[apart] for b in ("triton", "dense"))
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-3) and apart.sum() > 40


def test_the_spread_of_a_single_view_has_no_gradient_at_all() -> None:
    x = normal(60, 9).float().to(DEVICE).requires_grad_()
    with fastcl.backend("triton"):
        stats = fastcl.row_stats(x, sample=torch.arange(60, device=DEVICE) // 2, temperature=0.07)
    (gradient,) = torch.autograd.grad((stats.spread_view * 1e6).sum(), x)
    assert (stats.spread_view == 0).all() and (gradient == 0).all()
