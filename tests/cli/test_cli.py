"""The command line as a user meets it."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from scipy.stats import spearmanr
from tiny_run import run, tiny_toml

from fastcl import pair_stats
from fastcl.cli.contact_sheet import _difference
from fastcl.cli.main import _RUN, main


@pytest.mark.parametrize("command", ["", *_RUN])
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
        more = ["--spearman", "--json", str(tmp_path / "o.json")]
        assert main(["align", str(tmp_path / "a.npy"), str(tmp_path / name), *more]) == 0
        shown.append(capsys.readouterr().out.splitlines()[1:])
    assert shown[0] == shown[1]
    values = {line[2:32].strip(): float(line[32:].split()[0]) for line in shown[0]}
    xc, yc = (v.astype(float) - v.mean(0) for v in (x, y))
    cka = np.linalg.norm(xc.T @ yc) ** 2 / np.linalg.norm(xc.T @ xc) / np.linalg.norm(yc.T @ yc)
    assert values["linear CKA, biased"] == pytest.approx(cka, abs=1e-6)
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x.astype(float), y.astype(float))]
    cosines = [(v @ v.T)[np.triu_indices(40, 1)] for v in unit]
    assert values["RSA, cosine, Pearson"] == pytest.approx(np.corrcoef(*cosines)[0, 1], abs=1e-6)
    assert values["RSA, cosine, Spearman"] == pytest.approx(spearmanr(*cosines).statistic, abs=1e-6)
    assert shown[0][-1].endswith("(exact)")
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["samples"] == 40 and written["undefined"] == {} and written["measures"]["rsa_spearman_error"] == 0
    measures = [value for name, value in written["measures"].items() if name != "rsa_spearman_error"]
    assert measures == pytest.approx(list(values.values()), abs=1e-6) and len(measures) == 17
    assert main(["align", str(tmp_path / "a.npy"), str(tmp_path / "b.npz")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == shown[0][:-1]  # ranks of all pairs are for those who ask
    for measure, bound in (("cka_cosine", "cka_bound_tight"), ("rsa_cosine", "rsa_bound_tight")):
        assert written["measures"][measure] >= written["measures"][bound] >= written["measures"][bound[:-6]]


def test_align_says_what_is_undefined_and_shows_the_rest(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.normal(size=(20, 3)))
    np.save(tmp_path / "dead.npy", np.ones((20, 3)))
    names = [str(tmp_path / name) for name in ("a.npy", "dead.npy", "o.json")]
    assert main(["align", *names[:2], "--spearman", "--json", names[2]]) == 0
    text = capsys.readouterr().out
    assert text.count("is undefined") == 16 and "drift |K - L|, cosine" in text
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["measures"]["cka_linear"] is None is written["measures"]["rsa_spearman_error"]
    assert written["measures"]["drift"] > 0 and "all similarities" in written["undefined"]["rsa_spearman"]
    for measure in ("rho", "cka_bound", "cka_bound_tight", "r", "rsa_bound", "rsa_bound_tight"):
        assert written["measures"][measure] is None
        assert "second representation" in written["undefined"][measure]


def test_align_of_layers_from_files_and_folders(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 8))
    maps = {f"blocks.{k}": (x + rng.normal(size=x.shape) * k).reshape(30, 2, 2, 2) for k in (0, 2, 10)}
    np.savez(tmp_path / "a.npz", **maps, dead=np.ones((30, 2)))
    (tmp_path / "b").mkdir()
    safetensors.torch.save_file({k: torch.from_numpy(v) for k, v in maps.items()}, tmp_path / "c.safetensors")
    for name, h in maps.items():
        np.save(tmp_path / "b" / f"{name}.npy", h)
    (tmp_path / "b" / "notes.txt").write_text("no layer")
    wanted = {name: pair_stats(torch.from_numpy(x), torch.from_numpy(h).flatten(1)) for name, h in maps.items()}
    for other in ("b", "c.safetensors"):
        arguments = [str(tmp_path / name) for name in ("a.npz", other)]
        more = ["--json", str(tmp_path / "o.json"), "--out", str(tmp_path / "maps" / "heat.svg")]
        assert main(["align", *arguments, *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert other != "b" or lines.pop(0).endswith("/b: skipped 1 files that are not feature files: notes.txt")
        assert "30 samples: 4 layers of" in lines[0] and lines[1].split() == list(maps)  # 2 before 10
        assert lines[2].split() == ["blocks.0", *(f"{stats.cka_debiased:.4f}" for stats in wanted.values())]
        assert lines[5].split() == ["dead", "-", "-", "-"] and len(lines) == 8
        assert lines[6].startswith("  dead, blocks.0 (and 2 more pairs): debiased CKA")  # one reason, once
        written = json.loads((tmp_path / "o.json").read_text())
        assert written["layers_a"] == [*maps, "dead"] and written["layers_b"] == list(maps)
        assert written["cka_linear_debiased"][3] == [None] * 3 and len(written["undefined"]) == 3
        assert "layers of a.npz" in (tmp_path / "maps" / "heat.svg").read_text()


def test_align_errors_name_the_file(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((4, 2), np.float32))
    np.save(tmp_path / "short.npy", np.zeros((3, 2), np.float32))
    np.save(tmp_path / "ints.npy", np.zeros((4, 2), np.int64))
    np.savez(tmp_path / "two.npz", p=np.zeros((4, 2)), q=np.zeros((4, 2)))
    (tmp_path / "broken.npy").write_bytes(b"no array")
    (tmp_path / "x.txt").write_text("")
    for name, message in (
        ("short.npy", "4 rows"), ("ints.npy", "float matrix (samples, width), got (4, 2) int64"),
        ("two.npz", "contains layers, "), ("broken.npy", "cannot be read"), ("x.txt", ".npy, .npz, .safetensors"),
        ("absent.npy", "does not exist"),
    ):  # fmt: skip
        assert main(["align", str(tmp_path / "a.npy"), str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and name in error and message in error, error
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    np.save(tmp_path / "one" / "x.npy", np.zeros((4, 2), np.float32))
    np.savez(tmp_path / "uneven.npz", p=np.zeros((4, 2)), q=np.zeros((5, 2)))
    for arguments, message in (
        (("a.npy", "empty"), "contains no feature files"), (("a.npy", "one"), "contains layers, "),
        (("uneven.npz", "two.npz"), "must have the same number of rows, got {'p': 4, 'q': 5}"),
        (("a.npy", "a.npy", "--out", "x.svg"), "--out draws layers, but"),
        (("two.npz", "one", "--out", "x.pdf"), "heat maps must be .svg or .png"),
    ):  # fmt: skip
        paths = [name if name == "--out" else str(tmp_path / name) for name in arguments]
        assert main(["align", *paths]) == 1
        assert message in capsys.readouterr().err


def test_train_and_report_end_to_end(tmp_path, capsys):
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
    capsys.readouterr()
    assert main(["align", *(str(out / "features" / f"{name}.safetensors") for name in ("dcl", "identity"))]) == 0
    assert capsys.readouterr().out.count(" 1.000000") == 12


def test_views_draws_every_renderer_and_names_those_that_cannot_be_used(tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    arguments = ["--data", "digits", "--out", str(out), "--samples", "3", "--size", "12"]
    assert main(["views", *arguments, "--renderers", "triton,torchvision"]) == 0
    text = capsys.readouterr().out
    assert "views of 3 training images, preset characters at 12 pixels (--preset, --size), seed 0, epoch 0" in text
    assert "torchvision  the reference" in text and "triton       differs by 0.0" in text
    pixels = np.asarray(Image.open(out).convert("L"))
    assert pixels.shape[0] > 400 and pixels.std() > 20
    assert main(["views", *arguments, "--renderers", "torchvision", "--seed", "1"]) == 0
    assert not np.array_equal(np.asarray(Image.open(out).convert("L")), pixels)
    capsys.readouterr()
    for name in "ab":
        (tmp_path / "tree" / name).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (20 + k, 30), "red").save(tmp_path / "tree" / name / f"{k}.png")
    arguments[1] = f"folder:{tmp_path / 'tree'}"
    assert main(["views", *arguments, "--renderers", "triton"]) == 0
    assert "triton       not available: images must all have the same size" in capsys.readouterr().out
    (tmp_path / "tree" / "a" / "1.png").write_bytes(b"no image")
    assert main(["views", *arguments, "--renderers", "triton"]) == 1
    assert "a/1.png" in capsys.readouterr().err
    arguments[5:6] = ["2", "--corrupt", "skip"]
    assert main(["views", *arguments, "--renderers", "triton"]) == 0
    text = capsys.readouterr().out
    assert "skipped: " in text and "tree: views of 2 training images" in text
    for change, message in (
        (["--samples", "5"], "--samples must be in [1, 3] (training images), got 5"),
        (["--renderers", "dal"], "'dali'"),
        (["--out", "grid"], "grid must end in .png"), (["--out", "grid.xyz"], "grid.xyz must end in .png"),
    ):  # fmt: skip
        assert main(["views", *arguments, *change]) == 1
        assert message in capsys.readouterr().err


def test_the_difference_in_a_contact_sheet_has_the_sign_of_the_largest_channel():
    x = torch.tensor([[[[10.0, 20, 30], [5, 5, 5]]]])
    y = torch.tensor([[[[11.0, 23, 29], [5, 1, 7]]]])
    assert _difference(x, y).tolist() == [[[-3.0, 4.0]]]


def test_errors_are_one_line_and_status_one(tmp_path, capsys):
    assert main(["train", str(tmp_path / "absent.toml"), "--out", str(tmp_path / "o")]) == 1
    assert capsys.readouterr().err.startswith("error: cannot read config")
    assert main(["report", str(tmp_path)]) == 1
    assert "run.json" in capsys.readouterr().err


def test_doctor_passes_here_and_fails_on_wrong_numbers(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "losses, cpu" in text and "FAILED" not in text and torch.__version__.partition("+")[0] in text
    from fastcl.rowstats import chunked

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # what follows is not about kernels
    monkeypatch.setattr(chunked, "WHOLE", 0)  # few rows in tiles too
    monkeypatch.setattr(chunked, "EXP_LIMIT", 0.0)  # still right: the other path
    assert main(["doctor"]) == 0
    capsys.readouterr()
    right = chunked._add_exponentials
    monkeypatch.setattr(chunked, "_add_exponentials", lambda total, s, *rest: right(total, s * 1.001, *rest))
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "FAILED: ArithmeticError" in captured.out and "self-test failed" in captured.err


def test_options_are_not_shortened(capsys):
    with pytest.raises(SystemExit):
        main(["report", "x", "--ou", "y"])
    assert "unrecognized arguments: --ou y" in capsys.readouterr().err
