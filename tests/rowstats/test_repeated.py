"""Replays where kernels are compiled: launches that are given addresses, and memory that is no tensor."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from addressed import addressed, either
from reference import normal
from test_replay import Pair, X, host_of, nothing_recorded  # noqa: F401
from torch import Tensor
from triton_runs import DEVICE, few_programs, poisoned  # noqa: F401

import fastcl
from fastcl.kernels.common import launch
from fastcl.rowstats import (
    meeting,  # noqa: F401  (registers the operators of ranks)
    registration,
)
from fastcl.rowstats.triton import repeated, replay

pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.skipif(DEVICE.type != "cpu", reason="addresses are of the CPU's memory"),
]
LABELS = torch.arange(10) % 3


def several(z: Tensor, temperature: Tensor) -> Tensor:
    ids = torch.arange(20) % 10, LABELS.repeat(2)
    found = fastcl.contrastive_losses(z, *ids, ("ntxent", "nscl"), temperature=temperature)
    return found["ntxent"] + found["nscl"]


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ntxent": lambda a, b, s: fastcl.ntxent_loss(a, b, temperature=s),
    "supcon, none": lambda a, b, s: fastcl.supcon_loss(a, b, LABELS, reduction="none").mul(s).sum(),
    "clip": lambda a, b, s: fastcl.clip_loss(a, b, s),
    "lengths": lambda a, b, s: fastcl.nscl_loss(a, b, LABELS, normalize=False) * s,
    "sigmoid": lambda a, b, s: fastcl.sigmoid_loss(a, b, s, s - 11),
    "several": lambda a, b, s: several(torch.cat([a, b]), s),
}


class Add:
    """A kernel that writes one row plus another."""

    arg_names = ("one", "out", "by")

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda one, out, by, **_: out.copy_(one.tensor + by)


def gradients(loss: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    found = loss(*leaves)
    return [found.detach(), *torch.autograd.grad(found, leaves, allow_unused=True)]


def check_bits(call: Callable[[int], list[Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of other values each time, in both passes, is replayed, with the bits of its own code."""
    for seed in range(6):
        with fastcl.backend("triton"), monkeypatch.context() as patch:
            if seed > 2:  # what is recorded should not fill memory
                patch.setattr(torch, "empty", poisoned)
            found = call(seed)
            patch.setattr(replay, "MOST_ROWS", 0)
            expected = call(seed)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(replay._recordings) >= 2 and None not in replay._recordings.values()


@pytest.mark.parametrize(("d", "precision"), ((5, None), (300, "fp16"), (300, None)))
@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_the_same_bits(name: str, d: int, precision: str | None, monkeypatch) -> None:
    def call(seed: int) -> list[Tensor]:
        scale = torch.tensor(0.5 + seed, requires_grad=True)
        leaves = [normal(10, d, seed=k + 2 * seed).float().requires_grad_() for k in (0, 1)] + [scale]
        return gradients(LOSSES[name], leaves)

    with torch.autocast("cpu", enabled=precision is not None), addressed():
        check_bits(call, monkeypatch)


@either
@pytest.mark.parametrize("labelled", (False, True))
@pytest.mark.parametrize("learnable", (False, True))
def test_rows_of_other_ranks_have_the_same_bits(learnable: bool, labelled: bool, around, monkeypatch) -> None:
    def call(seed: int) -> list[Tensor]:
        x, y = (normal(n, 5, seed=n + seed).float() for n in (10, 14))
        ids = [(normal(n, 1, seed=seed)[:, 0] * 3).long() if labelled else None for n in (10, 14)]
        t = torch.tensor(0.2 + seed / 10, requires_grad=True)
        options = t if learnable else None, 0.3, True, "fp32", True, True
        leaves = [x.requires_grad_(), t][: 1 + learnable]
        stats, counts, theirs, *_ = torch.ops.fastcl.fused_apart(x, y, *ids, *options)
        upstream = [normal(*v.shape, seed=seed).float() for v in (stats, theirs)]
        upstream[0][: 2 if labelled else 4] = 0  # there are no views, and without labels no peers
        upstream[1][:2].abs_().add_(5)  # log-sum-exps of more rows
        upstream[1][2 : 2 if labelled else 4] = 0
        grads = torch.autograd.grad([stats, theirs], leaves, upstream)
        return [stats.detach(), counts, *grads]

    with around():
        check_bits(call, monkeypatch)


@either
def test_ids_of_sigmoid_pairs_have_the_same_bits(around, monkeypatch) -> None:
    def call(seed: int) -> list[Tensor]:
        ids = torch.arange(10).roll(seed), torch.arange(10).roll(2 * seed)
        leaves = [normal(10, 5, seed=k + 2 * seed).float().requires_grad_() for k in (0, 1)]
        found = torch.ops.fastcl.fused_sigmoid(*leaves, *ids, torch.tensor(-2.0), None, 0.3, False, "fp32")[:2]
        total = found[0].sum() + found[1].square().sum()
        return [*(v.detach() for v in found), *torch.autograd.grad(total, leaves)]

    with around():
        check_bits(call, monkeypatch)


