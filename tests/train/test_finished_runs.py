"""What a finished run's folder must hold to count as finished, and what goes on past its checkpoints."""

import json
import shutil

import pytest
from test_resume_refusals import done, files, last, original, small  # noqa: F401
from tiny_run import tiny_toml

from fastcl import FastclError
from fastcl.cli.main import main
from fastcl.train import Lockstep, trainer


def test_only_names_of_a_run_are_removed_and_only_from_a_run(done):  # noqa: F811
    kept = [done / name for name in ("mine.tmp", "weights/mine.tmp", "checkpoints/notes.tmp", ".fastcl-01.part")]
    ours = [done / name for name in ("run.json.tmp", "weights/dcl.safetensors.tmp", "features/.fastcl-01.part",
                                     "checkpoints/epoch_000001-01.pt.tmp")]  # fmt: skip
    for path in (*kept, *ours):
        path.write_bytes(b"half")
    with pytest.raises(FastclError, match="contains another run"):
        Lockstep(small(optim__lr=0.1), done)
    assert all(path.exists() for path in (*kept, *ours))
    Lockstep(small(), done)
    assert all(path.exists() for path in kept) and not any(path.exists() for path in ours)


def test_a_folder_that_is_no_run_keeps_its_files(tmp_path):
    (tmp_path / "run.json.tmp").write_bytes(b"somebody's")
    Lockstep(small(), tmp_path)
    assert (tmp_path / "run.json.tmp").exists()


def row(epoch, **more):
    return json.dumps({"epoch": epoch, "model": "dcl", **more}) + "\n"


@pytest.mark.parametrize("name, text", (
    ("metrics", row(3)), ("metrics", row(2)), ("metrics", "words\n"), ("steps", row(2)), ("timing", "[1]\n"),
))  # fmt: skip
def test_records_past_a_finished_run_are_kept_aside(done, caplog, name, text):  # noqa: F811
    before, path = files(done), done / f"{name}.jsonl"
    for kept in (f"{name}.jsonl.after-epoch-2", f"{name}.jsonl.after-epoch-2.2"):
        with path.open("a") as file:
            file.write(text)
        Lockstep(small(), done).run()
        assert (done / kept).read_text() == text and f"is kept in {done / kept}" in caplog.text
    assert {key: value for key, value in files(done).items() if "after-epoch" not in key} == before


def test_records_of_more_epochs_than_a_kill_leaves_are_kept_aside(done):  # noqa: F811
    for path in (done / "weights", done / "features"):
        shutil.rmtree(path)
    (done / "layers.json").unlink(missing_ok=True)
    before = files(done)
    last(done).unlink()
    Lockstep(small(), done).run()  # one epoch back: a run that was killed before it wrote its last checkpoint
    assert not list(done.glob("*.after-*"))
    assert all((done / name).read_bytes() == before[name] for name in ("metrics.jsonl", "steps.jsonl"))
    with (done / "metrics.jsonl").open("a") as file:
        file.write(row(7))
    for path in (done / "weights", done / "features"):
        shutil.rmtree(path)
    Lockstep(small(), done).run()
    assert (done / "metrics.jsonl.after-epoch-2").read_text() == row(7)


@pytest.mark.parametrize("content, why", ((b"", "damaged, 0 bytes"), (b"\2\0\0\0\0\0\0\0{}", "it contains no tensor"),
                                          (None, "missing")))  # fmt: skip
def test_damaged_weights_are_not_done(done, content, why):  # noqa: F811
    shutil.rmtree(done / "checkpoints")
    path = done / "weights" / "dcl.safetensors"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    before = files(done)
    with pytest.raises(FastclError, match=rf"for a finished run it lacks weights/dcl.safetensors \({why}\)"):
        Lockstep(small(), done).run()
    assert files(done) == before


def test_a_missing_layers_json_is_mentioned(tmp_path, caplog):
    config = small(train__models=["dcl", "nscl"], train__epochs=1)
    Lockstep(config, tmp_path).run()
    shutil.rmtree(tmp_path / "checkpoints")
    Lockstep(config, tmp_path).run()
    assert "layers.json" not in caplog.text
    (tmp_path / "layers.json").unlink()
    Lockstep(config, tmp_path).run()
    assert "has no layers.json" in caplog.text


def test_a_report_does_not_give_way(tmp_path):
    Lockstep(small(), tmp_path)
    (tmp_path / "report.html").write_text("precious")
    with pytest.raises(FastclError, match="contains another run, which differs in optim.lr"):
        Lockstep(small(optim__lr=0.1), tmp_path)


def test_a_run_does_not_lie_among_its_images(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    with pytest.raises(FastclError, match=f"--out: .* is inside {tmp_path}/images, whose images the run reads"):
        Lockstep(small(data__source=f"folder:{tmp_path}/images"), tmp_path / "images" / "runs" / "x")
    assert not (tmp_path / "images" / "runs").exists()


def times(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}


def test_the_command_of_a_finished_run_writes_only_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastcl.report.html._figures", lambda run: [])  # five reports are written
    config, out = tiny_toml(tmp_path / "tiny.toml"), tmp_path / "run"
    command = ["train", str(config), "--out", str(out)]
    for item in ("train.epochs=1", 'train.models=["dcl", "nscl"]', "train.controls=[]"):
        command += ["--set", item]
    assert main(command) == 0
    first, wanted = times(out), files(out)
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"already finished: 1 epoch in {out}\n" in said and "resuming" not in said
    assert times(out) == first
    gone = ("weights/dcl.safetensors", "features/nscl.safetensors", "layers.json", "report.html")
    for name in gone:
        (out / name).unlink()
    assert main(command) == 0
    assert f"wrote what was missing or damaged: {', '.join(gone[:3])}\n" in capsys.readouterr().out
    assert {path for path, time in times(out).items() if first[path] != time} == {out / name for name in gone}
    assert files(out) == wanted
    before = times(out)
    (out / "weights" / "dcl.safetensors").write_bytes(wanted["weights/nscl.safetensors"])
    assert main(command) == 0 and files(out) == wanted
    mended = ("weights/dcl.safetensors", "features/dcl.safetensors", "layers.json")
    assert f"wrote what was missing or damaged: {', '.join(mended)}\n" in capsys.readouterr().out
    changed = {path for path, time in times(out).items() if before[path] != time}
    assert changed == {out / name for name in (*mended, "report.html")}
    (out / "layers.json").write_bytes(wanted["layers.json"][:9])
    assert main(command) == 0 and files(out) == wanted
    for name in ("layers.json", "steps.jsonl"):
        (out / name).write_bytes(wanted[name])  # newer than the report
        assert main(command) == 0
        assert times(out)[out / "report.html"] >= times(out)[out / name]


def test_a_finished_run_is_not_resumed_elsewhere(done, caplog, monkeypatch):  # noqa: F811
    monkeypatch.setattr(trainer, "_device_name", lambda device: "another machine")
    Lockstep(small(), done).run()
    assert "already finished" in caplog.text and "elsewhere" not in caplog.text
