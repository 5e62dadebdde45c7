"""The view plan: known answers, purity, and the distributions of torchvision's own samplers."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import RandomResizedCrop

from fastcl import FastclError
from fastcl.data import PRESETS, ViewPlan, ViewSpec, center_view
from fastcl.data.philox import Stream, keys, permutation, philox4x32, uniforms, words

KNOWN_ANSWERS = [  # Random123's kat_vectors for philox4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert tuple(philox4x32(np.array(counter, np.uint32), key)) == expected


def test_words_are_the_documented_counters():
    seed = 0x0123456789ABCDEF
    got = words(6, seed=seed, stream=Stream.ORDER, index=np.array([7]), epoch=9, view=3)
    blocks = [philox4x32(np.array([7, 9, 3 | 1 << 16, b], np.uint32), (seed & 0xFFFFFFFF, seed >> 32)) for b in (0, 1)]
    assert np.array_equal(got[0], np.concatenate(blocks)[:6])


@pytest.mark.parametrize(
    "change", [dict(seed=1), dict(stream=Stream.SPLIT), dict(epoch=1), dict(view=1), dict(index=np.array([1]))]
)
def test_each_part_of_the_counter_matters(change):
    base = dict(seed=0, stream=Stream.VIEW, index=np.array([0]), epoch=0, view=0)
    assert not np.array_equal(words(4, **base), words(4, **base | change))


@pytest.mark.parametrize(
    "change, name",
    [(dict(seed=-1), "seed"), (dict(seed=1 << 64), "seed"), (dict(epoch=1 << 32), "epoch"),
     (dict(view=1 << 16), "view"),
     (dict(seed=1.0), "seed must be an integer, got 1.0"), (dict(epoch=0.5), "epoch must be an integer, got 0.5"),
     (dict(view=True), "view must be an integer, got True"),
     (dict(index=np.array([True])), "sample ids must be integers, got bool"),
     (dict(index=np.array([0.5])), "sample ids must be integers, got float64"),
     (dict(index=np.array([1 << 32])), "sample ids"), (dict(index=np.array([-1])), "sample ids")],
)  # fmt: skip
def test_values_that_would_alias_are_refused(change, name):
    with pytest.raises(FastclError, match=name):
        words(4, **dict(seed=0, stream=Stream.VIEW, index=np.array([0])) | change)


def test_uniforms_are_uniform_and_exact_in_float32():
    u = uniforms(8, seed=3, stream=Stream.VIEW, index=np.arange(20_000))
    assert u.min() >= 0 and u.max() < 1
    assert np.array_equal(u, u.astype(np.float32))
    # 160,000 draws: the standard error of the mean is 7e-4, of a decile's share 7.5e-4.
    assert abs(u.mean() - 0.5) < 4e-3
    assert np.abs(np.histogram(u, 10, (0, 1))[0] / u.size - 0.1).max() < 4e-3
    assert np.abs(np.corrcoef(u.T) - np.eye(8)).max() < 0.04


def test_permutation_is_one_and_depends_on_the_epoch():
    p = permutation(1000, seed=5, stream=Stream.ORDER, epoch=2)
    assert np.array_equal(np.sort(p), np.arange(1000))
    assert not np.array_equal(p, permutation(1000, seed=5, stream=Stream.ORDER, epoch=3))
    assert len(np.unique(keys(100_000, seed=5, stream=Stream.ORDER))) == 100_000


def _rows(params, index):
    return [getattr(params, f.name)[index] for f in dataclasses.fields(params)]


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(sorted(PRESETS)), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_a_view_depends_on_its_own_sample_alone(data, preset, seed, epoch):
    ids = np.array(data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20)))
    sizes = np.array(data.draw(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)),
                                        min_size=len(ids), max_size=len(ids))))  # fmt: skip
    plan = ViewPlan(ViewSpec.preset(preset), seed)
    whole = plan.draw(epoch, ids, 1, sizes)
    k = data.draw(st.integers(0, len(ids) - 1))
    alone = plan.draw(epoch, ids[k : k + 1], 1, sizes[k : k + 1])
    for a, b in zip(_rows(whole, k), _rows(alone, 0), strict=True):
        assert np.array_equal(a, b)
    top, left, height, width = whole.box[k]
    assert 0 <= top and 1 <= height and top + height <= sizes[k][0]
    assert 0 <= left and 1 <= width and left + width <= sizes[k][1]


def test_boxes_follow_torchvisions_distribution():
    size, n = (40, 70), 20_000
    params = ViewPlan(ViewSpec.preset("cifar"), 0).draw(0, np.arange(n), 0, np.tile([size], (n, 1)))
    torch.manual_seed(0)
    theirs = RandomResizedCrop(32)
    image = torch.zeros(3, *size)
    drawn = [theirs.make_params([image]) for _ in range(n)]
    for column, key in enumerate(("top", "left", "height", "width")):
        a, b = params.box[:, column], np.array([d[key] for d in drawn])
        for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert abs(np.quantile(a, quantile) - np.quantile(b, quantile)) <= 1, (key, quantile)
        assert abs(a.mean() - b.mean()) < 5 * b.std() * (2 / n) ** 0.5, key


def test_a_box_that_never_fits_is_torchvisions_central_crop():
    spec = ViewSpec(scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3))
    box = ViewPlan(spec, 0).draw(0, np.arange(3), 0, np.array([[10, 100], [100, 10], [30, 30]])).box
    assert box[0].tolist() == [0, 44, 10, 13]  # torchvision: (100 - 13) // 2 = 43; ours rounds half to even
    assert box[1].tolist() == [44, 0, 13, 10]


def test_factors_probabilities_and_orders():
    n = 40_000
    spec = ViewSpec.preset("simclr", solarize=0.2, rotation=30.0)
    p = ViewPlan(spec, 1).draw(4, np.arange(n), 1)
    for name, strength in (("brightness", 0.8), ("contrast", 0.8), ("saturation", 0.8), ("hue", 0.2)):
        v, centre = getattr(p, name), 0.0 if name == "hue" else 1.0
        assert centre - strength <= v.min() < centre - 0.99 * strength
        assert centre + 0.99 * strength < v.max() <= centre + strength
        assert abs(v.mean() - centre) < 5 * strength / (3 * n) ** 0.5
    for name, probability in (("flip", 0.5), ("jitter", 0.8), ("grayscale", 0.2), ("solarize", 0.2)):
        assert abs(getattr(p, name).mean() - probability) < 5 * (probability * (1 - probability) / n) ** 0.5, name
    blurred = p.blur_sigma[p.blur_sigma > 0]
    assert abs(len(blurred) / n - 0.5) < 0.0125 and 0.1 <= blurred.min() and blurred.max() <= 2.0
    assert -30 <= p.angle.min() < -29 and 29 < p.angle.max() <= 30
    _, counts = np.unique(p.order, axis=0, return_counts=True)
    assert len(counts) == 24 and np.abs(counts / n - 1 / 24).max() < 0.006


def test_switching_one_option_leaves_the_other_parameters():
    ids = np.arange(50)
    a = ViewPlan(ViewSpec.preset("cifar"), 0).draw(0, ids, 0)
    b = ViewPlan(ViewSpec.preset("cifar", blur=0.5, grayscale=0.9, flip=0.0), 0).draw(0, ids, 0)
    for name in ("box", "brightness", "contrast", "saturation", "hue", "order", "jitter"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_boxes_without_sizes_are_shares_of_a_square():
    box = ViewPlan(ViewSpec.preset("cifar"), 0).draw(0, np.arange(2000), 0).box
    area = box[:, 2] * box[:, 3]
    assert 0.08 - 1e-12 <= area.min() and area.max() <= 1 + 1e-12
    assert (box[:, 0] + box[:, 2]).max() <= 1 + 1e-12 and (box[:, 1] + box[:, 3]).max() <= 1 + 1e-12


def test_center_view():
    sizes = np.array([[100, 60], [33, 33]])
    assert center_view(ViewSpec(), sizes).box.tolist() == [[0, 0, 100, 60], [0, 0, 33, 33]]
    assert center_view(ViewSpec.preset("imagenet"), sizes).box.tolist() == [[24, 4, 52, 52], [2, 2, 29, 29]]


@pytest.mark.parametrize(
    "change, name",
    [(dict(flip=1.1), "flip"), (dict(scale=(0.5, 0.2)), "scale"), (dict(scale=(0.5, 1.2)), "scale"),
     (dict(ratio=(0.0, 1.0)), "ratio"), (dict(hue=0.6), "hue"), (dict(brightness=-0.1), "brightness"),
     (dict(blur_kernel=4), "blur_kernel"), (dict(blur=0.5, blur_kernel=65), "blur_kernel"), (dict(size=0), "size"),
     (dict(mean=(0.5, 0.5)), "mean"), (dict(std=(0.0,)), "std"),
     (dict(size=2, blur=0.5, blur_kernel=5), "blur_kernel must be less than 2 .* got 5 and size 2"),
     (dict(size=1), r"views.size must be in \[2, 4096\] pixels, got 1$"),
     (dict(size=4097), r"views.size must be in \[2, 4096\] pixels, got 4097"),
     (dict(size=10**400), "size must be finite"),
     (dict(size=8.0), "size must be an integer, got 8.0"), (dict(size=True), "size must be an integer, got True"),
     (dict(flip="0.5"), "flip must be a number, got '0.5'"), (dict(hue=float("nan")), "hue must be finite, got nan"),
     (dict(scale=0.5), "scale must be a tuple of two numbers, got 0.5"),
     (dict(scale=(0.5,)), "scale must be a tuple of two numbers"), (dict(mean=()), "mean must be a tuple of numbers"),
     (dict(std=[0.5]), r"std must be a tuple of numbers, got \[0.5\]"), (dict(eval_crop=0.0), "eval_crop")],
)  # fmt: skip
def test_bad_specs_are_refused(change, name):
    with pytest.raises(FastclError, match=name):
        ViewSpec(**change)


def test_unknown_preset_and_field_name_the_nearest():
    with pytest.raises(FastclError, match="unknown view preset 'cfar'.*cifar"):
        ViewSpec.preset("cfar")
    with pytest.raises(FastclError, match="views.brightnes.*did you mean 'brightness'"):
        ViewSpec.preset("cifar", brightnes=0.1)
