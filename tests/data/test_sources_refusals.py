"""What broken or ambiguous data are answered: one line, in words of our own, that names the file or folder."""

import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from small_images import noise, png, write_tree, write_zip
from test_sources_bounds import chunk, read, tiff
from torchvision import datasets

from fastcl.data.sources.load import load
from fastcl.errors import FastclError

PNG = png(noise(0))


@pytest.fixture(params=["tree", "zip"])
def make(request, tmp_path):
    if request.param == "tree":
        return lambda files: write_tree(tmp_path / "flowers", files)
    return lambda files: write_zip(tmp_path / "flowers.zip", files)


def two_each(*folders: str) -> dict[str, bytes]:
    return {f"{folder}/{i}.png": PNG for folder in folders for i in range(2)}


def refusal(source: str, **options) -> str:
    with pytest.raises(FastclError) as caught:
        load(source, **options)
    return str(caught.value)


class TestLayouts:
    @pytest.mark.parametrize(("folders", "seen"), [
        (("train_images", "test_images", "unlabeled_images"), "'test_images', 'train_images', 'unlabeled_images'"),
        (("train_images/a", "test_images/a"), "'test_images', 'train_images'"),
        (("train_images", "test_images", "more"), "'test_images', 'train_images'"),
        (("a", "b", "test/a", "test/b"), "'test'"),
        (("val/a", "val/b", "test/a", "test/b"), "'test', 'val'"),
        (("train1", "train2", "test"), "'test', 'train1', 'train2'"),
        (("train-a", "train-b", "val"), "'train-a', 'train-b', 'val'"),
        (("images/train", "images/test", "labels/train", "labels/test"), "'images/test', 'images/train'"),
        (("bottle/train/good", "bottle/test/good", "screw/train/good"), "'bottle/test', 'bottle/train'"),
        (("set/train2017", "set/val2017"), "'train2017', 'val2017'"),
        (("train/a", "train/b", "test/c", "test/d", "other/x"), "'test', 'train'"),
        (("a", "b", "unlabeled"), "'unlabeled'"),
    ])  # fmt: skip
    def test_what_looks_like_splits_is_not_taken_for_classes(self, make, folders, seen):
        message = refusal(make(two_each(*folders)))
        assert f": {seen} look like splits in an unsupported layout" in message and "SPLIT/CLASS/image" in message

    @pytest.mark.parametrize("folders", [
        ("trainer", "testudo", "valley"), ("train station", "validator", "bus"), ("bus", "test", "train"),
        ("beaker", "test-tube"), ("test/a", "test/b"), ("vehicle/train", "vehicle/bus", "animal/dog"),
    ])  # fmt: skip
    def test_ordinary_names_stay_classes(self, make, folders):
        assert load(make(two_each(*folders))).classes == tuple(sorted(folders))

    def test_flat_validation_images(self, make):
        files = two_each("train/n01/images", "train/n02/images", "val/images", "test/images")
        message = refusal(make(files))
        assert "'test' is flat" in message and "'n01/images', 'n02/images'" in message
        assert "same classes in every split" in message


class TestLostFolders:
    def test_each_is_named(self, make, caplog):
        lost = {f"c{k}/0{ending}": b"x" for k, ending in enumerate((".ico", ".psd", ".svg", ".npy", ""))}
        data = load(make(two_each("a", "b") | lost))
        line = "5 folders without a usable image, which are no classes (c0, c1, c2, c3, c4)"
        assert line in data.left_out
        assert f"left out {line}" in [r.message for r in caplog.records if r.levelname == "WARNING"][0]

    def test_empty_and_inner_ones(self, tmp_path):
        source = write_tree(tmp_path, two_each("a/x", "b"))
        for name in ("empty", "a/y/z", ".hidden/w", "__MACOSX/b"):
            (tmp_path / name).mkdir(parents=True)
        expected = "2 folders without a usable image, which are no classes (a/y/z, empty)"
        assert expected in load(source).left_out

    def test_empty_ones_of_a_zip(self, tmp_path):
        files = two_each("a", "b") | {"empty/": b"", "c/.x": b"", "__MACOSX/d/._0.png": b""}
        left_out = load(write_zip(tmp_path / "z.zip", files)).left_out
        assert "2 folders without a usable image, which are no classes (c, empty)" in left_out

    def test_a_folder_of_links_to_what_is_taken(self, tmp_path):
        source = write_tree(tmp_path, two_each("a", "b"))
        (tmp_path / "c").mkdir()
        (tmp_path / "c/0.png").symlink_to("../a/0.png")
        assert "1 folders without a usable image, which are no classes (c)" in load(source).left_out


