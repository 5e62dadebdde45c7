"""Host time: what is timed, and what each provider leaves out."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastcl
from bench.losses import host, no_device
from fastcl.errors import FastclError
from fastcl.kernels.common import launch
from fastcl.rowstats.triton import repeated, replay


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


def test_calls_are_launched_replayed_or_neither(monkeypatch) -> None:
    listed, recorded, original = [], [], replay._record
    monkeypatch.setattr(replay, "_record", lambda *given: recorded.append(1) or original(*given))
    monkeypatch.setattr(replay, "BEFORE", 1)
    monkeypatch.setattr(repeated, "_driver", lambda: mock.Mock(get_current_device=lambda: 0))
    call = host.passes(host.LOSSES["NSCL"], ours=True)["both"]
    replay.forget()
    with fastcl.backend("triton"), mock.patch.object(launch, "start", lambda *one: listed.append(one)):
        for _ in range(4):
            call()
        assert len(recorded) == 2  # forward and backward
        each = len(listed) / 4
        assert each > 4
        with host.not_replayed():
            call()
        assert len(listed) == 5 * each and len(recorded) == 2
        with host.not_launched():
            for _ in range(3):
                call()
        assert len(listed) == 5 * each and len(recorded) == 5  # forward, backward, and backward of a replay
        call()
    assert len(listed) == 6 * each and len(recorded) == 5
    replay.forget()


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"TRITON_INTERPRET": "1"}, "unset TRITON_INTERPRET"),
        ({"CC": "no-such-cc"}, "no C compiler was found.*no-such-cc"),
        ({"CC": "false"}, "false ended with status 1"),
    ),
)
def test_what_it_needs(change: dict[str, str], message: str, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FastclError, match=message), no_device.compiled():
        pass


def test_the_command_compiles_and_reports_every_loss_and_provider(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.losses.host", "--tiny", "--out", tmp_path]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    records = json.loads((tmp_path / "host.json").read_text(encoding="utf-8"))
    providers = {"fastcl", "fastcl without launches", "fastcl, every call anew", "plain PyTorch"}
    found = {(r["objective"], r["provider"], r["pass"]) for r in records}
    assert found == set(product(host.LOSSES, providers, ("fwd", "both"))) and all(r["host_us"] > 0 for r in records)
    lines = (tmp_path / "host.md").read_text(encoding="utf-8").splitlines()
    assert sum("plain PyTorch, and backward" in line for line in lines) == 1
    assert all(any(line.startswith(f"| {name} |") for line in lines) for name in host.LOSSES)
