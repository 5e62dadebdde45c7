"""The sigmoid loss on the Triton backend: launches, values and gradients against the formula in float64."""

import pytest
import torch
from reference import TOLERANCE, assert_gradients, normal, solve, unit_rows
from test_sigmoid import assert_options, formula, rows_of, value_and_gradients
from torch import Tensor
from torch.nn.functional import softplus
from triton_runs import (  # noqa: F401
    DEVICE,
    compare_rows,
    few_programs,
    launches,
    leaf,
    row_weights,
    tables_own_tiles,
    tiles,
)

import fastcl
from fastcl.rowstats.sigmoid_sums import unpaired_sums
from fastcl.rowstats.triton import operand

pytestmark = pytest.mark.usefixtures("few_programs")


def check(
    n: int, d: int, scale: float, bias: float, precision: str, dtype: torch.dtype = torch.float32,
    normalize: bool = True,
) -> None:  # fmt: skip
    """Values and gradients of row losses with random weights."""
    rows, weights = [leaf(v) for v in rows_of(n, d, dtype)], row_weights(n)
    options = [leaf(torch.tensor(v)) for v in (scale, bias)]
    truth = solve(formula(bias), rows[0].detach().cpu(), 1 / scale, rows[1].detach().cpu(), weights, normalize)
    with launches():
        found = fastcl.sigmoid_loss(*rows, *options, normalize=normalize, reduction="none", precision=precision)
        loss = compare_rows(found, truth, weights, precision)
        *grads, d_scale, d_bias = torch.autograd.grad(loss, (*rows, *options))
    assert fastcl.last_backend() == "triton" and grads[0].dtype == dtype
    assert_gradients([g.cpu() for g in grads], truth, precision)
    allowed = TOLERANCE[precision].gradient + 4 * TOLERANCE[precision].unit * scale / d**0.5
    assert_options((d_scale, d_bias), rows, weights, (scale, bias), normalize, allowed)


@pytest.mark.parametrize(
    ("n", "d", "scale", "bias", "precision", "dtype", "normalize"),
    (
        (1, 24, 10.0, -10.0, "fp32", torch.float32, True),
        (200, 24, 10.0, -10.0, "fp32", torch.float32, True),
        (200, 33, 20.0, -10.0, "fp16", torch.float16, True),
        (130, 64, 20.0, -10.0, "bf16", torch.bfloat16, True),
        (70, 300, 100.0, -20.0, "fp32", torch.float32, True),
        (70, 300, 20.0, 3.0, "fp16", torch.float32, True),
        (50, 40, 0.3, -2.0, "fp32", torch.float32, False),
    ),
)
def test_formula(n, d, scale, bias, precision, dtype, normalize) -> None:
    check(n, d, scale, bias, precision, dtype, normalize)


@pytest.mark.parametrize("apart", (True, False))
def test_small_tiles(apart: bool) -> None:
    with tiles(32, 64, apart):
        check(150, 24, 10.0, -10.0, "fp16", torch.float16)


@pytest.mark.parametrize("precision", ("fp16", "fp32"))
def test_far_from_and_close_to_convergence(precision: str) -> None:
    """Sums and gradients below 1e-10 keep their digits, in half precision too; no exponential overflows."""
    for scale, bias, noise in ((120.0, -84.0, 0.01), (1000.0, 900.0, 3.0), (1000.0, -950.0, 3.0)):
        image = normal(70, 64)
        leaves = [leaf(v.float()) for v in (image, image + noise * normal(70, 64, seed=1))]
        b = leaf(torch.tensor(bias))
        with launches():
            loss = fastcl.sigmoid_loss(*leaves, scale, b, precision=precision)
            got = value_and_gradients(loss, (*leaves, b))
        wide = [v.detach().cpu().double().requires_grad_() for v in (*leaves, b)]
        logits = unit_rows(wide[0]) @ unit_rows(wide[1]).T * scale
        want = value_and_gradients(formula(wide[2])(logits).mean(), wide)
        allowed = 2.0 ** (-21 if precision == "fp32" else -10) * (scale + abs(bias))
        for one, other in zip(got, want, strict=True):
            assert (one.cpu() - other).norm() <= allowed * other.norm() and other.norm() > 0


