"""A queue apart from the positives, rectangles of anchors and candidates, and arguments that every loss has."""

from functools import partial

import pytest
import torch
from reference import (
    TOLERANCE,
    assert_gradients,
    assert_loss,
    assert_rows,
    masks,
    normal,
    row_losses,
    solve,
    unit_rows,
)
from torch import Tensor
from triton_runs import compare_gradients, compare_rows, launches, leaf, row_weights

import fastcl
from fastcl import FastclError
from fastcl.losses import call_plans
from fastcl.rowstats import log_sums
from fastcl.rowstats.small import whole

BACKENDS = ("dense", "chunked")
both_backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sum is in the range of one pass."""
    monkeypatch.setattr(whole, "HIGHEST", 0.0)


def formula(query: Tensor, key: Tensor, queue: Tensor, temperature: float | Tensor, normalize: bool = True) -> Tensor:
    """(N,) losses as MoCo's paper writes them, in float64; log1p keeps the digits of small ones."""
    rows = [v.double() for v in (query, key, queue)]
    q, k, negatives = map(unit_rows, rows) if normalize else rows
    positive, others = (q * k).sum(1) / temperature, q @ negatives.T / temperature
    return (others - positive[:, None]).exp().sum(1).log1p()


def leaves(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [normal(*shape, seed=k).to(dtype).requires_grad_() for k, shape in enumerate(shapes)]


@pytest.mark.parametrize("at_once", (True, False))
@pytest.mark.parametrize("normalize", (True, False))
@both_backends
def test_queue(backend: str, normalize: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:
        monkeypatch.setattr(whole, "HIGHEST", 0.0)
    monkeypatch.setattr(log_sums, "TILE", {"cpu": 1})  # several tiles
    monkeypatch.setattr(log_sums, "NARROWEST", 4)
    given = leaves((7, 5), (7, 5), (11, 5))
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    want = formula(*given, t, normalize)
    with fastcl.backend(backend):
        rows = fastcl.queue_loss(*given, t, "none", normalize)
        torch.testing.assert_close(rows, want, rtol=1e-12, atol=1e-12)
        for reduction in ("mean", "sum"):
            loss = fastcl.queue_loss(*given, t, reduction, normalize)
            expected = torch.autograd.grad(getattr(want, reduction)(), (*given, t), retain_graph=True)
            assert fastcl.last_backend() == backend
            torch.testing.assert_close(torch.autograd.grad(loss, (*given, t)), expected, rtol=1e-11, atol=1e-12)


@both_backends
def test_one_float64_makes_all_of_it_float64(backend: str) -> None:
    given = [v.float() for v in (normal(6, 8, seed=0), normal(6, 8, seed=1), normal(40, 8, seed=2))]
    for k in range(3):
        with fastcl.backend(backend):
            loss = fastcl.queue_loss(*(v.double() if i == k else v for i, v in enumerate(given)), 0.1)
        torch.testing.assert_close(loss, formula(*given, 0.1).mean(), rtol=1e-13, atol=0)


@both_backends
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_keys_in_half_precision_and_a_queue_in_float32_or_the_other_way_round(dtype, backend: str) -> None:
    query, key, queue = (normal(*shape, seed=k) for k, shape in enumerate(((6, 8), (6, 8), (40, 8))))
    for halves in ((query, key), (queue,)):
        given = [v.to(dtype if any(v is h for h in halves) else torch.float32) for v in (query, key, queue)]
        given[0].requires_grad_()
        with fastcl.backend(backend), torch.autocast("cpu", dtype):
            loss = fastcl.queue_loss(*given, 0.1)
        want = formula(*given, 0.1).mean()
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
        got, expected = torch.autograd.grad(loss, given[0])[0], torch.autograd.grad(want, given[0])[0]
        assert (got - expected).norm() <= (1e-2 if got.dtype != torch.float32 else 1e-5) * expected.norm()


def test_a_queue_in_half_precision_is_saved_as_it_is_if_it_is_saved(operator: None) -> None:
    query, key = leaves((6, 8), (6, 8), dtype=torch.float32)
    queue, saved = normal(50, 8, seed=3).half(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        fastcl.queue_loss(query, key, queue)
    whole = [v for v in saved if v.numel() >= queue.numel()]
    assert whole and all(v.data_ptr() == queue.data_ptr() for v in whole)


def test_what_the_operator_lacks_is_refused(operator: None) -> None:
    query, key, queue = leaves((6, 8), (6, 8), (9, 8))
    losses = fastcl.queue_loss(query, key, queue, 0.3, "none")
    (first,) = torch.autograd.grad(losses.sum(), query, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):  # the backward pass does not round either
        assert torch.equal(torch.autograd.grad(losses.sum(), query, retain_graph=True)[0], first)
    with pytest.raises(FastclError, match="chunked .*second derivatives"):
        torch.autograd.grad(first.sum(), query, retain_graph=True)
    with pytest.raises(FastclError, match="chunked .*batched gradients"):
        torch.autograd.grad(losses, query, torch.eye(6, dtype=torch.float64), is_grads_batched=True)
    rows = query.detach(), torch.ones(6, 8, dtype=torch.float64)
    with pytest.raises(FastclError, match="chunked .*forward-mode"):
        torch.func.jvp(lambda q: fastcl.queue_loss(q, key, queue), rows[:1], rows[1:])
    with pytest.raises(FastclError, match="chunked .*torch.func.grad"):
        torch.func.grad(lambda k: fastcl.queue_loss(query, k, queue))(rows[0])
    with pytest.raises(FastclError, match="chunked .*torch.func.grad"):
        torch.func.grad(lambda m: fastcl.queue_loss(query, key, m))(rows[0])


def test_queue_far_from_and_close_to_convergence() -> None:
    """float32: neither does a small loss lose its digits, nor does exp overflow."""
    for temperature in (0.01, 0.1):
        key = normal(5, 16).float()
        query, queue = (key + 0.01 * normal(5, 16, seed=1)).float().requires_grad_(), normal(30, 16, seed=2).float()
        for negatives in (queue, torch.cat([queue, key])):
            loss, want = (
                fastcl.queue_loss(query, key, negatives, temperature),
                formula(query, key, negatives, temperature),
            )
            torch.testing.assert_close(loss.double(), want.mean(), rtol=1e-5 + 2.0**-23 / temperature, atol=1e-30)
            got, expected = (torch.autograd.grad(v, query)[0] for v in (loss, want.mean()))
            assert (got - expected).norm() <= 1e-4 * expected.norm() + 2.0**-24 / temperature**2


def test_queue_on_triton() -> None:
    query, key, queue = leaves((5, 24), (5, 24), (9, 24), dtype=torch.float32)
    half = queue.detach().half()
    want = formula(query, key, queue, 0.2)
    with launches():
        loss = fastcl.queue_loss(query, key, queue, 0.2)
        mixed = fastcl.queue_loss(query.half(), key.half(), queue, 0.2)
        stored = fastcl.queue_loss(query, key, half, 0.2)
        got = torch.autograd.grad(loss, (query, key, queue))
        got_stored = torch.autograd.grad(stored, query)[0]
    bound = TOLERANCE["fp32"]
    expected = torch.autograd.grad(want.mean(), (query, key, queue), retain_graph=True)
    torch.testing.assert_close(loss.double(), want.mean(), rtol=10 * bound.loss, atol=0)
    torch.testing.assert_close(mixed.double(), want.mean(), rtol=2e-3, atol=0)
    for one, other in zip((*got, got_stored), (*expected, expected[0]), strict=True):
        allowed = 2e-3 if one is got_stored else 10 * bound.gradient
        assert (one - other).norm() <= allowed * other.norm()


def test_queue_refuses() -> None:
    q, queue = torch.ones(3, 4), torch.ones(5, 4)
    for arguments, message in (
        ((q, q[:2], queue), r"same number of rows, got 3 and 2"),
        ((q, q, queue[:, :3]), r"same width and device, got \(3, 4\) .* for query and \(5, 3\) .* for queue"),
        ((q, q, queue[:0]), r"queue must be a non-empty .*, got \(0, 4\)"),
        ((q, q, queue, -0.1), r"temperature must be a positive .*, got -0.1; a negative one would attract"),
        ((q, q, queue, 0.1, "max"), r"reduction must be .*'max'"),
        ((q, q, queue, 0.1, "mean", True, "fp8"), r"precision must be .*'fp8'"),
    ):
        with pytest.raises(FastclError, match=message):
            fastcl.queue_loss(*arguments)


@both_backends
@pytest.mark.parametrize("name", ("ntxent", "nscl", "supcon"))
def test_rectangle(name: str, backend: str) -> None:
    x, y = leaves((7, 5), (9, 5))
    sample, sample_y = torch.arange(7), torch.tensor([0, 3, 3, 9, 5, 6, 1, 11, 12])
    labels, labels_y = sample % 3, sample_y % 3
    truth = solve(row_losses(name, masks(sample, labels, sample_y, labels_y)), x.detach(), 0.2, y.detach())
    with fastcl.backend(backend):
        loss = fastcl.contrastive_loss((x, y), (sample, sample_y), (labels, labels_y), name, 0.2)
        assert_loss(loss, truth, x.dtype)
        assert_gradients(torch.autograd.grad(loss, (x, y)), truth)
        several = fastcl.contrastive_losses((x, y), (sample, sample_y), (labels, labels_y), [name, "dcl"], 0.2, "none")
        assert_rows(several[name], truth, x.dtype)


def test_rectangle_on_triton() -> None:
    x, y = (leaf(normal(*shape, seed=k).float()) for k, shape in enumerate(((6, 24), (9, 24))))
    ids, weights = (torch.arange(6), torch.arange(9)), row_weights(6)
    truth = solve(row_losses("ntxent", masks(ids[0], None, ids[1])), x.detach(), 0.2, y.detach(), weights)
    with launches():
        rows = fastcl.contrastive_loss((x, y), ids, temperature=0.2, reduction="none", precision="fp32")
        compare_gradients(compare_rows(rows, truth, weights, "fp32"), (x, y), truth, "fp32")


def test_what_should_be_a_pair() -> None:
    z, ids = torch.ones(3, 4), torch.arange(3)
    for arguments, message in (
        (((z, z), ids), "sample must be a pair of tensors or, without"),
        (((z, z, z), (ids, ids)), "z must be a pair of tensors"),
        (((z, z), (ids, ids), ids, "nscl"), "labels must be a pair of tensors"),
        (((z, z), (ids, ids), None, "nscl"), "labels are required by objective 'nscl'"),
    ):
        with pytest.raises(FastclError, match=message):
            fastcl.contrastive_loss(*arguments)


@both_backends
@pytest.mark.parametrize("temperature", (0.5, torch.tensor(0.5, dtype=torch.float64)))
def test_reductions_of_clip(temperature, backend: str) -> None:
    image, text = leaves((6, 5), (6, 5))
    with fastcl.backend(backend):
        rows, total, mean = (
            fastcl.clip_loss(image, text, 1 / temperature, reduction=how) for how in ("none", "sum", "mean")
        )
        s = unit_rows(image) @ unit_rows(text).T / temperature
        want = (s.logsumexp(1) + s.logsumexp(0)) / 2 - s.diagonal()
        for got, expected in ((rows, want), (total, want.sum()), (mean, want.mean())):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(v.sum(), (image, text)) for v in (rows, total, want)]
        for got in gradients[:2]:
            torch.testing.assert_close(got, gradients[2], rtol=1e-11, atol=1e-12)


def test_labels_may_be_a_column() -> None:
    z1, z2 = (normal(6, 4, seed=k).float() for k in range(2))
    labels, ids = torch.tensor([0, 1, 0, -1, 2, 1]), torch.arange(6).repeat(2)
    column, z = labels[:, None], torch.cat([z1, z2])
    for backend in BACKENDS:
        with fastcl.backend(backend):
            assert torch.equal(fastcl.supcon_loss(z1, z2, column), fastcl.supcon_loss(z1, z2, labels))
            got = fastcl.contrastive_loss(z, ids, column.repeat(2, 1), "nscl")
            assert torch.equal(got, fastcl.contrastive_loss(z, ids, labels.repeat(2), "nscl"))
    with pytest.raises(FastclError, match=r"labels must have one id per row, shape \(6,\) .* got \(6, 2\)"):
        fastcl.supcon_loss(z1, z2, column.expand(6, 2))


def test_every_loss_has_a_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    z1, z2 = (normal(4, 24, seed=k).float() for k in range(2))
    labels = torch.tensor([0, 1, 0, 2])

    def stopped(batch, temperature, normalize, columns, precision, *rest):
        raise InterruptedError(precision)

    monkeypatch.setattr(call_plans, "fused", stopped)
    for loss, module, extra in (
        (fastcl.ntxent_loss, fastcl.NTXentLoss, ()), (fastcl.dcl_loss, fastcl.DCLLoss, ()),
        (fastcl.nscl_loss, fastcl.NSCLLoss, (labels,)), (fastcl.supcon_loss, fastcl.SupConLoss, (labels,)),
        (fastcl.clip_loss, fastcl.CLIPLoss, (5.0,)),
    ):  # fmt: skip
        for call in (partial(loss, precision="bf16"), module(precision="bf16")):
            with fastcl.backend("triton"), pytest.raises(InterruptedError, match="bf16"):
                call(z1, z2, *extra)
        with pytest.raises(FastclError, match="precision must be"):
            loss(z1, z2, *extra, precision="fp8")
