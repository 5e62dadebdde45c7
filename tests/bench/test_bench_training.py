"""The benchmark of the trainer: a tiny run of all of it, and how a profile is read."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench.harness.records import digits
from bench.losses import plain
from bench.training import profile as step_profile
from bench.training import report as training_report
from bench.training import run as training
from bench.training import runs as training_runs
from bench.training import speed
from fastcl.train.step import BACKWARD, ENCODERS, LOSSES, METRICS, OPTIMIZERS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("training")
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastcl.report.html._figures", lambda run: [])  # tests/report looks at figures
            assert training.main(["--out", str(out), "--tiny", "--device", "cpu", "--repeats", "2"]) == 0
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return out, json.loads((out / "training.json").read_text())


def test_every_section_is_measured(results):
    out, found = results
    assert [(r["section"], r["reason"]) for r in found] == [
        *[("steps", None)] * 2, *[("speed", None)] * 5, *[("memory", None)] * 3, *[("runs", None)] * 2,
        ("precision", None),
    ]  # fmt: skip
    text = (out / "training.md").read_text()
    assert "measure nothing" in text and "peak memory not measured" in text
    for r in found[:2]:
        assert len(r["step_seconds"]) == 2 and r["twins"] == 4 and r["peak_bytes"] is None
        assert all(0 <= w <= s for w, s in zip(r["waiting_seconds"], r["step_seconds"], strict=True))
        assert sum(r["shares"].values()) == pytest.approx(1) and min(r["shares"].values()) > 0
    speeds = {r["provider"]: r for r in found[2:7]}
    assert [r["networks"] for r in speeds.values()] == [1, 2, 4, 1, 1] and "| published loop | 1 | " in text
    assert all(len(r["samples_ms"]) == 2 and r["pass"] == "both" for r in speeds.values())
    found = found[:2] + found[7:]
    assert [(r["batch"], r["parts"]) for r in found[2:5]] == [(4, 1), (64, 16), (64, 1)]
    assert all(r["peak_bytes"] >= 0 and r["seconds"] > 0 for r in found[2:5]) and "## Memory" in text
    for r in found[5:7]:
        assert set(r["pairs"]) == {"nscl", "supcon", "ce", "reseeded"} and set(r["ncc"]) == {"dcl", *r["pairs"]}
        assert all(0 <= r["probe"][model] <= 1 for model in r["ncc"])
        folder = out / "runs" / f"temperature-{r['temperature']:g}"
        assert (folder / "report.html").exists() and not any(path.is_dir() for path in folder.iterdir())
        assert r["evaluation_seconds"] > 0 and f"an epoch {digits(r['epoch_seconds'])} s" in text
        assert f"| ce | {r['pairs']['ce']['cka']:.4f} |" in text
    r = found[7]
    assert r["between"]["cka"] != 1 and r["alignment"]["fp32"] != r["alignment"]["bf16"]
    assert f"| dcl fp32, dcl bf16 | what the precision changes | {r['between']['cka']:.4f} |" in text


def test_a_case_that_fails_is_told_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    def measure(config, *_):
        if config.train.precision == "fp32":
            raise torch.OutOfMemoryError("tried to allocate 99 GiB")
        raise ValueError("odd")

    monkeypatch.setattr(step_profile, "measure", measure)
    assert training.main(["--out", str(tmp_path), "--tiny", "--device", "cpu", "--sections", "steps"]) == 1
    first, second = json.loads((tmp_path / "training.json").read_text())
    assert first["reason"].startswith("out of memory") and second["reason"] == "failed: ValueError: odd"
    assert "error: steps: failed: ValueError: odd" in capsys.readouterr().err
    assert "| 64 | fp32 | 4 | out of memory" in (tmp_path / "training.md").read_text()


def _event(key, time, kind=DeviceType.CPU):
    return SimpleNamespace(key=key, device_type=kind, device_time_total=time, cpu_time_total=2 * time)


def test_shares_of_a_profile():
    spans = [_event(ENCODERS, 30), _event(LOSSES, 4), _event(METRICS, 2), _event(OPTIMIZERS, 4)]
    operators = [_event("fastcl::twin", 3), _event("fastcl::fused_backward", 8), _event("aten::conv", 29)]
    card = [_event(BACKWARD, 60), _event("conv_kernel", 92, DeviceType.CUDA), _event(ENCODERS, 30, DeviceType.CUDA)]
    # Of 100 in all 60 are backward: 8 of the losses, 52 of the encoders.
    shares, twin = step_profile.shares_of([*spans, *operators, *card], True)
    assert shares == pytest.approx({"encoders": 0.82, "losses": 0.12, "metrics": 0.02, "optimisers": 0.04})
    assert twin == 0.03
    shares, twin = step_profile.shares_of([*spans, *operators[1:], _event(BACKWARD, 40)], False)
    found = {"encoders": 62 / 80, "losses": 12 / 80, "metrics": 2 / 80, "optimisers": 4 / 80}
    assert shares == pytest.approx(found) and twin is None


def test_a_profile_without_times_has_no_shares():
    spans = [_event(name, 0) for name in (ENCODERS, LOSSES, METRICS, OPTIMIZERS)]
    assert step_profile.shares_of(spans, True) == (dict.fromkeys(step_profile.SHARES), None)
    r = {"section": "steps", "batch": 1024, "precision": "fp32", "models": 4, "reason": None, "twins": 4,
         "versions": {"cuda": "13"}, "shares": dict.fromkeys(step_profile.SHARES), "twin_share": None,
         "step_seconds": [2.0], "waiting_seconds": [0.1], "images_per_second": 512.0, "peak_bytes": 2**30}  # fmt: skip
    row = "| 1,024 | fp32 | 4 | 2 (2-2) | 512 | 2,048 | 5.0% | - | - | - | - | - | 1.0 |"
    assert row in training_report.steps_table([r])
    assert next(training_report.targets([r]))[2:] == ("not measured", "")
    r["shares"] = {"encoders": 0.9, "losses": 0.02, "metrics": 0.01, "optimisers": 0.07}
    assert next(training_report.targets([r]))[2:] == ("6.9%", "no")
    r["waiting_seconds"] = [0.04]
    assert next(training_report.targets([r]))[2:] == ("4.0%", "yes")
    assert next(training_report.targets([r | {"versions": {}}]))[2:] == ("not measured", "")


def test_the_largest_batch_trains_one_model(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(step_profile, "measure", lambda config, *_: asked.append(config.train) or {})
    args = SimpleNamespace(repeats=2, seconds=9, device=torch.device("cuda"))
    for measure in training.steps(training.Training("training", args, {}, str, kind="cuda"), tmp_path):
        measure()
    assert [(t.batch_size, t.precision, len(t.models)) for t in asked] == [
        (1024, "fp32", 4), (1024, "bf16", 4), (4096, "bf16", 4), (16384, "bf16", 1)
    ]  # fmt: skip


def test_the_masked_form_is_nt_xent():
    z, labels = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(5)
    found = speed.masked_ntxent(z, torch.arange(5).repeat(2), plain.TEMPERATURE)
    assert found.item() == pytest.approx(plain.ntxent(z, labels).item(), rel=1e-12)


def test_the_ridge_probe_separates_what_is_separable():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long()
    x[:, 0] += 4 * labels
    assert training_runs.ridge_accuracy(x[:40], x[40:], labels[:40], labels[40:]) == 1
    assert training_runs.ridge_accuracy(x[:40], x[40:], labels[:40], 1 - labels[40:]) == 0


def test_pace_decides_the_epochs(tmp_path, monkeypatch):
    """Four models take 2 s a step of 10 an epoch, five 25 s an epoch, 30 with its evaluation."""
    values = {"steps_per_epoch": 10, "step_seconds": [2.0, 1.0, 3.0]}
    monkeypatch.setattr(step_profile, "measure", lambda *_: values)
    args = SimpleNamespace(seconds=95, device=torch.device("cpu"))
    run = training.Training("training", args, {}, str, kind="cpu")
    assert training.epochs_within(run, tmp_path) == 3
    run.args.seconds = 1
    assert training.epochs_within(run, tmp_path) == 2
    run.args.seconds = 95
    case = {"section": "steps", "batch": 64, "precision": "fp32", "models": 4}
    run.found.append({**case, **values, "step_seconds": [1.0], "reason": None})
    assert training.epochs_within(run, tmp_path) == 6
    run.found[0] = {**case, "reason": "out of memory"}
    assert training.epochs_within(run, tmp_path) == 2


def test_the_report_without_a_case():
    facts = {"device": "x", "versions": {}, "date": "y"}
    assert "## Steps" not in training_report.markdown([], facts, "digits", SimpleNamespace())


def test_real_images_are_named_without_their_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / training.CIFAR).touch()
    seen = []

    def section(run, scratch):
        seen.append((run.source, Path.cwd(), run.args.out))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "PARTS", {"steps": section})
    arguments = ["--out", "out", "--data", "data", "--device", "cpu", "--sections", "steps"]
    assert training.main(arguments) == 130
    assert seen == [(f"cifar10:{training.CIFAR}", folder, tmp_path / "out")] and Path.cwd() == tmp_path
