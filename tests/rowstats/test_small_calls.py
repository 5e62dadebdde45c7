"""Eager calls of few rows on the Triton backend: replayed, without PyTorch's dispatcher, and with the same bits."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from addressed import either
from reference import normal
from test_replay import nothing_recorded  # noqa: F401
from test_triton_operator import KINDS, call
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from triton_runs import DEVICE, few_programs, poisoned  # noqa: F401

import fastcl
from fastcl.kernels.common import launch
from fastcl.rowstats import registration
from fastcl.rowstats.triton import backward, forward, replay, two_models, weighted

pytestmark = pytest.mark.usefixtures("few_programs")
X = torch.ones(4, 3)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that host code started, not those that a replay did."""
    found: list[Any] = []
    start = launch.launch

    def counted(kernel, *options, **arguments) -> None:
        found.append(kernel)
        start(kernel, *options, **arguments)

    for module in (launch, backward, forward, weighted, two_models):
        monkeypatch.setattr(module, "launch", counted)
    return found


def losses_and_gradients(arguments: list) -> list[Tensor]:
    """Results of the operator, and gradients of a sum of those that have one."""
    leaves = [v for v in arguments if isinstance(v, Tensor) and v.requires_grad]
    tensors, options = arguments[:8], tuple(tuple(v) if isinstance(v, list) else v for v in arguments[8:])
    results = registration.call("fused", tensors, options)
    assert len(results) == 6 or not registration.is_plain(tensors)
    found = [v for v in results[:6] if v is not None and v.numel()]
    of = [v for v in found if v.requires_grad]
    total = sum((v.masked_fill(v.isinf(), 0) * (1 + k)).sum() for k, v in enumerate(of))
    return [*(v.detach() for v in found), *torch.autograd.grad(total, leaves)]


def with_other_values(arguments: list, seed: int) -> list:
    changed = []
    for k, value in enumerate(arguments):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 2:
            other = torch.empty_like(value)
            with torch.no_grad():
                other.copy_(normal(*value.shape, seed=10 * seed + k))
            value = other.requires_grad_()
        changed.append(value)
    return changed


@either
@pytest.mark.parametrize("options", ((False, True, "fp16"), (True, False, "fp32")), ids=("fixed", "learnable"))
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(kind: str, options: tuple[bool, bool, str], around: Callable, runs, monkeypatch) -> None:
    arguments, started = call(kind, *options), []
    for seed in range(5):  # the backward pass of a replay is recorded after it
        given, before = with_other_values(arguments, seed), len(runs)
        with monkeypatch.context() as patch, around():
            if seed > 1:
                patch.setattr(torch, "empty", poisoned)
            found = losses_and_gradients(given)
            started.append(len(runs) - before)
            patch.setattr(replay, "MOST_ROWS", 0)
            expected = losses_and_gradients(given)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert started[0] == started[1] > started[2] and started[3:] == [0, 0]


def test_a_loss_is_replayed_for_every_pass_of_a_loop(runs) -> None:
    weight = normal(8, 4).float().to(DEVICE).requires_grad_()
    x, y = (normal(12, 8, seed=k).float().to(DEVICE) for k in (1, 2))
    seen = []
    with fastcl.backend("triton"):
        for _ in range(5):
            before = len(runs)
            fastcl.nscl_loss(x @ weight, y @ weight, torch.arange(12, device=DEVICE) % 3).backward()
            seen.append(len(runs) - before)
    assert seen[0] > 0 and seen[2:] == [0, 0, 0]


def test_without_the_dispatcher_the_bits_are_the_same(monkeypatch) -> None:
    arguments = call("two views", True)
    direct = losses_and_gradients(arguments)
    monkeypatch.setattr(registration, "is_plain", lambda *_: False)
    assert all(map(torch.equal, direct, losses_and_gradients(arguments)))


def test_what_a_call_allocates_and_launches_is_all_that_a_replay_does() -> None:
    z1, z2 = (normal(8, 4, seed=k).float().to(DEVICE).requires_grad_() for k in (0, 1))
    with fastcl.backend("triton"), mock.patch.object(launch, "start", lambda *_: None):
        for _ in range(3):
            fastcl.ntxent_loss(z1, z2).backward()
        with torch.autograd.profiler.profile() as seen:
            fastcl.ntxent_loss(z1, z2)
    found = {event.name for event in seen.function_events if event.name.startswith("aten::")}
    views = {"aten::unbind", "aten::select", "aten::as_strided", "aten::squeeze"}
    assert found <= {"aten::empty", "aten::new_empty", *views}, found  # a profiled call returns empty tensors for None


@either
def test_two_models_are_replayed(around: Callable, runs) -> None:
    za, zb = (normal(12, 4, seed=k).float().to(DEVICE) for k in (0, 1))
    sample, found, started = torch.arange(12, device=DEVICE) // 2, [], []
    with fastcl.backend("triton"), around():
        for _ in range(4):
            before = len(runs)
            stats = fastcl.twin_stats(za, zb, sample=sample, temperature=0.5)
            found.append((stats.a.lse_other, stats.b.mean_view, stats.sums))
            started.append(len(runs) - before)
    assert started[0] == started[1] > 0 and started[2:] == [0, 0]
    assert all(torch.equal(v, first) for one in found[1:] for v, first in zip(one, found[0], strict=True))


class Other(Tensor):
    """A class of its own."""


