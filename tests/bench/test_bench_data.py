"""The benchmark of the data part measures what it says: views, differences, reasons, processor time; never how fast."""

import importlib.util
import json
import multiprocessing
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastcl
from bench.data import decoder, peers, providers, waiting
from bench.data import inputs as photos
from bench.data import report as data_report
from bench.data import run as data
from bench.data.inputs import CASES, TINY
from bench.data.providers import DALI_RENDERER, DECODING, LEVELS, PROVIDERS, TRITON_RENDERER
from bench.harness.records import record
from bench.harness.suite import Run
from fastcl.cli import main as cli
from fastcl.train import load_config

CPU = torch.device("cpu")
BY_NAME = {p.name: p for p in PROVIDERS}
OURS, PEER, BARE = "fastcl torchvision", "torchvision v2, tensors, workers", "drawing the plan alone"


@pytest.fixture(scope="module")
def few_workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "WORKERS", 1)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few_workers) -> tuple[list[dict], str]:
    """Records and report of the tiny mode with all that is installed, training left out."""
    folder = tmp_path_factory.mktemp("data")
    arguments = ["--out", str(folder), "--device", "cpu", "--tiny", "--repeats", "1", "--sections", "views"]
    assert data.main(arguments) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["data.json", "data.md"]
    return json.loads((folder / "data.json").read_text()), (folder / "data.md").read_text()


@pytest.fixture
def images(tmp_path) -> photos.Photos:
    return photos.read(TINY[0], tmp_path, tmp_path)


def test_a_tiny_run_writes_every_provider_of_every_size(finished):
    found, _ = finished
    assert [(r["size"], r["provider"]) for r in found] == [(c.size, p.name) for c in TINY for p in PROVIDERS]
    timed = [r for r in found if not r["reason"]]
    assert {OURS, PEER, "torchvision v2, Pillow, workers", BARE, "reading alone"} <= {r["provider"] for r in timed}
    for r in timed:
        assert r["bench"] == "data" and len(r["samples_ms"]) == 1 and r["images"] == 8 and r["batch"] == 4
        assert r["views"] == 2 * BY_NAME[r["provider"]].views and r["versions"]["fastcl"] == fastcl.__version__
        assert data_report.rate(r) == pytest.approx(8e3 / np.median(r["samples_ms"]))
        assert (r["difference_mean"] is not None) == bool(BY_NAME[r["provider"]].renderer)
    assert all(r["difference_mean"] <= LEVELS for r in timed if BY_NAME[r["provider"]].renderer)
    assert all(r["difference_max"] == 0 for r in timed if r["provider"] == OURS)
    assert all(r["cores_ms"] for r in timed) or not Path("/proc/self/stat").exists()


def test_the_report_names_conditions_images_targets_and_what_was_not_measured(finished):
    found, text = finished
    for fact in (found[0]["device"], torch.__version__, "Tiny sizes", "MADE-UP pictures (tiny), encoded", "core-ms"):
        assert fact in text
    assert text.count("| not measured |  |") == 2  # both need a GPU
    section = text.split("## 20 x 20 pixels\n")[1]
    assert f"| {OURS} | two views |" in section and f"| {BARE} | no views |" in section
    missing = [r for r in found if r["size"] == 20 and r["reason"]]
    assert "kornia" in {r["provider"] for r in missing}  # absent, or these images differ in size
    assert all(f"{r['provider']}: {r['reason']}" in section.split("Not measured: ")[1] for r in missing)


def test_what_is_not_installed_or_does_not_fit_is_named(monkeypatch, images):
    real = importlib.util.find_spec

    def find_spec(name, *rest):
        if name == "nvidia.dali":
            raise ModuleNotFoundError("No module named 'nvidia'")
        return None if name == "kornia" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    absent = {"DALI, operator seeds": "nvidia-dali", DECODING: "nvidia-dali", "kornia": "kornia"}
    for name, package in absent.items():
        assert BY_NAME[name].obstacle(images, TINY[0], CPU) == f"{package} is not installed"
    decoded = replace(images, split=replace(images.split, encoded=None))
    assert BY_NAME[DECODING].obstacle(decoded, TINY[0], CPU) == "the images are decoded beforehand"

    def refuse(name, *rest):
        raise fastcl.FastclError(f"{name} cannot be used here: no such card")

    monkeypatch.setattr(providers, "choose_renderer", refuse)
    assert BY_NAME[OURS].obstacle(images, TINY[0], CPU) == "no such card"


def changed(monkeypatch, name: str, change) -> None:
    """Replace a provider's batches by change(views)."""

    def broken(*args):
        feed = BY_NAME[name].open(*args)
        return lambda epoch: (change(views) for views in feed(epoch))

    providers = [replace(p, open=broken) if p.name == name else p for p in PROVIDERS]
    monkeypatch.setattr(data.Views, "table", tuple(providers))


