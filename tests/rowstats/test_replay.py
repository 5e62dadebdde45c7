"""Calls that are replayed: the bits of calls that are not, whatever the tensors hold; and what is never replayed."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from reference import normal
from test_triton_operator import KINDS, call
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from triton import language as tl
from triton_runs import DEVICE, few_programs, poisoned  # noqa: F401

import fastcl
from fastcl.kernels.common import launch
from fastcl.rowstats import registration
from fastcl.rowstats.triton import backward, forward, hopper, replay, two_models, weighted

pytestmark = pytest.mark.usefixtures("few_programs")


@pytest.fixture(autouse=True)
def nothing_recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The second call is recorded, so that the third is a replay."""
    monkeypatch.setattr(replay, "BEFORE", 1)
    replay.forget()
    yield
    replay.forget()


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
    results = registration.call("fused", *arguments)
    assert len(results) == 6 or not registration.is_plain(arguments)
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


@pytest.mark.parametrize("options", ((False, True, "fp16"), (True, False, "fp32")), ids=("fixed", "learnable"))
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(kind: str, options: tuple[bool, bool, str], runs, monkeypatch) -> None:
    arguments, started = call(kind, *options), []
    for seed in range(4):
        given, before = with_other_values(arguments, seed), len(runs)
        with monkeypatch.context() as patch:
            if seed > 1:
                patch.setattr(torch, "empty", poisoned)
            found = losses_and_gradients(given)
            started.append(len(runs) - before)
            patch.setattr(replay, "MOST_ROWS", 0)
            expected = losses_and_gradients(given)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert started[0] == started[1] > 0 and started[2:] == [0, 0]


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


def host_of(function: Callable) -> tuple[Callable, list[int]]:
    """A function that is replayed, and how often its own code ran."""
    ran: list[int] = []

    def host(*args):
        ran.append(1)
        return function(*args)

    return lambda *args: replay.run(host, args), ran


class Kernel:
    """Notes how it was started."""

    def __init__(self) -> None:
        self.started: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self.started.append((grid, arguments))


X = torch.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    "change",
    (
        lambda: (torch.zeros(5, 3), 1, [X]),
        lambda: (X.T.contiguous().T, 1, [X]),
        lambda: (X.double(), 1, [X]),
        lambda: (X, 2, [X + 0]),
        lambda: (X, 1, [X + 0, X + 0]),
        lambda: (X, 1, [None]),
        lambda: (X, 1, [torch.zeros(4, 3, dtype=torch.float64)]),
        lambda: (X.to("meta"), 1, [X + 0]),
    ),
    ids=("shape", "strides", "dtype", "number", "length", "none", "dtype in a list", "device"),
)
def test_other_calls_are_not_mistaken_for_it(change) -> None:
    host, ran = host_of(lambda x, factor, others: (x * factor, *(None if v is None else v + 1 for v in others)))
    for _ in range(4):
        host(X, 1, [X + 0])
    assert len(ran) == 2
    args = change()
    found = host(*args)
    assert len(ran) == 3
    assert found[0].is_meta or torch.equal(found[0], args[0] * args[1])


def test_another_choice_of_launches_is_another_call() -> None:
    host, ran = host_of(lambda x: (x + (launch.forced_architecture() or 0),))
    for _ in range(3):
        host(X)
    with launch.on_architecture(80):
        assert torch.equal(host(X)[0], X + 80)
    assert len(ran) == 3
    with hopper.using(True):
        for _ in range(3):
            host(X)
    assert len(ran) == 5
    host(X)
    assert len(ran) == 6


def test_the_device_is_that_of_the_first_tensor(monkeypatch) -> None:
    entered = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x) or device_of(x))
    host, ran = host_of(lambda x, y: (x + y,))
    for _ in range(4):
        host(X, X + 1)
    assert len(ran) == 2 and len(entered) == 4 and all(x is X for x in entered)


def test_operations_views_lists_and_memory_written_in_place() -> None:
    def function(x, others):
        first, *rest = x.unbind(0)
        total = torch.zeros_like(x)
        total[1:].add_(torch.stack(rest)).mul_(2)
        parts = total.split([1, 3])
        wide = torch.sum(x, 0, dtype=torch.float64).to(torch.int32)
        return torch.cat([*parts, first[None]]), None, others[1].new_empty(2, 3).fill_(first.shape[0]), x.t()[:2], wide

    host, ran = host_of(function)
    for k in range(5):
        args = X + k, [None, X - k]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(host(*args), function(*args), strict=True))
    assert len(ran) == 2


def test_what_depends_on_values_is_never_replayed() -> None:
    host, ran = host_of(lambda x: (x * float(x[0, 0]),))
    recorded, record = [], replay._record
    with mock.patch.object(replay, "_record", lambda *given: recorded.append(1) or record(*given)):
        for k in range(5):
            assert torch.equal(host(X + k)[0], (X + k) * k)
    assert len(ran) == 5 and len(recorded) == 1


def test_tensors_that_came_from_elsewhere_are_never_replayed() -> None:
    hidden = [X]
    host, ran = host_of(lambda x: (x + hidden[0],))
    for k in range(4):
        hidden[0] = X + k
        assert torch.equal(host(X)[0], X + hidden[0])
    assert len(ran) == 4


