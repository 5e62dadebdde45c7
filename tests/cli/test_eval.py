"""fastcl eval as a user meets it: of a run, of files, stopped and resumed, and in the report."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from small_runs import page_of, tables_of, text_of
from tiny_run import tiny_config

from fastcl import FastclError
from fastcl.cli import probing
from fastcl.cli.feature_files import read_labelled
from fastcl.cli.main import main
from fastcl.evaluation import evaluate
from fastcl.evaluation.record import read_record
from fastcl.report.evaluations import FEW_SHOTS, about, read_evaluations
from fastcl.report.run import load_run
from fastcl.train import Lockstep
from fastcl.train.frozen_run import open_frozen
from fastcl.train.run_folder.identity import claim_folder

QUICK = ["--shots", "1,3", "--repeats", "2", "--k", "1,4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of three models."""
    out = tmp_path_factory.mktemp("eval") / "run"
    strict = torch.are_deterministic_algorithms_enabled()
    Lockstep(tiny_config(train__epochs=2, train__models=["dcl", "ce"], train__controls=["identity"]), out).run()
    torch.use_deterministic_algorithms(strict)
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def probed(monkeypatch):
    """The probe of every measurement."""
    seen = []
    plain = probing.with_probe

    def counted(evaluation, name, data, settings):
        seen.append(name)
        return plain(evaluation, name, data, settings)

    monkeypatch.setattr(probing, "with_probe", counted)
    return seen


def evaluated(run) -> dict:
    return json.loads((run / "evaluation.json").read_text())["models"]


