"""Sources that other formats back: .npz archives and torchvision's data sets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_images import check_shapes, noise, pixels_by_id, png, write_tree
from torchvision import datasets

from fastcl.data.sources.load import load
from fastcl.errors import FastclError

SIDE = 105


def omniglot_arrays(n_classes: int = 4, per_class: int = 5) -> tuple[dict[str, np.ndarray], np.ndarray]:
    ink = np.random.default_rng(0).random((n_classes * per_class, SIDE, SIDE)) < 0.1
    return {
        "ink_bits": np.packbits(ink, axis=2),
        "label": np.repeat(np.arange(n_classes, dtype=np.int16), per_class),
        "class_names": np.array([f"alphabet/{c}" for c in range(n_classes)]),
    }, ink


def cifar_arrays(images: list[bytes], label: list[int], split: list[int]) -> dict[str, np.ndarray]:
    return {
        "jpeg": np.frombuffer(b"".join(images), np.uint8),
        "offset": np.cumsum([0, *map(len, images)]),
        "label": np.array(label, np.int16),
        "split": np.array(split, np.uint8),
        "class_names": np.array(["cat", "dog"]),
    }


def small_cifar() -> dict[str, np.ndarray]:
    return cifar_arrays([png(noise(i, 32, 32)) for i in range(8)], [0, 0, 0, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1, 1])


def save(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)
    return path


class TestOmniglot:
    def test_ink_is_bright_on_zero(self, tmp_path):
        arrays, ink = omniglot_arrays()
        data = load(f"omniglot:{save(tmp_path / 'o.npz', arrays)}")
        check_shapes(data)
        assert (data.channels, len(data.train), len(data.test)) == (1, 16, 4)
        for i, image in pixels_by_id(data).items():
            np.testing.assert_array_equal(image[..., 0], ink[i] * 255)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"label": None}, r"missing arrays \['label'\].*class_names"),
            ({"ink_bits": np.zeros((20, 105, 13), np.uint8)}, r"\(n, 105, 14\).*\(20, 105, 13\)"),
            ({"ink_bits": np.zeros((20, 105, 14), np.int32)}, "int32"),
            (
                {"ink_bits": np.zeros((19, 105, 14), np.uint8)},
                r"label must be a \(19,\) array of integers, got \(20,\)",
            ),
            ({"label": np.zeros(20)}, "label must be .* integers.* float64"),
            ({"label": np.full(20, 4)}, r"label must be in \[0, 4\), got 4 to 4"),
            ({"label": np.full(20, -1)}, "got -1 to -1"),
            ({"label": np.array(["a"] * 20)}, "integers.*<U1"),
            ({"label": np.array([None] * 20)}, "o.npz"),  # needs pickle, which is never allowed
            ({"label": np.r_[np.repeat([0, 1, 2], 6), 3, 3][:19].tolist() + [2]}, "'alphabet/3' has 1 images"),
        ],
    )
    def test_bad_archive(self, tmp_path, change, message):
        arrays = {**omniglot_arrays()[0], **change}
        path = save(tmp_path / "o.npz", {name: value for name, value in arrays.items() if value is not None})
        with pytest.raises(FastclError, match=message):
            load(f"omniglot:{path}")

    def test_archive_without_images(self, tmp_path):
        arrays = {name: value[:0] for name, value in omniglot_arrays()[0].items()}
        with pytest.raises(FastclError, match="o.npz contains no images"):
            load(f"omniglot:{save(tmp_path / 'o.npz', arrays)}")

    def test_truncated_or_corrupt_archive(self, tmp_path):
        whole = save(tmp_path / "o.npz", omniglot_arrays()[0]).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 0xFF
        for data in (whole[: len(whole) // 2], whole[:-1], bytes(flipped), b"", b"not an archive"):
            (tmp_path / "broken.npz").write_bytes(data)
            with pytest.raises(FastclError, match="broken.npz as an .npz archive"):
                load(f"omniglot:{tmp_path / 'broken.npz'}")


class TestCifar10:
    def test_official_split_and_pixels(self, tmp_path):
        data = load(f"cifar10:{save(tmp_path / 'c.npz', small_cifar())}", test_fraction=0.9, seed=8)
        check_shapes(data)
        assert data.train.ids.tolist() == [0, 1, 2, 3, 4, 5]
        assert data.test.ids.tolist() == [6, 7]
        assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert data.classes == ("cat", "dog")
        for i, image in pixels_by_id(data).items():
            np.testing.assert_array_equal(image, noise(i, 32, 32))

    def test_only_chosen_classes_are_decoded(self, tmp_path):
        images = [png(noise(i, 32, 32)) for i in range(6)]
        arrays = cifar_arrays(images[:4] + [b"broken", b"broken"], [0, 1, 0, 1, 2, 2], [0, 0, 1, 1, 0, 1])
        arrays["class_names"] = np.array(["cat", "dog", "eel"])
        source = f"cifar10:{save(tmp_path / 'c.npz', arrays)}"
        outcomes = {frozenset(classes_or_culprit(source, seed)) for seed in range(12)}
        assert outcomes == {frozenset({"cat", "dog"}), frozenset({"c.npz image 4"})}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"offset": np.arange(8)}, r"offset must be a \(9,\) array of integers, got \(8,\)"),
            ({"offset": np.zeros(9, np.int64)}, "offset must increase from 0"),
            ({"jpeg": np.zeros((2, 4), np.uint8)}, r"jpeg must be .*\(2, 4\)"),
            ({"jpeg": np.zeros(20, np.uint8)}, r"offset must be in \[0, 21\)"),
            ({"split": np.full(8, 2)}, r"split must be in \[0, 2\)"),
            ({"split": np.zeros(8, np.uint8)}, "class 'cat' has no test images"),
            ({"label": np.int64([0, 0, 0, 0, 0, 0, 0, 1])}, "class 'dog' has no training images"),
            ({"label": np.linspace(0, 1, 8)}, "label must be .* float64"),
        ],
    )
    def test_bad_archive(self, tmp_path, change, message):
        with pytest.raises(FastclError, match=message):
            load(f"cifar10:{save(tmp_path / 'c.npz', {**small_cifar(), **change})}")

    def test_corrupt_and_odd_sized_images_are_named(self, tmp_path):
        good = [png(noise(i, 32, 32)) for i in range(4)]
        for bad, message in ((good[3][:60], "c.npz image 3: "), (png(noise(0, 31, 32)), "image 3: .*got 31 x 32")):
            arrays = cifar_arrays([*good[:3], bad], [0, 1, 0, 1], [0, 0, 1, 1])
            with pytest.raises(FastclError, match=message):
                load(f"cifar10:{save(tmp_path / 'c.npz', arrays)}")


def classes_or_culprit(source: str, seed: int) -> tuple[str, ...]:
    """The two classes loaded, or the image that the error names."""
    try:
        return load(source, classes=2, seed=seed).classes
    except FastclError as error:
        return (str(error).split(":")[0],)


class Pictures:
    """A data set in torchvision's manner; image i of a part is the noise of its seed."""

    classes = ["ant", "bee"]

    def __init__(self, root: str, part: str):
        self.root = root
        self.base = {"train": 0, "test": 100, "val": 100}[part]

    def __len__(self) -> int:
        return 6 if self.base == 0 else 4

    def __getitem__(self, i: int):
        return Image.fromarray(noise(self.base + i)), i % 2


