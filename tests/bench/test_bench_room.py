"""What the benchmark of the losses does where memory is short, on fakes of a card."""

from types import SimpleNamespace

import pytest
import torch

from bench.harness import clocks, records
from bench.losses import run as losses


@pytest.mark.parametrize(("kind", "total", "asked", "limit"), [
    ("cpu", 100, None, 12), ("cpu", 8, None, 6), ("cpu", 100, 50, 50), ("cuda", 100, None, 75), ("cuda", 100, 90, 75),
])  # fmt: skip
def test_the_limit_of_memory_fits_the_device(monkeypatch, kind, total, asked, limit):
    monkeypatch.setattr(records, "total_memory", lambda device: total * records.GIB)
    assert records.memory_limit(asked, torch.device(kind)) == limit


@pytest.mark.parametrize(("memory", "seconds", "captured", "warm"), [
    (11, 0.1, [True, False, False], 0.2),  # GiB, of which an eager pass takes 4, and each graph keeps 4
    (7, 0.1, [False, False, False], 0.2), (99, 0.1, [True, True, False], 0.2), (99, 0.6, [False, False, False], 0),
])  # fmt: skip
def test_graphs_leave_room_and_long_calls_need_none(monkeypatch, memory, seconds, captured, warm):
    chosen = [p for p in losses.PROVIDERS if p.name in ("plain PyTorch", "fastcl fp16", "fastcl chunked")]
    entries = {p.name: losses.Entry(p, clocks.Peak(4 * records.GIB, seconds), ()) for p in reversed(chosen)}
    tried, warmed = [], []

    def timer_of(forward, leaf, capture):
        tried.append(capture)
        return (lambda: None), "graph" if capture else "events"

    monkeypatch.setattr(losses, "timer_of", timer_of)
    monkeypatch.setattr(losses, "interleave", lambda timers, repeats, s, warm_up: warmed.append(warm_up) or {})
    args = SimpleNamespace(memory=memory, repeats=3, seconds=1)
    run = losses.Run(args, torch.device("cuda"), {}, None)
    z, labels = losses.make_batch(8, 4, torch.device("cpu"))
    losses._times({"objective": "ntxent", "n": 8, "d": 4}, (z, labels), entries, run, "")
    assert tried == captured and warmed == [warm]


def test_a_case_that_runs_out_of_memory_leaves_the_next_one(monkeypatch):
    def run_case(case, run):
        raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    monkeypatch.setattr(losses, "run_case", run_case)
    run = losses.Run(None, torch.device("cpu"), {}, None)
    assert losses._run_or_fail({"objective": "clip", "n": 8, "d": 4}, run) == []
    assert run.failed == ["clip, n=8, d=4: OutOfMemoryError: tried to allocate 99 GiB"]
