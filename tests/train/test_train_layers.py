"""layers.json of a run: which layers, which models, which images; what a collapsed or odd model does to it."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import timm
import torch
from tiny_run import tiny_config

from fastcl import FastclError, layer_cka
from fastcl.data import EvalViews, ViewPlan, load
from fastcl.report.heat_maps import read_layer_tables, write_heat_map
from fastcl.train import Lockstep
from fastcl.train.measures import layer_table as module
from fastcl.train.measures.layer_table import check_layers, encoder_layers, write_layers
from fastcl.train.models import make_twins

CPU = torch.device("cpu")
STAGES = ["conv1", "bn1", "act1", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "global_pool"]


@pytest.fixture
def parts():
    """Twins with weights that differ, held-out images and their plan."""
    config = tiny_config()
    data = load("digits", classes=3, seed=7, test_fraction=0.2)
    twins = make_twins(config, data.channels, len(data.classes), CPU)
    with torch.no_grad():
        for seed, twin in enumerate(twins[1:3]):
            torch.manual_seed(seed)
            for p in twin.network.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
    return twins, data.test, ViewPlan(config.views, 7)


def test_the_reference_meets_every_other_model_and_the_noise_floor(parts, tmp_path):
    twins, split, plan = parts
    for path in (tmp_path / "layers.json", tmp_path / "again.json"):
        write_layers(path, twins, EvalViews(split, plan), [])
    assert (tmp_path / "layers.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    table = json.loads((tmp_path / "layers.json").read_text())
    assert table["reference"] == "dcl" and (table["samples"], table["batches"]) == (108, 1)
    assert list(table["models"]) == ["nscl", "ce", "reseeded"]
    images = next(EvalViews(split, plan).batches(108))
    for twin in twins[1:3]:
        found = table["models"][twin.name]
        assert found["layers"] == found["other_layers"] == [f"encoder.{name}" for name in STAGES]
        wanted = layer_cka(twins[0].network, twin.network, [images], found["layers"])
        assert found["cka"] == wanted.matrix.tolist() and np.ptp(found["cka"]) > 0.1


def test_many_images_are_sampled_evenly_in_batches_that_are_never_short(parts, tmp_path, monkeypatch):
    twins, split, plan = parts
    monkeypatch.setattr(module, "LAYER_IMAGES", 41)
    monkeypatch.setattr(module, "_BATCH", 20)
    read = []
    spied = dataclasses.replace(split, read=lambda i: read.append(i) or split.read(i))
    write_layers(tmp_path / "layers.json", twins[:2], EvalViews(spied, plan), ["projector", "encoder.layer?"])
    assert len(read) == 41 and read[0] == 0 and read[-1] > 104 and set(np.diff(read)) == {2, 3}
    table = json.loads((tmp_path / "layers.json").read_text())
    assert (table["samples"], table["batches"]) == (41, 3)
    assert table["models"]["nscl"]["layers"] == [*(f"encoder.layer{k}" for k in (1, 2, 3, 4)), "projector"]


def test_a_collapsed_model_is_left_out_with_a_warning(parts, tmp_path, caplog):
    twins, split, plan = parts
    torch.nn.init.zeros_(twins[1].network.encoder.conv1.weight)
    with caplog.at_level(logging.WARNING, "fastcl"):
        write_layers(tmp_path / "layers.json", twins, EvalViews(split, plan), [])
        write_layers(tmp_path / "none.json", twins[:2], EvalViews(split, plan), [])
        write_layers(tmp_path / "one.json", twins[:1], EvalViews(split, plan), [])
    assert "layers of dcl, nscl: in nscl, batch 0: CKA of layer 'encoder.conv1' is undefined: HSIC_1" in caplog.text
    assert list(json.loads((tmp_path / "layers.json").read_text())["models"]) == ["ce", "reseeded"]
    assert not (tmp_path / "none.json").exists() and not (tmp_path / "one.json").exists()


def test_an_undefined_layer_is_null_and_leaves_the_others(parts, tmp_path, caplog):
    twins, split, plan = parts
    layers = ["encoder.layer?", "projector"]
    write_layers(tmp_path / "before.json", twins[:2], EvalViews(split, plan), layers)
    for parameter in twins[1].network.projector.parameters():
        torch.nn.init.zeros_(parameter)
    with caplog.at_level(logging.WARNING, "fastcl"):
        write_layers(tmp_path / "layers.json", twins[:2], EvalViews(split, plan), layers)
    assert "in nscl, batch 0: CKA of layer 'projector' is undefined" in caplog.text
    before, after = (json.loads((tmp_path / name).read_text()) for name in ("before.json", "layers.json"))
    before, after = (np.array(one["models"]["nscl"]["cka"], dtype=float) for one in (before, after))
    assert np.isnan(after[:, -1]).all() and np.array_equal(after[:, :-1], before[:, :-1]) and np.isfinite(before).all()
    (table,) = read_layer_tables(tmp_path)
    assert np.array_equal(table.values, after, equal_nan=True)
    assert write_heat_map(table, tmp_path / "map.svg").exists()


@pytest.mark.parametrize(("name", "first", "last", "count"), [
    ("resnet50", "encoder.conv1", "encoder.global_pool", 21), ("vit_tiny_patch16_224", "encoder.patch_embed",
    "encoder.norm", 14), ("convnext_atto", "encoder.stem.0", "encoder.head", 7),
])  # fmt: skip
def test_stages_of_common_encoders(name, first, last, count):
    with torch.device("meta"):
        names = encoder_layers(timm.create_model(name, num_classes=0))
    assert (names[0], names[-1], len(names)) == (first, last, count)


def test_unknown_layers_are_refused_before_the_run(parts, tmp_path):
    check_layers(parts[0][0], [])
    check_layers(parts[0][0], ["encoder.layer*"])
    with pytest.raises(FastclError, match=r"train.layers: 'encoder.layr1' matches none of .*'encoder.layer1'"):
        Lockstep(tiny_config(train__layers=["encoder.layr1"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
