"""What a folder or zip holds beside plain class folders: every file is taken, or counted and named."""

import json
import logging
import os
import socket
import zipfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from small_images import by_id, noise, png, write_tree, write_zip

from fastcl.data.sources.load import load
from fastcl.data.sources.trees import listing
from fastcl.errors import FastclError


def plain(*names, seed=0):
    return {name: png(noise(seed + k)) for k, name in enumerate(names)}


TWO = plain(*(f"{c}/{i}.png" for c in "ab" for i in range(2)))


@pytest.fixture(params=["tree", "zip"])
def make(request, tmp_path):
    if request.param == "tree":
        return lambda files: write_tree(tmp_path / "flowers", files)
    return lambda files: write_zip(tmp_path / "flowers.zip", files)


def classes_of(data, split):
    part = getattr(data, split)
    return [data.classes[c] for c in part.labels]


class TestSplits:
    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("name", ["unlabeled", "Unlabelled", "unsupervised"])
    def test_unlabeled_images_are_left_out_and_counted(self, make, caplog, name, flat):
        files = plain(*(f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "ab" for i in range(2)))
        files |= plain(*(f"{name}/{'' if flat else 'x/'}{i}.png" for i in range(5)), seed=20)
        data = load(make(files))
        assert data.classes == ("a", "b")
        order = sorted(files)
        assert [order[i].split("/")[0] for i in data.train.ids] == ["train"] * 4
        assert [order[i].split("/")[0] for i in data.test.ids] == ["test"] * 4
        (line,) = data.left_out
        assert line.startswith(f"5 images of {name}/ ({name}/") and f"left out {line}" in caplog.text

    def test_unlabeled_images_beside_training_images_alone(self, make):
        files = plain(*(f"{s}/{c}/{i}.png" for s in ("train", "unlabeled") for c in "ab" for i in range(4)))
        data = load(make(files), test_fraction=0.5)
        assert data.classes == ("a", "b") and len(data.train) == len(data.test) == 4
        assert all(sorted(files)[i].startswith("train/") for i in [*data.train.ids, *data.test.ids])

    def test_validation_images_beside_test_images_are_counted(self, make):
        files = plain(*(f"{s}/{c}/0.png" for s in ("train", "test", "val") for c in "ab"))
        assert load(make(files)).left_out == ("2 images of val/ (val/a/0.png, val/b/0.png)",)

    @pytest.mark.parametrize("other", ["extra/a/0.png", "preview.png", "extra/0.png"])
    def test_splits_beside_something_else_are_no_classes(self, make, other):
        files = plain(*(f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "ab" for i in range(2)), other)
        with pytest.raises(FastclError, match=r"look like splits.*1 images in '(extra|\.)'.*unlabeled"):
            load(make(files))

    def test_flat_splits_say_what_is_expected(self, make):
        with pytest.raises(
            FastclError, match=r"test/0.png is not in a class folder \(2 such.*: test, train are splits"
        ):
            load(make(plain("test/0.png", "test/1.png", "train/a/0.png", "train/a/1.png")))


