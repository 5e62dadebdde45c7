"""The benchmark of the losses measures what it says: records, agreement, reasons, rounds, memory; never how fast."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch

import fastcl
from bench.harness import clocks, records, suite
from bench.losses import run as losses

ROOT = Path(__file__).resolve().parents[2]
FIELDS = (
    "bench provider objective n d dtype precision pass gpu_ms wall_ms peak_bytes tflops tflops_dense bound_ms device "
    "versions date timing samples_ms wall_samples_ms reason"
).split()
BY_NAME = {p.name: p for p in losses.PROVIDERS}
FOUR = ("fastcl chunked", "fastcl dense", "plain PyTorch", "authors' formulation")
RUN = (*FOUR, "chunked bf16", "cut-cross-entropy")  # the last cannot run here
OBJECTIVES = ("ntxent", "clip")
CASES = [(o, BY_NAME[name]) for o in OBJECTIVES for name in RUN[:-1] if o in BY_NAME[name].objectives]


def run_module(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.losses", "--out", str(folder), "--device", "cpu", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # cases this small only wait for a second thread
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def read(folder: Path) -> list[dict]:
    return json.loads((folder / "losses.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """Folder and output of a tiny run of the whole benchmark."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--n", "64", "--d", "8", "--repeats", "4", "--objectives", *OBJECTIVES, "--providers", *RUN]
    done = run_module(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def small(monkeypatch) -> list[str]:
    """Arguments for NT-Xent by four providers alone, so that a run in this process is short."""
    return ["--device", "cpu", "--objectives", "ntxent", "--providers", *FOUR]


def test_a_run_writes_every_pass_of_every_case_in_the_schema(finished):
    found = read(finished[0])
    assert all(list(r) == FIELDS for r in found)
    keys = [(r["objective"], r["provider"], r["pass"]) for r in found if not r["reason"]]
    assert sorted(keys) == sorted((o, p.name, run) for o, p in CASES for run in ("fwd", "bwd", "both"))
    absent = {(r["objective"], r["provider"]): r["reason"] for r in found if r["reason"]}
    assert absent == {
        ("clip", "authors' formulation"): "has no clip",
        ("ntxent", "cut-cross-entropy"): "has no ntxent",
        ("clip", "cut-cross-entropy"): "timed on CUDA only",
    }
    for r in (r for r in found if not r["reason"]):
        provider, clip = BY_NAME[r["provider"]], r["objective"] == "clip"
        own = dict(zip(("fwd", "bwd"), provider.work(r["objective"], 8), strict=True))
        counts = {"tflops": own | {"both": sum(own.values())}, "tflops_dense": {"fwd": 2, "bwd": 4, "both": 6}}
        for key, count in counts.items():
            work = count[r["pass"]] * 64 * 64 * 8 / (4 if clip else 1)
            assert r[key] == pytest.approx(work / (r["wall_ms"] / 1e3) / 1e12)
        assert (r["bench"], r["n"], r["d"], r["dtype"]) == ("losses", 64, 8, "float32")
        assert r["precision"] == ("bf16" if "bf16" in r["provider"] else "fp32")
        assert r["gpu_ms"] is r["bound_ms"] is r["timing"] is None and r["wall_samples_ms"] == []
        assert len(r["samples_ms"]) == 4 and min(r["samples_ms"]) > 0 and r["wall_ms"] == median(r["samples_ms"])
        assert (r["peak_bytes"] is None) == (r["pass"] != "both")
        assert r["versions"]["torch"] == torch.__version__ and r["versions"]["fastcl"] == fastcl.__version__
        assert f"threads: 1 of {os.cpu_count()}" in r["device"] and datetime.fromisoformat(r["date"]).tzinfo is not None


def test_the_passes_of_a_call_add_up(finished):
    samples = {(r["objective"], r["provider"], r["pass"]): r["samples_ms"] for r in read(finished[0])}
    for objective, provider in CASES:
        fwd, bwd, both = (samples[objective, provider.name, run] for run in ("fwd", "bwd", "both"))
        assert both == pytest.approx([a + b for a, b in zip(fwd, bwd, strict=True)])


def test_the_report_and_the_output_name_conditions_and_every_case(finished):
    folder, output = finished
    text = (folder / "losses.md").read_text()
    found = read(folder)
    for fact in (found[0]["device"], torch.__version__, found[0]["date"], "median", "n x n x d x 2", "Load average"):
        assert fact in text
    for objective, provider in CASES:
        section = text.split(f"## {objective}, d = 8\n")[1].split("##")[0]
        (row,) = (line for line in section.splitlines() if f"| {provider.name} |" in line)
        r = next(r for r in found if (r["objective"], r["provider"], r["pass"]) == (objective, provider.name, "both"))
        ours = next(r for r in found if (r["objective"], r["pass"]) == (objective, "both"))
        assert f"| {records.milliseconds(r['samples_ms'])} |" in row and f"| {r['peak_bytes'] / 2**20:.1f} |" in row
        assert (f"| {records.digits(r['wall_ms'] / ours['wall_ms'])}x |" in row) == (r is not ours)
        assert f"{objective:7} n=64     {provider.name:23} peak memory" in output
    assert "Not run. has no ntxent: cut-cross-entropy.\n" in text
    assert "Not run. timed on CUDA only: cut-cross-entropy; has no clip: authors' formulation.\n" in text
    assert sorted(path.name for path in folder.iterdir()) == ["losses.json", "losses.md"]


@pytest.mark.parametrize(("what", "wrong"), [("loss", 2.0003), ("gradient", 3.001), ("gradient", float("nan"))])
def test_providers_that_differ_are_an_error(what, wrong):
    right = {"loss": torch.tensor(2.0), "gradient": torch.tensor([[3.0, 0.0]])}
    near = {name: value * (1 + 9e-5) for name, value in right.items()}
    records.agree({"a": right, "b": near}, losses.TOLERANCES["fp32"])
    found = {**near, what: torch.full_like(right[what], wrong)}
    with pytest.raises(fastcl.FastclError, match=f"c disagrees with a on the {what}"):
        records.agree({"a": right, "b": near, "c": found}, losses.TOLERANCES["fp32"])


def changed(monkeypatch, name: str, **fields) -> None:
    """Replace a provider by one with other fields."""
    providers = [replace(p, **fields) if p.name == name else p for p in losses.PROVIDERS]
    monkeypatch.setattr(losses.Losses, "table", tuple(providers))


@pytest.fixture
def no_memory(monkeypatch):
    """Without the measurement of memory, which takes a process of its own for each provider."""
    monkeypatch.setattr(losses.Losses, "peak", lambda self, entry: clocks.Peak(7, 0.0))


@pytest.mark.parametrize("ours", [True, False])
def test_a_provider_that_is_wrong_is_not_timed_and_the_others_are(
    small, no_memory, tmp_path, monkeypatch, capsys, ours
):
    def wrong_at_16(z, labels, objective):
        return BY_NAME["plain PyTorch"].loss(z, labels, objective) * (1.01 if len(z) == 16 else 1)

    changed(monkeypatch, "plain PyTorch", loss=wrong_at_16, ours=ours)
    # The exit status tells of our own alone: nobody can help what another library computes.
    assert losses.main(["--out", str(tmp_path), *small, "--n", "8", "32", "16", "--repeats", "1"]) == ours
    message = "plain PyTorch disagrees with fastcl chunked on the loss"
    error = capsys.readouterr().err
    assert message in error and ("error: ntxent, n=16, d=128: plain PyTorch disagrees" in error) == ours
    reasons = {(r["n"], r["provider"]): r["reason"] for r in read(tmp_path) if r["reason"]}
    assert list(reasons) == [(16, "plain PyTorch")] and message in reasons[16, "plain PyTorch"]
    assert [r["n"] for r in read(tmp_path)] == sorted(r["n"] for r in read(tmp_path))


@pytest.mark.parametrize("ours", [True, False])
def test_a_provider_that_raises_is_a_reason_not_the_end(small, no_memory, tmp_path, monkeypatch, ours):
    def broken(z, labels, objective):
        raise NotImplementedError("no rows\nof that kind")

    changed(monkeypatch, "plain PyTorch", loss=broken, ours=ours)
    assert losses.main(["--out", str(tmp_path), *small, "--n", "8", "--repeats", "1"]) == ours
    reasons = {r["provider"]: r["reason"] for r in read(tmp_path)}
    assert {name for name, reason in reasons.items() if reason is None} == set(FOUR) - {"plain PyTorch"}
    assert reasons["plain PyTorch"] == "failed: NotImplementedError: no rows"


def test_what_would_take_too_long_at_the_next_size_is_not_begun(small, tmp_path, monkeypatch):
    called = []

    def slow(z, labels, objective):
        called.append(len(z))
        return BY_NAME["plain PyTorch"].loss(z, labels, objective)

    monkeypatch.setattr(losses.Losses, "peak", lambda self, entry: clocks.Peak(7, 0.9 * (self.n / 16) ** 2))
    changed(monkeypatch, "plain PyTorch", loss=slow)
    arguments = ["--out", str(tmp_path), *small, "--n", "16", "32", "--seconds", "1", "--repeats", "1"]
    assert losses.main(arguments) == 0
    found = {(r["n"], r["provider"]): r["reason"] for r in read(tmp_path)}
    # 0.9 s less what no size makes longer, times four.
    expected = 4 * (0.9 - losses.Losses.overhead["cpu"])
    assert found[16, "plain PyTorch"] is None and set(called) == {16}
    assert found[32, "plain PyTorch"] == f"skipped: one call would take about {expected:.3g} s, the limit is 1 s"


@pytest.mark.parametrize(
    ("limit", "skipped", "reason"),
    [
        (("--memory", "0.002"), {"authors' formulation"}, "skipped: needs 0.00296 GiB, the limit is 0.002 GiB"),
        (("--seconds", "1e-9"), set(FOUR), "skipped: one call takes"),
    ],
)
def test_what_does_not_fit_is_recorded_with_the_reason(small, tmp_path, limit, skipped, reason):
    arguments = ["--out", str(tmp_path), *small, "--n", "64", "--d", "32", "--repeats", "1", *limit]
    assert losses.main(arguments) == 0
    found = read(tmp_path)
    assert {r["provider"] for r in found if r["reason"]} == skipped
    for r in found:
        assert list(r) == FIELDS
        if r["reason"]:
            assert r["reason"].startswith(reason) and r["pass"] == "both"
            assert r["gpu_ms"] is r["wall_ms"] is r["tflops"] is None and r["samples_ms"] == []
            assert (r["peak_bytes"] is None) == ("needs" in r["reason"])
            assert f"| 64 | {r['provider']} | {r['reason']} |" in (tmp_path / "losses.md").read_text()


def allocate(device: str, count: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """For `measure_peak`: a call that writes that many bytes."""
    return partial(torch.ones, 8), partial(torch.ones, count, dtype=torch.uint8)


def killed(device: str, *args: object) -> tuple[Callable[[], object], Callable[[], object]]:
    """For `measure_peak`: a call that ends as it does when the system is out of memory."""
    return partial(torch.ones, 8), partial(os.kill, os.getpid(), signal.SIGKILL)


def test_the_memory_measurement_sees_what_is_allocated_and_nothing_of_this_process():
    held = torch.ones(600 * 10**6, dtype=torch.uint8)  # a measurement that began at this process's peak would see 0
    assert 190e6 < clocks.measure_peak(allocate, "cpu", 200 * 10**6).bytes < 260e6
    assert 0 <= clocks.measure_peak(allocate, "cpu", 1000).bytes < 10e6
    assert held[-1] == 1


def test_the_memory_of_a_case_is_that_of_its_arrays_as_estimated():
    # Arrays above 32 MiB, which the C allocator takes from the system one by one and gives back at once.
    name, cases = "authors' formulation", [{"objective": "ntxent", "n": n, "d": 64} for n in (losses.WARM_UP_ROWS, 384)]
    peak = clocks.measure_peak(suite.memory_case, "cpu", losses.Losses, name, *cases).bytes
    assert peak == pytest.approx(4 * BY_NAME[name].floats(384, 64), rel=0.15)


def test_a_process_that_was_killed_is_a_reason_not_the_end(small, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "memory_case", killed)
    assert losses.main(["--out", str(tmp_path), *small, "--n", "8", "--d", "2"]) == 0
    assert [r["reason"] for r in read(tmp_path)] == ["its process was killed, most likely for want of memory"] * 4


def test_the_time_of_a_gpu_comes_before_that_of_the_wall_clock():
    samples = [clocks.Sample(5.0, 4.0), clocks.Sample(9.0, 2.0), clocks.Sample(6.0, 1.0)]
    r = records.record("losses", "p", {"n": 8}, {"device": "a GPU"}, "both", samples, (2e9, 4e9), 7, 0.5, "graph")
    assert (r["gpu_ms"], r["wall_ms"], r["samples_ms"], r["peak_bytes"]) == (2.0, 6.0, [4.0, 2.0, 1.0], 7)
    assert (r["tflops"], r["tflops_dense"]) == pytest.approx((1.0, 2.0))
    assert (r["bound_ms"], r["timing"], r["wall_samples_ms"]) == (0.5, "graph", [5.0, 9.0, 6.0])
    r = records.record("losses", "p", {"n": 8}, {"device": "a GPU"}, "fwd", [clocks.Sample(None, 4.0)])
    assert (r["gpu_ms"], r["wall_ms"], r["tflops"]) == (4.0, None, None)


@pytest.mark.gpu
def test_on_a_gpu_times_and_memory_come_from_the_device(tmp_path):
    names = ["fastcl chunked", "fastcl fp16", "plain PyTorch"]
    arguments = ["--out", str(tmp_path), "--n", "256", "--d", "64", "--repeats", "3", "--objectives", "ntxent"]
    assert losses.main([*arguments, "--device", "cuda", "--providers", *names]) == 0
    for r in read(tmp_path):
        assert r["device"] == torch.cuda.get_device_name() and r["samples_ms"] and r["gpu_ms"] > 0
        assert (r["wall_ms"] is None) == (r["pass"] != "both") and r["bound_ms"] > 0
        assert r["timing"] == ("events" if r["provider"] == "fastcl chunked" else "graph")
    allocated = clocks.measure_peak(allocate_on_gpu, "cuda", 200 * 10**6).bytes
    assert 190e6 < allocated < 260e6


def allocate_on_gpu(device: str, count: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """For `measure_peak`: as `allocate`, on the device."""
    return partial(torch.ones, 8, device=device), partial(torch.ones, count, dtype=torch.uint8, device=device)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--n", "64", "7"), "--n: rows must be even and at least 8, got 7"),
        (("--seconds", "0"), "--seconds: must be"),
        (("--memory", "0"), "--memory: must be positive and finite, got 0"),
    ],
)
def test_bad_arguments_are_named(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        losses.main(["--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def test_a_file_is_replaced_as_a_whole(tmp_path):
    records.write(tmp_path / "new", "losses", [{"n": 1}, {"n": 2}], "first")
    with pytest.raises(ValueError):
        records.write(tmp_path / "new", "losses", [{"n": float("nan")}], "second")
    assert read(tmp_path / "new") == [{"n": 1}, {"n": 2}] and (tmp_path / "new" / "losses.md").read_text() == "first"