def test_every_model_of_a_run_is_evaluated_on_its_own_features(run, capsys):
    assert main(["eval", str(run), *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "epoch 2: 3 models" in printed and "fastcl report" in printed
    frozen = open_frozen(run)
    features, data = frozen.features(["ce", "dcl"]), frozen.inputs.data
    for model, (train, test) in features.items():
        kept = safetensors.torch.load_file(run / "features" / f"{model}.safetensors")["features"]
        assert torch.equal(test, kept)  # bit for bit those of the end of training
        labels = [torch.from_numpy(split.labels) for split in (data.train, data.test)]
        ids = torch.from_numpy(data.train.ids)
        settings = probing.ProbeSettings(k=(1, 4), shots=(1, 3), repeats=2)
        want = evaluate(train, labels[0], test, labels[1], ids=ids, settings=settings)
        assert read_record(run / "evaluation.json")[model].evaluation == want
    found = evaluated(run)
    assert list(found) == ["dcl", "ce", "identity"] and found["dcl"]["evaluation"] == found["identity"]["evaluation"]
    assert found["ce"]["epoch"] == 2 and found["ce"]["settings"]["few_shot"] == {
        "shots": [1, 3], "repeats": 2, "seed": 0
    }  # fmt: skip
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {row["model"]: row for row in metrics if row["epoch"] == 2 and "model" in row}
    assert all(last[m]["ncc_test"] == found[m]["evaluation"]["ncc"]["test"] for m in found)
    line = next(line for line in printed.splitlines() if line.startswith("nearest class centre"))
    assert line.split()[3:] == [f"{last[m]['ncc_train']:.4f}" for m in found]


def test_what_is_there_is_not_measured_again(run, probed):
    main(["eval", str(run), *QUICK, "--probes", "ncc,knn"])
    assert probed == ["ncc", "knn"] * 3
    before = (run / "evaluation.json").read_bytes()
    main(["eval", str(run), *QUICK, "--probes", "ncc,knn"])
    assert len(probed) == 6 and (run / "evaluation.json").read_bytes() == before
    main(["eval", str(run), "--probes", "ncc,knn", "--k", "2"])
    assert probed[6:] == ["knn"] * 3 and [one["k"] for one in evaluated(run)["ce"]["evaluation"]["knn"]] == [2, 2]
    weights = run / "weights" / "ce.safetensors"
    tensors = safetensors.torch.load_file(weights)
    name = next(name for name in tensors if name.startswith("encoder.") and name.endswith("weight"))
    safetensors.torch.save_file(tensors | {name: -tensors[name]}, weights)
    main(["eval", str(run), "--probes", "ncc"])
    assert probed[9:] == ["ncc"]  # the others' features are the same
    assert evaluated(run)["ce"]["evaluation"]["knn"] == [] and evaluated(run)["dcl"]["evaluation"]["knn"]


def test_a_stopped_evaluation_goes_on(run, probed, monkeypatch):
    plain, calls = probing.write_record, []

    def stopped(path, models):
        plain(path, models)
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(probing, "write_record", stopped)
    assert main(["eval", str(run), *QUICK, "--probes", "ncc,knn"]) == 130
    assert probed == ["ncc", "knn", "ncc"] and list(evaluated(run)) == ["dcl", "ce"]
    assert main(["eval", str(run), *QUICK, "--probes", "ncc,knn"]) == 0
    assert probed[3:] == ["knn", "ncc", "knn"] and list(evaluated(run)) == ["dcl", "ce", "identity"]


def test_an_unfinished_run_is_evaluated_at_its_last_checkpoint(run, capsys):
    main(["eval", str(run), "--probes", "ncc"])
    whole = evaluated(run)
    (run / "weights" / "ce.safetensors").unlink()
    max((run / "checkpoints").iterdir()).unlink()
    main(["eval", str(run), "--probes", "ncc"])
    assert "epoch 1: 3 models" in capsys.readouterr().out
    part = evaluated(run)
    assert part["dcl"]["epoch"] == 1 and part["dcl"]["features"] != whole["dcl"]["features"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    want = next(row for row in rows if row["epoch"] == 1 and row.get("model") == "ce")
    assert part["ce"]["evaluation"]["ncc"]["test"] == want["ncc_test"]
    said = about(load_run(run))
    assert "as they were after 1 epoch;" in said and "The run has gone on since then" in said


def test_the_report_shows_what_was_measured(run):
    assert read_evaluations(load_run(run)) == {}  # and so the page has no such section
    main(["eval", str(run), *QUICK])
    page = page_of(run)
    table = next(table for table in tables_of(page) if table.get("probe") == ["dcl", "ce", "identity"])
    found = evaluated(run)
    assert table["linear probe"] == [f"{one['evaluation']['linear']['test']:.4f}" for one in found.values()]
    spread = found["ce"]["evaluation"]["few_shot"][1]["test"]
    assert table["3 shots, nearest centre"][1] == f"{spread['mean']:.4f} ± {spread['interval']:.3f}"
    assert "Evaluation of frozen features" in text_of(page) and "Accuracy with few shots" in text_of(page)
    main(["eval", str(run), "--probes", "ncc", "--json", str(run.parent / "other.json")])
    (run / "evaluation.json").write_bytes((run.parent / "other.json").read_bytes())
    assert read_evaluations(load_run(run)) and not FEW_SHOTS.shown(load_run(run))
    (run / "evaluation.json").write_text('{"version": 1, "models": {"ce": {"features": 3}}}')
    with pytest.raises(FastclError, match=r"evaluation.json: models.ce.features must be"):
        read_evaluations(load_run(run))


def files(folder, ending, n=60, shift=1.0, labels=None):
    """Two feature files of three clusters."""
    rng = np.random.default_rng(0)
    paths = []
    for split in ("train", "test"):
        y = np.arange(n) % 3 if labels is None else labels
        x = (rng.normal(size=(n, 4)) + shift * y[:, None]).astype(np.float32)
        arrays = {"features": x, "labels": y.astype(np.int32), "names": np.full(n, 2.5)}
        paths.append(folder / f"{split}.{ending}")
        if ending == "npz":
            np.savez(paths[-1], **arrays, ids=np.arange(n)[::-1])
        else:
            safetensors.torch.save_file({k: torch.from_numpy(v) for k, v in arrays.items()}, paths[-1])
    return paths


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_files_give_what_the_function_gives(ending, tmp_path, capsys, probed):
    paths, out = files(tmp_path, ending), tmp_path / "o.json"
    command = ["eval", "--features", *map(str, paths), *QUICK, "--json", str(out)]
    assert main(command) == 0
    (x, y, ids), (x_test, y_test, _) = map(read_labelled, paths)
    assert y.dtype == torch.int64 and (ids is None) == (ending == "safetensors")
    settings = probing.ProbeSettings(k=(1, 4), shots=(1, 3), repeats=2)
    assert read_record(out)["features"].evaluation == evaluate(x, y, x_test, y_test, ids=ids, settings=settings)
    table = capsys.readouterr().out
    assert "accuracy on the test split" in table and "3 shots, linear probe" in table and len(probed) == 4
    assert main(command) == 0 and len(probed) == 4
    assert capsys.readouterr().out == table
    files(tmp_path, ending, shift=2.0)
    assert main(command) == 0 and len(probed) == 8  # other features
    assert main(command[:-2]) == 0  # no file: all is measured, and printed only
    assert len(probed) == 12


def test_labels_that_were_not_seen_are_said(tmp_path, capsys):
    train, test = files(tmp_path, "npz")
    (tmp_path / "more").mkdir()
    _, more = files(tmp_path / "more", "npz", labels=np.arange(60) % 5)
    assert main(["eval", "--features", str(train), str(more), "--probes", "ncc"]) == 0
    said = "features: 24 of 60 test rows have labels that no training row has (3, 4); every probe counts them as wrong."
    assert said in capsys.readouterr().out


def test_errors_name_what_is_wrong(run, tmp_path, capsys):
    train, test = files(tmp_path, "npz")
    one = tmp_path / "one.npz"
    np.savez(one, features=np.ones((6, 4)), labels=np.zeros(6, int))
    wrong = {
        "short.npz": {"features": np.ones((6, 4)), "labels": np.arange(5)},
        "float.npz": {"features": np.ones((6, 4)), "labels": np.ones(6)},
        "none.npz": {"features": np.ones((6, 4))},
        "wide.npz": {"features": np.ones((6, 5)), "labels": np.arange(6) % 3},
    }
    for name, arrays in wrong.items():
        np.savez(tmp_path / name, **arrays)
    np.save(tmp_path / "bare.npy", np.ones((6, 4)))
    both = ["--features", str(train), str(test)]

    def against(name):
        return ["--features", str(train), str(tmp_path / name)]

    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "sweep.json").write_text("{}", encoding="utf-8")
    cases = {
        "is the folder of a sweep; its runs are the folders in": ([str(sweep)],),
        "give the folder of a run, or --features TRAIN TEST": ([], [str(run), *both]),
        "the folder of a run?": ([str(tmp_path)],),
        "must have the same number of rows, got {'features': 6, 'labels': 5}": (against("short.npz"),),
        "'labels' must be (samples,) integers (int8, int16": (against("float.npz"),),
        "must contain the arrays 'features' and 'labels'": (against("none.npz"), against("bare.npy")),
        "must have the same width, got 5 and 4": (against("wide.npz"),),
        "train_labels are all 0": (["--features", str(one), str(test)],),
        "bare.npy is not a folder; give that of a run": ([str(tmp_path / "bare.npy")],),
        "unknown probe 'nnc'; did you mean 'ncc'?": ([*both, "--probes", "nnc"],),
        "k must be at most 59": ([*both, "--k", "60"],),
        "k must be at most 432": ([str(run), "--k", "433"],),
        "seed must be an integer in [0, 2**32), got -1": ([str(run), "--seed", "-1"],),
        "repeats must be a positive integer, got 0": ([str(run), "--repeats", "0"],),
        "shots must be at most 20, the number of training rows of class 0, got 21": ([*both, "--shots", "21"],),
        "is an input or another output": ([*both, "--json", str(train)], [str(run), "--json", str(run / "run.json")]),
        "looks like a feature file": ([*both, "--json", str(tmp_path / "x.npz")],),
        "--set is for the data of a run": ([*both, "--set", "data.source=digits"],),
        "only data.source, data.root": ([str(run), "--set", "train.epochs=3"],),
    }  # fmt: skip
    for message, commands in cases.items():
        for arguments in commands:
            assert main(["eval", *arguments]) == 1, arguments
            assert message in capsys.readouterr().err, arguments
    with pytest.raises(SystemExit):
        main(["eval", *both, "--k", "1,x"])
    assert "must be integers separated by commas, got '1,x'" in capsys.readouterr().err
    np.savez(tmp_path / "nan.npz", features=np.full((6, 4), np.nan), labels=np.arange(6) % 3)
    assert main(["eval", *against("nan.npz")]) == 1
    assert "features are not finite: first in row 0" in capsys.readouterr().err


def test_another_run_in_the_folder_has_no_evaluation(run):
    """One of an untrained run, of which the folder had only the initial weights, would be of other models."""
    main(["eval", str(run), "--probes", "ncc"])
    keep = {"run.json", "evaluation.json"}
    for path in run.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    claim_folder(run, json.loads((run / "run.json").read_text()))
    assert (run / "evaluation.json").is_file()
    claim_folder(run, {"config": {}, "seed": 1})
    assert not (run / "evaluation.json").exists()


def test_a_run_without_its_images_or_weights_is_refused(run, capsys):
    described = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(described | {"data": described["data"] | {"train": 7}}))
    assert main(["eval", str(run)]) == 1
    assert "the images are not those of" in capsys.readouterr().err
    (run / "run.json").write_text(json.dumps(described))
    (run / "weights" / "ce.safetensors").write_bytes((run / "weights" / "dcl.safetensors").read_bytes())
    assert main(["eval", str(run)]) == 1
    assert "ce.safetensors does not hold the weights of 'ce'" in capsys.readouterr().err
    (run / "weights" / "ce.safetensors").unlink()
    shutil.rmtree(run / "checkpoints")
    assert main(["eval", str(run)]) == 1
    assert "has neither the weights of all its models nor a checkpoint" in capsys.readouterr().err