@pytest.mark.parametrize(
    "values",
    (
        [X.as_subclass(Other)],
        [X, None, X.as_subclass(Other)],
        [torch._neg_view(X)],
        [torch.complex(X, X).conj().imag],
        [torch._efficientzerotensor((2, 2))],
        [torch._to_functional_tensor(X)],
    ),
    ids=("class", "class of the second", "negative", "conjugate", "zero", "functional"),
)
def test_tensors_that_the_dispatcher_has_to_see(values: list) -> None:
    assert registration.is_plain([X, None, torch.nn.Parameter(X)], [X, None])
    assert not registration.is_plain(values)
    assert registration.is_plain([X], values) != any(type(v) is Other for v in values)


def test_negated_views_of_memory() -> None:
    a, b, weights = (normal(8, 4, seed=k).float().to(DEVICE) for k in range(3))

    def results(a: Tensor, gradient: Tensor, temperature: Tensor) -> list[Tensor]:
        leaf, t = a.detach().requires_grad_(), temperature.detach().requires_grad_()
        rows = fastcl.ntxent_loss(leaf, b, t, reduction="none")
        return [rows.detach(), *torch.autograd.grad(rows, (leaf, t), gradient)]

    gradient, temperature = weights.flatten()[:16], torch.tensor(0.3, device=DEVICE)
    with fastcl.backend("triton"):
        expected = results(a, gradient, temperature)
        given = (torch._neg_view(-v) for v in (a, gradient, temperature))
        assert all(map(torch.equal, results(*given), expected))


def test_watched_calls_show_the_operator() -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    z, y = (normal(8, 4, seed=k).float().to(DEVICE) for k in (0, 1))
    with fastcl.backend("triton"):
        with Watch():
            fastcl.ntxent_loss(z, y)
        with torch.autograd.profiler.profile() as profile:
            fastcl.ntxent_loss(z.requires_grad_(), y).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(lambda z: fastcl.ntxent_loss(z, y), z, check_trace=False)
    assert "fastcl.fused.default" in seen
    assert {"fastcl::fused", "fastcl::fused_backward"} <= {event.name for event in profile.function_events}
    assert "fastcl::fused" in str(traced.graph)


@pytest.mark.parametrize("watched", ("forward", "backward"))
def test_checkpoints_of_which_one_pass_is_watched(watched: str) -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    z, y = (normal(8, 4, seed=k).float().to(DEVICE).requires_grad_() for k in (0, 1))
    with fastcl.backend("triton"):
        (expected,) = torch.autograd.grad(fastcl.ntxent_loss(z, y), z)
        with Watch() if watched == "forward" else nullcontext():
            loss = checkpoint(lambda z: fastcl.ntxent_loss(z, y), z, use_reentrant=False)
        with Watch() if watched == "backward" else nullcontext():
            (found,) = torch.autograd.grad(loss, z)
    assert torch.equal(found, expected)


def test_what_is_saved_may_be_kept_elsewhere_used_twice_but_not_changed() -> None:
    z, y = (normal(8, 4, seed=k).float().to(DEVICE).requires_grad_() for k in (0, 1))
    t = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    found = []
    with fastcl.backend("triton"):
        for k in range(5):
            with torch.autograd.graph.save_on_cpu() if k % 2 else nullcontext():
                loss = fastcl.ntxent_loss(z, y, t)
            found += [torch.autograd.grad(loss, (z, y, t), retain_graph=True) for _ in range(2)]
            with torch.no_grad():
                y.add_(0)
            with nullcontext() if k % 2 else pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()  # elsewhere there is a copy
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many of the tensors that the test allocates are alive, without help of the garbage collector."""
    made: list[weakref.ref[Tensor]] = []

    def empty(*args, **options) -> Tensor:
        memory = X.new_empty(*args, **options)
        made.append(weakref.ref(memory))
        return memory

    gc.disable()
    monkeypatch.setattr(torch, "empty", empty)
    yield lambda: sum(one() is not None for one in made)
    gc.enable()


@pytest.mark.parametrize("kind", ("loss", "statistics"))
def test_what_is_saved_is_freed_with_the_graph(kind: str, allocated) -> None:
    z, y = (normal(8, 4, seed=k).float().to(DEVICE).requires_grad_() for k in (0, 1))
    ids = torch.arange(8, device=DEVICE) // 2

    def value() -> Tensor:
        if kind == "loss":
            return fastcl.ntxent_loss(z, y)
        return fastcl.row_stats(z, sample=ids, temperature=0.5).lse_other.sum()

    with fastcl.backend("triton"):
        for _ in range(3):
            torch.autograd.grad(value(), z)
        assert allocated() == 0
        result = value()
        before = allocated()
        first, second = (torch.autograd.grad(result, z, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second) and before > 2
        del first, second
        assert allocated() == before
        torch.autograd.grad(result, z)
        assert allocated() <= 1  # the loss itself
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(result, z)
        del result
        result = value()
        assert allocated() == before
        del result
        assert allocated() == 0


def test_hooks_see_all_that_is_saved() -> None:
    z, y = (normal(8, 4, seed=k).float().to(DEVICE).requires_grad_() for k in (0, 1))
    seen, counts = [], []
    with fastcl.backend("triton"):
        for _ in range(4):
            seen.clear()
            with torch.autograd.graph.saved_tensors_hooks(lambda v: seen.append(v) or v.clone(), lambda v: v):
                loss = fastcl.ntxent_loss(z, y)
            counts.append(len(seen))
            found = torch.autograd.grad(loss, (z, y))
            expected = torch.autograd.grad(fastcl.ntxent_loss(z, y), (z, y))
            assert all(map(torch.equal, found, expected))
    assert counts == counts[:1] * 4 and counts[0] > 6