class TestMessages:
    @pytest.mark.parametrize("bad", ["a/new\nline.png", "a/new\rline.png"])
    def test_names_stay_on_one_line(self, make, bad):
        message = refusal(make(two_each("a", "b") | {bad: b"no image"}))
        assert ascii(bad)[1:-1] in message and message.isprintable()

    @pytest.mark.parametrize("kind", ["folder", "omniglot", "cifar10"])
    def test_paths_stay_on_one_line(self, kind, tmp_path):
        (tmp_path / "is\nx").mkdir()
        (tmp_path / "bad\nx").write_bytes(b"PK")
        for name in ("nope\nx", "is\nx", "bad\nx"):
            message = refusal(f"{kind}:{tmp_path / name}")
            assert "\\nx" in message and message.isprintable()

    def test_no_image_at_all(self, make):
        assert "b/1.png: cannot be decoded as an image;" in refusal(make(two_each("a", "b") | {"b/1.png": b"x"}))

    def test_more_pixels_than_pillow_opens(self, make):
        header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
        message = refusal(make(two_each("a", "b") | {"b/1.png": bomb}))
        most = f"{2 * Image.MAX_IMAGE_PIXELS:,}"
        assert f"b/1.png: has more than {most} pixels, the upper limit of data.max_pixels" in message

    def test_text_that_is_never_unpacked(self, make):
        text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2 << 20)))
        message = refusal(make(two_each("a", "b") | {"b/1.png": PNG[:33] + text + PNG[33:]}))
        assert "b/1.png: has more text metadata than Pillow decompresses" in message

    @pytest.mark.parametrize(
        ("data", "why"), [(b"", "the file is empty"), (b"no zip", "not a zip archive, or a truncated one (6 bytes)")]
    )
    def test_no_zip(self, tmp_path, data, why):
        (tmp_path / "z").write_bytes(data)
        for kind, what in (("folder", "a zip"), ("omniglot", "an .npz archive"), ("cifar10", "an .npz archive")):
            assert f"z as {what}: {why}" in refusal(f"{kind}:{tmp_path / 'z'}")

    def test_other_formats_are_not_tried(self, make, monkeypatch):
        started = []
        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: started.append(args))
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n%%EndComments\nshowpage\n%%EOF\n"
        message = refusal(make(two_each("a", "b") | {"b/1.jpg": eps}), corrupt="stop")
        assert "b/1.jpg: cannot be decoded as an image" in message and not started

    def test_torchvision_class_that_needs_more(self, monkeypatch):
        class Clips:
            def __init__(self, frames, split="train"):
                raise AssertionError

        monkeypatch.setattr(datasets, "Clips", Clips, raising=False)
        assert refusal("torchvision:Clips").endswith("needs arguments that a config cannot provide: frames")

    @pytest.mark.parametrize(("options", "message"), [
        ({"skipped": [1]}, r"skipped must map sample ids to reasons.*got \[1\]"),
        ({"skipped": {"1": "x"}}, "a sample id of skipped must be an integer"),
        ({"download": "x"}, "data.download must be true or false, got 'x'"),
    ])  # fmt: skip
    def test_types(self, options, message):
        with pytest.raises(FastclError, match=message):
            load("digits", **options)


def test_tiff_whose_zero_is_white(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (6, 5))
    black, white = (struct.pack("<HHII", 262, 4, 1, zero) for zero in (1, 0))
    data = tiff(values, "<").replace(black, white)
    np.testing.assert_array_equal(read(tmp_path, data, "tif")[..., 0], (65535 - values) // 256)


def test_a_dark_image_of_sixteen_bits_can_be_left_out(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (6, 5))
    files = {f"{c}/{i}.tif": tiff(values, "<") for c in "ab" for i in range(4)} | {"b/9.tif": tiff(values // 8, "<")}
    source = write_tree(tmp_path, files)
    assert list(load(source, corrupt="skip", test_fraction=0.5).skipped) == [8]
    whole = load(source)
    part = whole.train if 8 in whole.train.ids else whole.test
    with pytest.raises(
        FastclError, match=r"b/9.tif: .*save the image with 8 bits if it is just dark; corrupt=skip leaves out"
    ):
        part.image(part.ids.tolist().index(8))