def fail(views):
    raise NotImplementedError("no such images\nof that kind")


@pytest.mark.parametrize(("name", "change", "reason"), [
    (OURS, fail, "no such images"),
    (OURS, lambda v: tuple(x + 0.05 for x in v), "grey levels in the mean, allowed are 1.5"),
    (OURS, lambda v: tuple(x * torch.nan for x in v), "not finite"),
    (OURS, lambda v: v[::-1], "grey levels in the mean"),
    (OURS, lambda v: (v[0], v[0]), "2 views, or twice the same"),
    (PEER, lambda v: tuple(x[:, :, 1:] for x in v), "views are (4, 3, 11, 12)"),
    (PEER, fail, "no such images"),
])  # fmt: skip
def test_a_provider_that_fails_or_is_wrong_is_named_and_the_others_are_timed(
    few_workers, tmp_path, monkeypatch, capsys, name, change, reason
):
    changed(monkeypatch, name, change)
    monkeypatch.setattr(data, "TINY", TINY[:1])
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--tiny", "--repeats", "1", "--sections", "views"]
    assert data.main([*arguments, "--providers", OURS, PEER, BARE]) == (name == OURS)
    found = {r["provider"]: r for r in json.loads((tmp_path / "data.json").read_text())}
    assert found[name]["reason"].startswith("failed: ") and reason in found[name]["reason"]
    assert not found[name]["samples_ms"] and all(r["samples_ms"] for key, r in found.items() if key != name)
    assert (f"error: 12 x 12: {name}: " in capsys.readouterr().err) == (name == OURS)
    assert f"Not measured: {name}: failed: " in (tmp_path / "data.md").read_text()