def test_one_tensor_as_two_arguments_is_never_replayed() -> None:
    host, ran = host_of(lambda x, y: (x - y,))
    for _ in range(3):
        assert not host(X, X)[0].any()
    assert len(ran) == 3
    for _ in range(3):
        assert torch.equal(host(X, X + 1)[0], -torch.ones(4, 3))
    assert len(ran) == 4  # the first of these was recorded


class Pair(NamedTuple):
    tensor: Any
    constants: Any


def test_launches_and_what_they_are_given() -> None:
    kernel = Kernel()

    def function(x):
        part = torch.empty(3, dtype=torch.int32, device=x.device)
        launch.launch(kernel, (2, 5), 4, 3, one=Pair(x, Pair(part, (1.5, None))), name="b", C=Pair(1, tl.constexpr(2)))
        return x + 1, part

    host, ran = host_of(function)
    for k in range(4):
        x = X + k
        _, part = host(x)
        grid, given = kernel.started[-1]
        constants = given.pop("C")
        assert grid == (2, 5) and given.pop("one") == Pair(x, Pair(part, (1.5, None))) or given["one"].tensor is x
        assert type(constants) is Pair and constants.constants.value == 2
        assert given["name"] == "b" and (given["num_warps"], given["num_stages"]) == (4, 3)
    assert len(ran) == 2 and len(kernel.started) == 4


def test_launches_of_what_is_no_tensor_and_no_constant_are_never_replayed() -> None:
    host, ran = host_of(lambda x: (launch.launch(Kernel(), (1,), 4, 1, x=x, descriptor=object()), x + 1))
    for _ in range(4):
        host(X)
    assert len(ran) == 4


def test_many_rows_and_recorded_launches_are_left_alone(monkeypatch) -> None:
    host, ran = host_of(lambda x: (x + 1,))
    monkeypatch.setattr(replay, "MOST_ROWS", 3)
    for _ in range(4):
        host(X)
    assert len(ran) == 4
    monkeypatch.setattr(replay, "MOST_ROWS", 4)
    kernel = Kernel()
    with launch.recording() as launches:
        for _ in range(4):
            host(X)
        launch.launch(kernel, (1,), 4, 1)
    assert len(ran) == 8 and len(launches) == 1 and not kernel.started
    for _ in range(4):
        host(X)
    assert len(ran) == 10


def test_memory_is_released_where_the_host_code_released_it(monkeypatch) -> None:
    made: list[weakref.ref] = []
    alive = []

    def watched(*args, **options) -> Tensor:
        alive.append(sum(one() is not None for one in made))
        memory = X.new_empty(*args, **options)
        made.append(weakref.ref(memory))
        return memory

    def function(x):
        for k in range(3):
            x = x + torch.empty(4, 3, dtype=torch.float32, device="cpu").fill_(k)
        return (x,)

    host, ran = host_of(function)
    host(X)
    monkeypatch.setattr(torch, "empty", watched)
    for _ in range(3):
        assert torch.equal(host(X)[0], X + 3)
    assert len(ran) == 2 and alive == [0] * 9


def test_the_number_of_recordings_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(replay, "MOST_CALLS", 3)
    host, ran = host_of(lambda x, k: (x * k,))
    for k in range(10):
        for _ in range(3):
            assert torch.equal(host(X, k)[0], X * k)
    assert len(replay._recordings) <= 3 and len(replay._seen) <= 3 and len(ran) == 20


def test_calls_that_come_seldom_are_not_recorded_and_drive_out_no_recording(monkeypatch) -> None:
    monkeypatch.setattr(replay, "MOST_CALLS", 3)
    monkeypatch.setattr(replay, "BEFORE", 2)
    host, ran = host_of(lambda x, k: (x * k,))
    for _ in range(4):
        host(X, -1)
    assert len(ran) == 3
    for k in range(10):
        host(X, k), host(X, k)
        host(X, -1)
    assert len(ran) == 23 and len(replay._recordings) == 1


def test_without_the_dispatcher_the_bits_are_the_same(monkeypatch) -> None:
    arguments = call("two views", True)
    direct = losses_and_gradients(arguments)
    monkeypatch.setattr(registration, "is_plain", lambda _: False)
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


def test_two_models_are_replayed(runs) -> None:
    za, zb = (normal(12, 4, seed=k).float().to(DEVICE) for k in (0, 1))
    sample, found, started = torch.arange(12, device=DEVICE) // 2, [], []
    with fastcl.backend("triton"):
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
        [X, [None, X.as_subclass(Other)]],
        [torch._neg_view(X)],
        [torch.complex(X, X).conj().imag],
        [torch._efficientzerotensor((2, 2))],
        [torch._to_functional_tensor(X)],
    ),
    ids=("class", "class in a list", "negative", "conjugate", "zero", "functional"),
)
def test_tensors_that_the_dispatcher_has_to_see(values: list) -> None:
    assert registration.is_plain([X, None, 1, [X, None], torch.nn.Parameter(X), "a"])
    assert not registration.is_plain(values)


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
