"""Results that only the backward pass sees: where kernels are compiled, a replay puts them into one memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from addressed import addressed, either
from reference import normal
from test_repeated import Add
from test_replay import Pair, X, nothing_recorded  # noqa: F401
from test_small_calls import Other
from test_triton_operator import call
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton_runs import DEVICE, few_programs, poisoned  # noqa: F401

import fastcl
import fastcl.similarity.two_models  # registers its operator
from fastcl.kernels.common import launch
from fastcl.rowstats import registration
from fastcl.rowstats.hidden import Hidden, Place
from fastcl.rowstats.registration import tensors_of
from fastcl.rowstats.triton import replay

pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.skipif(DEVICE.type != "cpu", reason="addresses are of the CPU's memory"),
]


def plus(x: Tensor, by: float) -> Tensor:
    """x and a number, by a launch."""
    out = torch.empty(4, 3, dtype=torch.float32, device=x.device)
    launch.launch(Add(), (1,), 4, 1, one=Pair(x, None), out=out, by=by)
    return out


def forward(x: Tensor) -> tuple[Tensor | None, ...]:
    first = plus(x, 1)
    return first, plus(first, 2), None, plus(x, 5)


def backward(x: Tensor, a: Tensor, none: None, b: Tensor) -> tuple[Tensor | None, ...]:
    return plus(a, 10), a * b, None


def test_a_backward_pass_gets_the_values_of_its_forward_pass(monkeypatch) -> None:
    ran, kinds = [], []

    def counted(*args: Any) -> tuple[Tensor | None, ...]:
        ran.append(1)
        return backward(*args)

    with addressed():
        for k in range(6):
            x = X + k
            if k > 2:  # what is recorded should not fill memory
                monkeypatch.setattr(torch, "empty", poisoned)
            (seen,), hidden = replay.run(forward, (x,), (), (), 1)
            (first, product, none), nothing = replay.run(counted, (x,), (), hidden)
            kinds.append(type(hidden))
            assert torch.equal(seen, x + 1) and none is None and not tensors_of(nothing)
            a, none, b = tensors_of(hidden)
            assert torch.equal(a, x + 3) and none is None and torch.equal(b, x + 5)
            assert torch.equal(first, x + 13) and torch.equal(product, (x + 3) * (x + 5))
    assert kinds == [tuple] * 2 + [Hidden] * 4
    # Of the first two calls the second is recorded; another recording is of what a replay has saved.
    assert len(ran) == 3


def test_what_launches_alone_read_is_never_a_tensor(monkeypatch) -> None:
    def first(x: Tensor, *saved: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if v is None else plus(v, 1) for v in saved)

    with addressed():
        for k in range(6):
            (_,), hidden = replay.run(forward, (X + k,), (), (), 1)
            if k > 3:
                monkeypatch.setattr(Place, "tensor", None)
            found, _ = replay.run(first, (X,), (), hidden)
        assert torch.equal(found[0], X + 9)


def test_losses_of_both_sides_that_are_added_are_replayed() -> None:
    z, y = (normal(8, 4, seed=k).float().requires_grad_() for k in (0, 1))
    with fastcl.backend("triton"), addressed():
        found = [torch.autograd.grad(fastcl.clip_loss(z, y, 5.0, reduction="none").sum(), z)[0] for _ in range(5)]
    assert len(replay._recordings) == 3 and None not in replay._recordings.values()
    assert all(torch.equal(one, found[0]) for one in found)


def test_two_layouts_of_as_many_bytes_are_told_apart() -> None:
    def turned(x: Tensor) -> tuple[Tensor | None, ...]:
        seen, a, none, b = forward(x)
        return seen, none, a, b

    def first(x: Tensor, *saved: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if v is None else plus(v, 1) for v in saved)

    with addressed():
        for k in range(6):
            for host in (forward, turned):
                (_,), hidden = replay.run(host, (X + k,), (), (), 1)
                found, _ = replay.run(first, (X,), (), hidden)
                assert (found[0] is None) == (host is turned)
                pairs = zip(found, tensors_of(hidden), strict=True)
                assert all(a is b is None or torch.equal(a, b + 1) for a, b in pairs)


def test_hidden_results_lie_apart_in_one_memory(monkeypatch) -> None:
    made, empty = [], torch.empty
    with addressed():
        for _ in range(3):
            replay.run(forward, (X,), (), (), 1)
        monkeypatch.setattr(torch, "empty", lambda *sizes, **options: made.append(sizes) or empty(*sizes, **options))
        _, hidden = replay.run(forward, (X,), (), (), 1)
    assert made == [(1024,), (4, 3)]
    a, _, b = hidden.tensors()
    assert hidden.memory.dtype == torch.uint8 and hidden.memory.nbytes == 1024
    assert [v.data_ptr() - hidden.memory.data_ptr() for v in (a, b)] == [0, 512]


@pytest.mark.parametrize(
    "results",
    (
        lambda x: (plus(x, 1), plus(x, 2).unbind()[1]),
        lambda x: (plus(x, 1), plus(x, 2) * 2),
        lambda x: (plus(x, 1), *[plus(x, 2)] * 2),
        lambda x: (*[plus(x, 2)] * 2, plus(x, 1)),
        lambda x: (plus(x, 1), x),
    ),
    ids=("row", "operation", "twice", "seen too", "given"),
)
def test_what_is_no_memory_of_its_own_stays_a_tensor(results: Callable) -> None:
    ran = []

    def function(x: Tensor) -> tuple[Tensor, ...]:
        ran.append(1)
        return results(x)

    with addressed():
        for k in range(4):
            (seen,), hidden = replay.run(function, (X + k,), (), (), 1)
            assert type(hidden) is tuple
            assert all(map(torch.equal, (seen, *hidden), results(X + k)))
    assert len(ran) == 2


def test_without_a_way_to_know_of_hooks_nothing_is_hidden(monkeypatch) -> None:
    monkeypatch.setattr(registration, "_hooks", None)  # as in PyTorch 2.7
    monkeypatch.setattr(Hidden, "tensors", None)
    z, y = (normal(8, 4, seed=k).float().requires_grad_() for k in (0, 1))
    with fastcl.backend("triton"), addressed():
        found = [torch.autograd.grad(fastcl.ntxent_loss(z, y), z)[0] for _ in range(4)]
    assert all(torch.equal(one, found[0]) for one in found) and len(replay._recordings) == 2


@either
@pytest.mark.parametrize("forgotten", ("forward", "backward"))
def test_checkpoints_of_which_one_pass_is_replayed(forgotten: str, around: Callable) -> None:
    z, y = (normal(8, 4, seed=k).float().requires_grad_() for k in (0, 1))
    with fastcl.backend("triton"), around():
        for _ in range(4):
            (expected,) = torch.autograd.grad(fastcl.ntxent_loss(z, y), z)
        if forgotten == "forward":
            replay.forget()
        loss = checkpoint(lambda z: fastcl.ntxent_loss(z, y), z, use_reentrant=False)
        if forgotten == "backward":
            replay.forget()
        elif forgotten == "forward":
            for _ in range(4):
                torch.autograd.grad(fastcl.ntxent_loss(z, y), z)
        assert torch.equal(torch.autograd.grad(loss, z)[0], expected)


def test_what_has_no_gradient_says_so() -> None:
    za, zb = (normal(12, 4, seed=k).float().to(DEVICE).requires_grad_() for k in (0, 1))
    tensors = za, zb, None, torch.arange(12, device=DEVICE) // 2, None
    for found in (registration.call("twin", tensors, (0.5, "fp32")), torch.ops.fastcl.twin(*tensors, 0.5, "fp32")):
        assert [v.requires_grad for v in found[:4]] == [True, True, False, False]
    arguments = call("columns", False)
    assert not any(v.requires_grad for v in torch.ops.fastcl.fused(*arguments)[6:])


@pytest.mark.parametrize("replaced", (2, 5))  # those that need a gradient lose it again
def test_saved_tensors_that_a_hook_gives_a_class_meet_the_dispatcher(replaced: int, monkeypatch) -> None:
    z, y = (normal(8, 4, seed=k).float().to(DEVICE).requires_grad_() for k in (0, 1))
    seen, before = [], registration._operators["fused_backward"]
    after = before._replace(registered=lambda *given: seen.append(1) or before.registered(*given))
    monkeypatch.setitem(registration._operators, "fused_backward", after)
    with fastcl.backend("triton"):
        (expected,) = torch.autograd.grad(fastcl.ntxent_loss(z, y), z)
        count = iter(range(99))

        def unpack(v: Tensor) -> Tensor:
            return v.as_subclass(Other) if next(count) == replaced else v

        with torch.autograd.graph.saved_tensors_hooks(lambda v: v, unpack):
            loss = fastcl.ntxent_loss(z, y)
        (found,) = torch.autograd.grad(loss, z)
    assert torch.equal(found.as_subclass(Tensor), expected)
    assert seen == [1]
