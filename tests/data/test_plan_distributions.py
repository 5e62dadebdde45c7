"""The plan draws what torchvision's own samplers draw, and the same bits on every machine; the presets are the recipes.

Two samples of fixed seeds are compared by their statistics, so a test gives one answer. LEAST is the probability that
samples of one distribution lie as far apart: with about 60 comparisons a false alarm had a chance of 1 in 150.
"""

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chi2_contingency, chisquare, ks_2samp
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop, RandomRotation

from fastcl import FastclError
from fastcl.data import PRESETS, ViewPlan, ViewSpec
from fastcl.data import plan as plan_module

LEAST = 1e-4
OURS, THEIRS = 60_000, 4_000  # draws: of torchvision's samplers each takes a Python call
FLAGS = {"flip": "flip", "jitter": "jitter", "grayscale": "grayscale", "blur": "blur_sigma", "solarize": "solarize"}


def same(a: np.ndarray, b: np.ndarray) -> float:
    """p of the two-sample Kolmogorov-Smirnov test; with ties (whole pixels) it is larger than it had to be."""
    return ks_2samp(a, b, method="asymp").pvalue


def crops(size: tuple[int, int], spec: ViewSpec, seed: int = 0) -> np.ndarray:
    """(THEIRS, 4) top, left, height, width as torchvision draws them."""
    torch.manual_seed(seed)
    image = torch.empty(1, *size)
    return np.array([RandomResizedCrop.get_params(image, spec.scale, spec.ratio) for _ in range(THEIRS)])


def boxes(size: tuple[int, int], spec: ViewSpec, n: int = OURS) -> np.ndarray:
    return ViewPlan(spec, 0).draw(0, np.arange(n), 0, np.tile([size], (n, 1))).box


@pytest.mark.parametrize(
    ("size", "spec"),
    [((32, 32), ViewSpec()), ((400, 533), ViewSpec()), ((180, 60), ViewSpec()), ((1, 7), ViewSpec()),
     ((64, 48), ViewSpec.preset("characters", ratio=(0.5, 3.0)))],
)  # fmt: skip
def test_crops_are_distributed_as_torchvisions(size, spec):
    ours, theirs = boxes(size, spec), crops(size, spec)
    for column, name in enumerate(("top", "left", "height", "width")):
        assert same(ours[:, column], theirs[:, column]) > LEAST, name
    for name, value in (("area", lambda b: b[:, 2] * b[:, 3]), ("ratio", lambda b: b[:, 3] / b[:, 2])):
        assert same(value(ours), value(theirs)) > LEAST, name


@pytest.mark.parametrize(("size", "central"), [((10, 100), [10, 13]), ((100, 10), [13, 10])])
def test_extreme_shapes_fall_back_as_often_as_torchvision_does(size, central):
    ours, theirs = boxes(size, ViewSpec()), crops(size, ViewSpec())
    # The central crop starts at row or column 43.5: torchvision takes 43, and we the even neighbour. No other is there.
    there = [(b[:, 2:] == central).all(1) & (b[:, :2].max(1) == start) for b, start in ((ours, 44), (theirs, 43))]
    counts = [[t.sum(), len(t) - t.sum()] for t in there]
    assert 0.5 < there[0].mean() < 0.9 and chi2_contingency(counts).pvalue > LEAST
    for column in range(4):
        assert same(ours[~there[0], column], theirs[~there[1], column]) > LEAST


def test_an_image_of_one_pixel_is_its_own_crop():
    for name in PRESETS:
        assert (boxes((1, 1), ViewSpec.preset(name), 1000) == [0, 0, 1, 1]).all(), name


