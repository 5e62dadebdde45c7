"""`fastcl align --models`, and permutation tests and intervals on the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

from fastcl.cli.main import main
from fastcl.data import load
from fastcl.similarity import SIMILARITIES, bootstrap_interval, permutation_test
from fastcl.zoo.encoders import load_encoder
from fastcl.zoo.images import Images, features_of
from fastcl.zoo.names import ModelName

CPU = torch.device("cpu")


class Tiny(nn.Module):
    """Pools an image to 4 x 4 pixels; `fc` is its classifier."""

    pretrained_cfg = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, classifier="fc",
                          interpolation="bilinear")  # fmt: skip

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.last = nn.Linear(48, width)

    def forward(self, x):
        return self.last(self.stem(x))


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Timm has five more models that cost nothing."""
    made = {
        "tiny_6": lambda: Tiny(6), "tiny_9": lambda: Tiny(9), "tiny_7": lambda: Tiny(7),
        "maps": lambda: nn.Sequential(nn.AvgPool2d(2)),
        "fixed": lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, 5)),
    }  # fmt: skip
    known, create = timm.list_models(), timm.create_model

    def created(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no connection.\nat all")
        return made[name]() if name in made else create(name, **options)

    monkeypatch.setattr(timm, "list_models", lambda: [*known, *made])
    monkeypatch.setattr(timm, "create_model", created)


def told(capsys, *arguments):
    assert main(["align", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys, *arguments):
    assert main(["align", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1, error
    return error


def test_doubts_stand_beside_the_similarities(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=generator)
    y = x[:, :3] + torch.randn(30, 3, generator=generator)
    np.save(tmp_path / "a.npy", x)
    np.save(tmp_path / "b.npy", y)
    files = tmp_path / "a.npy", tmp_path / "b.npy"
    more = ("--permutations", 19, "--bootstrap", 30, "--seed", 4, "--neighbours", 5, "--json", tmp_path / "o.json")
    lines = told(capsys, *files, *more)
    assert "95 % intervals from 30 halves" in lines[1] and "19 permutations; seed 4" in lines[1]
    record = json.loads((tmp_path / "o.json").read_text())
    assert list(record["permutations"]) == list(record["bootstrap"]) == list(SIMILARITIES)
    for name, line in zip(SIMILARITIES, lines[2:], strict=False):
        test = permutation_test(x, y, name, repeats=19, seed=4, k=5)
        interval = bootstrap_interval(x, y, name, repeats=30, seed=4, k=5)
        found = record["permutations"][name], record["bootstrap"][name]
        assert record["measures"][name] == pytest.approx(test.value) and found[0]["p_value"] == test.p_value
        assert found[0]["null_quantiles"]["0.95"] == pytest.approx(test.null_quantiles[0.95])
        assert (found[1]["low"], found[1]["high"]) == pytest.approx((interval.low, interval.high))
        assert f"[{interval.low:9.6f}, {interval.high:9.6f}]  p = {test.p_value:.3g} (by chance" in line
    assert record["measures"]["procrustes_distance"] == pytest.approx(2 - 2 * record["measures"]["procrustes"])
    assert "mutual k-NN, cosine, k=5" in lines[8]
    plain = told(capsys, *files)
    assert "[" not in "".join(plain[1:]) and "permutations" not in json.dumps(plain)


def test_what_has_no_interval_says_why_and_hides_no_other(tmp_path, capsys):
    rare = np.zeros((12, 2))
    rare[3] = 1
    np.save(tmp_path / "rare.npy", rare)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(12, 4)))
    lines = told(capsys, tmp_path / "x.npy", tmp_path / "rare.npy", "--bootstrap", 20, "--permutations", 5)
    reasons = [line for line in lines if line.startswith("  no interval of ")]
    assert any("linear CKA, biased" in line and "half-sample" in line for line in reasons)
    assert "p = " in lines[2] and "mutual k-NN" in "".join(lines) and "k must be" not in "".join(lines)
    short = told(capsys, tmp_path / "x.npy", tmp_path / "rare.npy", "--neighbours", 12)
    assert any("k must be an integer in [1, 11]" in line for line in short)


def test_models_are_compared_on_their_features(tmp_path, capsys):
    more = ("--data", "digits", "--samples", 40, "--seed", 3)
    lines = told(capsys, "--models", "tiny_6,tiny_9", *more, "--json", tmp_path / "o.json", "--permutations", 9)
    assert lines[0] == "40 images of digits, weights: 2 random (seed 3)"
    assert lines[1] == "tiny_6 (40, 6) against tiny_9 (40, 9)"
    record = json.loads((tmp_path / "o.json").read_text())
    encoders = [load_encoder(ModelName.parsed(name), 3, False, CPU) for name in ("tiny_6", "tiny_9")]
    images = Images.chosen(load("digits", seed=3), "all", 40, 3)
    x, y = features_of(encoders, images, CPU).values()
    assert record["widths"] == {"tiny_6": 6, "tiny_9": 9} and record["samples"] == 40
    (pair,) = record["pairs"]
    for name in SIMILARITIES:
        test = permutation_test(x, y, name, repeats=9, seed=3)
        assert pair["measures"][name] == pytest.approx(test.value, abs=1e-9), name
        assert pair["permutations"][name]["p_value"] == test.p_value
    again = told(capsys, "--models", "tiny_6,tiny_9", *more, "--permutations", 9)
    assert again == lines and told(capsys, "--models", "tiny_6,tiny_9", *more[:-1], 4) != lines


def test_of_more_than_two_models_all_pairs_are_compared(tmp_path, capsys):
    more = ("--data", "digits", "--samples", 30, "--json", tmp_path / "o.json", "--spearman")
    lines = told(capsys, "--models", "tiny_6, tiny_9,tiny_7", *more)
    record = json.loads((tmp_path / "o.json").read_text())
    assert [(pair["a"], pair["b"]) for pair in record["pairs"]] == [
        ("tiny_6", "tiny_9"), ("tiny_6", "tiny_7"), ("tiny_9", "tiny_7")
    ]  # fmt: skip
    at = lines.index("linear CKA, debiased")
    values = [pair["measures"]["cka_linear_debiased"] for pair in record["pairs"]]
    assert lines[at + 1].split() == ["tiny_6", "tiny_9", "tiny_7"]
    assert lines[at + 3].split() == ["tiny_9", f"{values[0]:.4f}", "1.0000", f"{values[2]:.4f}"]
    assert "RSA, cosine, Spearman" in lines and len([line for line in lines if "against" in line]) == 0
    tested = told(capsys, "--models", "tiny_6,tiny_9,tiny_7", *more, "--permutations", 3)
    assert len([line for line in tested if "against" in line]) == 3


def test_layers_of_two_models(tmp_path, capsys):
    more = ("--data", "digits", "--samples", 70, "--layers")
    lines = told(capsys, "--models", "tiny_6,tiny_9", *more, "--out", tmp_path / "l.svg", "--json", tmp_path / "o.json")
    assert "70 samples in 2 batches: 3 layers of tiny_6 against 3 of tiny_9" in lines[0]
    assert lines[1].split() == ["stem.0", "stem.1", "last"] and lines[-1].startswith("heat map: ")
    record = json.loads((tmp_path / "o.json").read_text())
    table = np.array(record["cka_linear_debiased"])
    assert table.shape == (3, 3) and table[:2, :2] == pytest.approx(1.0) and (table[2] < 1).all()
    apart = told(capsys, "--models", "tiny_6,test_vit", *more[:3], 8, "--layers", "last,blocks.0,blocks.5")
    assert apart[1].split() == ["blocks.0", "blocks.5"] and apart[2].split()[0] == "last" and len(apart) == 3
    one = told(capsys, "--models", "tiny_6,tiny_9", *more, "last, stem")
    assert one[1].split() == ["stem", "last"] and one[3].split()[2] == lines[4].split()[3]


def test_weights_come_from_files(tmp_path, capsys):
    torch.manual_seed(5)
    trained = Tiny(6)
    head = {"fc.weight": torch.zeros(2, 6), "fc.bias": torch.zeros(2)}
    torch.save({"state_dict": trained.state_dict() | head}, tmp_path / "w.pth")
    ours = {f"encoder.{key}": value for key, value in trained.state_dict().items()}
    safetensors.torch.save_file(ours | {"projector.0.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    names = [f"tiny_6={tmp_path / file}" for file in ("w.pth", "w.safetensors")]
    lines = told(capsys, "--models", ",".join(names), "--data", "digits", "--samples", 20, "--pretrained")
    assert lines[0].endswith("weights: 2 from files") and "linear CKA, biased              1.000000" in lines[2]
    assert "1 from files, 1 random (seed 0)" in told(
        capsys, "--models", f"{names[0]},tiny_9", "--data", "digits", "--samples", 20
    )[0]  # fmt: skip
    for model, file, why in (("tiny_9", "w.pth", "size mismatch"), ("tiny_6", "none.pth", "does not exist"),
                             ("tiny_6", "", "is not a regular file"),
                             ("test_vit", "w.pth", "weights of another model")):  # fmt: skip
        message = refused(capsys, "--models", f"{model}={tmp_path / file},tiny_7", "--data", "digits")
        assert why in message and file in message
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    assert "holds no weights" in refused(
        capsys, "--models", f"tiny_6={tmp_path / 'broken.pth'},tiny_7", "--data", "digits"
    )  # fmt: skip
    assert "--json: " in refused(capsys, "--models", ",".join(names), "--data", "digits", "--json", tmp_path / "w.pth")


def test_models_of_both_libraries_see_images_as_they_were_made_to(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(3):
            Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / name / f"{k}.png")
    data = load(f"folder:{tmp_path}")
    images = Images.chosen(data, "all", None, 0)
    assert len(images) == 6 and images.read(torch.tensor([0]))[0].size == (30, 20)
    assert len(Images.chosen(data, "train", 4, 0)) == 4
    names = [ModelName.parsed(name) for name in ("test_resnet", "torchvision:shufflenet_v2_x0_5")]
    encoders = [load_encoder(name, 0, False, CPU) for name in names]
    found = features_of(encoders, images, CPU)
    assert [x.shape for x in found.values()] == [(6, 96), (6, 1024)] and all(x.std() > 0 for x in found.values())
    sides = [encoder.batch(images.read(torch.tensor([0]))).shape[2:] for encoder in encoders]
    assert sides == [(160, 160), (224, 224)]
    four = [[i for _, i in Images.chosen(data, "all", 4, seed).places] for seed in range(5)]
    assert len(set(map(tuple, four))) > 1 and four[0] == [i for _, i in Images.chosen(data, "all", 4, 0).places]
    other = load_encoder(names[0], 1, False, CPU)
    assert not torch.equal(features_of([other], images, CPU)["test_resnet"], found["test_resnet"])
    torch.rand(1)
    again = load_encoder(names[0], 0, False, CPU)
    assert torch.equal(features_of([again], images, CPU)["test_resnet"], found["test_resnet"])
    assert not encoders[0].module.training


def test_bad_input_is_one_clear_error(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((4, 2)))
    data, two = ("--data", "digits", "--samples", 20), ("--models", "tiny_6,tiny_9")
    for arguments, message in (
        (("--models", "resnet18x,tiny_6", *data), "timm has no model 'resnet18x' (of 1,"),
        (("--models", "torchvision:resnet19,tiny_6", *data), "did you mean 'resnet1"),
        (("--models", "keras:x,tiny_6", *data), "the library must be 'timm' or 'torchvision', got 'keras'"),
        (("--models", "tiny_6", *data), "needs two models or more"), (("--models", "tiny_6,", *data), "'' is not "),
        (("--models", "tiny_6=,tiny_9", *data), "'tiny_6=' is not "),
        (("--models", "tiny_6,tiny_6", *data), "names 'tiny_6' twice"), (two, "--models needs --data"),
        (data, "--data needs --models"), ((tmp_path / "a.npy", *two, *data), "no place for the file"),
        ((tmp_path / "a.npy",), "two feature files, A and B"), ((), "two feature files, A and B"),
        ((tmp_path / "a.npy", tmp_path / "a.npy", "--layers"), "--layers goes with --models"),
        ((*two, "--data", "digits", "--samples", 3), "--samples must be in [4, 1797]"),
        ((*two, "--data", "digits", "--samples", 2000, "--part", "test"), "(test images of digits), got 2000"),
        ((*two, "--data", "nothing"), "unknown source"), ((*two, *data, "--out", "l.svg"), "add --layers"),
        ((*two, *data, "--layers", "last,nothing"), "--layers: 'nothing' matches none of 4 modules"),
        (("--models", "tiny_6,maps", *data, "--layers", "last"), "patterns last matches a layer of maps"),
        ((*two, *data, "--layers", "--permutations", 3), "--permutations compares two matrices, not layers"),
        (("--models", "tiny_6,tiny_9,tiny_7", *data, "--layers"), "--layers compares two models, got 3"),
        (("--models", "tiny_6,maps", *data), "maps must return one vector per image, got (3, 112, 112)"),
        (("--models", "tiny_6,fixed", *data), "fixed does not accept images of 224 x 224 pixels: mat1"),
        ((*two, *data, "--pretrained"), "weights of tiny_6: no connection; without a network, leave out --pretrained"),
        (("--models", "torchvision:squeezenet1_1,tiny_6", *data), "has no linear classifier"),
        ((*two, *data, "--permutations", 0), "--permutations must be an integer >= 1, got 0"),
        ((*two, *data, "--bootstrap", 1), "--bootstrap must be an integer >= 2, got 1"),
        ((*two, *data, "--neighbours", 0), "--neighbours must be"), ((*two, *data, "--seed", -1), "--seed must be"),
    ):  # fmt: skip
        assert message in (error := refused(capsys, *arguments)), error
    assert not Path("l.svg").exists()