def test_texts_of_other_ranks() -> None:
    """Texts that are nobody's own."""
    for n, m in ((40, 170), (60, 60)):
        x, y = leaf(normal(n, 24).float()), leaf(normal(m, 24, seed=1).float())
        x_wide, y_wide = (v.detach().cpu().double().requires_grad_() for v in (x, y))
        logits = unit_rows(x_wide) @ unit_rows(y_wide).T * 10 - 5
        weights = row_weights(n)
        want = value_and_gradients((softplus(logits).sum(1) * weights.double()).sum(), (x_wide, y_wide))
        with launches():
            sums = unpaired_sums(x, y, 10.0, -5.0, True, "fp32")
            got = value_and_gradients((sums * weights.to(sums)).sum(), (x, y))
        for one, other in zip(got, want, strict=True):
            assert (one.cpu() - other).norm() <= 1e-5 * other.norm()


def test_gradients_that_nobody_needs_are_not_computed() -> None:
    x, y = (v.detach() for v in rows_of(20, 24, torch.float32))
    for k, kernels in ((0, 1), (1, 1), (2, 1), (3, 0)):
        given = [v.clone().to(DEVICE) for v in (x, y, torch.tensor(10.0), torch.tensor(-5.0))]
        given[k].requires_grad_()
        with launches() as ran:
            (grad,) = torch.autograd.grad(fastcl.sigmoid_loss(*given), given[k])
        assert grad.shape == given[k].shape and grad.any()
        assert len(ran.of("backward_kernel")) == kernels and len(ran.of("forward_kernel")) == 1 + (k == 3)


def test_operators() -> None:
    x, y = (v.detach() for v in rows_of(5, 24, torch.float32))
    ids = torch.arange(7)
    wider = torch.cat([y, y[:2]])
    bias, scale = torch.tensor([-2.0]), torch.tensor(5.0)
    for given in (
        (x, y, None, None, bias, scale, 0.0, True, "fp32"),
        (x, wider, ids[2:], ids, bias, None, 0.1, False, "fp16"),
    ):
        leaves = [v.to(DEVICE) if isinstance(v, Tensor) else v for v in given]
        found = torch.ops.fastcl.fused_sigmoid(*leaves)
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        leaves[0].requires_grad_()
        torch.library.opcheck(torch.ops.fastcl.fused_sigmoid.default, tuple(leaves), test_utils=utils)
        plain = [v.detach() if isinstance(v, Tensor) else v for v in (*leaves[:2], *leaves[4:])]
        grads = [torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE)]
        need = [True, True, given[5] is not None, True]
        backward = torch.ops.fastcl.fused_sigmoid_backward.default
        torch.library.opcheck(backward, (*plain, list(found[:2]), list(found[2:]), grads, need), test_utils=utils[::2])


def test_compiled() -> None:
    rows, bias = [leaf(v) for v in rows_of(6, 24, torch.float32)], leaf(torch.tensor(-1.0))

    def loss(image: Tensor, text: Tensor, b: Tensor) -> Tensor:
        return fastcl.sigmoid_loss(image, text, 5.0, b)

    with fastcl.backend("triton"):
        eager = value_and_gradients(loss(*rows, bias), (*rows, bias))
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        torch.testing.assert_close(value_and_gradients(compiled(*rows, bias), (*rows, bias)), eager)
        (first,) = torch.autograd.grad(loss(*rows, bias), bias, create_graph=True)
        with pytest.raises(fastcl.FastclError, match="second derivatives"):
            torch.autograd.grad(first, rows[0])


def test_tables_tiles_of_wide_rows() -> None:
    with tables_own_tiles():
        check(20, 520, 10.0, -10.0, "fp16", torch.float16)
    assert operand.NARROW < 520
