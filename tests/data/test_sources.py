"""Which classes and splits a source gives, what broken requests answer, and the real data sets."""

import pickle
import time

import numpy as np
import pytest
from small_images import by_id, check_shapes, pixels_by_id

from fastcl.data.philox import Stream, words
from fastcl.data.sources.load import load
from fastcl.data.sources.subset import subsample
from fastcl.errors import FastclError


class TestClassesAndSplits:
    def test_digits_are_scikit_learns(self):
        from sklearn.datasets import load_digits

        data, digits = load("digits"), load_digits()
        check_shapes(data)
        assert (data.name, data.channels, data.classes) == ("digits", 1, tuple("0123456789"))
        assert sorted([*data.train.ids, *data.test.ids]) == list(range(1797))
        for split in (data.train, data.test):
            np.testing.assert_array_equal(split.labels, digits.target[split.ids])
            stack = np.stack([split.image(k)[..., 0] for k in range(len(split))])
            assert np.abs(stack - digits.images[split.ids] * 255 / 16).max() <= 0.5
            assert (stack.min(), stack.max()) == (0, 255)

    @pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.999])
    def test_drawn_split_is_the_smallest_words_of_each_class(self, fraction):
        from sklearn.datasets import load_digits

        target = load_digits().target
        keys = words(2, seed=3, stream=Stream.SPLIT, index=np.arange(len(target))).tolist()
        expected = set()
        for digit in range(10):
            members = sorted(np.flatnonzero(target == digit).tolist(), key=lambda i: keys[i])
            expected |= set(members[: min(max(round(fraction * len(members)), 1), len(members) - 1)])
        assert set(load("digits", seed=3, test_fraction=fraction).test.ids.tolist()) == expected

    def test_larger_test_fraction_contains_a_smaller_one_and_the_seed_matters(self):
        small, large, other = (load("digits", test_fraction=f, seed=s) for f, s in ((0.1, 0), (0.3, 0), (0.1, 1)))
        assert set(small.test.ids) < set(large.test.ids)
        assert set(small.test.ids) != set(other.test.ids)

    def test_class_subsets_are_nested(self):
        subsets = {k: load("digits", classes=k, seed=5) for k in (2, 3, 7, 10)}
        for k, data in subsets.items():
            assert data.classes == subsets[10].classes[:k]
            kept = {i: fact for i, fact in by_id(subsets[10]).items() if fact[0] in data.classes}
            assert by_id(data) == kept, "ids, names and split do not depend on the other classes taken"
        whole, three = pixels_by_id(subsets[10]), pixels_by_id(subsets[3])
        assert all(np.array_equal(image, whole[i]) for i, image in three.items())
        labels = {int(i): int(c) for i, c in zip(subsets[10].train.ids, subsets[10].train.labels, strict=True)}
        assert all(
            labels[int(i)] == c for i, c in zip(subsets[3].train.ids, subsets[3].train.labels.tolist(), strict=True)
        )

    def test_class_choice_is_seeded_but_all_classes_keep_the_sources_order(self):
        assert len({load("digits", classes=4, seed=s).classes for s in range(4)}) > 1
        assert load("digits", seed=9).classes == tuple("0123456789")
        assert load("digits", classes=10, seed=9).classes != tuple("0123456789")
        assert by_id(load("digits", seed=9)) == by_id(load("digits", classes=10, seed=9))

    @pytest.mark.parametrize("classes", [0, 1, -3, 11, 2.0, True, "3"])
    def test_impossible_class_count(self, classes):
        with pytest.raises(FastclError, match=rf"\[2, 10\].*got {classes!r}"):
            load("digits", classes=classes)

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
    def test_impossible_test_fraction(self, fraction):
        with pytest.raises(FastclError, match=f"test_fraction.*{fraction}"):
            load("digits", test_fraction=fraction)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("digit", "'digit'.*digits"),
            ("cifar:x.npz", "cifar10"),
            ("", "unknown source ''.*folder"),
            ("digits:x", "takes no path, got 'x'"),
            ("omniglot", "needs a path: 'omniglot:...'"),
            ("torchvision:", "needs a name"),
            ("omniglot:nowhere/o.npz", "data.source: no such file: nowhere/o.npz"),
            ("cifar10:nowhere/c.npz", "data.source: no such file: nowhere/c.npz"),
            ("folder:nowhere/tree", "data.source: no such folder or zip: nowhere/tree"),
            ("some/tree", r"did you mean 'folder:some/tree'\?$"),
            ("../o.npz", r"did you mean 'omniglot:../o.npz' or 'cifar10:../o.npz'\?$"),
        ],
    )
    def test_source_that_is_not_there(self, source, message):
        with pytest.raises(FastclError, match=message):
            load(source)

    def test_position_outside_the_split(self):
        split = load("digits").test
        for i in (-1, len(split)):
            with pytest.raises(FastclError, match=rf"position of an image must be in \[0, {len(split)}\), got {i}"):
                split.image(i)

    def test_images_are_the_callers_own(self):
        split = load("digits").train
        first = split.image(0)
        before = first.copy()
        first[:] = 77
        np.testing.assert_array_equal(split.image(0), before)