@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.4, 0.1), (0.8, 0.5, 1.4, 0.5), (0.0, 0.3, 0.0, 0.0)])
def test_jitter_is_distributed_as_torchvisions(strengths):
    names = ("brightness", "contrast", "saturation", "hue")
    theirs = ColorJitter(*strengths)
    ranges = [getattr(theirs, name) for name in names]
    torch.manual_seed(0)
    drawn = [ColorJitter.get_params(*ranges) for _ in range(THEIRS)]
    p = ViewPlan(ViewSpec(**dict(zip(names, strengths, strict=True))), 0).draw(0, np.arange(OURS), 0)
    for place, name in enumerate(names):
        got = getattr(p, name)
        if ranges[place] is None:
            assert (got == (0.0 if name == "hue" else 1.0)).all(), name
            continue
        low, high = ranges[place]
        assert low <= got.min() and got.max() <= high, name
        assert same(got, np.array([d[place + 1] for d in drawn])) > LEAST, name
    orders = list(itertools.permutations(range(4)))
    ours = [int((p.order == order).all(1).sum()) for order in orders]
    others = [tuple(d[0].tolist()) for d in drawn]
    assert sum(ours) == OURS and chisquare(ours).pvalue > LEAST
    assert chi2_contingency([ours, [others.count(order) for order in orders]]).pvalue > LEAST


def test_angle_and_blur_are_distributed_as_torchvisions():
    spec = ViewSpec(rotation=15.0, blur=1.0, blur_sigma=(0.1, 2.0))
    p = ViewPlan(spec, 0).draw(0, np.arange(OURS), 0)
    torch.manual_seed(0)
    assert same(p.angle, np.array([RandomRotation.get_params([-15.0, 15.0]) for _ in range(THEIRS)])) > LEAST
    assert same(p.blur_sigma, np.array([GaussianBlur.get_params(0.1, 2.0) for _ in range(THEIRS)])) > LEAST


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_options_have_their_probabilities_and_are_independent(name):
    spec = ViewSpec.preset(name, solarize=0.2)
    p = ViewPlan(spec, 1).draw(3, np.arange(OURS), 1)
    chosen = {option: getattr(p, array) > 0 for option, array in FLAGS.items()}
    for option, flags in chosen.items():
        assert binomtest(int(flags.sum()), OURS, getattr(spec, option)).pvalue > LEAST, option
    varied = [option for option in FLAGS if 0 < getattr(spec, option) < 1]
    for a, b in itertools.combinations(varied, 2):
        counts = np.bincount(2 * chosen[a] + chosen[b], minlength=4).reshape(2, 2)
        assert chi2_contingency(counts).pvalue > LEAST, (a, b)


def test_views_epochs_seeds_and_neighbours_are_independent():
    """Correlations of n independent pairs have a standard deviation of 1 / sqrt(n); 5 of them are p = 6e-7."""
    ids = np.arange(OURS)
    base = ViewPlan(ViewSpec(), 0).draw(0, ids, 0)
    others = {
        "view": ViewPlan(ViewSpec(), 0).draw(0, ids, 1), "epoch": ViewPlan(ViewSpec(), 0).draw(1, ids, 0),
        "seed": ViewPlan(ViewSpec(), 1).draw(0, ids, 0), "sample": ViewPlan(ViewSpec(), 0).draw(0, ids + 1, 0),
    }  # fmt: skip
    for what, other in others.items():
        for name in ("brightness", "hue", "flip", "jitter"):
            assert abs(np.corrcoef(getattr(base, name), getattr(other, name))[0, 1]) < 5 * OURS**-0.5, (what, name)
        assert np.abs(np.corrcoef(base.box.T, other.box.T)[:4, 4:]).max() < 5 * OURS**-0.5, what


CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
RECIPE = {
    "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5, "rotation": 0.0, "jitter": 0.8, "brightness": 0.4,
    "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2, "blur": 0.0, "blur_sigma": (0.1, 2.0),
    "blur_kernel": 3, "solarize": 0.0, "eval_crop": 1.0,
}  # fmt: skip
STRONG = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
RECIPES = {
    "cifar": RECIPE | CIFAR | {"size": 32},
    "tiny-imagenet": RECIPE | IMAGENET | {"size": 64},
    # Evaluation takes 224 of 256 pixels.
    "imagenet": RECIPE | IMAGENET | STRONG | {
        "size": 224, "jitter": 1.0, "blur": 0.1, "blur_sigma": (1.5, 1.5), "eval_crop": 224 / 256},
    "simclr": RECIPE | IMAGENET | STRONG | {"size": 224, "blur": 0.5, "blur_kernel": 23, "eval_crop": 224 / 256},
    "characters": RECIPE | {
        "size": 28, "scale": (0.4, 1.0), "flip": 0.0, "rotation": 15.0, "jitter": 0.0, "grayscale": 0.0,
        "mean": (0.5,), "std": (0.5,)},
}  # fmt: skip


def test_presets_are_the_recipes_field_by_field():
    assert {name: dataclasses.asdict(spec) for name, spec in PRESETS.items()} == RECIPES


def test_views_are_these_on_every_machine():
    spec = ViewSpec.preset("simclr", solarize=0.2, rotation=30.0)
    p = ViewPlan(spec, 0x0123456789ABCDEF).draw(
        7, np.array([0, 4_000_000_000, 49_999]), 1, np.array([[400, 533], [32, 32], [10, 100]])
    )
    assert p.box.tolist() == [[20, 5, 362, 415], [1, 0, 30, 30], [0, 44, 10, 13]]
    assert p.order.tolist() == [[1, 3, 2, 0], [2, 1, 3, 0], [3, 1, 2, 0]]
    assert (p.flip.tolist(), p.jitter.tolist()) == ([False, True, False], [True, False, True])
    assert not p.grayscale.any() and not p.solarize.any()
    exact = {  # sums and products alone, which every machine rounds alike
        "brightness": [0.3176301002502441, 1.6256864547729493, 0.402712345123291],
        "contrast": [1.0286282539367675, 0.6731657028198241, 1.3077277183532714],
        "saturation": [1.0112393379211426, 0.7377312660217284, 1.6358885765075684],
        "hue": [0.09518742561340332, -0.026233482360839847, 0.13774988651275635],
        "angle": [-16.965969800949097, 14.15122389793396, -24.9502694606781],
        "blur_sigma": [0.0, 1.9192098736763001, 0.43688082695007324],
    }
    assert {name: getattr(p, name).tolist() for name in exact} == exact


def test_many_samples_are_the_same_views_in_little_memory():
    n = 50 * plan_module._CHUNK + 1
    ids, plan = np.arange(n) * 7, ViewPlan(ViewSpec.preset("simclr"), 2)
    sizes = np.random.default_rng(0).integers(1, 400, (n, 2))
    tracemalloc.start()
    try:
        whole = plan.draw(5, ids, 1, sizes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    fields = [f.name for f in dataclasses.fields(whole)]
    result = sum(getattr(whole, name).nbytes for name in fields)
    # The parts, their concatenation, and the words of one part; all words at once would be nine times the result.
    assert result < peak < 2.3 * result
    order = np.random.default_rng(1).permutation(n)[: 2 * plan_module._CHUNK]
    shuffled = plan.draw(5, ids[order], 1, sizes[order])
    for name in fields:
        assert np.array_equal(getattr(whole, name)[order], getattr(shuffled, name)), name


def test_no_samples_are_no_views_and_sizes_must_be_one_each():
    plan = ViewPlan(ViewSpec(), 0)
    empty = plan.draw(0, np.arange(0), 0, np.zeros((0, 2), np.int64))
    assert len(empty) == 0 and empty.box.shape == (0, 4) and empty.order.shape == (0, 4)
    for shape in ((1, 2), (3,), (3, 3)):
        with pytest.raises(FastclError, match=r"sizes must have shape \(3, 2\), got"):
            plan.draw(0, np.arange(3), 0, np.ones(shape, np.int64))