def misaligned(x: Tensor) -> Tensor:
    """The same rows, four bytes further."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def test_what_was_compiled_for_multiples_of_16_bytes_gets_no_others() -> None:
    def function(x):
        out = torch.empty(4, 3, dtype=torch.float32, device=x.device)
        launch.launch(Add(), (1,), 4, 1, one=Pair(x, None), out=out, by=2)
        return (out,)

    host, ran = host_of(function)
    with addressed():
        for k in range(4):
            for x in (X + k, misaligned(X - k)):
                assert torch.equal(host(x)[0], x + 2)
    assert len(ran) == 4  # two of each kind


def test_operations_of_pytorch_get_tensors() -> None:
    def function(x):
        made, unused, rest = (torch.empty(1, 2, 4, 3, dtype=torch.float32, device=x.device) for _ in range(3))
        ((first, second),) = (one.unbind() for one in made.unbind())
        launch.launch(Add(), (1,), 4, 1, one=Pair(x, None), out=first, by=1)
        launch.launch(Add(), (1,), 4, 1, one=Pair(first, None), out=second, by=1)
        ((hidden, other),) = (one.unbind() for one in rest.unbind())
        launch.launch(Add(), (1,), 4, 1, one=Pair(second, None), out=other, by=5)
        total = second + x
        launch.launch(Add(), (1,), 4, 1, one=Pair(total, None), out=hidden, by=0.5)
        out = torch.empty(4, 3, dtype=torch.float32, device=x.device)
        launch.launch(Add(), (1,), 4, 1, one=Pair(hidden, None), out=out, by=1)
        return out, first, None

    host, ran = host_of(function)
    with addressed():
        for k in range(4):
            x = X + k
            assert all(map(torch.equal, host(x)[:2], (2 * x + 3.5, x + 1)))
    assert len(ran) == 2


def test_launches_get_rows_of_memory_in_another_order() -> None:
    def function(x):
        out = torch.empty(4, dtype=torch.float32, device=x.device)
        launch.launch(Add(), (1,), 4, 1, one=Pair(x.T.unbind()[1], None), out=out, by=2)
        return (out,)

    host, ran = host_of(function)
    with addressed():
        for k in range(4):
            assert torch.equal(host(X + k)[0], X[:, 1] + k + 2)
    assert len(ran) == 2


@pytest.mark.parametrize("small", (0, 2**20), ids=("each allocated", "shared"))
@pytest.mark.parametrize("d", (5, 300))
def test_launches_are_given_memory_that_is_alive(d: int, small: int, monkeypatch) -> None:
    monkeypatch.setattr(repeated, "_SMALL", small)
    alive: dict[object, tuple[int, int]] = {}
    told: list[int] = []
    z1, z2 = (normal(10, d, seed=k).float().requires_grad_() for k in (0, 1))
    held = [z1, z2, LABELS]

    def watched(*args, **options) -> Tensor:
        memory = poisoned(*args, **options)
        one = object()
        alive[one] = memory.data_ptr(), memory.nbytes
        weakref.finalize(memory, alive.pop, one)
        return memory

    def seen(address: int, size: int) -> None:
        told.append(address)
        inside = [*alive.values(), *((t.data_ptr(), t.nbytes) for t in held)]
        assert any(begin <= address and address + size <= begin + length for begin, length in inside)

    with fastcl.backend("triton"), addressed(seen), mock.patch.object(torch, "empty", watched):
        for _ in range(4):
            loss = fastcl.supcon_loss(z1, z2, LABELS)
            upstream = torch.ones((), dtype=torch.float32)
            held[3:] = upstream, *(t for t in loss.grad_fn.saved_tensors if t is not None)
            torch.autograd.grad(loss, [z1, z2], upstream)
            del loss
    assert told


def test_only_results_and_two_memories_are_allocated(monkeypatch) -> None:
    made: list[Tensor] = []
    empty, counts = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: made.append(empty(*sizes, **options)) or made[-1])
    z1, z2 = (normal(10, 5, seed=k).float().requires_grad_() for k in (0, 1))
    for around in (nullcontext, addressed):
        replay.forget()
        with fastcl.backend("triton"), around():
            for _ in range(3):
                made.clear()
                fastcl.ntxent_loss(z1, z2)
        counts.append(len(made))
    # The loss, what the backward pass reads, and the rest. PyTorch 2.7 hides nothing: six in place of the second.
    assert counts[1] == (3 if registration._hooks else 8) < counts[0]
