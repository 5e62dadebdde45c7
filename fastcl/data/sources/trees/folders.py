"""Image trees and zips of them: classes are folders, and images are decoded on access."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fastcl.data.limits import check_pixels
from fastcl.data.sources.opening import naming, open_image
from fastcl.data.sources.pixels import decode
from fastcl.data.sources.readers import Opened, Source
from fastcl.data.sources.trees.archives import Zip
from fastcl.data.sources.trees.disk import Tree
from fastcl.data.sources.trees.layouts import LEFT_OUT, official_splits
from fastcl.data.sources.trees.listing import extensions, mode_of
from fastcl.errors import FastclError, shown

_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"


def read_folder(path: Path, max_pixels: int) -> Source:
    """An image tree, or a zip of one. RGB; an image's class is the full path of its folder below the root.

    If all top-level folders are split names (train or training; test or testing; val, valid, validation, dev, eval or
    evaluation; unlabeled, unlabelled or unsupervised; upper or lower case), they are the official splits. They may lie
    below a single wrapping folder. The test images are those of `test`, otherwise the validation images. Unlabeled
    images are left out, and so are validation images if there is a test split.
    Sample ids count all images in the order of their sorted paths, including those of left-out splits. Hidden files and
    folders, macOS's resource forks and everything that this Pillow cannot decode are left out. What is left out is
    counted (`Source.left_out`), and every folder without a usable image is named.

    Folders that look like splits in another layout are refused rather than treated as classes. A name looks like a
    split if it is one of the words above, alone or followed by `-`, `_`, `.` or a digit (train_images, test-a,
    val2017); `trainer`, `valley` and `train station` do not. Refused are, at the top or below one wrapping folder:
        - two or more folders that all look like splits, but not in the layout above (no train, or train1, train2);
        - folders of two kinds (train and test, say) next to other folders, if one of the names is more than the word
          alone or both hold class folders; a folder of one kind that holds class folders named like those next to it;
          unlabeled next to classes;
        - folders that themselves hold train and test or validation folders (images/train, images/test, labels/train).
    Everything else is a class, such as `bus`, `train` and `test` with images directly in them.

    Raises:
        FastclError: not a folder or zip, no images, an image in no class folder, a class whose images cannot be decoded
            here, splits in another layout, or a training and a test split without a common class.
    """
    mode = mode_of(path, "folder or zip")
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise FastclError(f"{shown(path)} is a special file, neither a folder nor a zip")
    store = Tree(path, max_pixels) if stat.S_ISDIR(mode) else Zip(path, max_pixels)
    if not store.names:
        seen = "; it contains " + ", ".join(store.left_out.lines()) if store.left_out.lines() else ""
        raise FastclError(f"{shown(path)} contains no image files ({' '.join(extensions())}){seen}")
    folders = [name.split("/")[:-1] for name in store.names]
    depth, split = official_splits(str(path), folders)
    _count_left_out(store, folders, depth, split)
    used = [kind != LEFT_OUT for kind in split]
    bare = [i for i, folder in enumerate(folders) if used[i] and len(folder) <= depth]
    if bare:
        tops = ", ".join(sorted({folder[depth - 1] for folder in folders})) if depth else ""
        hint = f": {tops} are splits, whose images belong in SPLIT/CLASS/" if depth else ""
        raise FastclError(f"{store.label(bare[0])} is not in a class folder ({len(bare)} such images){hint}")
    classes = ["/".join(folder[depth:]) for folder in folders]
    names = sorted({name for name, use in zip(classes, used, strict=True) if use})
    index = {name: i for i, name in enumerate(names)}
    labels = np.array([index[name] if use else -1 for name, use in zip(classes, used, strict=True)], np.int64)
    test = np.array([kind == "test" for kind in split]) if "test" in split else None
    title = path.resolve().name if stat.S_ISDIR(mode) else path.stem
    opened = partial(_open_files, store, max_pixels)
    return Source(title, tuple(names), 3, labels, test, opened, store.left_out.lines())


def _count_left_out(store: Tree | Zip, folders: Sequence[Sequence[str]], depth: int, split: list[str]) -> None:
    for name, folder, kind in zip(store.names, folders, split, strict=True):
        if kind == LEFT_OUT:
            store.left_out.add(f"images of {folder[depth - 1]}/", name)


def _open_files(store: Tree | Zip, max_pixels: int, ids: np.ndarray) -> Opened:
    headers = [_header(store, max_pixels, i) for i in ids.tolist()]
    sizes = np.array([size for size, _ in headers], np.int64).reshape(len(ids), 2)
    jpeg = np.array([is_jpeg for _, is_jpeg in headers])
    return sizes, partial(_file_pixels, store, max_pixels, ids, sizes), partial(_jpeg_bytes, store, ids, jpeg)


def _header(store: Tree | Zip, max_pixels: int, i: int) -> tuple[tuple[int, int], bool]:
    """(height, width), and whether it is a grey or RGB JPEG. The size is (0, 0) if the header cannot be read or states
    more pixels than allowed; reading the image then raises the error."""
    try:
        with naming(store.label(i)), store.open(i) as file, open_image(file) as picture:
            check_pixels(picture, max_pixels)
            return (picture.height, picture.width), picture.format == "JPEG" and picture.mode in ("L", "RGB")
    except FastclError:
        return (0, 0), False


def _file_pixels(store: Tree | Zip, max_pixels: int, ids: np.ndarray, sizes: np.ndarray, i: int) -> np.ndarray:
    image = int(ids[i])
    with naming(store.label(image)):
        if not sizes[i].all():  # raise the header's error before unpacking the rest
            with store.open(image) as file, open_image(file) as picture:
                check_pixels(picture, max_pixels)
        with store.whole(image) as file, open_image(file) as picture:
            return decode(picture, 3, max_pixels)


def _jpeg_bytes(store: Tree | Zip, ids: np.ndarray, jpeg: np.ndarray, i: int) -> bytes | None:
    if not jpeg[i]:
        return None
    with naming(store.label(int(ids[i]))):
        data = store.data(int(ids[i]))
    return data if _has_end(data) else None


def _has_end(data: bytes) -> bool:
    """Whether an end marker follows a JPEG file's last scan, that is, the file is not truncated. Decoders that skip the
    rest of a file would not notice; the split's own reader reads it whole and reports the file."""
    return data.endswith(_JPEG_END) or data.rfind(_JPEG_END) > data.rfind(_JPEG_SCAN)
