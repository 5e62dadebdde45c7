"""Rendering and batches: torchvision's numbers, and nothing that depends on the batch around a view."""

import argparse
import os

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from fastcl import FastclError
from fastcl.cli import contact_sheet as views
from fastcl.data import Dataset, EvalViews, Split, ViewLoader, ViewPlan, ViewSpec, center_view, render_torchvision
from fastcl.data.renderers.colour import colour_stage

GREY_LEVEL = 1 / 255


def _images(n, channels=3, seed=0, size=None):
    random = np.random.default_rng(seed)
    shapes = [(size, size) if size else tuple(random.integers(9, 40, 2)) for _ in range(n)]
    return [random.integers(0, 256, (*s, channels), dtype=np.uint8) for s in shapes]


def _sizes(images):
    return np.array([i.shape[:2] for i in images])


def _split(n=50, channels=3, classes=5):
    images = _images(n, channels)
    labels = np.minimum(np.arange(n) // 4, classes - 1).astype(np.int64)  # the last class is far larger
    return Split(np.arange(n) * 3 + 1, labels, _sizes(images), lambda i: images[i])


def _torchvision_colour(x, p, k, spec):
    v = x[k].float() / 255
    steps = (
        lambda v: F.adjust_brightness(v, p.brightness[k]),
        lambda v: F.adjust_contrast(v, p.contrast[k]),
        lambda v: F.adjust_saturation(v, p.saturation[k]),
        lambda v: F.adjust_hue(v, p.hue[k]),
    )
    for number in p.order[k] if p.jitter[k] else ():
        v = steps[number](v)
    if p.grayscale[k]:
        v = F.rgb_to_grayscale(v, num_output_channels=x.shape[1])
    if p.blur_sigma[k]:
        v = F.gaussian_blur(v, [spec.blur_kernel] * 2, [float(p.blur_sigma[k])] * 2)
    return F.solarize(v, 128 / 255) if p.solarize[k] else v


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_stage_equals_torchvision(channels):
    n = 200
    x = torch.from_numpy(np.stack(_images(n, channels, size=24))).permute(0, 3, 1, 2).contiguous()
    x[0], x[1], x[2, :, ::2] = 0, 255, 7  # black, white, stripes
    x[3, 0], x[3, 1:] = 255, 0  # pure red: a hue at the seam
    spec = ViewSpec.preset("simclr", size=24, solarize=0.2, mean=(0.0,), std=(1.0,), blur_kernel=5)
    p = ViewPlan(spec, 0).draw(0, np.arange(n), 0)
    got = colour_stage(x, p, spec)
    for k in range(n):
        expected = _torchvision_colour(x, p, k, spec)
        # Solarisation is a jump at the threshold, so one rounding can flip a pixel there.
        at_jump = ((1 - expected) - got[k]).abs() < 1e-5 if p.solarize[k] else torch.zeros_like(expected, dtype=bool)
        error = (got[k] - expected).abs().masked_fill(at_jump & ((expected - 0.5).abs() < 0.01), 0)
        assert error.max() < 0.01 * GREY_LEVEL, k


def test_solarisation_begins_at_level_128():
    spec = ViewSpec.preset("cifar", size=2, solarize=1.0, jitter=0.0, grayscale=0.0, mean=(0.0,), std=(1.0,))
    x = torch.tensor([127, 128, 129, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    levels = colour_stage(x, ViewPlan(spec, 0).draw(0, np.arange(1), 0), spec) * 255
    assert levels.round().flatten().tolist() == [127, 127, 126, 0]


def test_normalisation():
    spec = ViewSpec.preset("cifar")
    x = torch.from_numpy(np.stack(_images(4, size=8))).permute(0, 3, 1, 2)
    p = center_view(spec, np.full((4, 2), 8))
    expected = F.normalize(x.float() / 255, spec.mean, spec.std)
    assert torch.allclose(colour_stage(x, p, spec), expected, atol=1e-6)
    with pytest.raises(FastclError, match=r"1 value or one per channel \(1\), got 3"):
        colour_stage(x[:, :1], p, spec)


def test_geometry_equals_torchvision():
    images = _images(40)
    spec = ViewSpec(size=16, jitter=0.0, grayscale=0.0, rotation=20.0, mean=(0.0,), std=(1.0,))
    p = ViewPlan(spec, 0).draw(0, np.arange(40), 0, _sizes(images))
    got = render_torchvision(images, p, spec)
    for k, image in enumerate(images):
        x = F.resized_crop(torch.from_numpy(image).permute(2, 0, 1), *p.box[k].astype(int).tolist(), [16, 16])
        x = F.horizontal_flip(x) if p.flip[k] else x
        x = F.rotate(x, float(p.angle[k]), interpolation=F.InterpolationMode.BILINEAR)
        assert torch.equal((got[k] * 255).round().byte(), x), k


@pytest.mark.parametrize("preset", ["cifar", "simclr"])
@pytest.mark.parametrize("threads", [1, 2])
def test_views_do_not_depend_on_the_batch_or_on_threads(preset, threads):
    images = _images(33)
    spec = ViewSpec.preset(preset, size=32, solarize=0.3)
    p = ViewPlan(spec, 3).draw(1, np.arange(33), 0, _sizes(images))
    whole = render_torchvision(images, p, spec)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size in (1, 7):
            parts = [render_torchvision(images[k : k + size], p[k : k + size], spec) for k in range(0, 33, size)]
            assert torch.equal(torch.cat(parts), whole)
    finally:
        torch.set_num_threads(before)


def test_shuffled_epochs_visit_each_sample_once():
    loader = ViewLoader(_split(), ViewPlan(ViewSpec(size=8), 2), 8)
    assert len(loader) == 6
    epochs = [np.concatenate([loader.batch(e, k) for k in range(6)]) for e in range(2)]
    for order in epochs:
        assert len(np.unique(order)) == 48
    assert not np.array_equal(*epochs)
    assert np.array_equal(loader.batch(0, 3), epochs[0][24:32])


def test_balanced_batches_are_distinct_within_and_balanced_across():
    split = _split()
    loader = ViewLoader(split, ViewPlan(ViewSpec(size=8), 2), 10, "balanced")
    counts = np.zeros(5)
    for epoch in range(300):
        for k in range(len(loader)):
            batch = loader.batch(epoch, k)
            assert len(np.unique(batch)) == 10
            counts += np.bincount(split.labels[batch], minlength=5)
    assert not np.array_equal(loader.batch(0, 1), loader.batch(1, 0))
    picks = [loader.batch(e, k)[0] for e in range(300) for k in range(len(loader))]
    first = np.bincount(split.labels[picks], minlength=5)
    # The first pick of each batch is exactly balanced in expectation: 300 of 1,500, standard deviation 15.5.
    assert np.abs(first - 300).max() < 70
    # 34 of 50 samples are of one class; without weights it would fill 68 % of the batches.
    assert counts[4] / counts.sum() < 0.35


def test_loader_renders_the_plan_and_another_seed_differs():
    split = _split()
    plan = ViewPlan(ViewSpec(size=8), 2)
    loader = ViewLoader(split, plan, 10)
    batch = loader.batch(1, 2)
    one, two = loader.views(batch, 1)
    expected = plan.draw(1, split.ids[batch], 1, split.sizes[batch])
    assert torch.equal(two, render_torchvision([split.image(i) for i in batch], expected, plan.spec))
    assert not torch.equal(one, two)
    assert torch.equal(loader.views(batch[::-1].copy(), 1)[0].flip(0), one)
    assert not torch.equal(ViewLoader(split, ViewPlan(plan.spec, 3), 10).views(batch, 1)[0], one)
    assert not torch.equal(loader.views(batch, 2)[0], one)


def test_eval_views_cover_the_split_in_order():
    split = _split()
    plan = ViewPlan(ViewSpec(size=8), 0)
    parts = list(EvalViews(split, plan).batches(16))
    assert [len(p) for p in parts] == [16, 16, 16, 2]
    images = [split.image(i) for i in range(50)]
    assert torch.equal(torch.cat(parts), render_torchvision(images, center_view(plan.spec, split.sizes), plan.spec))


@pytest.mark.parametrize("batch_size", [0, 51])
def test_batch_sizes_that_cannot_be(batch_size):
    with pytest.raises(
        FastclError, match=rf"train.batch_size must be in \[1, 50\] \(training images\), got {batch_size}"
    ):
        ViewLoader(_split(), ViewPlan(ViewSpec(), 0), batch_size)


def test_unknown_order():
    with pytest.raises(FastclError, match="data.order.*'shuffled' or 'balanced', got 'sorted'"):
        ViewLoader(_split(), ViewPlan(ViewSpec(), 0), 5, "sorted")


def test_a_picture_never_takes_the_place_of_the_data_nor_fails_after_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(views, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"data")
    os.link(tmp_path / "a" / "0.png", tmp_path / "x.png")
    for data, root, out in (
        (f"folder:{tmp_path}", None, "a/0.png"), (f"folder:{tmp_path / 'x.png'}", None, "a/0.png"),
        ("torchvision:ImageFolder", str(tmp_path), "a/0.png"),
    ):  # fmt: skip
        args = argparse.Namespace(data=data, root=root, out=tmp_path / out, corrupt="stop")
        with pytest.raises(FastclError, match="0.png (is an input|is inside)"):
            views.show_views(args)
    data = Dataset("caf\udce9", ("a\udce9",) * 5, 3, _split(), _split())
    monkeypatch.setattr(views, "ViewLoader", lambda *_: pytest.fail("worked"))
    for out in (f"{'n' * 300}.png", "x.png/y.png", "a/b\0.png"):
        with pytest.raises(FastclError, match="--out: .* cannot be written"):
            views.contact_sheet(data, ViewSpec(size=8), tmp_path / out)
    monkeypatch.undo()
    views.contact_sheet(data, ViewSpec(size=8), tmp_path / "new" / "sheet.png", renderers=(), samples=1)
    assert (tmp_path / "new" / "sheet.png").stat().st_size > 1000 and (tmp_path / "x.png").read_bytes() == b"data"
