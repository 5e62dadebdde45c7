"""The loss of a queue with its gradients from one pass, on a CPU: when it is taken, and that it is right."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from reference import TOLERANCE, normal
from test_queue import formula
from torch import Tensor

import fastcl
from fastcl import FastclError
from fastcl.rowstats import chunked, log_sums


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of a queue."""
    monkeypatch.setattr(log_sums, "TILE", {"cpu": 1})
    monkeypatch.setattr(log_sums, "NARROWEST", 4)


@pytest.fixture
def operated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of queries that another way than one pass has computed."""
    from fastcl.losses import queue

    seen: list[int] = []
    found = queue.log_sums
    monkeypatch.setattr(queue, "log_sums", lambda *given: seen.append(len(given[0])) or found(*given))
    yield seen


def rows(dtypes: tuple[torch.dtype, ...] = (torch.float64,) * 3) -> list[Tensor]:
    shapes = ((7, 5), (7, 5), (11, 5))
    return [normal(*shape, seed=k).to(d) for k, (shape, d) in enumerate(zip(shapes, dtypes, strict=True))]


HALF = torch.float16, torch.bfloat16
MIXED = [
    *itertools.product((torch.float64,), repeat=3), *itertools.product((torch.float32,), repeat=3),
    (HALF[0], HALF[0], torch.float32), (torch.float32, torch.float32, HALF[1]), (HALF[1], torch.float32, HALF[0]),
    (torch.float32, torch.float64, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_gradients_of_whatever_is_trained(dtypes: tuple[torch.dtype, ...], normalize: bool, operated) -> None:
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    everything = [*rows(dtypes), torch.tensor(0.3, dtype=wide)]
    for reduction, k in itertools.product(("mean", "sum", "none"), range(1, 16)):
        if reduction == "none" and k & 4:
            continue  # row losses with a queue that is trained are left to the operator
        given = [v.clone().requires_grad_(bool(k & 1 << i)) for i, v in enumerate(everything)]
        trained = [v for v in given if v.requires_grad]
        got, want = fastcl.queue_loss(*given, reduction, normalize), formula(*given[:3], given[3].double(), normalize)
        weights = torch.linspace(1, 2, 7, dtype=torch.float64)
        want, got = (want * weights, got * weights) if reduction == "none" else (getattr(want, reduction)(), got)
        bound = TOLERANCE[wide]
        torch.testing.assert_close(got.double(), want, rtol=10 * bound.loss, atol=bound.loss)
        grads = zip(*(torch.autograd.grad(v.sum(), trained) for v in (got, want)), strict=True)
        for one, other in grads:
            unit = max(torch.finfo(one.dtype).eps, bound.gradient)
            assert one.dtype == other.dtype and (one.double() - other.double()).norm() <= unit * (1 + other.norm())
    assert not operated


def test_what_one_pass_does_not_give_comes_from_the_operator(operated: list[int], monkeypatch) -> None:
    query, key, queue = rows()
    trained = queue.clone().requires_grad_()
    zero, huge = queue.clone(), queue.clone()
    zero[2], huge[3] = 0, 1e20
    given = [
        ((query, key, trained, 0.3, "none"), trained), ((query, key, zero, 0.3), query),
        ((query, key, huge, 0.3), query), ((query, key, queue, 1e-2), query), ((query, key, -query[:1], 1e-2), query),
    ]  # fmt: skip
    for k, (arguments, leaf) in enumerate(given, 1):
        leaf.requires_grad_()
        loss, want = fastcl.queue_loss(*arguments).sum(), formula(*arguments[:4])
        want = want.sum() if "none" in arguments else want.mean()
        torch.testing.assert_close(loss, want, rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(*(torch.autograd.grad(v, leaf)[0] for v in (loss, want)), rtol=1e-9, atol=1e-12)
        assert len(operated) == k
    monkeypatch.setattr(chunked, "WHOLE", 7 * 11 - 1)
    fastcl.queue_loss(query, key, trained, 0.3)
    assert len(operated) == len(given) + 1
    monkeypatch.setattr(chunked, "WHOLE", 7 * 11)
    fastcl.queue_loss(query, key, trained, 0.3)
    assert len(operated) == len(given) + 1


def test_nan_and_infinity_are_told(operated: list[int]) -> None:
    for bad, place in itertools.product((torch.nan, torch.inf, -torch.inf), range(3)):
        given = rows((torch.float32,) * 3)
        given[place][2, 1] = bad
        found = fastcl.queue_loss(*given, 0.3, "none", normalize=False)
        assert found.isnan().all() if place == 2 else found.isnan().sum() == 1
    assert len(operated) == 9


def test_a_queue_that_is_kept_as_columns(operated: list[int]) -> None:
    query, key, queue = rows()
    found = [fastcl.queue_loss(query, key, v, 0.3) for v in (queue, queue.T.contiguous().T)]
    torch.testing.assert_close(*found, rtol=1e-14, atol=0)
    assert not operated


def test_nothing_of_a_frozen_queue_is_kept() -> None:
    """No copy of it, no logits; and who overwrites it changes no gradient."""
    query, key, queue = rows()
    query.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        loss = fastcl.queue_loss(query, key, queue)
    assert saved and max(v.numel() for v in saved) <= query.numel() < queue.numel()
    (want,) = torch.autograd.grad(fastcl.queue_loss(query, key, queue), query)
    for v in (key, queue):
        v.zero_()
    assert torch.equal(torch.autograd.grad(loss, query)[0], want)


def test_what_is_refused(operated: list[int]) -> None:
    query, key, queue = rows()
    losses = fastcl.queue_loss(query.requires_grad_(), key, queue, 0.3, "none")
    (first,) = torch.autograd.grad(losses.sum(), query, create_graph=True)
    with pytest.raises(FastclError, match="chunked .*second derivatives"):
        torch.autograd.grad(first.sum(), query, retain_graph=True)
    with pytest.raises(FastclError, match="chunked .*batched gradients"):
        torch.autograd.grad(losses, query, torch.eye(7, dtype=torch.float64), is_grads_batched=True)
    assert not operated
    narrow = [v.detach().float() for v in (query, key, queue)]
    full = fastcl.queue_loss(*narrow, 0.3, "none")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastcl.queue_loss(*narrow, 0.3, "none"), full)
    compiled = torch.compile(fastcl.queue_loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, queue, 0.3, "none"), losses, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(fastcl.queue_loss(query, key, queue, 0.3, "none"), losses)


def test_unit_rows_outlive_what_they_were_made_of() -> None:
    """Few steps where norms are in range are nobody's cost who changes the rows afterwards, or has a row of zeros."""
    x = normal(6, 5).requires_grad_()
    given = x * 1
    unit = fastcl.normalize_rows(given)
    given.detach().zero_()
    (got,) = torch.autograd.grad((unit * normal(6, 5, seed=1)).sum(), x)
    (want,) = torch.autograd.grad((x / x.norm(dim=1, keepdim=True) * normal(6, 5, seed=1)).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    traced = torch.jit.trace(fastcl.normalize_rows, (x.detach(),))
    assert torch.equal(traced(torch.zeros(6, 5, dtype=torch.float64)), torch.zeros(6, 5, dtype=torch.float64))
