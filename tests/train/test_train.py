"""The lockstep trainer in one process: what it writes, what its controls prove, and what it refuses."""

import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_run import TABLES, tiny_config

import fastcl
from fastcl import FastclError
from fastcl.train import Lockstep, parse_config
from fastcl.train.measures.evaluate import encode
from fastcl.train.models import STEP_VALUES, learning_rate, make_twins
from fastcl.train.run_folder.records import locked
from fastcl.train.step import PAIR_VALUES

PAIR_KEYS = ["cka", "cka_debiased", "cka_cosine", "rsa", "drift", "rho", "cka_bound", "r", "rsa_bound", "weight_gap"]


def _records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run: its object and its folder."""
    out = tmp_path_factory.mktemp("run") / "tiny"
    run = Lockstep(tiny_config(), out)
    run.run()
    return run, out


@pytest.fixture(scope="module")
def metrics(finished):
    return _records(finished[1] / "metrics.jsonl")


def test_models_start_equal_and_measure_as_equal(metrics):
    start = [r for r in metrics if r["epoch"] == 0 and "pair" in r]
    assert len(start) == 10
    for r in start:
        ones, zeros = ("cka", "cka_debiased", "cka_cosine", "rsa", "cka_bound", "rsa_bound"), ("drift", "rho", "r")
        assert all(r[key] == 1 for key in ones) and all(r[key] == 0 for key in (*zeros, "weight_gap")), r


def test_the_identity_twin_stays_bit_identical(finished, metrics):
    networks = {t.name: t.network.state_dict() for t in finished[0].twins}
    assert all(torch.equal(v, networks["identity"][k]) for k, v in networks["dcl"].items())
    for r in metrics:
        if r.get("pair") == ["dcl", "identity"]:
            assert (r["cka"], r["cka_debiased"], r["rsa"], r["weight_gap"]) == (1.0, 1.0, 1.0, 0.0)


def test_other_objectives_and_other_views_part_from_the_reference(metrics):
    for name in ("nscl", "ce", "reseeded"):
        (last,) = [r for r in metrics if r.get("pair") == ["dcl", name] and r["epoch"] == 3]
        assert 0 < last["weight_gap"] and last["cka"] < 1 and last["rsa"] < 1, last


def test_records_have_the_documented_form(finished, metrics):
    names = [t.name for t in finished[0].twins]
    assert names == ["dcl", "nscl", "ce", "identity", "reseeded"]
    for epoch in range(4):
        here = [r for r in metrics if r["epoch"] == epoch]
        assert [r["model"] for r in here if "model" in r] == names
        assert sum("pair" in r for r in here) == 10
        for r in here:
            if "model" in r:
                assert set(r) == {"epoch", "model", *STEP_VALUES, "ncc_train", "ncc_test", "cdnv", "cdnv_directional"}
                assert (r["loss"] is None) == (epoch == 0)
                assert 0 <= r["ncc_test"] <= 1 and r["cdnv"] > 0
            else:
                assert set(r) == {"epoch", "pair", *PAIR_KEYS}
                assert r["cka_cosine"] >= r["cka_bound"] >= 0 and r["rsa"] >= r["rsa_bound"] >= -1


def test_recorded_measures_are_those_of_the_encoder_s_outputs(finished, metrics):
    run, out = finished
    h = {n: safetensors.torch.load_file(out / "features" / f"{n}.safetensors")["features"] for n in ("dcl", "ce")}
    unit = {n: torch.nn.functional.normalize(v.double()) for n, v in h.items()}
    below = torch.ones(len(h["ce"]), len(h["ce"])).tril(-1).bool()
    cosines = torch.stack([(u @ u.T)[below] for u in unit.values()])
    (pair,) = [r for r in metrics if r.get("pair") == ["dcl", "ce"] and r["epoch"] == 3]
    assert pair["rsa"] == pytest.approx(torch.corrcoef(cosines)[0, 1].item(), abs=2e-6)
    k, other = (u @ u.T for u in unit.values())
    centred = [m - m.mean(0) - m.mean(1, keepdim=True) + m.mean() for m in (k, other)]
    assert pair["drift"] == pytest.approx((k - other).norm().item(), rel=1e-5)
    cka = torch.cosine_similarity(*(c.flatten() for c in centred), 0).item()
    assert pair["cka_cosine"] == pytest.approx(cka, rel=1e-5)
    assert pair["rho"] == pytest.approx(((centred[0] - centred[1]).norm() / centred[0].norm()).item(), rel=1e-5)
    train = encode(run.twins, run.inputs.train)["ce"]
    labels = torch.from_numpy(run.data.train.labels)
    centres = torch.stack([train[labels == c].mean(0) for c in range(3)])
    nearest = torch.cdist(h["ce"], centres).argmin(1)
    (ce,) = [r for r in metrics if r.get("model") == "ce" and r["epoch"] == 3]
    assert ce["ncc_test"] == (nearest == torch.from_numpy(run.data.test.labels)).double().mean().item()


def test_the_head_reads_unit_rows(finished):
    (ce,) = [t for t in finished[0].twins if t.name == "ce"]
    z = torch.randn(5, 8)
    assert torch.allclose(ce.network.logits(z), ce.network.logits(100 * z), atol=1e-6)


def test_step_records_and_their_epoch_means(finished, metrics):
    steps = _records(finished[1] / "steps.jsonl")
    total = len(finished[0].loader)
    assert [r["step"] for r in steps if r["model"] == "dcl"] == list(range(3 * total))
    for r in steps:
        assert r["loss_gap"] == pytest.approx(r["dcl_loss"] - r["nscl_loss"], abs=1e-6)
        assert r["loss_gap"] >= 0 and 0 < r["same_class_mass"] < 1
        if r["model"] in ("dcl", "nscl"):
            assert r["loss"] == r[f"{r['model']}_loss"]
    for name in ("nscl", "ce"):
        mean = np.mean([r["loss"] for r in steps if r["model"] == name and r["epoch"] == 1])
        (recorded,) = [r["loss"] for r in metrics if r.get("model") == name and r["epoch"] == 2]
        assert recorded == pytest.approx(mean, rel=1e-12)


def test_pair_records(finished):
    rows, total = _records(finished[1] / "pairs.jsonl"), len(finished[0].loader)
    assert [(r["step"], r["epoch"]) for r in rows] == [(s, s // total) for s in range(3 * total)]
    for r in rows:
        assert list(r) == ["step", "epoch", "pair", *PAIR_VALUES, "lr"] and r["pair"] == ["dcl", "nscl"]
        assert r["lr"] == learning_rate(finished[0].config, r["step"], total)
    assert [rows[0][name] for name in PAIR_VALUES] == [0.0, 1.0, 1.0, 1.0]
    assert all(r["drift"] > 0 and r["cka"] < 1 and r["rsa"] < 1 for r in rows[1:])


def test_first_step_is_the_loss_of_the_plan_s_views(finished, tmp_path):
    run = Lockstep(tiny_config(), tmp_path)
    positions = run.loader.batch(0, 0)
    views = run.loader.views(positions, 0)[:2]
    network = run.twins[0].network.train()
    z1, z2 = network(torch.cat(views)).chunk(2)
    (first,) = [r for r in _records(finished[1] / "steps.jsonl") if r["step"] == 0 and r["model"] == "nscl"]
    labels = torch.from_numpy(run.data.train.labels[positions])
    assert first["nscl_loss"] == pytest.approx(fastcl.nscl_loss(z1, z2, labels, 0.5).item(), rel=1e-6)
    assert first["dcl_loss"] == pytest.approx(fastcl.dcl_loss(z1, z2, 0.5).item(), rel=1e-6)


def test_run_json_tells_what_ran(finished):
    described = json.loads((finished[1] / "run.json").read_text())
    assert described["seed"] == 7 and described["reference"] == "dcl" and described["renderer"] == "torchvision"
    assert described["versions"]["torch"] == torch.__version__
    sizes = {"train": len(finished[0].data.train), "test": len(finished[0].data.test)}
    largest = np.bincount(finished[0].data.train.labels).max() / sizes["train"]
    data = {"source": "digits", "classes": 3, "channels": 1, "size": 8, "largest_class": largest}
    assert described["data"] == data | sizes
    text = (finished[1] / "metrics.jsonl").read_text() + (finished[1] / "run.json").read_text()
    assert "seconds" not in text


def test_learning_rate_warms_up_and_falls_to_zero():
    config = tiny_config(optim__lr=0.8, optim__warmup_epochs=2, train__epochs=10)
    rates = [learning_rate(config, s, 5) for s in range(51)]
    assert rates[:10] == pytest.approx([0.08 * k for k in range(1, 11)])
    assert rates[10] == 0.8 and rates[30] == pytest.approx(0.4)  # half way between the end of the warm-up and the end
    assert rates[50] == pytest.approx(0.0, abs=1e-12) and rates[49] > 0  # step 50 is the first that is not made
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert learning_rate(tiny_config(optim__lr=0.8, optim__warmup_epochs=0, train__epochs=1), 0, 1) == 0.8


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_every_optimiser_learns(name, tmp_path):
    lr = {"lars": 2.0, "sgd": 0.1, "adamw": 0.003}[name]
    config = tiny_config(optim__name=name, optim__lr=lr, train__models=["supcon"], train__controls=[], train__epochs=4)
    run = Lockstep(config, tmp_path)
    run.run()
    losses = [r["loss"] for r in _records(tmp_path / "steps.jsonl")]
    assert losses[-1] < losses[0]
    assert not any("pair" in r for r in _records(tmp_path / "metrics.jsonl"))
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_complete(tmp_path):
    config = tiny_config(optim__lr=1e12, optim__warmup_epochs=0, train__models=["ce", "dcl"], train__controls=[])
    with pytest.raises(FastclError, match=r"of model '(ce|dcl)' is (nan|inf) at step \d+ \(epoch \d"):
        Lockstep(config, tmp_path).run()
    assert {r["epoch"] for r in _records(tmp_path / "metrics.jsonl")} == {0}
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_folder_with_another_run_is_left_alone(finished):
    before = (finished[1] / "run.json").read_bytes()
    with pytest.raises(FastclError, match=r"another run.*train.temperature \(0.5 there, 0.1 here\)"):
        Lockstep(tiny_config(train__temperature=0.1), finished[1])
    assert (finished[1] / "run.json").read_bytes() == before


def test_a_folder_in_use_is_refused(finished):
    with locked(finished[1]), pytest.raises(FastclError, match=f"another process is training in {finished[1]}"):
        finished[0].run()


def test_dropped_paths_are_the_same_for_all_twins(tmp_path):
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "drop_path_rate": 0.5}
    config = tiny_config(model__name="vit_tiny_patch16_224", model__options=options, model__cifar_stem=False,
                         train__models=["dcl"], train__controls=["identity"], train__epochs=1)  # fmt: skip
    run = Lockstep(config, tmp_path)
    run.run()
    a, b = (t.network.state_dict() for t in run.twins)
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FastclError, match=rf"{tmp_path / 'file' / 'run'} cannot be written \(Not a directory\)"):
        Lockstep(tiny_config(), tmp_path / "file" / "run")


def test_twins_share_their_weights_and_only_ce_has_a_head():
    config = tiny_config(train__models=["dcl", "supcon", "ce"])
    twins = {t.name: t for t in make_twins(config, 1, 3, torch.device("cpu"))}
    reference = twins["dcl"].network.state_dict()
    for twin in twins.values():
        state = twin.network.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in reference.items())
        assert (twin.network.head is not None) == (twin.objective == "ce")
    assert twins["reseeded"].objective == "dcl" and twins["reseeded"].reseeded
    other = make_twins(tiny_config(train__seed=8), 1, 3, torch.device("cpu"))[0].network.state_dict()
    assert not torch.equal(other["projector.0.weight"], reference["projector.0.weight"])


BAD = [
    (("train", "epcohs", 3), r"unknown key 'train.epcohs'; did you mean 'train.epochs'"),
    (("views", "szie", 3), r"views.szie.*did you mean '(views\.)?size'"),
    (("train", "epochs", "three"), "train.epochs must be an integer, got 'three'"),
    (("train", "epochs", True), "train.epochs must be an integer, got True"),
    (("train", "epochs", 0), "train.epochs must be positive, got 0"),
    (("train", "batch_size", 1), "train.batch_size must be at least 2, got 1"),
    (("train", "temperature", 0.0), "train.temperature must be a positive number .*, got 0.0"),
    (("train", "temperature", math.nan), "train.temperature must be finite, got nan"),
    (("views", "rotation", math.inf), "views.rotation must be finite, got inf"),
    (("optim", "momentum", -1.0), "optim.momentum must not be negative, got -1.0"),
    (("views", "preset", ["cifar"]), "views.preset must be a name"),
    (("train", "models", "dcl"), "train.models must be a list"),
    (("views", "scale", [0.1]), "views.scale must be a list"),
    (("views", "preset", "cifra"), "unknown view preset 'cifra'"),
    (("train", "seed", -1), r"train.seed must be in \[0, 2\*\*32\), got -1"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_settings(change, message):
    table, key, value = change
    tables = {name: dict(t) for name, t in TABLES.items()}
    tables[table][key] = value
    with pytest.raises(FastclError, match=message):
        parse_config(tables)


BAD_RUNS = [
    (dict(train__models=["dcl", "nsl"]), "train.models: unknown name 'nsl'.*did you mean 'nscl'"),
    (dict(train__models=["dcl", "dcl"]), "train.models must not repeat a name, got dcl, dcl"),
    (dict(train__models=[]), "train.models is empty"),
    (dict(train__controls=["twin"]), "train.controls: unknown name 'twin'"),
    (dict(train__batch_size=10_000), r"train.batch_size must be in \[1, \d+\] \(training images\), got 10000"),
    (dict(train__device="gpu"), "train.device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
    (dict(optim__name="adam"), "optim.name.*'adam'"),
    (dict(model__name="resnet19"), "timm cannot create 'resnet19'"),
    (dict(model__options={"layrs": 1}), "timm cannot create 'resnet18' with model.options = .*layrs"),
    (
        dict(model__name="mobilenetv3_small_050", model__options={"global_pool": ""}, model__cifar_stem=False),
        "must return one vector per image",
    ),
    (dict(model__name="vit_tiny_patch16_224", model__options={}, model__cifar_stem=False), "images of 8 x 8 pixels"),
    (dict(data__classes=11), "11"),
    (dict(data__source="digit"), "digit"),
    (dict(data__renderer="dally"), "data.renderer: unknown renderer 'dally'.*did you mean 'dali'"),
    (dict(data__corrupt="ignore"), "data.corrupt must be 'stop' or 'skip', got 'ignore'"),
    (dict(data__workers=-1), "data.workers must be in.*got -1"),
]


@pytest.mark.parametrize("changes, message", BAD_RUNS)
def test_runs_that_cannot_be(changes, message, tmp_path):
    with pytest.raises(FastclError, match=message):
        Lockstep(tiny_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
