"""Image trees and zips: layouts, official splits, damage, and the modes that a picture can have."""

import os
import pickle
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_images import by_id, check_shapes, noise, pixels_by_id, png, write_tree, write_zip

from fastcl.data.sources.load import load
from fastcl.data.sources.trees.listing import extensions
from fastcl.errors import FastclError


def flower_files(per_class: int = 4) -> dict[str, bytes]:
    """Three classes, one of them nested, and files that are no images; image k has the noise of seed k, in no order."""
    names = [f"{c}/{i}.png" for c in ("rose", "Daisy/wild one", "tulip") for i in range(per_class)]
    files = {name: png(noise(seed, 6 + seed)) for seed, name in enumerate(names)}
    others = ("LICENSE", "rose/readme.txt", ".cache/rose/9.png", "__MACOSX/rose/._0.png")
    return {**dict.fromkeys(others, b"not an image"), **files}


class TestFolders:
    @pytest.fixture(params=["tree", "stored", "deflated"])
    def make(self, request, tmp_path):
        """Writes files as a tree or a zip and gives the source string."""
        if request.param == "tree":
            return lambda files: write_tree(tmp_path / "flowers", files)
        method = zipfile.ZIP_STORED if request.param == "stored" else zipfile.ZIP_DEFLATED
        return lambda files: write_zip(tmp_path / "flowers.zip", files, method)

    def test_classes_are_folders_and_ids_are_sorted_positions(self, make):
        files = flower_files()
        data = load(make(files))
        check_shapes(data)
        assert (data.name, data.channels) == ("flowers", 3)
        assert data.classes == ("Daisy/wild one", "rose", "tulip")
        kept = sorted(name for name in files if name.endswith("png") and not name.startswith((".", "_")))
        assert sorted([*data.train.ids, *data.test.ids]) == list(range(12))
        for i, (name, _) in by_id(data).items():
            assert kept[i].rsplit("/", 1)[0] == name
        for i, image in pixels_by_id(data).items():
            np.testing.assert_array_equal(image, np.array(Image.open(BytesIO(files[kept[i]]))))

    def test_subset_keeps_ids(self, make):
        source = make(flower_files())
        whole, two = by_id(load(source)), load(source, classes=2)
        assert by_id(two) == {i: fact for i, fact in whole.items() if fact[0] in two.classes}
        assert len(two.train) + len(two.test) == 8

    @pytest.mark.parametrize("prefix", ["", "dataset-v2/"])
    def test_official_splits(self, make, prefix):
        names = [f"{split}/{c}/{i}.PNG" for split in ("Training", "test", "validation") for c in "ab" for i in range(2)]
        files = {prefix + name: png(noise(k)) for k, name in enumerate(names)}
        files[f"{prefix}validation/only here/0.png"] = png(noise(50))
        data = load(make(files), test_fraction=0.9)
        order = sorted(files)
        assert data.classes == ("a", "b")
        assert [order[i] for i in data.train.ids] == [prefix + name for name in names if name[0] == "T"]
        assert [order[i] for i in data.test.ids] == [prefix + name for name in names if name[0] == "t"]
        assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 0, 1, 1]

    def test_validation_serves_where_there_is_no_test(self, make):
        data = load(make({f"{s}/{c}/{i}.png": png(noise(i)) for s in ("train", "val") for c in "ab" for i in range(2)}))
        assert (data.train.ids.tolist(), data.test.ids.tolist()) == ([0, 1, 2, 3], [4, 5, 6, 7])

    def test_a_class_called_train_is_a_class(self, make):
        data = load(make({f"{c}/{i}.png": png(noise(i)) for c in ("bus", "train", "test") for i in range(2)}))
        assert data.classes == ("bus", "test", "train")

    def test_class_missing_from_an_official_split(self, make):
        names = ["train/a/0.png", "train/b/0.png", "test/a/0.png"]
        with pytest.raises(FastclError, match="class 'b' has no test images"):
            load(make({name: png(noise(0)) for name in names}))

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"LICENSE": b"x", "a/notes.txt": b"x"}, "contains no image files"),
            ({"0.png": b"x", "a/0.png": b"x"}, r"0.png is not in a class folder \(1 such"),
            ({"train/0.png": b"x", "test/a/0.png": b"x"}, r"train/0.png is not in a class folder"),
            ({"a/0.png": b"x", "b/0.png": b"x", "b/1.png": b"x"}, "class 'a' has 1 images: too few"),
        ],
    )
    def test_unusable_layout(self, make, files, message):
        with pytest.raises(FastclError, match=message):
            load(make(files))

    def test_corrupt_images_are_named(self, make):
        files = flower_files(2)
        good = files["rose/1.png"]
        with pytest.raises(FastclError, match="flowers(.zip!|/)rose/1.png: "):
            load(make({**files, "rose/1.png": b"no image at all"}))
        data = load(make({**files, "rose/1.png": good[:-30]}))  # a whole header, pixels cut off
        with pytest.raises(FastclError, match="flowers(.zip!|/)rose/1.png: "):
            pixels_by_id(data)

    def test_every_extension_in_any_case_is_read(self, make):
        buffers = {}
        for k, extension in enumerate(extensions()):
            buffer, grey = BytesIO(), extension in (".pgm", ".pbm")
            Image.fromarray(noise(k)).convert("L" if grey else "RGB").save(
                buffer, Image.registered_extensions()[extension]
            )
            buffers |= {f"{c}/{k}{extension.upper() if c == 'b' else extension}": buffer.getvalue() for c in "ab"}
        data = load(make(buffers))
        check_shapes(data)
        assert len(data.train) + len(data.test) == 2 * len(extensions())

    def test_threads_and_pickles_read_the_same(self, make):
        split = load(make({f"{c}/{i}.png": png(noise(i, 64, 64)) for c in "ab" for i in range(20)})).train
        expected = [split.image(k) for k in range(len(split))]
        jobs = list(range(len(split))) * 8
        with ThreadPoolExecutor(8) as pool:
            for k, image in zip(jobs, pool.map(split.image, jobs), strict=True):
                np.testing.assert_array_equal(image, expected[k])
        copy = pickle.loads(pickle.dumps(split))
        np.testing.assert_array_equal(copy.image(3), expected[3])

    def test_size_that_stands_far_into_the_file(self, tmp_path):
        buffer = BytesIO()
        Image.fromarray(noise(0, 210, 190)).save(buffer, "JPEG", icc_profile=b"p" * 200_000)
        with pytest.raises(OSError):
            Image.open(BytesIO(buffer.getvalue()[: 1 << 16]))
        data = load(write_zip(tmp_path / "x.zip", {f"{c}/{i}.jpg": buffer.getvalue() for c in "ab" for i in "01"}))
        assert data.train.sizes.tolist() == [[210, 190]] * 2
        assert data.train.image(0).shape == (210, 190, 3)

    def test_file_removed_after_loading(self, tmp_path):
        data = load(write_tree(tmp_path / "t", flower_files(2)))
        (tmp_path / "t/rose/0.png").unlink()
        with pytest.raises(FastclError, match=r"t/rose/0.png: FileNotFoundError"):
            pixels_by_id(data)

    def test_linked_folders_are_followed_but_not_in_circles(self, tmp_path):
        write_tree(tmp_path / "real", {f"{c}/{i}.png": png(noise(i)) for c in "ab" for i in range(2)})
        (tmp_path / "links").mkdir()
        for name, target in (("x", tmp_path / "real/a"), ("y", tmp_path / "real/b"), ("up", tmp_path / "links")):
            os.symlink(target, tmp_path / "links" / name)
        assert load(f"folder:{tmp_path / 'links'}").classes == ("x", "y")

    def test_damaged_zip(self, tmp_path):
        source = write_zip(tmp_path / "z.zip", flower_files(2))
        whole = (tmp_path / "z.zip").read_bytes()
        (tmp_path / "z.zip").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FastclError, match="cannot read .*z.zip as a zip"):
            load(source)
        with zipfile.ZipFile(BytesIO(whole)) as archive:
            offset = archive.getinfo("rose/1.png").header_offset
        pixel = whole.index(b"IDAT", offset) + 8
        (tmp_path / "z.zip").write_bytes(whole[:pixel] + bytes([whole[pixel] ^ 1]) + whole[pixel + 1 :])
        with pytest.raises(FastclError, match="z.zip!rose/1.png: .*checksum"):
            pixels_by_id(load(source))
        data = load(write_zip(tmp_path / "z.zip", flower_files(2)))
        (tmp_path / "z.zip").write_bytes(whole[:offset] + b"XX" + whole[offset + 2 :])
        with pytest.raises(FastclError, match="z.zip!rose/1.png: .*no zip entry at byte"):
            pixels_by_id(data)

    def test_zip_methods_that_are_not_read(self, tmp_path):
        with pytest.raises(FastclError, match=r"z.zip!.*: only unencrypted stored or deflated .* method 12"):
            load(write_zip(tmp_path / "z.zip", flower_files(2), zipfile.ZIP_BZIP2))
        source = write_zip(tmp_path / "z.zip", {"a/0.png": b"x"})
        data = bytearray((tmp_path / "z.zip").read_bytes())
        flags = data.index(b"PK\x01\x02") + 8
        data[flags : flags + 2] = struct.pack("<H", 1)
        (tmp_path / "z.zip").write_bytes(data)
        with pytest.raises(FastclError, match="z.zip!a/0.png: .* encrypted"):
            load(source)