class ByTrain(Pictures):
    def __init__(self, root: str, train: bool = True, download: bool = False):
        if not download:
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        super().__init__(root, "train" if train else "test")


class BySplit(Pictures):
    def __init__(self, root: str, split: str = "train"):
        if split not in ("train", "val"):
            raise ValueError(f"Unknown value '{split}' for argument split")
        super().__init__(root, split)


class OnlyTrain(Pictures):
    def __init__(self, root: str, split: str = "train"):
        if split != "train":
            raise ValueError("no such split")
        super().__init__(root, split)


class Grey:
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int):
        return Image.fromarray(noise(i)[..., 0]), np.int64(i % 3)


class Boxes(Grey):
    def __getitem__(self, i: int):
        return Image.fromarray(noise(i)), {"box": (1, 2, 3, 4)} if i == 4 else 0


class Broken(Grey):
    def __getitem__(self, i: int):
        if i == 2:
            raise OSError("image file is truncated")
        return super().__getitem__(i)


class TestTorchvision:
    @pytest.fixture(autouse=True)
    def known(self, monkeypatch):
        for kind in (ByTrain, BySplit, OnlyTrain, Grey, Boxes, Broken):
            monkeypatch.setattr(datasets, kind.__name__, kind, raising=False)

    @pytest.mark.parametrize(("name", "download"), [("ByTrain", True), ("BySplit", False)])
    def test_official_split_by_either_argument(self, name, download):
        data = load(f"torchvision:{name}", root="somewhere", download=download)
        check_shapes(data)
        assert (data.name, data.classes, data.channels) == (name, ("ant", "bee"), 3)
        assert (data.train.ids.tolist(), data.test.ids.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9])
        np.testing.assert_array_equal(data.train.image(5), noise(5))
        np.testing.assert_array_equal(data.test.image(1), noise(101))

    def test_grey_pictures_have_one_channel_and_unnamed_classes_numbers(self):
        data = load("torchvision:Grey")
        check_shapes(data)
        assert (data.channels, data.classes, len(data.test)) == (1, ("0", "1", "2"), 3)
        assert all(np.array_equal(image, noise(i)[..., :1]) for i, image in pixels_by_id(data).items())

    def test_library_class_without_root(self):
        data = load("torchvision:FakeData", classes=2, seed=1)
        own = datasets.FakeData()
        assert data.train.sizes.tolist() == [[224, 224]] * len(data.train)
        position = int(data.train.ids[7])
        np.testing.assert_array_equal(data.train.image(7), np.array(own[position][0]))
        assert data.classes[data.train.labels[7]] == str(own[position][1])

    def test_library_class_with_a_loader(self, tmp_path):
        write_tree(tmp_path, {f"{c}/{i}.png": png(noise(i)) for c in "ab" for i in range(3)})
        data = load("torchvision:ImageFolder", root=str(tmp_path))
        check_shapes(data)
        assert data.classes == ("a", "b")
        np.testing.assert_array_equal(data.train.image(0), noise(int(data.train.ids[0]) % 3))

    @pytest.mark.parametrize(
        ("name", "root", "message"),
        [
            ("CIFAR1O", None, "no 'CIFAR1O'; did you mean 'CIFAR10'"),
            ("CIFAR10", None, "torchvision:CIFAR10 needs data.root"),
            ("ByTrain", "x", "torchvision:ByTrain: files are missing from data.root.*data.download = true"),
            ("OnlyTrain", "x", "torchvision:OnlyTrain: none of its possible test splits.*no such split"),
            ("Boxes", None, r"torchvision:Boxes item 4: .*integer label.*\(Image, \{'box'"),
            ("Broken", None, "torchvision:Broken item 2: OSError: image file is truncated"),
        ],
    )
    def test_errors_name_the_data_set(self, name, root, message):
        with pytest.raises(FastclError, match=message):
            load(f"torchvision:{name}", root=root)
