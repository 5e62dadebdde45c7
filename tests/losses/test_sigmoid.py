"""The sigmoid loss on the torch backends against its formula in float64; its operators; what it refuses."""

from collections.abc import Callable, Sequence

import pytest
import torch
from reference import DTYPES, TOLERANCE, assert_gradients, assert_loss, assert_rows, normal, solve, unit_rows
from torch import Tensor
from torch.nn.functional import softplus

import fastcl
from fastcl import FastclError
from fastcl.rowstats import log_sums
from fastcl.rowstats.sigmoid_sums import unpaired_sums

BACKENDS = ("dense", "chunked")
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def formula(bias: float | Tensor) -> Callable[[Tensor], Tensor]:
    """(N,) losses from logits without their bias, as the paper writes them: -log sigmoid(z_ij l_ij), z = 2 I - 1."""

    def rows(s: Tensor) -> Tensor:
        z = 2 * torch.eye(*s.shape, dtype=s.dtype) - 1
        return -torch.nn.functional.logsigmoid(z * (s + bias)).sum(1)

    return rows


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_sums, "TILE", {"cpu": 1})
    monkeypatch.setattr(log_sums, "NARROWEST", 4)


def rows_of(n: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Images, and texts that are near them."""
    image = normal(n, d)
    return [v.to(dtype).requires_grad_() for v in (image, image + normal(n, d, seed=1))]


def value_and_gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_options(
    got: Sequence[Tensor], rows: Sequence[Tensor], weights: Tensor, options: tuple[float, float], normalize: bool,
    allowed: float,
) -> None:  # fmt: skip
    """The gradients of scale and bias, relative to the sizes of the terms that they are sums of."""
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in options)
    wide = [v.detach().cpu().double() for v in rows]
    u, v = map(unit_rows, wide) if normalize else wide
    cosines = u @ v.T
    logits = cosines * scale + bias
    *want, terms = torch.autograd.grad((formula(0.0)(logits) * weights.double()).sum(), (scale, bias, logits))
    for one, other, size in zip(got, want, (cosines, torch.ones_like(cosines)), strict=True):
        assert abs(one.cpu() - other) <= allowed * (terms * size).abs().sum()


@both_backends
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "bias"), ((10.0, -10.0), (60.0, -30.0), (3.0, 2.0)))
def test_formula(scale: float, bias: float, dtype: torch.dtype, normalize: bool, backend: str, small_tiles) -> None:
    wide = dtype if dtype == torch.float64 else torch.float32
    rows = rows_of(13, 6, dtype)
    options = [torch.tensor([v], dtype=wide, requires_grad=True) for v in (scale, bias)]
    weights = torch.rand(13, generator=torch.Generator().manual_seed(0), dtype=wide)
    truth = solve(formula(bias), rows[0], 1 / scale, rows[1], weights, normalize)
    with fastcl.backend(backend), torch.autocast("cpu", torch.bfloat16):
        found = fastcl.sigmoid_loss(*rows, *options, normalize=normalize, reduction="none")
        loss = (found * weights).sum()
        plain = fastcl.sigmoid_loss(*rows, scale, bias, normalize=normalize, reduction="none")
        total, mean = (fastcl.sigmoid_loss(*rows, *options, normalize=normalize, reduction=r) for r in ("sum", "mean"))
    *grads, d_scale, d_bias = torch.autograd.grad(loss, (*rows, *options))
    assert found.dtype == wide and fastcl.last_backend() == backend
    torch.testing.assert_close(plain, found, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((total, mean), (found.sum(), found.mean()), rtol=1e-6, atol=0)
    assert_rows(found, truth, dtype)
    assert_loss(loss, truth, dtype)
    assert_gradients(grads, truth)
    assert_options((d_scale, d_bias), rows, weights, (scale, bias), normalize, 100 * TOLERANCE[dtype].unit)


@both_backends
def test_far_from_and_close_to_convergence(backend: str) -> None:
    """float32: a small loss and its gradient keep their digits, and no exponential overflows."""
    for scale, bias, noise in ((60.0, -40.0, 0.01), (100.0, -50.0, 0.01), (1000.0, 500.0, 3.0), (1000.0, -900.0, 3.0)):
        image = normal(7, 32)
        leaves = [v.float().requires_grad_() for v in (image, image + noise * normal(7, 32, seed=1))]
        b = torch.tensor(bias, requires_grad=True)
        with fastcl.backend(backend):
            got = value_and_gradients(fastcl.sigmoid_loss(*leaves, scale, b), (*leaves, b))
        wide = [v.detach().double().requires_grad_() for v in (*leaves, b)]
        logits = unit_rows(wide[0]) @ unit_rows(wide[1]).T * scale
        want = value_and_gradients(formula(wide[2])(logits).mean(), wide)
        allowed = 1e-5 + 2.0**-22 * (scale + abs(bias))
        for one, other in zip(got, want, strict=True):
            assert (one - other).norm() <= allowed * other.norm() and other.norm() > 0


@both_backends
def test_one_pair_and_texts_without_gradient(backend: str) -> None:
    image, text = rows_of(1, 4)
    with fastcl.backend(backend):
        loss = fastcl.sigmoid_loss(image, text, 5.0, -1.0)
        torch.testing.assert_close(loss, formula(-1.0)(unit_rows(image) @ unit_rows(text).T * 5).mean())
        rows = rows_of(5, 3)
        whole = torch.autograd.grad(fastcl.sigmoid_loss(*rows, 5.0, -1.0), rows)
        for k, given in enumerate(((rows[0], rows[1].detach()), (rows[0].detach(), rows[1]))):
            assert torch.equal(torch.autograd.grad(fastcl.sigmoid_loss(*given, 5.0, -1.0), rows[k])[0], whole[k])
        rows = [v.detach() for v in rows]
        rows[0][2, 1] = torch.nan
        losses = fastcl.sigmoid_loss(*rows, 5.0, -1.0, reduction="none")
        assert losses.isnan().tolist() == [False, False, True, False, False]


@both_backends
def test_texts_that_are_nobodys_own(backend: str, small_tiles) -> None:
    for n, m in ((7, 7), (5, 13), (13, 5)):
        x, y = normal(n, 4).requires_grad_(), normal(m, 4, seed=1).requires_grad_()
        weights = normal(n, seed=2)
        want = softplus(unit_rows(x) @ unit_rows(y).T * 5 - 1).sum(1)
        with fastcl.backend(backend):
            got = unpaired_sums(x, y, 5.0, -1.0, True, None)
        pairs = (value_and_gradients((v * weights).sum(), (x, y)) for v in (got, want))
        torch.testing.assert_close(*pairs, rtol=1e-12, atol=1e-12)


def test_rules_of_operators() -> None:
    x, wider = rows_of(7, 4)[0], normal(12, 4, seed=1).requires_grad_()
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    backward = torch.ops.fastcl.sigmoid_sums_backward.default
    for y, paired in ((wider, False), (wider.detach()[:7].requires_grad_(), True)):
        torch.library.opcheck(torch.ops.fastcl.sigmoid_sums.default, (x, y, bias, paired))
        given = x.detach(), y.detach(), bias.detach(), paired, normal(7, seed=3)
        torch.library.opcheck(backward, (*given, [True, True, True]))
        torch.library.opcheck(backward, (*given, [False, True, False]), test_utils="test_faketensor")


def test_compiled_and_what_only_dense_can() -> None:
    rows, bias = rows_of(6, 4), torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    def loss(image: Tensor, text: Tensor, b: Tensor) -> Tensor:
        return fastcl.sigmoid_loss(image, text, 5.0, b)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    eager = value_and_gradients(loss(*rows, bias), (*rows, bias))
    torch.testing.assert_close(value_and_gradients(compiled(*rows, bias), (*rows, bias)), eager)
    with fastcl.backend("dense"):
        (first,) = torch.autograd.grad(loss(*rows, bias), bias, create_graph=True)
        assert torch.autograd.grad(first, rows[0])[0].any()
        torch.testing.assert_close(torch.func.jacrev(loss)(*rows, bias), eager[1])
        biases = torch.stack([bias.detach(), bias.detach() + 1])
        expected = torch.func.vmap(lambda b: loss(*rows, b))(biases)
    torch.testing.assert_close(torch.func.vmap(lambda b: loss(*rows, b))(biases), expected)
    value = loss(*rows, bias)
    (first,) = torch.autograd.grad(value, bias, create_graph=True)
    for call, message in (
        (lambda: torch.autograd.grad(first, rows[0]), "second derivatives"),
        (lambda: torch.func.jacrev(loss)(*rows, bias), "torch.func.grad"),
        (lambda: torch.func.jvp(lambda b: loss(*rows, b), (bias,), (bias,)), "forward-mode"),
        (lambda: torch.autograd.grad(loss(*rows, bias), bias, torch.ones(2, dtype=torch.float64),
                                     is_grads_batched=True), "batched gradients"),
    ):  # fmt: skip
        with pytest.raises(FastclError, match=message):
            call()


def test_refuses() -> None:
    x = torch.ones(3, 4)
    for arguments, options, message in (
        ((x, x[:2], 10.0, -10.0), {}, r"same shape, dtype and device, got \(3, 4\) .* and \(2, 4\)"),
        ((x, x.double(), 10.0, -10.0), {}, "same shape, dtype and device"),
        ((x[:0], x[:0], 10.0, -10.0), {}, "image must be a non-empty"),
        ((x, x, -1.0, -10.0), {}, r"logit_scale must be a positive number .*, got -1.0"),
        ((x, x, 10.0, float("nan")), {}, r"logit_bias must be a number .*, got nan"),
        ((x, x, 10.0, None), {}, r"logit_bias must be a number .*, got None"),
        ((x, x, 10.0, torch.ones(2)), {}, r"logit_bias must be a number or a float tensor with one element"),
        ((x, x, 10.0, torch.tensor(-torch.inf)), {}, "logit_bias must be a number .*, got -inf"),
        ((x, x, 10.0, -10.0), {"reduction": "max"}, "reduction must be .*'max'"),
        ((x, x, 10.0, -10.0), {"precision": "fp8"}, "precision must be .*'fp8'"),
    ):
        with pytest.raises(FastclError, match=message):
            fastcl.sigmoid_loss(*arguments, **options)
