"""Recordings of host code: what they repeat, what makes another call of one, and what is never recorded."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton import language as tl

from fastcl.kernels.common import launch
from fastcl.rowstats.triton import hopper, replay


@pytest.fixture(autouse=True)
def nothing_recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The second call is recorded, so that the third is a replay."""
    monkeypatch.setattr(replay, "BEFORE", 1)
    replay.forget()
    yield
    replay.forget()


def host_of(function: Callable) -> tuple[Callable, list[int]]:
    """A function that is replayed, of tensors or None, then other values; and how often its own code ran."""
    ran: list[int] = []

    def host(*args):
        ran.append(1)
        return function(*args)

    def run(*args):
        count = sum(v is None or isinstance(v, Tensor) for v in args)
        return replay.run(host, args[:count], args[count:])[0]

    return run, ran


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
        lambda: (torch.zeros(5, 3), X, 1),
        lambda: (X.T.contiguous().T, X, 1),
        lambda: (X.double(), X, 1),
        lambda: (X, X + 0, 2),
        lambda: (X, X + 0, X + 0, 1),
        lambda: (X, None, 1),
        lambda: (X, torch.zeros(4, 3, dtype=torch.float64), 1),
        lambda: (X.to("meta"), X + 0, 1),
        lambda: (X, torch.arange(-1.0, 12.0)[1:].view(4, 3), 1),
    ),
    ids=("shape", "strides", "dtype", "number", "length", "none", "dtype of the second", "device", "address"),
)
def test_other_calls_are_not_mistaken_for_it(change) -> None:
    def function(x, *rest):
        *others, factor = rest
        return x * factor, *(None if v is None else v + 1 for v in others)

    host, ran = host_of(function)
    for _ in range(4):
        host(X, X + 0, 1)
    assert len(ran) == 2
    args = change()
    found = host(*args)
    assert len(ran) == 3
    assert found[0].is_meta or torch.equal(found[0], args[0] * args[-1])


def test_saved_tensors_are_told_apart_as_all_others() -> None:
    ran: list[int] = []

    def function(x, saved, factor):
        ran.append(1)
        return None if saved is None else saved * factor, x + 1

    for k in range(4):
        (found,), (other,) = replay.run(function, (X,), (2,), (X + k,), 1)
        assert torch.equal(found, 2 * (X + k)) and torch.equal(other, X + 1)
    assert len(ran) == 2
    assert replay.run(function, (X,), (2,), (None,), 1)[0] == (None,)
    assert torch.equal(replay.run(function, (X,), (2,), (X[:2],), 1)[0][0], 2 * X[:2])
    for other in (X.half(), X.T.contiguous().T, torch.arange(-1.0, 12.0)[1:].view(4, 3)):  # as hooks may return them
        assert torch.equal(replay.run(function, (X,), (2,), (other,), 1)[0][0], 2 * other)
    assert len(ran) == 7


def test_what_callers_see_is_part_of_a_call() -> None:
    def function(x):
        return x + 1, x + 2

    for _ in range(4):
        assert [len(part) for part in replay.run(function, (X,), (), (), 1)] == [1, 1]
        assert [len(part) for part in replay.run(function, (X,), ())] == [2, 0]


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


class Elsewhere(Tensor):
    """Says that it lies on the second GPU."""

    is_cuda = True

    def get_device(self) -> int:
        return 1


@pytest.mark.parametrize("current", (0, 1))
def test_the_device_is_that_of_the_first_tensor(current: int, monkeypatch) -> None:
    devices, entered = [current], []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        entered.append(x)
        devices.append(x.get_device())
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    x, seen = X.as_subclass(Elsewhere), []
    host, ran = host_of(lambda x, y: (seen.append(devices[-1]), y + 1)[1:])
    for _ in range(4):
        host(x, X + 1)
    assert len(ran) == 2 and seen == [1, 1] and devices == [current]
    assert len(entered) == (0 if current else 4) and all(given is x for given in entered)


def test_operations_views_lists_and_memory_written_in_place() -> None:
    def function(x, _, other):
        first, *rest = x.unbind(0)
        total = torch.zeros_like(x)
        total[1:].add_(torch.stack(rest)).mul_(2)
        parts = total.split([1, 3])
        wide = torch.sum(x, 0, dtype=torch.float64).to(torch.int32)
        return torch.cat([*parts, first[None]]), None, other.new_empty(2, 3).fill_(first.shape[0]), x.t()[:2], wide

    host, ran = host_of(function)
    for k in range(5):
        args = X + k, None, X - k
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
