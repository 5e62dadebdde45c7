"""DALI against itself: nothing but the plan counts, streams keep apart, errors name the image."""

import sys
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from dali_views import REAL, array_split, drawn, file_split, jpeg, levels, photo, real_split, take
from small_images import noise, write_tree, write_zip

from fastcl import FastclError
from fastcl.data import Split, ViewSpec, load, render_torchvision
from fastcl.data.renderers.dali import DaliRenderer, obstacle

pytest.importorskip("nvidia.dali", reason="DALI is not installed (pip install '.[dali]')")

CHAIN_MEAN = 1.5  # grey levels


@pytest.fixture(scope="module")
def real(data_path):
    """Function from the name of a real data file to its training split."""
    find = lru_cache(real_split)
    return lambda name: find(data_path(name))


@pytest.mark.parametrize("name", REAL)
def test_views_do_not_depend_on_batch_threads_order_or_company(real, name):
    split, spec = real(name), ViewSpec.preset("simclr", size=24, rotation=5.0)
    positions = take(split, 37)
    params = drawn(split, positions, spec)
    whole = DaliRenderer(split, spec, "cpu")(positions, params)
    for threads, size in ((1, 1), (2, 7), (4, 16), (4, 37)):
        renderer = DaliRenderer(split, spec, "cpu", threads=threads)
        cuts = [slice(k, k + size) for k in range(0, 37, size)]
        parts = list(renderer.stream((positions[cut], [p[cut] for p in params]) for cut in cuts))
        for view in (0, 1):
            assert torch.equal(torch.cat([part[view] for part in parts]), whole[view]), (threads, size)
    order = np.random.default_rng(0).permutation(37)
    shuffled = renderer(positions[order], [p[order] for p in params])
    assert all(torch.equal(a, b[order]) for a, b in zip(shuffled, whole, strict=True))
    (alone,) = renderer(positions, params[1:])  # another region is decoded
    assert torch.equal(alone, whole[1])


def test_batches_above_the_chunk_and_resumption(real):
    split, spec = real("fruits65.zip"), ViewSpec.preset("cifar")
    batches = [take(split, 150), take(split, 3), take(split, 40)[::-1].copy()]
    work = [(positions, drawn(split, positions, spec, epoch=k)) for k, positions in enumerate(batches)]
    renderer = DaliRenderer(split, spec, "cpu")
    through = list(renderer.stream(work))
    resumed = list(DaliRenderer(split, spec, "cpu").stream(work[1:]))
    for (a, b), (c, d) in zip(through[1:], resumed, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    images = [split.image(int(p)) for p in batches[0]]
    assert levels(through[0][0], render_torchvision(images, work[0][1][0], spec), spec)[1] <= CHAIN_MEAN
    abandoned = renderer.stream(work)
    next(abandoned)
    abandoned.close()
    assert torch.equal(renderer(*work[2])[1], through[2][1])


def test_streams_of_one_renderer_do_not_mix(real):
    split, spec = real("fruits65.zip"), ViewSpec.preset("cifar")
    work = [(cut, drawn(split, cut, spec)) for cut in take(split, 40).reshape(8, 5)]
    renderer = DaliRenderer(split, spec, "cpu")
    expected = [renderer(*batch) for batch in work]
    for one, two, batch, views in zip(renderer.stream(work), renderer.stream(work), work, expected, strict=True):
        for got in (one, two, renderer(*batch)):
            assert all(torch.equal(a, b) for a, b in zip(got, views, strict=True))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.08, 0.1)])  # the second: views that do not meet the lost part
def test_truncated_jpeg_is_named(tmp_path, zipped, scale):
    files = {f"{c}/{i}.jpg": jpeg(photo(i, 200, 160)) for c in "ab" for i in range(6)}
    files["b/3.jpg"] = files["b/3.jpg"][: len(files["b/3.jpg"]) * 3 // 4]
    files["b/2.jpg"] += b"\xff\x00" * 40  # what follows the end of an image is harmless
    source = write_zip(tmp_path / "x.zip", files) if zipped else write_tree(tmp_path, files)
    data = load(source, test_fraction=0.2)
    split = next(s for s in (data.train, data.test) if 9 in s.ids)
    bad = int(np.flatnonzero(split.ids == 9)[0])
    spec, positions = ViewSpec(size=16, scale=scale), np.arange(len(split))
    params = drawn(split, positions, spec)
    if scale[1] < 1:
        params = [replace(p, box=p.box * [0, 1, 1, 1]) for p in params]
    renderer = DaliRenderer(split, spec, "cpu")
    single = [(positions[k : k + 1], [p[k : k + 1] for p in params]) for k in range(len(split))]
    for work in ([(positions, params)], single):
        with pytest.raises(FastclError, match=r"b/3\.jpg.*truncated"):
            list(renderer.stream(work))
    good = positions[positions != bad]
    assert len(renderer(good, [p[good] for p in params])[0]) == len(good), "usable after a failure"


def test_file_that_only_dali_refuses_is_named_by_its_sample_id():
    files = [jpeg(photo(i)) for i in range(5)]
    split = file_split(files)
    broken = Split(split.ids + 70, split.labels, split.sizes, split.read, lambda i: b"\xff\xd8" if i == 2 else files[i])
    spec, positions = ViewSpec(size=16), np.arange(5)
    with pytest.raises(FastclError, match="DALI cannot render the image of sample id 72"):
        DaliRenderer(broken, spec, "cpu")(positions, drawn(broken, positions, spec))


def test_obstacles(monkeypatch):
    split, spec = array_split([noise(0)]), ViewSpec(size=4)
    assert obstacle(split, spec, "cpu") is None
    assert "not on meta" in obstacle(split, spec, "meta")
    with pytest.raises(FastclError, match="'dali': DALI works on cpu and cuda, not on meta"):
        DaliRenderer(split, spec, "meta")
    if not torch.cuda.is_available():
        assert "no CUDA device" in obstacle(split, spec, "cuda")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert "pip install '.[dali]'" in obstacle(split, spec, "cpu")
