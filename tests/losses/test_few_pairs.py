"""The sigmoid loss of few pairs on a CPU, which visits each logit once: values, edges, who comes here."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from reference import DTYPES, TOLERANCE, assert_gradients, assert_loss, solve
from test_sigmoid import assert_options, formula, rows_of, value_and_gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastcl
from fastcl import FastclError
from fastcl.rowstats import chunked
from fastcl.rowstats.small import decisions


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each call that came to this way got its loss there."""
    found: list[bool] = []
    plain = decisions.sigmoid_sum

    def recorded(*arguments) -> Tensor | None:
        loss = plain(*arguments)
        found.append(loss is not None)
        return loss

    monkeypatch.setattr(decisions, "sigmoid_sum", recorded)
    yield found


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", (1, 40, 1 << 19))
def test_values_and_gradients(
    tile: int, dtype: torch.dtype, normalize: bool, monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    monkeypatch.setattr(decisions, "TILE", tile)
    wide = dtype if dtype == torch.float64 else torch.float32
    for (n, d), (scale, bias) in itertools.product(((2, 3), (13, 6), (33, 24)), ((10.0, -10.0), (60.0, 3.0))):
        rows = rows_of(n, d, dtype)
        options = [torch.tensor(v, dtype=wide, requires_grad=True) for v in ([scale], bias)]
        for reduction, weight in (("mean", 1 / n), ("sum", 1.0)):
            weights = torch.full((n,), weight, dtype=torch.float64)
            truth = solve(formula(bias), rows[0], 1 / scale, rows[1], weights, normalize)
            with torch.autocast("cpu", torch.bfloat16):
                loss = fastcl.sigmoid_loss(*rows, *options, normalize=normalize, reduction=reduction)
                plain = fastcl.sigmoid_loss(*rows, scale, bias, normalize=normalize, reduction=reduction)
            *grads, d_scale, d_bias = torch.autograd.grad(loss, (*rows, *options))
            assert torch.equal(plain, loss) and loss.dtype == wide and fastcl.last_backend() == "chunked"
            assert d_scale.shape == (1,) and d_bias.shape == ()
            assert_loss(loss, truth, dtype)
            assert_gradients(grads, truth)
            assert_options((d_scale[0], d_bias), rows, weights, (scale, bias), normalize, 100 * TOLERANCE[dtype].unit)
    assert taken and all(taken)


@pytest.mark.parametrize("normalize", (True, False))
def test_any_of_the_gradients_alone(normalize: bool, monkeypatch: pytest.MonkeyPatch, taken: list[bool]) -> None:
    def inputs() -> list[Tensor]:
        numbers = (torch.tensor([10.0], dtype=torch.float64), torch.tensor(-9.0, dtype=torch.float64))
        return [*(v.detach().float() for v in rows_of(7, 4)), *numbers]

    for tile in (20, 1 << 19):
        monkeypatch.setattr(decisions, "TILE", tile)
        leaves = [v.requires_grad_() for v in inputs()]
        loss = fastcl.sigmoid_loss(*leaves, normalize=normalize)
        whole = torch.autograd.grad(loss, leaves)
        assert [v.dtype for v in whole] == [v.dtype for v in leaves]
        for need in itertools.product((False, True), repeat=4):
            given = [v.requires_grad_(needed) for v, needed in zip(inputs(), need, strict=True)]
            value = fastcl.sigmoid_loss(*given, normalize=normalize)
            assert torch.equal(value, loss) and value.requires_grad == any(need)
            if any(need):
                value.backward()
            for v, needed, want in zip(given, need, whole, strict=True):
                assert torch.equal(v.grad, want) if needed else v.grad is None
    monkeypatch.setattr(Tensor, "sigmoid_", None)  # gradients are not computed in vain
    with torch.no_grad():
        assert not fastcl.sigmoid_loss(*leaves, normalize=normalize).requires_grad
    assert taken and all(taken)


def test_the_border_of_few(monkeypatch: pytest.MonkeyPatch, taken: list[bool]) -> None:
    monkeypatch.setattr(chunked, "WHOLE", 81)
    for n, here in ((9, [True]), (10, [])):
        rows, bias = rows_of(n, 4), torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
        leaves = *rows, bias
        found = value_and_gradients(fastcl.sigmoid_loss(*rows, 5.0, bias), leaves)
        assert taken == here
        with fastcl.backend("dense"):
            torch.testing.assert_close(
                found, value_and_gradients(fastcl.sigmoid_loss(*rows, 5.0, bias), leaves), rtol=1e-12, atol=1e-14
            )
        taken.clear()


class Labelled(Tensor):
    """A tensor that some library has made its own."""


def test_who_must_see_the_operator(taken: list[bool]) -> None:
    image, text = (v.detach() for v in rows_of(6, 4))
    fastcl.sigmoid_loss(image, text, 5.0, -1.0, reduction="none")
    fastcl.sigmoid_loss(image, text.as_subclass(Labelled), 5.0, -1.0)
    fastcl.sigmoid_loss(image, text, 5.0, torch.tensor(-1.0).as_subclass(Labelled))
    torch.func.vmap(lambda b: fastcl.sigmoid_loss(image, text, 5.0, b))(torch.zeros(2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fastcl.sigmoid_loss(image, text, 5.0, -1.0).shape == ()
    with fastcl.backend("dense"):
        fastcl.sigmoid_loss(image, text, 5.0, -1.0)
    assert not taken
    fastcl.sigmoid_loss(image, text, 5.0, -1.0)
    assert taken == [True]


@pytest.mark.parametrize("value", (0.0, 1e-20, 1e20, math.nan, math.inf, -math.inf))
def test_rows_that_take_more_care_go_to_the_operator(
    value: float, monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    for normalize, which in itertools.product((True, False), (0, 1)):
        rows = [v.detach().float() for v in rows_of(9, 4)]
        rows[which][3] = rows[which][3].abs() * value if value and math.isfinite(value) else value
        results = []
        for whole in (chunked.WHOLE, 0):
            with monkeypatch.context() as patch:
                patch.setattr(chunked, "WHOLE", whole)
                leaves = [v.clone().requires_grad_() for v in rows]
                loss = fastcl.sigmoid_loss(*leaves, 1e-9, -1.0, normalize=normalize)
            results.append(value_and_gradients(loss, leaves))
        torch.testing.assert_close(*results, equal_nan=True)
        assert results[0][0].isnan() == (not math.isfinite(value))
        assert taken == [not normalize and math.isfinite(value)]
        taken.clear()


def test_softplus_keeps_its_digits() -> None:
    for dtype in (torch.float32, torch.float64):
        s = torch.cat([torch.linspace(-80, 80, 20001, dtype=dtype), -torch.logspace(-30, 0, 200, dtype=dtype)])
        want = torch.nn.functional.softplus(s.double(), threshold=100)
        error = (decisions.softplus_of_many(s).double() - want).abs() / want
        assert error.max() <= 4 * torch.finfo(dtype).eps
        ends = decisions.softplus_of_many(torch.tensor([-torch.inf, torch.inf, torch.nan, 1e30, -1e30], dtype=dtype))
        torch.testing.assert_close(ends, torch.tensor([0, torch.inf, torch.nan, 1e30, 0], dtype=dtype), equal_nan=True)


@pytest.mark.parametrize("normalize", (True, False))
def test_used_as_other_losses_are(normalize: bool, taken: list[bool]) -> None:
    rows = rows_of(8, 5)
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    leaves: Sequence[Tensor] = *rows, bias

    def loss(image: Tensor, text: Tensor) -> Tensor:
        return fastcl.sigmoid_loss(image, text, 5.0, bias, normalize=normalize)

    want = value_and_gradients(loss(*rows), leaves)
    copies = [v * 1 for v in rows]
    value = loss(*copies)
    for v in copies:
        v.detach().mul_(2)
    assert all(map(torch.equal, value_and_gradients(value, leaves), want))
    halves = torch.autograd.grad(loss(*rows) * 0.5, leaves)
    assert all(torch.equal(2 * half, whole) for half, whole in zip(halves, want[1:], strict=True))
    with torch.inference_mode():
        frozen = [v * 1 for v in rows]
        assert torch.equal(loss(*frozen), want[0])
    assert torch.equal(torch.autograd.grad(loss(*frozen), bias)[0], want[3])
    recomputed = torch.utils.checkpoint.checkpoint(loss, *rows, use_reentrant=False)
    assert all(map(torch.equal, value_and_gradients(recomputed, leaves), want))
    assert taken and all(taken)
    refused: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: torch.autograd.grad(loss(*rows), rows[0], torch.ones(2, dtype=torch.float64), is_grads_batched=True),
         "batched gradients"),
        (lambda: torch.autograd.functional.hessian(lambda x: loss(x, rows[1]), rows[0]), "second derivatives"),
        (lambda: torch.func.grad(loss)(*rows), "torch.func.grad"),
    )  # fmt: skip
    for call, message in refused:
        with pytest.raises(FastclError, match=message):
            call()


def test_the_mean_follows_from_the_losses_of_the_rows() -> None:
    image, text = (v.detach().float() for v in rows_of(300, 16))
    rows = fastcl.sigmoid_loss(image, text, 20.0, -5.0, reduction="none")
    for reduction in ("mean", "sum"):
        found = fastcl.sigmoid_loss(image, text, 20.0, -5.0, reduction=reduction)
        torch.testing.assert_close(found, getattr(rows, reduction)(), rtol=1e-6, atol=0)
