"""Objectives of every kind far down in convergence, on every backend: gradients keep their digits at losses of 1e-8."""

import pytest
import torch
from reference import TOLERANCE, masks, normal, row_losses, solve
from test_triton_objectives import SETS, of_sets
from triton_runs import DEVICE, few_programs  # noqa: F401

import fastcl
from fastcl import Objective

pytestmark = pytest.mark.usefixtures("few_programs")
BACKENDS = ("dense", "chunked", "triton")
CLASSES = 12
# Where each class is one point: two views of one sample, two samples of one view, both, or a sample of one view beside
# one of two.
SAMPLES = {"views": (0, 0), "peers": (0, 1), "both": (0, 0, 1, 1), "uneven": (0, 0, 1)}


def collapsed(kind: str, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows near the corners of a simplex, their samples and their classes."""
    own = torch.tensor(SAMPLES[kind])
    classes = torch.arange(CLASSES).repeat_interleave(len(own))
    sample = own.repeat(CLASSES) + 2 * classes
    corners = torch.eye(CLASSES, dtype=torch.float64) - 1 / CLASSES
    return (corners[classes] + noise * normal(len(classes), CLASSES)).float(), sample, classes


# Those that share one of two attracted relations with their denominator, and two of the table and beside it with a
# single peer. The interpreter is slow: there the others are left to the tests of all objectives.
ALL = ("view", "peer", "other")
PARTLY = [s for s in SETS if len(s[1]) == 2 and len(set(s[0]) & set(s[1])) == 1 and "other" in s[0]]
FEW = [*PARTLY, (ALL, ("view", "peer"), False), (("peer", "other"), ("peer",), False)]
ON_TRITON = [("triton", "views"), ("triton", "peers")]


@pytest.mark.parametrize(("backend", "kind"), [(b, k) for b in BACKENDS[:2] for k in SAMPLES] + ON_TRITON)
def test_every_objective_keeps_its_digits(backend: str, kind: str) -> None:
    z, sample, labels = collapsed(kind, 1e-3)
    m = masks(sample, labels)
    lowest = 1.0
    for denominator, positives, inside in FEW if backend == "triton" else SETS:
        if not sum(getattr(m, r) for r in denominator).any(1).all():
            continue  # rows that do not count
        rows_of = row_losses(of_sets(denominator, positives, inside), m)
        truth = solve(rows_of, z, 0.05, subtracts=True)
        x = z.to(DEVICE).requires_grad_()
        with fastcl.backend(backend):
            objective = Objective(denominator, positives, inside)
            rows = fastcl.contrastive_loss(x, sample.to(DEVICE), labels.to(DEVICE), objective, 0.05, "none")
            (grad,) = torch.autograd.grad(rows.mean(), x)
        if truth.loss > 0:
            lowest = min(lowest, float(truth.loss))
        error = ((grad.cpu().double() - truth.grads[0]) * truth.sizes[0]).norm()
        bound = TOLERANCE[torch.float32].gradient * truth.grad_scales[0] + truth.blurs[0]
        assert error <= bound, (denominator, positives, inside, float(error / bound))
        assert ((rows.cpu() - truth.rows).abs() <= 1e-6 * truth.row_scale + truth.row_blur).all()
    assert lowest < 1e-7 or kind in ("both", "uneven")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_loss_is_known_to_all_its_digits(backend: str) -> None:
    """Objectives that a row without the relation that only attracts reduces to log(1 + Q / S): their loss is 7e-9."""
    for kind, denominator in (("views", ("view", "other")), ("peers", ("peer", "other"))):
        z, sample, labels = collapsed(kind, 1e-3)
        for inside in (False, True):
            positives = ("view", "peer")
            truth = solve(row_losses(of_sets(denominator, positives, inside), masks(sample, labels)), z, 0.05)
            with fastcl.backend(backend):
                objective = Objective(denominator, positives, inside)
                ids = sample.to(DEVICE), labels.to(DEVICE)
                loss = fastcl.contrastive_loss(z.to(DEVICE), *ids, objective, 0.05)
            assert float(truth.loss) < 1e-8 and float(loss) == pytest.approx(float(truth.loss), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_loss_has_a_gradient_of_zero(backend: str) -> None:
    z, sample, labels = (v.to(DEVICE) for v in collapsed("both", 0.1))
    z.requires_grad_()
    for relation, count in (("view", 1), ("peer", 2)):
        with fastcl.backend(backend):
            loss = fastcl.contrastive_loss(z, sample, labels, Objective((relation,), (relation,), True), 0.1, "none")
            (grad,) = torch.autograd.grad(loss.sum(), z)
        assert loss.tolist() == pytest.approx([torch.tensor(float(count)).log().item()] * len(z))
        assert not grad.any()
