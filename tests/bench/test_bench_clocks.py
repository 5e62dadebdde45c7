"""The clocks of a GPU, played through without one, and the rounds in which providers take turns."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench.harness import clocks


class FakeCuda:
    """Stands in for torch.cuda: a clock that each pass and each replay moves on, and a journal of what happened."""

    def __init__(self, monkeypatch, fail: bool = False) -> None:
        self.journal: list[str] = []
        self.now, self.stream, self.fail, self.made = 0.0, "first", fail, 0
        replaced = {
            "CUDAGraph": self.graph_object, "graph": self.graph, "stream": self.on_stream, "Event": self.event,
            "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda device: SimpleNamespace(name="first", wait_stream=lambda other: None),
            "set_stream": self.set_stream, "graph_pool_handle": lambda: 0, "synchronize": lambda device=None: None,
            "_sleep": lambda cycles: self.journal.append("busy"),
        }  # fmt: skip
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.autograd, "grad", self.grad)

    def forward(self) -> torch.Tensor:
        self.now += 1
        self.journal.append("forward")
        loss = torch.tensor(3.0, requires_grad=True)
        loss.backward = lambda: self.grad(loss, None)
        return loss

    def grad(self, loss, leaf):
        self.now += 2
        self.journal.append("backward")
        return (torch.ones(2),)

    def graph_object(self):
        self.made += 1
        name, cost = ("fwd", "bwd", "both")[self.made - 1], (10, 20, 25)[self.made - 1]

        def replay() -> None:
            self.now += cost
            self.journal.append(name)

        return SimpleNamespace(replay=replay)

    @contextmanager
    def graph(self, graph, pool, stream):
        self.stream = "capturing"
        yield
        if self.fail:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        self.stream = "first"

    @contextmanager
    def on_stream(self, stream):
        yield

    def set_stream(self, stream) -> None:
        self.stream = stream.name

    def event(self, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: other.at - event.at
        return event


LEAF = SimpleNamespace(device=torch.device("cuda"), grad=None)


def test_a_captured_call_is_timed_by_replays_and_the_wall_clock_by_an_eager_call(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    timer, timing = clocks.timer_of(cuda.forward, LEAF, capture=True)
    assert timing == "graph" and cuda.made == 3
    cuda.journal.clear()
    found = timer()
    assert {run: sample.gpu for run, sample in found.items()} == {"fwd": 10, "bwd": 20, "both": 25}
    assert [found[run].wall is None for run in clocks.PASSES] == [True, True, False]
    # The eager call first; then, behind other work, the two passes that share memory, and the graph of both.
    assert cuda.journal == ["forward", "backward", "busy", "fwd", "bwd", "both"]


def test_what_is_captured_keeps_no_graph_of_autograd(monkeypatch):
    graphs = clocks.Graphs(FakeCuda(monkeypatch).forward, LEAF)
    assert not graphs.loss.requires_grad and graphs.result()[0] is not graphs.loss


@pytest.mark.parametrize(("capture", "fail"), [(False, False), (True, True)])
def test_what_no_graph_holds_is_timed_between_events(monkeypatch, capsys, capture, fail):
    cuda = FakeCuda(monkeypatch, fail)
    timer, timing = clocks.timer_of(cuda.forward, LEAF, capture)
    assert timing == "events" and cuda.stream == "first"
    assert ("no CUDA graph: RuntimeError: operation not permitted\n" in capsys.readouterr().out) == fail
    assert {run: sample.gpu for run, sample in timer().items()} == {"fwd": 1, "bwd": 2, "both": 3}


def test_a_replay_with_another_loss_is_not_used(monkeypatch, capsys):
    cuda = FakeCuda(monkeypatch)
    losses = iter([3.0, 3.0, 3.0, 4.0])  # the eager call after the capture gives something else
    real = cuda.forward

    def forward():
        return real() * 0 + next(losses)

    assert clocks.timer_of(forward, LEAF, capture=True)[1] == "events"
    assert "its replay gives another loss" in capsys.readouterr().out


def test_the_memory_of_a_gpu_is_that_of_the_second_call(monkeypatch):
    state = {"now": 100, "peak": 900}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: state.update(peak=state["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state["peak"])

    def call(size: int) -> None:
        state["peak"] = max(state["peak"], state["now"] + size)

    found = clocks.measure_peak(lambda device: (lambda: call(5000), lambda: call(70)), "cuda")
    assert found.bytes == 70 and found.seconds >= 0


def test_rounds_that_warm_up_leave_no_times(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(clocks, "perf_counter", lambda: next(ticks))
    called = []
    timers = {"a": lambda: called.append(1) or {"both": clocks.Sample(float(len(called)))}}
    found = clocks.interleave(timers, repeats=2, seconds=60, warm_up=3)
    warm = len(called) - 2
    assert warm > 0 and [s.wall for s in found["a"]["both"]] == [warm + 1, warm + 2]


def test_no_provider_always_follows_the_same_one():
    called = []
    timers = {name: lambda name=name: called.append(name) or {"both": clocks.Sample(100.0)} for name in "abc"}
    found = clocks.interleave(timers, repeats=12, seconds=60)
    assert {name: len(passes["both"]) for name, passes in found.items()} == {"a": 12, "b": 12, "c": 12}
    assert all(sorted(called[k : k + 3]) == ["a", "b", "c"] for k in range(0, 36, 3))
    for name in "abc":
        assert len({before for before, now in zip(called, called[1:], strict=False) if now == name} - {name}) == 2


def test_rounds_interleave_the_providers_and_end_with_the_time():
    called = []

    def timer(name):
        called.append(name)
        return {"both": clocks.Sample(100.0 + len(called))}

    timers = {name: partial(timer, name) for name in "abc"}
    found = clocks.interleave(timers, repeats=12, seconds=60)
    rounds = ["".join(called[k : k + 3]) for k in range(0, 36, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert {each[0] for each in rounds} == set("abc")  # no provider always comes after the same one
    assert [s.wall for s in found["a"]["both"]] == [101 + k for k, name in enumerate(called) if name == "a"]
    first = called.copy()
    called.clear()
    clocks.interleave(timers, repeats=12, seconds=60)
    assert called == first
    called.clear()
    clocks.interleave(timers, repeats=50, seconds=0)
    assert len(called) == 3 * clocks.MIN_ROUNDS
    called.clear()
    clocks.interleave(timers, repeats=1, seconds=0)
    assert len(called) == 3


def test_a_quick_call_counts_when_it_has_run_for_a_while(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clocks, "perf_counter", lambda: now[0])

    def timer(ms: float, gpu: float | None = None) -> dict[str, clocks.Sample]:
        now[0] += ms / 1e3
        return {"fwd": clocks.Sample(0.0, gpu), "both": clocks.Sample(now[0], gpu)}

    found = clocks.interleave({"quick": partial(timer, clocks.QUICK / 8)}, repeats=1, seconds=60)
    (sample,) = found["quick"]["both"]
    assert sample.wall == pytest.approx(clocks.QUICK * 9 / 8 / 1e3)  # the first call, and the while after it
    now[0] = 0.0
    found = clocks.interleave({"on a card": partial(timer, clocks.QUICK / 8, 0.1)}, repeats=1, seconds=60)
    assert found["on a card"]["both"][0].wall == pytest.approx(clocks.QUICK / 8 / 1e3)
