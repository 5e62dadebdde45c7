"""The full-scale settings hold the published values, and each starts on images of its size."""

from itertools import islice

import numpy as np
import pytest
from small_images import noise, png, write_tree
from test_structure import ROOT

from fastcl.config.settings import Config
from fastcl.config.tables import load_config
from fastcl.config.written import preset_file, preset_names
from fastcl.train import Lockstep
from fastcl.train.models import learning_rate
from fastcl.train.step import fetch, step_twins

FOLDER = ROOT / "examples" / "paper"
LOSSES = ("dcl", "nscl", "supcon", "ce")
# The published configurations: epochs, temperature, projection, view preset (its side), whether CIFAR's stem.
RESNETS = {
    "cifar10": (1201, 0.5, 64, 32, True),
    "cifar100": (1201, 0.1, 128, 32, True),
    "mini-imagenet": (1201, 0.1, 128, 224, False),
    "tiny-imagenet": (1201, 0.1, 128, 64, False),
    "imagenet-1k": (301, 0.1, 128, 224, False),
}
# The published ViTs: side of the image, patch, width; 12 layers and 12 heads, an MLP of four times the width.
VITS = {"vit-cifar100": (32, 4, 384), "vit-tiny-imagenet": (64, 8, 384), "vit-mini-imagenet": (224, 16, 768)}
# Encoders that two steps and one core would take too long for: fewer blocks of the same kind. CIFAR-100 and the ViT of
# CIFAR run whole.
SHALLOW = {
    **dict.fromkeys(("cifar10", "mini-imagenet", "tiny-imagenet", "imagenet-1k"), {"layers": [1, 1, 1, 1]}),
    **dict.fromkeys(("vit-mini-imagenet", "vit-tiny-imagenet"), {"depth": 1}),
}


def setting(name: str, *overrides: str) -> Config:
    return load_config(FOLDER / f"{name}.toml", list(overrides))


def test_the_examples_are_the_presets():
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    assert names == sorted([*RESNETS, *VITS]) and set(names) <= set(preset_names())
    for name in names:
        with preset_file(name) as preset:
            assert (FOLDER / f"{name}.toml").read_bytes() == preset.read_bytes()


@pytest.mark.parametrize("name", [*RESNETS, *VITS])
def test_values_are_the_published_ones(name):
    c = setting(name)
    assert (c.optim.name, c.optim.momentum, c.optim.weight_decay, c.optim.warmup_epochs) == ("lars", 0.9, 1e-6, 10)
    assert c.optim.lr == pytest.approx(0.3 * 1024 / 256) and c.train.batch_size == 1024 and c.model.hidden == 2048
    assert c.data.order == "balanced" and not c.train.joint_views and c.train.controls == ("identity", "reseeded")
    v = c.views
    assert v.scale == (0.08, 1.0) and v.ratio == (3 / 4, 4 / 3) and v.flip == 0.5 and v.grayscale == 0.2
    assert v.solarize == v.rotation == 0
    if v.size == 224:
        assert (v.jitter, v.brightness, v.contrast, v.saturation, v.hue) == (1.0, 0.8, 0.8, 0.8, 0.2)
        assert (v.blur, v.blur_kernel, v.blur_sigma, v.eval_crop) == (0.1, 3, (1.5, 1.5), 224 / 256)
    else:
        assert (v.jitter, v.brightness, v.contrast, v.saturation, v.hue) == (0.8, 0.4, 0.4, 0.4, 0.1)
        assert (v.blur, v.eval_crop) == (0, 1.0)
    cifar = v.size == 32
    assert v.mean == ((0.4914, 0.4822, 0.4465) if cifar else (0.485, 0.456, 0.406))
    assert v.std == ((0.2023, 0.1994, 0.2010) if cifar else (0.229, 0.224, 0.225))
    if name in RESNETS:
        assert (c.train.epochs, c.train.temperature, c.model.projection, v.size, c.model.cifar_stem) == RESNETS[name]
        assert c.model.name == "resnet50" and c.model.options == {"zero_init_last": False}
        assert c.train.models == LOSSES
    else:
        o = c.model.options
        assert (o["img_size"], o["patch_size"], o["embed_dim"]) == VITS[name] and v.size == o["img_size"]
        assert (o["depth"], o["num_heads"]) == (12, 12) and not c.model.cifar_stem
        assert (c.train.epochs, c.train.temperature, c.train.models) == (300, 0.1, LOSSES[:2])


@pytest.fixture
def images(tmp_path, request) -> str:
    """Two classes of three training images and one held-out image each, of the side of the setting's views."""
    side = setting(request.param).views.size
    parts = (("train", 3), ("test", 1))
    files = {f"{part}/{c}/{k}.png": png(noise(k, side, side)) for part, n in parts for c in "ab" for k in range(n)}
    return write_tree(tmp_path / "images", files)


@pytest.mark.parametrize("images, name", [(name, name) for name in (*RESNETS, *VITS)], indirect=["images"])
def test_every_setting_starts(images, name, tmp_path):
    """Two steps of its first model on batches of two."""
    overrides = [f"data.source={images}", "train.batch_size=2", "train.controls=[]", 'train.models=["dcl"]']
    overrides += [f"model.options.{key}={value}" for key, value in SHALLOW.get(name, {}).items()]
    config = setting(name, *overrides)
    run = Lockstep(config, tmp_path / "run")
    (twin,), side = run.twins, config.views.size
    assert twin.network.projector[0].in_features == (VITS[name][2] if name in VITS else 2048)
    before = [p.detach().clone() for p in twin.network.projector.parameters()]
    assert len(run.loader) == 3
    for step, (views, labels, _) in enumerate(islice(run.loader.batches(0), 2)):
        assert all(view.shape == (2, 3, side, side) for view in views)
        lr = learning_rate(config, step, len(run.loader))
        found = step_twins(run.twins, views, None, labels, temperature=config.train.temperature, lr=lr, seed=step)
        assert np.isfinite(fetch([found])[0].values).all()
    assert any(not p.equal(old) for p, old in zip(twin.network.projector.parameters(), before, strict=True))
