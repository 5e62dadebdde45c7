"""The published numbers are those that the figures show, and each belongs to the setting that it says."""

import pytest

from fastcl.errors import FastclError
from fastcl.paper import Curve, targets
from fastcl.paper.published import published, target_named

FIG2 = (10, 50, 90, 200, 400, 600, 800, 1000, 1200)
# Fig. 2 with three digits, as noted when it was read: data set and measure -> NSCL, SCL, CE.
LINES = {
    ("cifar100", "rsa"): (".942 .955 .942 .902 .854 .849 .842 .770 .686",
                          ".505 .506 .455 .275 .254 .193 .252 .238 .189",
                          ".530 .653 .681 .662 .702 .672 .668 .631 .623"),
    ("cifar100", "cka"): (".933 .939 .930 .903 .853 .833 .816 .785 .770",
                          ".445 .463 .260 .103 .079 .068 .090 .051 .077",
                          ".508 .567 .575 .609 .613 .596 .599 .576 .574"),
    ("tiny-imagenet", "rsa"): (".911 .943 .928 .820 .798 .806 .799 .807 .788",
                               ".417 .168 .039 .086 .083 .168 .158 .156 .170",
                               ".514 .408 .336 .439 .540 .554 .571 .554 .566"),
    ("tiny-imagenet", "cka"): (".914 .945 .940 .913 .900 .897 .880 .863 .843",
                               ".461 .335 .063 .058 .050 .044 .054 .047 .060",
                               ".468 .538 .522 .538 .575 .581 .529 .450 .474"),
    ("mini-imagenet", "rsa"): (".919 .962 .936 .859 .791 .785 .757 .740 .711",
                               ".361 .449 .277 .188 .263 .258 .187 .190 .180",
                               ".471 .681 .626 .567 .658 .656 .631 .602 .619"),
    ("mini-imagenet", "cka"): (".902 .946 .914 .872 .793 .755 .710 .647 .554",
                               ".259 .609 .458 .255 .188 .181 .113 .126 .138",
                               ".372 .621 .617 .646 .645 .639 .634 .620 .607"),
}  # fmt: skip
# Fig. 3: CKA of training and held-out images at a few epochs.
CELLS = {
    "mini-imagenet-50-classes": {10: (0.80, 0.80), 50: (0.97, 0.96), 1000: (0.77, 0.81)},
    "tiny-imagenet-5-classes": {10: (0.30, 0.71), 50: (0.21, 0.21), 1000: (0.63, 0.72)},
    "imagenet-1k-10-classes": {10: (0.64, 0.59), 50: (0.84, 0.83), 100: (0.80, 0.82)},
}
# Fig. 5: batch size -> RSA at epochs 30, 60, 100, 200.
BATCHES = {
    "mini-imagenet-linear-1024": (0.960, 0.953, 0.920, 0.845),
    "mini-imagenet-sqrt-512": (0.971, 0.982, 0.981, 0.982),
    "mini-imagenet-fourth-root-256": (0.9952, 0.994, 0.9926, 0.9923),
}


def test_fig_2_is_what_was_read():
    for (data, measure), rows in LINES.items():
        for model, row in zip(("nscl", "supcon", "ce"), rows, strict=True):
            target = targets()[data]
            curve = target.curve(measure, model, "test")
            assert curve.split == "train", "held-out curves of Fig. 2 were not read"
            for epoch, text in zip(FIG2, row.split(), strict=True):  # two readings of one picture
                assert abs(curve.points[epoch] - float(text)) < target.error, (data, measure, model, epoch)


def test_figs_3_and_5_are_what_was_read():
    for name, cells in CELLS.items():
        for k, split in enumerate(("train", "test")):
            target = targets()[name]
            curve = target.curve("cka", "nscl", split)
            assert curve.split == split
            assert all(abs(curve.points[epoch] - pair[k]) < target.error for epoch, pair in cells.items()), name
    for name, row in BATCHES.items():
        points = targets()[name].curve("rsa", "nscl", "test").points
        assert all(abs(points[e] - v) < targets()[name].error for e, v in zip((30, 60, 100, 200), row, strict=True))


def test_every_target_has_the_setting_that_its_name_says():
    found = targets()
    assert len(found) == 3 + 9 + 15 + 9 and list(found)[:3] == ["cifar100", "tiny-imagenet", "mini-imagenet"]
    for name, target in found.items():
        config, rest = target.config(), name.removeprefix(target.data).strip("-")
        assert name.startswith(target.data) and target.preset == target.data
        assert target.error == (0.02 if target.figure == "Fig. 3" else 0.003)
        assert config.data.classes in (None, target.classes)
        kind, _, number = rest.rpartition("-")
        if kind == "tau":
            assert config.train.temperature == float(number)
            assert any(curve.misplaced for curve in target.curves) == (number == "0.1")
        elif number == "classes":
            assert target.classes == int(kind)
        elif kind:
            power = {"linear": 1, "sqrt": 0.5, "fourth-root": 0.25}[kind]
            assert config.train.batch_size == int(number)
            assert config.optim.lr == pytest.approx(0.3 * int(number) ** power / 256, rel=1e-3)
        for curve in target.curves:
            assert list(curve.points) == sorted(curve.points) and all(0 < v <= 1 for v in curve.points.values())
    assert "training images unless" in published().about


def test_misplaced_points_are_in_no_comparison():
    for data, ends in (("cifar100", {200: 200, 300: 400}), ("mini-imagenet", {100: 200, 200: 400})):
        late = targets()[f"{data}-tau-0.1"].curve("rsa", "nscl", "test")
        assert max(late.points) == 90 and late.at(200) is None
        there = targets()[data].curve("rsa", "nscl", "test").points
        error = targets()[data].error
        assert all(abs(late.misplaced[drawn] - there[epoch]) < error for drawn, epoch in ends.items()), data


def test_values_lie_between_published_epochs_alone():
    curve = Curve("cka", "nscl", "train", {10: 0.8, 20: 0.6, 50: 0.9})
    assert [curve.at(e) for e in (10, 20, 50)] == [0.8, 0.6, 0.9]
    assert curve.at(15) == pytest.approx(0.7) and curve.at(30) == pytest.approx(0.7)
    assert curve.at(9) is None and curve.at(51) is None


def test_an_unknown_target_is_told_the_nearest():
    with pytest.raises(FastclError, match="--target: unknown target 'cifar-100'; did you mean 'cifar100'"):
        target_named("cifar-100")