class TestRealData:
    def test_omniglot_subset_is_quick_and_small(self, data_path):
        source = f"omniglot:{data_path('omniglot_105.npz')}"
        start = time.process_time()
        data = load(source, classes=200)
        assert time.process_time() - start < 3
        assert (len(data.classes), len(data.train), len(data.test)) == (200, 3200, 800)
        assert (np.bincount(data.test.labels) == 4).all()
        assert len(pickle.dumps(data)) < 4000 * (105 * 14 + 100)
        image = data.train.image(0)
        assert image.shape == (105, 105, 1)
        assert set(np.unique(image)) == {0, 255}
        assert (image > 0).mean() < 0.2, "ink is the bright, rare value"
        assert set(load(source, classes=20).classes) < set(data.classes)

    def test_cifar10(self, data_path):
        data = load(f"cifar10:{data_path('cifar10_jpeg75.npz')}", classes=2)
        assert (len(data.train), len(data.test), data.channels) == (10000, 2000, 3)
        assert data.train.sizes.max() == data.train.sizes.min() == 32
        assert data.test.ids.min() >= 50000

    def test_fruits_are_split_by_class(self, data_path):
        data = load(f"folder:{data_path('fruits65.zip')}")
        assert (data.name, len(data.classes)) == ("fruits65", 65)
        assert "Apple/Apple 10" in data.classes
        assert (np.bincount(data.train.labels) == 40).all()
        assert (np.bincount(data.test.labels) == 10).all()
        assert data.test.image(11).shape == (100, 100, 3)
        assert data.test.image(11)[0, 0].min() > 240, "the fruits stand before white"

    def test_clothing_has_official_splits(self, data_path):
        data = load(f"folder:{data_path('clothing10.zip')}", test_fraction=0.5)
        assert (len(data.classes), len(data.train), len(data.test)) == (10, 1435, 372)
        assert data.train.image(0).shape == (*data.train.sizes[0], 3)
        assert data.train.ids.min() == 372, "test/ sorts before train/"


class TestSubsample:
    @pytest.mark.parametrize("count", [1, 7, 10, 100, 359])
    def test_shares_of_the_classes_are_kept_and_images_are_theirs(self, count):
        whole = load("digits", seed=3).test
        some = subsample(whole, count, seed=3)
        assert len(some) == count and set(some.ids) <= set(whole.ids) and list(some.ids) == sorted(some.ids)
        counts, sizes = (np.bincount(split.labels, minlength=10) for split in (some, whole))
        assert np.abs(counts - count * sizes / len(whole)).max() < 1
        where = np.searchsorted(whole.ids, some.ids)
        np.testing.assert_array_equal(some.labels, whole.labels[where])
        np.testing.assert_array_equal(some.sizes, whole.sizes[where])
        for k in (0, count - 1):
            np.testing.assert_array_equal(some.image(k), whole.image(int(where[k])))
            assert some.file(k) is None
        with pytest.raises(FastclError, match=rf"in \[0, {count}\), got {count}"):
            some.image(count)

    def test_a_larger_count_contains_a_smaller_one_and_the_seed_matters(self):
        whole = load("digits", seed=3).test
        small, large = (set(subsample(whole, count, seed=3).ids) for count in (50, 51))
        assert small < large and small != set(subsample(whole, 50, seed=4).ids)
        assert subsample(whole, len(whole), seed=3) is whole and subsample(whole, 10**9, seed=3) is whole