class TestFilesThatAreNotTaken:
    def test_all_of_them_are_counted(self, make, caplog):
        extra = {"a/x.txt": b"x", "LICENSE": b"x", "a/._0.png": b"x", ".DS_Store": b"x", "a/raw.dng": b"x"}
        with caplog.at_level(logging.INFO, "fastcl"):
            data = load(make({**TWO, **extra}))
        assert set(data.left_out) == {
            "2 files that are not images (LICENSE, a/x.txt)",
            "2 hidden files or folders (.DS_Store, a/._0.png)",
            "1 images that this Pillow cannot decode (a/raw.dng)",
        }
        levels = {r.message: r.levelname for r in caplog.records}
        assert all(f"flowers: left out {line}" in levels for line in data.left_out)
        assert [m for m, level in levels.items() if level == "WARNING"] == [
            "flowers: left out 1 images that this Pillow cannot decode (a/raw.dng)"
        ]

    def test_a_class_that_cannot_be_decoded_does_not_vanish(self, make):
        files = {**TWO, "c/0.HEIC": b"x", "c/1.heif": b"x", "d/0.heif": b"x"}
        with pytest.raises(FastclError, match=r"all images of 'c', 'd' are .HEIC, .heif, which .*\(3 such images\)"):
            load(make(files))

    @pytest.mark.parametrize("extension", ["jfif", "jpe", "avif", "jp2", "tga", "pnm", "dib"])
    def test_what_pillow_decodes_is_taken(self, make, extension):
        if f".{extension}" not in listing.extensions():
            pytest.skip(f"this Pillow does not decode .{extension}")
        buffer = BytesIO()
        Image.fromarray(noise(1)).save(buffer, Image.registered_extensions()[f".{extension}"])
        data = load(make({**TWO, **{f"c/{i}.{extension}": buffer.getvalue() for i in range(2)}}))
        assert data.classes == ("a", "b", "c") and data.left_out == ()

    def test_avif_without_its_library(self, make, monkeypatch):
        monkeypatch.setattr(listing.features, "check", lambda name: name != "avif")
        with pytest.raises(FastclError, match="all images of 'c' are .avif"):
            load(make({**TWO, "c/0.avif": b"x"}))

    def test_no_images_at_all(self, make):
        with pytest.raises(
            FastclError, match=r"contains no image files .*; it contains 1 files that are not images \(a/x.txt\)"
        ):
            load(make({"a/x.txt": b"x"}))

    def test_special_files_are_never_opened(self, tmp_path):
        source = write_tree(tmp_path / "t", TWO)
        os.mkfifo(tmp_path / "t/a/pipe.png")
        os.symlink("pipe.png", tmp_path / "t/a/link.png")
        os.symlink("/dev/zero", tmp_path / "t/b/device.png")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "t/b/socket.png"))
            data = load(source)
        assert len(data.train) + len(data.test) == 4
        assert data.left_out == (
            "4 special files (pipes, sockets, devices) (a/link.png, a/pipe.png, b/device.png, ...)",
        )  # fmt: skip
        first = tmp_path / "t" / f"{classes_of(data, 'train')[0]}/{data.train.ids[0] % 2}.png"
        first.unlink()
        os.mkfifo(first)  # what was a file is a pipe by now: opening it must not wait for a writer
        with pytest.raises(FastclError, match="not a regular file"):
            data.train.image(0)
        for kind in ("folder", "omniglot", "cifar10"):
            with pytest.raises(FastclError, match="is a special file, n"):
                load(f"{kind}:{first}")


class TestLinks:
    def test_folders_that_link_to_each_other(self, tmp_path):
        source = write_tree(tmp_path, plain(*(f"{c}/{i}.png" for c in "ab" for i in range(3))))
        os.symlink("../b", tmp_path / "a/to_b")
        os.symlink("../a", tmp_path / "b/to_a")
        data = load(source)
        assert data.classes == ("a", "b") and len(data.train) + len(data.test) == 6
        assert data.left_out == ("2 links to files or folders that are already included (a/to_b, b/to_a)",)

    def test_two_links_to_one_folder(self, tmp_path):
        write_tree(tmp_path / "store", plain("x/0.png", "x/1.png", "y/0.png", "y/1.png"))
        (tmp_path / "links").mkdir()
        for name, target in (("a", "x"), ("b", "y"), ("c", "x")):
            os.symlink(tmp_path / "store" / target, tmp_path / "links" / name)
        data = load(f"folder:{tmp_path / 'links'}")
        assert data.classes == ("a", "b") and len(by_id(data)) == 4
        assert data.left_out == ("1 links to files or folders that are already included (c)",)

    def test_links_to_files(self, tmp_path):
        source = write_tree(tmp_path / "t", TWO)
        write_tree(tmp_path / "elsewhere", plain("far.png", seed=9))
        os.symlink("0.png", tmp_path / "t/a/twice.png")
        os.symlink("../../elsewhere/far.png", tmp_path / "t/b/far.png")
        os.symlink("../../elsewhere/far.png", tmp_path / "t/b/further.png")
        os.link(tmp_path / "t/a/0.png", tmp_path / "t/a/hard.png")  # a file like any other
        data = load(source)
        assert len(by_id(data)) == 6
        assert data.left_out == (
            "2 links to files or folders that are already included (a/twice.png, b/further.png)",
        )  # fmt: skip

    def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(self, tmp_path):
        source = write_tree(tmp_path, plain(*(f"{c}/{i}.png" for c in "ab" for i in range(8))))
        os.symlink("gone", tmp_path / "a/9.png")
        os.symlink("9.png", tmp_path / "b/9.png")  # to itself
        with pytest.raises(FastclError, match=r"a/9.png: FileNotFoundError"):
            load(source)
        assert list(load(source, corrupt="skip").skipped) == [8, 17]