def test_a_pass_that_takes_too_long_is_named_and_not_extrapolated(few_workers, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TINY", TINY[:1])
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--tiny", "--sections", "views", "--providers", OURS, BARE]
    assert data.main([*arguments, "--seconds", "1e-9"]) == 0
    found = json.loads((tmp_path / "data.json").read_text())
    assert all(r["reason"].startswith("over the limit of 1e-09 s: one pass takes ") for r in found) and len(found) == 2
    assert "Nothing was measured." in (tmp_path / "data.md").read_text()


def burn(done, stop) -> None:
    while time.process_time() < 0.3:
        pass
    done.set()
    stop.wait()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell of processes' time")
def test_processor_time_counts_workers_that_live_and_that_have_ended():
    context = multiprocessing.get_context("fork")
    done, stop = context.Event(), context.Event()
    before = data.core_seconds()
    worker = context.Process(target=burn, args=(done, stop))
    worker.start()
    assert done.wait(60)
    assert data.core_seconds() - before >= 0.25  # the system counts in hundredths
    stop.set()
    worker.join()
    assert data.core_seconds() - before >= 0.25


def test_images_of_a_pass_are_whole_batches_of_real_or_named_made_up_ones(data_path, tmp_path):
    case = replace(CASES["cpu"][1], images=10, batch=4)
    found = photos.read(case, data_path(case.file).parent, tmp_path)
    assert found.name == "fruits65, encoded" and len(found.split) == 8 and found.equally_sized
    whole = fastcl.data.load(found.source).train
    positions = [whole.ids.tolist().index(i) for i in found.split.ids]
    for k in (0, 7):
        assert np.array_equal(found.split.image(k), whole.image(positions[k]))
        assert found.split.encoded(k)[:2] == b"\xff\xd8"
    made_up = photos.read(case, tmp_path / "nowhere", tmp_path)
    assert made_up.name == "MADE-UP pictures (fruits65.zip is not there), encoded" and len(made_up.split) == 8
    assert made_up.split.sizes.tolist() == [[100, 100]] * 8


def test_images_of_several_sizes_are_those_of_the_commonest(data_path, tmp_path):
    case = replace(CASES["cpu"][2], images=20, batch=10)
    found = photos.read(case, data_path(case.file).parent, tmp_path)
    assert len(found.split) == 20 and found.equally_sized
    whole = fastcl.data.load(found.source).train
    sizes, counts = np.unique(whole.sizes, axis=0, return_counts=True)
    assert len(sizes) > 1 and found.split.sizes[0].tolist() == sizes[counts.argmax()].tolist()
    i = int(np.flatnonzero(whole.ids == found.split.ids[3])[0])
    assert np.array_equal(found.split.image(3), whole.image(i))


def made(name: str, size: int, rate: float, **versions: str) -> dict:
    full = {"section": "views", "size": size, "images": 1000, "source": "x", "preset": "y", "batch": 10, "views": 2,
            "cores_ms": [100.0], "difference_mean": 0.25, "difference_max": 2.0, "versions": versions}  # fmt: skip
    return record("data", name, full, {}) | {"samples_ms": [1e6 / rate]}


@pytest.mark.parametrize(("rate", "reached"), [(1.1e6, "| 1,100,000 | yes |"), (9e5, "| 900,000 | no |")])
def test_targets_are_those_of_a_gpu(rate, reached):
    gpu = [made(TRITON_RENDERER, 32, rate, cuda="13"), made(DALI_RENDERER, 224, 3000, cuda="13"),
           made(DECODING, 224, 4000, cuda="13")]  # fmt: skip
    text = data_report.body(gpu)
    assert reached in text and "| 75 % of 4,000 images/s |" in text
    assert f"| {DALI_RENDERER} | two views | 3000 (3000-3000) | 0.1 | 10000 | 0.25 (2) |" in text
    without = data_report.body([r | {"versions": {}} for r in gpu])
    assert without.count("| not measured |") == 2


@pytest.mark.parametrize("kind", ["cuda", "cpu", "tiny"])
def test_the_training_run_is_a_valid_configuration(tmp_path, images, kind):
    path = tmp_path / "run.toml"
    path.write_text(waiting.configuration("torchvision", kind, TINY[0], images, CPU))
    config = load_config(path)
    assert config.data.renderer == "torchvision" and config.views == TINY[0].spec and config.train.epochs == 2


def test_a_training_run_tells_what_its_steps_wait(tmp_path, images, monkeypatch):
    run = Run("data", SimpleNamespace(tiny=True, providers=[OURS, DALI_RENDERER], device=CPU), {}, str)
    ran = []

    def fake(command, **options):
        out = Path(command[-1])
        ran.append(out.name)
        if "dali" in out.name:
            return subprocess.CompletedProcess(command, 1, "", "a warning\nerror: no such codec\n")
        out.mkdir()
        lines = [{"epoch": e, "seconds": 4.0 * e, "images_per_second": 2.0, "rendering_seconds": 1.0} for e in (1, 2)]
        (out / "timing.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(waiting.subprocess, "run", fake)
    monkeypatch.setattr(providers, "choose_renderer", lambda *args: None)
    waiting.measure(run, TINY[0], images, tmp_path)
    found = run.found
    assert ran == ["training-torchvision", "training-dali"]
    assert run.failed == ["training: fastcl dali: failed: no such codec"]
    assert waiting.share_of(found[0]) == 1 / 8 and found[1]["reason"] == "failed: no such codec"
    text = data_report.body(found)
    assert f"| {OURS} | two views | 2 | 8 | 12.5 % |" in text and f"{DALI_RENDERER}: failed: no such codec" in text


def test_the_command_line_trains_for_the_wait(tmp_path_factory, images, monkeypatch):
    outside = tmp_path_factory.mktemp("out")  # a run is not written among the images that it reads

    def here(command, **options):  # a process of its own would take seconds to start
        return subprocess.CompletedProcess(command, cli.main(list(command[3:])), "", "")

    monkeypatch.setattr(waiting.subprocess, "run", here)
    text = waiting.configuration("torchvision", "tiny", TINY[0], images, CPU)
    timing, reason = waiting._train(text, outside / "run")
    assert reason is None and timing["epoch"] == 2 and 0 <= timing["rendering_seconds"] <= timing["seconds"]


def test_bad_arguments_are_refused(capsys):
    for arguments in (["--seconds", "0"], ["--sizes", "33"]):
        with pytest.raises(SystemExit):
            data.main(["--out", "x", *arguments])
    assert "--seconds: must be positive and finite, got 0" in capsys.readouterr().err


def test_dali_again(tmp_path, monkeypatch, capsys):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (pip install '.[dali]')")
    assert decoder.main(["--out", str(tmp_path), "--tiny"]) == 0
    found = json.loads((tmp_path / "decoder.json").read_text())
    assert [r["hw_decoder_load"] for r in found] == [0.0] * 5 + [0.65] * 5
    assert all(r["max"] == 0 for r in found if r["against"] != "torchvision's")
    assert 0 < found[4]["mean"] < 1.5 and "| 0 | torchvision's |" in (tmp_path / "decoder.md").read_text()
    monkeypatch.setattr(decoder, "compared", lambda *_: iter([("twice", 0.1, 1.0), ("torchvision's", 0.1, 1.0)]))
    assert decoder.main(["--out", str(tmp_path), "--tiny"]) == 1
    assert "error: not the same twice" in capsys.readouterr().err
