"""The command line as a user meets it."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_run import run, tiny_toml

from fastcl.cli import main


@pytest.mark.parametrize("command", ["", "demo", "train", "align", "report", "doctor"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and len(text) > 200
    assert max(map(len, text.splitlines())) <= 120


def test_align_reads_every_format_and_agrees_with_the_functions(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    y = (x @ np.random.default_rng(1).normal(size=(6, 9))).astype(np.float32)
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "b.npz", features=y, other=x[:3])
    safetensors.torch.save_file({"h": torch.from_numpy(y)}, tmp_path / "b.safetensors")
    shown = []
    for name in ("b.npz", "b.safetensors"):
        assert main(["align", str(tmp_path / "a.npy"), str(tmp_path / name)]) == 0
        shown.append(capsys.readouterr().out.splitlines()[1:])
    assert shown[0] == shown[1]
    xc, yc = (v.astype(float) - v.mean(0) for v in (x, y))
    cka = np.linalg.norm(xc.T @ yc) ** 2 / np.linalg.norm(xc.T @ xc) / np.linalg.norm(yc.T @ yc)
    assert float(shown[0][0].split()[-1]) == pytest.approx(cka, abs=1e-6)


def test_align_errors_name_the_file(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((4, 2), np.float32))
    np.save(tmp_path / "short.npy", np.zeros((3, 2), np.float32))
    np.save(tmp_path / "ints.npy", np.zeros((4, 2), np.int64))
    np.savez(tmp_path / "two.npz", p=np.zeros((4, 2)), q=np.zeros((4, 2)))
    (tmp_path / "broken.npy").write_bytes(b"no array")
    (tmp_path / "x.txt").write_text("")
    for name, message in (
        ("short.npy", "4 rows"), ("ints.npy", "float matrix (samples, width), got (4, 2) torch.int64"),
        ("two.npz", "holds 2 arrays (p, q)"), ("broken.npy", "cannot be read"), ("x.txt", ".npy, .npz, .safetensors"),
        ("absent.npy", "does not exist"),
    ):  # fmt: skip
        assert main(["align", str(tmp_path / "a.npy"), str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and name in error and message in error, error


def test_train_and_report_end_to_end(tmp_path):
    out = tmp_path / "run"
    done = run("train", tiny_toml(tmp_path / "c.toml"), "--out", out, "--set", "train.epochs=1")
    assert done.returncode == 0, done.stdout
    assert "433 training and 108 held-out images of 3 classes" in done.stdout
    assert f"report: {out / 'report.html'}" in done.stdout
    assert json.loads((out / "run.json").read_text())["config"]["train"]["epochs"] == 1
    for name in ("dcl", "nscl", "ce", "identity", "reseeded"):
        features = safetensors.torch.load_file(out / "features" / f"{name}.safetensors")["features"]
        assert features.shape[1] == 16 and features.isfinite().all()
    assert any((out / "tensorboard").iterdir())
    page = tmp_path / "page.html"
    assert main(["report", str(out), "--out", str(page)]) == 0
    assert page.read_bytes() == (out / "report.html").read_bytes()
    done = run("align", out / "features" / "dcl.safetensors", out / "features" / "identity.safetensors")
    assert done.returncode == 0 and done.stdout.count("1.000000") == 4, done.stdout


def test_errors_are_one_line_and_status_one(tmp_path, capsys):
    assert main(["train", str(tmp_path / "absent.toml"), "--out", str(tmp_path / "o")]) == 1
    assert capsys.readouterr().err.startswith("error: cannot read config")
    assert main(["report", str(tmp_path)]) == 1
    assert "run.json" in capsys.readouterr().err


def test_doctor_passes_here_and_fails_on_wrong_numbers(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "losses, cpu" in text and "FAILED" not in text and torch.__version__.partition("+")[0] in text
    from fastcl.backends import chunked

    monkeypatch.setattr(chunked, "EXP_LIMIT", 0.0)  # still right: the other path
    assert main(["doctor"]) == 0
    capsys.readouterr()
    right = chunked._add_exponentials
    monkeypatch.setattr(chunked, "_add_exponentials", lambda total, s, *rest: right(total, s * 1.001, *rest))
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "FAILED: ArithmeticError" in captured.out and "self-test failed" in captured.err