class TestPictureModes:
    """Each mode's RGB by a formula of its own, at file level."""

    def read(self, tmp_path: Path, picture: Image.Image, extension: str, **options) -> np.ndarray:
        for c in "ab":
            for i in range(2):
                (tmp_path / c).mkdir(exist_ok=True)
                picture.save(tmp_path / c / f"{i}.{extension}", **options)
        return load(f"folder:{tmp_path}").train.image(0).astype(np.float64)

    def test_grey(self, tmp_path):
        grey = noise(0)[..., 0]
        assert np.array_equal(self.read(tmp_path, Image.fromarray(grey), "png"), np.stack([grey] * 3, -1))

    def test_grey_of_one_bit(self, tmp_path):
        ink = noise(0)[..., 0] > 100
        assert np.array_equal(self.read(tmp_path, Image.fromarray(ink), "png")[..., 1], ink * 255.0)

    def test_grey_of_sixteen_bits_is_scaled_not_clipped(self, tmp_path):
        grey = np.random.default_rng(0).integers(0, 65536, (6, 5)).astype(np.uint16)
        assert np.array_equal(self.read(tmp_path, Image.fromarray(grey), "png")[..., 2], grey // 256)

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_alpha_shows_white(self, tmp_path, mode):
        values = noise(1, channels=len(mode)).astype(np.float64)
        picture = Image.frombytes(mode, (5, 6), values.astype(np.uint8).tobytes())
        alpha = values[..., -1:] / 255
        expected = np.broadcast_to(values[..., :-1] * alpha + 255 * (1 - alpha), (6, 5, 3))
        assert np.abs(self.read(tmp_path, picture, "png") - expected).max() <= 1

    def test_palette_with_a_transparent_entry(self, tmp_path):
        index = (np.arange(30).reshape(6, 5) % 3).astype(np.uint8)
        picture = Image.frombytes("P", (5, 6), index.tobytes())
        colours = np.array([[10, 20, 30], [200, 100, 0], [1, 2, 3]])
        picture.putpalette(colours.ravel().tolist())
        shown = colours.copy()
        shown[1] = 255
        assert np.array_equal(self.read(tmp_path, picture, "png", transparency=1), shown[index])

    def test_cmyk(self, tmp_path):
        ink = noise(2, channels=4)
        values = 255.0 - ink
        expected = values[..., :3] * values[..., 3:] / 255
        assert np.abs(self.read(tmp_path, Image.frombytes("CMYK", (5, 6), ink.tobytes()), "tif") - expected).max() <= 1

    @pytest.mark.parametrize("dtype", [np.float32, np.int32])
    def test_thirty_two_bits_are_refused(self, tmp_path, dtype):
        with pytest.raises(FastclError, match=r"a/\d.tif: .*32-bit"):
            self.read(tmp_path, Image.fromarray(noise(0)[..., 0].astype(dtype)), "tif")
