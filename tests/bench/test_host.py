"""Host time: what is timed is the loss's own host code, and no kernel runs."""

from unittest import mock

import pytest
import torch

from bench.harness.records import Record
from bench.losses import host
from fastcl.kernels.common import launch
from fastcl.rowstats.triton import replay


@pytest.mark.parametrize("name", host.LOSSES)
def test_the_plain_losses_are_those_of_the_package(name: str, monkeypatch) -> None:
    monkeypatch.setattr(host, "N", host.PLAIN)
    monkeypatch.setattr(host, "D", 8)
    loss = host.LOSSES[name]
    views = [torch.randn(host.PLAIN // 2, 8, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    labels, scale = torch.arange(host.PLAIN // 2) % 4, torch.tensor(1.0 / host.plain.TEMPERATURE)
    ours = loss.ours(*views, labels, scale)
    theirs = loss.plain(torch.cat(views), labels, torch.tensor(1.0))
    if name != "SupCon":  # whose temperature is another by default
        torch.testing.assert_close(ours, theirs)


def test_no_kernel_runs_and_calls_are_replayed_or_not(monkeypatch) -> None:
    listed, recorded, original = [], [], replay._record
    monkeypatch.setattr(replay, "_record", lambda *given: recorded.append(1) or original(*given))
    monkeypatch.setattr(replay, "BEFORE", 1)
    call = host.passes(host.LOSSES["NSCL"], ours=True)["both"]
    replay.forget()
    with host.no_launches(), mock.patch.object(launch, "start", lambda *one: listed.append(one)):
        for _ in range(4):
            call()
        assert len(recorded) == 2  # forward and backward
        each = len(listed) / 4
        assert each > 4
        with host.not_replayed():
            call()
    assert len(listed) == 5 * each and len(recorded) == 2
    replay.forget()


def test_the_report_has_every_loss_and_provider() -> None:
    with host.no_launches():
        records: list[Record] = list(host.measured(rounds=1, calls=1))
    assert {r["objective"] for r in records} == set(host.LOSSES) and all(r["host_us"] > 0 for r in records)
    lines = host.report(records).splitlines()
    assert len(lines) == 2 + len(host.LOSSES) and "plain PyTorch, and backward" in lines[0]
