"""`fastcl compare`: rows, bands, the choice of the published run, what differs, and errors."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from published_runs import PUBLISHED, preset_run
from small_runs import make_run

from fastcl.cli.main import main
from fastcl.errors import FastclError
from fastcl.paper import compare, targets

NSCL = targets()["cifar100"].curve("cka", "nscl", "train").points


def shifted(*shifts: float, model: str = "nscl") -> dict:
    """CKA above the published one at epochs 0, 10, 20, ...; RSA is the published one."""
    cka, rsa = (targets()["cifar100"].curve(measure, model, "train").points for measure in ("cka", "rsa"))
    return {10 * k: (cka[10 * k] + shift, rsa[10 * k]) for k, shift in enumerate(shifts)}


@pytest.fixture
def run(tmp_path) -> Path:
    """With the published losses: at epoch 10 below the band, at 20 within, at 30 above, at 35 between two."""
    curves = {
        "nscl_with_positive": shifted(0, -0.0035, 0.032, 0.034) | {35: (0.95, None), 1201: (0.7, 0.0)},
        "ce": shifted(0, -0.0025, model="ce"),
    }
    return preset_run(tmp_path / "run", "cifar100", curves, PUBLISHED)


def test_rows_differences_and_bands(run):
    sides = compare(run)
    assert sides.target.name == "cifar100" and sides.cl == "ntxent"
    assert sides.models == {"nscl": "nscl_with_positive", "supcon": "supcon", "ce": "ce"}
    rows = {(row.measure, row.model, row.epoch): row for row in sides.rows}
    assert [rows["cka", "nscl", e].place for e in (0, 10, 20, 30)] == ["within", "below", "within", "above"]
    ten = rows["cka", "nscl", 10]
    assert ten.paper == NSCL[10] and ten.difference == pytest.approx(-0.0035) and not ten.interpolated
    assert (ten.low, ten.high) == pytest.approx((NSCL[10] - 0.003, NSCL[10] + 0.033))
    between = rows["cka", "nscl", 35]
    assert between.interpolated and between.paper == pytest.approx((NSCL[30] + NSCL[40]) / 2)
    after = rows["cka", "nscl", 1201]
    assert after.paper is None and after.place is None and after.difference is None and after.ours == 0.7
    assert rows["rsa", "nscl", 1201].ours == 0.0
    undefined = rows["rsa", "nscl", 35]
    assert undefined.ours is None and undefined.place is None and undefined.paper is not None
    assert rows["rsa", "ce", 10].difference == 0 and rows["cka", "ce", 10].place == "within"


def test_heat_maps_are_compared_on_held_out_images(tmp_path):
    curves = {"nscl": {10: (0.77, None), 20: (0.91, None)}}
    run = preset_run(tmp_path / "run", "mini-imagenet", curves, "data.classes=50", classes=50)
    sides = compare(run)
    assert sides.target.name == "mini-imagenet-50-classes" and {c.split for c in sides.curves} == {"test"}
    low, high = sides.rows
    assert (low.low, low.high) == pytest.approx((0.775, 0.815)) and low.place == "below"
    assert high.place == "above" and high.high == pytest.approx(0.907)
    assert "Published: held-out images" in sides.basis() and "the band reaches" not in sides.basis()


@pytest.mark.parametrize(
    "preset, overrides, data, name",
    (
        ("cifar100", (), {}, "cifar100"),
        ("cifar100", ("train.temperature=1.0",), {}, "cifar100-tau-1.0"),
        ("mini-imagenet", ("data.source=folder:images/Mini_ImageNet.zip",), {}, "mini-imagenet"),
        ("tiny-imagenet", (), {"classes": 10}, "tiny-imagenet-10-classes"),
        ("imagenet-1k", ("data.source=torchvision:ImageNet",), {}, "imagenet-1k-1000-classes"),
        ("vit-tiny-imagenet", ("train.temperature=0.5",), {}, "tiny-imagenet-tau-0.5"),
    ),
)
def test_the_target_is_that_of_the_data_and_the_temperature(tmp_path, preset, overrides, data, name):
    run = preset_run(tmp_path / "run", preset, {"nscl": {0: (1.0, 1.0)}}, *overrides, **data)
    assert compare(run).target.name == name


def test_what_differs_is_named(run, tmp_path):
    always = {"precision": "fp32", "LARS": "biases and norms without weight decay and trust ratio"}
    said = {one.what: one.ours for one in compare(run).differences}
    assert said == always | {"schedule": "by steps, a cosine after the warm-up"}
    other = preset_run(
        tmp_path / "other", "vit-cifar100", {"nscl": {0: (1.0, 1.0)}}, "optim.name=adamw", "optim.lr=0.001",
        "train.batch_size=512", "views.size=28", "data.source=folder:photos", "train.precision=bf16",
        source="photos", classes=7,
    )  # fmt: skip
    head = other / "run.json"
    head.write_text(head.read_text().replace('"device": "cpu"', '"device": "NVIDIA H200 x 4 ranks"'))
    said = {one.what: (one.ours, one.published) for one in compare(other, "cifar100").differences}
    assert said["data set"] == ("folder:photos", "cifar100")
    assert said["loss of CL"][1] == "ntxent" and said["loss of NSCL"][1] == "nscl_with_positive"
    assert said["optim.name"] == ('"adamw"', '"lars"') and said["train.batch_size"] == ("512", "1024")
    assert said["views.size"] == ("28", "32") and said["model.name"] == ('"vit_base_patch16_224"', '"resnet50"')
    assert said["train.epochs"] == ("300", "1201") and said["precision"][0] == "bf16" and "LARS" not in said
    assert said["processes"] == ("4, each with batch statistics of its part", "1")
    assert "train.temperature" not in said and "optim.momentum" not in said
    (tmp_path / "run" / "run.json").write_text((run / "run.json").read_text().replace('"joint_views": false, ', ""))
    assert {one.what: one.ours for one in compare(run).differences}["train.joint_views"] == "not recorded"


def test_the_command_prints_a_table_and_writes_its_files(run, tmp_path, capsys):
    figure, numbers = tmp_path / "paper.svg", tmp_path / "paper.json"
    assert main(["compare", str(run), "--out", str(figure), "--json", str(numbers)]) == 0
    said = capsys.readouterr().out
    assert "1201  |    0.7000           not published" in said and "~0.9487" in said and "undefined" in said
    assert "nscl_with_positive: within the band at 1 of 3 published epochs after epoch 0" in said
    assert "10,000 held-out images" in said and "Published: training images" in said
    assert "most likely" in said and "With 3 differences" in said
    assert max(map(len, said.splitlines())) <= 120
    record = json.loads(numbers.read_text())
    assert record["target"] == "cifar100" and len(record["rows"]) == len(compare(run).rows)
    assert record["rows"][1]["place"] == "below" and record["differences"][0]["what"] == "precision"
    first = figure.read_bytes()
    ElementTree.fromstring(first)
    assert b"wrong epoch" not in first and main(["compare", str(run), "--out", str(figure)]) == 0
    assert figure.read_bytes() == first, "the same run gives the same figure"
    assert main(["compare", str(run), "--target", "cifar100-tau-0.1", "--out", str(figure)]) == 0
    drawn = figure.read_text()
    assert "published at a wrong epoch" in drawn
    crosses = set(re.findall(r'<path id="(\w+)" d="M -2.25 2.25 \nL 2.25 -2.25 \nM', drawn))
    count = sum(drawn.count(f'href="#{name}"') for name in crosses)
    assert count == 2 * 3 + 1, "three in each panel, one in the legend"


def test_many_epochs_are_shortened_to_the_published_ones(tmp_path, capsys):
    run = preset_run(tmp_path / "run", "cifar100", {"nscl": {e: (0.9, 0.9) for e in range(60)}})
    assert main(["compare", str(run)]) == 0
    said = capsys.readouterr().out
    assert "and 53 more evaluated epochs" in said and "\n     59  |" in said and "\n     11  |" not in said


def test_the_list_names_every_target(capsys):
    assert main(["compare", "--list"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(targets()) and said[0].split()[:3] == ["cifar100", "Fig.", "2:"]
    assert "mini-imagenet-sqrt-512" in "\n".join(said) and "learning rate 0.02652" in "\n".join(said)


def test_errors_say_what_is_missing(run, tmp_path, capsys):
    def failed(*arguments: object) -> str:
        assert main(["compare", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    assert "--list" in failed() and "did you mean 'mini-imagenet'" in failed(run, "--target", "miniimagenet")
    assert ".svg or .png" in failed(run, "--out", tmp_path / "x.pdf")
    assert "is an input" in failed(run, "--json", run / "metrics.jsonl")
    ten = preset_run(tmp_path / "ten", "cifar10", {"nscl": {0: (1.0, 1.0)}})
    assert "no published curve is of torchvision:CIFAR10 with 10 classes at temperature 0.5" in failed(ten)
    warm = preset_run(tmp_path / "warm", "cifar100", {"nscl": {0: (1.0, 1.0)}}, "train.temperature=0.2")
    assert "cifar100, cifar100-tau-0.1, cifar100-tau-0.5" in failed(warm)
    only = preset_run(tmp_path / "only", "cifar100", {"ce": {0: (1.0, 1.0)}}, 'train.models=["dcl", "ce"]')
    assert "cifar100-tau-0.5 has curves of nscl; the run has ce" in failed(only, "--target", "cifar100-tau-0.5")
    assert compare(only).models == {"ce": "ce"}
    bare = preset_run(tmp_path / "bare", "cifar100", {"ce": {0: (1.0, 1.0)}}, 'train.models=["supcon", "ce"]')
    assert "no such model (ntxent or dcl); its models are supcon, ce" in failed(bare)
    (bare / "metrics.jsonl").write_text("")
    assert "no evaluation has been written yet" in failed(bare)
    assert "is" in failed(tmp_path / "nowhere") and not (tmp_path / "nowhere").exists()


def test_a_run_of_other_data_needs_a_target(tmp_path):
    run = make_run(tmp_path / "run", epochs=2)
    with pytest.raises(FastclError, match="fastcl compare --list shows all"):
        compare(run)
    sides = compare(run, "cifar100-tau-0.5")
    assert [row.paper for row in sides.rows] == [None] * len(sides.rows) != []
    assert {"data set", "loss of CL", "model.name"} <= {one.what for one in sides.differences}