class TestNames:
    def test_names_that_are_not_utf8_are_shown_escaped(self, tmp_path, caplog):
        for folder in (b"caf\xe9", b"tab\there\x1b[31m", "ž".encode()):
            os.makedirs(os.fsencode(tmp_path) + b"/" + folder)
            for i in range(3):
                with open(os.fsencode(tmp_path) + b"/" + folder + b"/\xff%d.png" % i, "wb") as file:
                    file.write(png(noise(i)))
        with open(os.fsencode(tmp_path) + b"/caf\xe9/\xff9.png", "wb") as file:
            file.write(b"no image")
        data = load(f"folder:{tmp_path}", corrupt="skip")
        assert data.classes == ("caf\\xe9", "tab\\there\\x1b[31m", "ž")
        (message,) = data.skipped.values()
        assert "caf\\xe9/\\xff9.png: " in message
        for text in (*data.classes, message, caplog.text, repr(data.left_out)):
            assert text.encode() and json.loads(json.dumps(text, ensure_ascii=False).encode()) == text

    @pytest.mark.parametrize("prefix", ["./", "", ".\\"])
    @pytest.mark.parametrize("separator", ["/", "\\"])
    def test_zips_of_other_programs(self, tmp_path, prefix, separator):
        files = {prefix + name.replace("/", separator): data for name, data in TWO.items()}
        data = load(write_zip(tmp_path / "z.zip", {**files, f"a{separator}": b""}))
        assert data.classes == ("a", "b") and data.left_out == ()
        for i, image in zip(data.train.ids, map(data.train.image, range(len(data.train))), strict=True):
            np.testing.assert_array_equal(image, noise(int(i)))

    @pytest.mark.parametrize("name", ["../a/0.png", "/a/0.png", "a/../../0.png", "C:\\a\\0.png", "\\a\\0.png"])
    def test_entries_outside_the_archive(self, tmp_path, name):
        with pytest.raises(FastclError, match="points outside the archive"):
            load(write_zip(tmp_path / "z.zip", {**TWO, name: png(noise(0))}))

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_entries_of_one_name_and_links(self, tmp_path):
        source = write_zip(tmp_path / "z.zip", TWO)
        link = zipfile.ZipInfo("a/link.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        with zipfile.ZipFile(tmp_path / "z.zip", "a") as archive:
            archive.writestr("a/0.png", png(noise(77)))
            archive.writestr(link, "0.png")
        data = load(source)
        assert set(data.left_out) == {
            "1 earlier versions of an entry (a/0.png)",
            "1 links and special files (a/link.png)",
        }
        images = [split.image(k) for split in (data.train, data.test) for k, i in enumerate(split.ids) if i == 0]
        np.testing.assert_array_equal(images[0], noise(77))


@pytest.mark.parametrize("kind", ["folder", "omniglot", "cifar10"])
@pytest.mark.parametrize(("where", "message"), [
    ("x" * 300, "cannot open xxx.*File name too long"), ("a\0b", "cannot open a.x00b"),
    ("~nobody_here/x", "nobody_here"),
])  # fmt: skip
def test_paths_that_cannot_be(kind, where, message):
    with pytest.raises(FastclError, match=message):
        load(f"{kind}:{where}")


@pytest.mark.parametrize(("options", "message"), [
    ({"source": 3}, "data.source must be a string, got 3"),
    ({"source": None}, "data.source must be a string, got None"),
    ({"root": np.datetime64("2024-01-01")}, "data.root must be a string"),
    ({"test_fraction": "0.2"}, "must be a number"),
    ({"max_pixels": 0}, r"data.max_pixels must be in \[1, "), ({"max_pixels": 1 << 40}, "Pillow refuses more"),
    ({"max_pixels": 1.5}, "data.max_pixels must be an integer"),
])  # fmt: skip
def test_values_of_another_type(options, message):
    with pytest.raises(FastclError, match=message):
        load(**{"source": "digits", **options})
