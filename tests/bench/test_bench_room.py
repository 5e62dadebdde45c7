"""What the benchmark of the losses does where memory is short, on fakes of a card."""

from types import SimpleNamespace

import pytest
import torch

from bench.harness import clocks, records, suite
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
    tried, warmed = [], []

    def timer_of(forward, leaf, capture):
        tried.append(capture)
        return (lambda: None), "graph" if capture else "events"

    def probe(self, entry):
        entry.peak, entry.result = clocks.Peak(4 * records.GIB, seconds), (torch.ones(1), torch.ones(1))

    monkeypatch.setattr(clocks, "timer_of", timer_of)
    monkeypatch.setattr(losses, "make_batch", lambda n, d, device: (torch.ones(n, d), torch.arange(n // 2)))
    monkeypatch.setattr(losses.Losses, "probe", probe)
    monkeypatch.setattr(losses.Losses, "providers", lambda self: chosen[::-1])
    monkeypatch.setattr(clocks, "interleave", lambda timers, repeats, s, warm_up: warmed.append(warm_up) or {})
    args = SimpleNamespace(memory=memory, repeats=3, seconds=1, device=torch.device("cuda"))
    losses.Losses(suite.Run("losses", args, {}, str), {"objective": "ntxent", "n": 8, "d": 4}).measure()
    assert tried == captured and warmed == [warm]


def test_a_case_that_runs_out_of_memory_leaves_the_next_one(monkeypatch):
    def prepare(case, device):
        raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    monkeypatch.setattr(losses.Losses, "prepare", staticmethod(prepare))
    run = suite.Run("losses", SimpleNamespace(device=torch.device("cpu")), {}, str)
    losses.Losses(run, {"objective": "clip", "n": 8, "d": 4}).measure()
    assert run.found == []
    assert run.failed == ["clip, n=8, d=4: OutOfMemoryError: tried to allocate 99 GiB"]
