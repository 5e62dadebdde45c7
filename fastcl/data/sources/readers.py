"""Readers of image collections: every image and label of a source, before classes and splits are chosen.

A reader returns a `Source`; `fastcl.data.sources.load` chooses classes and splits, and only then are pixels read.
The reader of image trees and zips is in `fastcl.data.sources.trees.folders`.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from fastcl.data.limits import check_pixels
from fastcl.data.sources.opening import check_zip, naming, open_image
from fastcl.data.sources.pixels import decode
from fastcl.data.sources.trees.listing import check_file
from fastcl.errors import FastclError, install_hint, shown, suggest

OMNIGLOT_SIDE = 105
CIFAR_SIDE = 32
_GREY_MODES = {"1", "L", "I;16", "I;16B"}
_NAME_BYTES = 4096  # longest class name in an archive
_TEST_SPLITS = ("test", "val", "valid")

Read = Callable[[int], np.ndarray]
Encoded = Callable[[int], bytes | None]
Opened = tuple[np.ndarray, Read, Encoded | None]


@dataclass(frozen=True, eq=False)
class Source:
    """Every image of a collection, unopened.

    Attributes:
        name: name in reports.
        classes: class names in the source's own order.
        channels: 1 or 3.
        labels: (n,) int64 positions in `classes`, or -1 for images that no split uses; the row is the sample id.
        test: (n,) bool, the official test images; None if the source has no split of its own.
        open: (m,) int64 sample ids -> their (m, 2) int64 heights and widths, a function that reads the i-th of them,
            and for sources of files a function that returns the i-th as JPEG bytes (None if not a JPEG), else None.
        left_out: descriptions of what was found but is not part of the collection -> whether to warn about it.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    labels: np.ndarray
    test: np.ndarray | None
    open: Callable[[np.ndarray], Opened]
    left_out: Mapping[str, bool] = field(default_factory=dict)


def read_digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8, rescaled from 0..16 to 0..255. No official split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FastclError(f"source 'digits' needs scikit-learn ({install_hint('train')})") from error
    digits = cast(Any, load_digits())  # its declared type depends on an argument
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    names = tuple(str(name) for name in digits.target_names)
    return Source("digits", names, 1, digits.target.astype(np.int64), None, partial(_open_digits, pixels))


def read_omniglot(path: Path) -> Source:
    """An .npz with `ink_bits` (n, 105, 14) uint8 (rows packed to bits, 1 = ink), `label` and `class_names`.

    Images stay packed (1.5 kB each) and are unpacked on access: ink is 255 on 0, so that padding with zeros is
    background. The archive's background and evaluation sets divide classes, not images, so there is no official split.
    """

    def check(bits: _Header, label: _Header, names: _Header) -> None:
        if bits.shape[1:] != (OMNIGLOT_SIDE, -(-OMNIGLOT_SIDE // 8)) or bits.dtype != np.uint8:
            raise FastclError(f"{shown(path)}: ink_bits must be a (n, 105, 14) uint8 array, got {bits}")
        _check_integers(path, "label", label, bits.shape[0])
        _check_names(path, names)

    bits, label, names = _arrays(path, check, "ink_bits", "label", "class_names")
    labels = _checked(path, "label", label, len(names))
    return Source("omniglot", tuple(map(str, names)), 1, labels, None, partial(_open_ink, bits))


def read_cifar10(path: Path) -> Source:
    """An .npz with `jpeg` (encoded images end to end), `offset` (n + 1,), `label`, `split` (1 = test), `class_names`.

    All images are 32 x 32. Those of the chosen classes are decoded when a split is opened and kept as uint8.
    """

    def check(jpeg: _Header, offset: _Header, label: _Header, split: _Header, names: _Header) -> None:
        if len(jpeg.shape) != 1 or jpeg.dtype != np.uint8:
            raise FastclError(f"{shown(path)}: jpeg must be a (bytes,) uint8 array, got {jpeg}")
        if label.shape[0] > jpeg.shape[0]:
            raise FastclError(f"{shown(path)}: got {label.shape[0]} labels but only {jpeg.shape[0]} bytes of images")
        for name, header, more in (("offset", offset, 1), ("label", label, 0), ("split", split, 0)):
            _check_integers(path, name, header, label.shape[0] + more)
        _check_names(path, names)

    jpeg, offset, label, split, names = _arrays(path, check, "jpeg", "offset", "label", "split", "class_names")
    offset = _checked(path, "offset", offset, len(jpeg) + 1)
    if len(label) and (offset[0] != 0 or offset[-1] != len(jpeg) or np.diff(offset).min() < 1):
        raise FastclError(
            f"{shown(path)}: offset must increase from 0 to {len(jpeg)}, the bytes of jpeg, "
            f"got {offset[0]} to {offset[-1]}, smallest step {np.diff(offset).min()}"
        )
    labels = _checked(path, "label", label, len(names))
    test = _checked(path, "split", split, 2) == 1
    return Source("cifar10", tuple(map(str, names)), 3, labels, test, partial(_open_jpegs, path, jpeg, offset))


def read_torchvision(name: str, root: str | None, download: bool, max_pixels: int) -> Source:
    """A torchvision data set by class name. Items must be (PIL image, int); each is visited once for label and size.

    The official split comes from the class's `train=` or `split=` argument (train and test, else val or valid); sample
    ids count the training images first. root and download are passed to classes that accept them. If the class accepts
    a `loader`, this visit reads only the headers of the files.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise FastclError(f"source 'torchvision:{name}' needs torchvision ({install_hint('train')})") from error
    known = {key: value for key, value in vars(datasets).items() if isinstance(value, type)}
    if name not in known:
        raise FastclError(f"torchvision.datasets has no {name!r}{suggest(name, known)}")
    parameters = inspect.signature(known[name]).parameters
    if "root" in parameters and root is None:
        raise FastclError(
            f"torchvision:{name} needs data.root, the folder of the data (data.download = true downloads it)"
        )
    offered = {"root": root, "download": download, "loader": open_image}
    options = {key: value for key, value in offered.items() if key in parameters}
    needed = [
        key
        for key, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if unknown := [key for key in needed if key not in (*options, "train", "split")]:
        raise FastclError(f"torchvision:{name} needs arguments that a config cannot provide: {', '.join(unknown)}")
    with naming(f"torchvision:{name}"):
        parts = _torchvision_parts(known[name], parameters, options)
    labels, sizes, channels = _visit(name, parts, max_pixels)
    first, count = len(parts[0]), int(labels.max(initial=-1)) + 1
    given = getattr(parts[0], "classes", None) or getattr(parts[0], "categories", None) or ()
    names = tuple(", ".join(c) if isinstance(c, tuple) else str(c) for c in given)
    if len(names) < count:
        names = tuple(str(c) for c in range(count))
    test = np.arange(len(labels)) >= first if len(parts) == 2 else None
    return Source(name, names, channels, labels, test, partial(_open_items, name, parts, sizes, channels, max_pixels))


def _arrays(path: Path, check: Callable[..., None], *names: str) -> list[np.ndarray]:
    """The named arrays of an .npz archive; `check` gets their shapes and dtypes before the data is read."""
    check_file(path, "an .npz archive")
    with naming(f"cannot read {path} as an .npz archive"), open(path, "rb") as file:
        check_zip(file)
        with np.load(file) as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise FastclError(f"missing arrays {missing}; it contains {sorted(archive.files)}")
            headers = [_npy_header(archive, name) for name in names]
    check(*headers)
    with naming(f"cannot read {path} as an .npz archive"), open(path, "rb") as file, np.load(file) as archive:
        return [np.atleast_1d(archive[name]) for name in names]


@dataclass(frozen=True)
class _Header:
    """Shape and dtype of an array in an archive, from its header."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


def _npy_header(archive: Any, name: str) -> _Header:
    with archive.zip.open(f"{name}.npy" if f"{name}.npy" in archive.zip.namelist() else name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.hasobject:
        raise FastclError(f"{name} contains Python objects, which are never loaded")
    return _Header(shape or (1,), dtype)


def _check_integers(path: Path, name: str, header: _Header, count: int) -> None:
    if header.dtype.kind not in "iu" or header.shape != (count,):
        raise FastclError(f"{shown(path)}: {name} must be a ({count},) array of integers, got {header}")


def _check_names(path: Path, header: _Header) -> None:
    if len(header.shape) != 1 or header.dtype.kind not in "US" or header.dtype.itemsize > _NAME_BYTES:
        raise FastclError(f"{shown(path)}: class_names must be a list of names, got {header}")


def _checked(path: Path, name: str, values: np.ndarray, bound: int) -> np.ndarray:
    """An archive's integers as (n,) int64, checked to lie in [0, bound)."""
    if len(values) and not (0 <= values.min() and values.max() < bound):
        raise FastclError(f"{shown(path)}: {name} must be in [0, {bound}), got {values.min()} to {values.max()}")
    return values.astype(np.int64)


def _open_digits(pixels: np.ndarray, ids: np.ndarray) -> Opened:
    return _equal_sizes(len(ids), pixels.shape[1]), partial(_copy, pixels[ids]), None


def _open_ink(bits: np.ndarray, ids: np.ndarray) -> Opened:
    return _equal_sizes(len(ids), OMNIGLOT_SIDE), partial(_ink, bits[ids]), None


def _open_jpegs(path: Path, jpeg: np.ndarray, offset: np.ndarray, ids: np.ndarray) -> Opened:
    pixels = np.empty((len(ids), CIFAR_SIDE, CIFAR_SIDE, 3), np.uint8)
    for row, i in zip(pixels, ids.tolist(), strict=True):
        with naming(f"{path.name} image {i}"), open_image(io.BytesIO(jpeg[offset[i] : offset[i + 1]])) as picture:
            if picture.size != (CIFAR_SIDE, CIFAR_SIDE):
                raise FastclError(f"must be {CIFAR_SIDE} x {CIFAR_SIDE}, got {picture.height} x {picture.width}")
            row[:] = decode(picture, 3)
    return _equal_sizes(len(ids), CIFAR_SIDE), partial(_copy, pixels), None


def _equal_sizes(count: int, side: int) -> np.ndarray:
    return np.full((count, 2), side, np.int64)


def _copy(pixels: np.ndarray, i: int) -> np.ndarray:
    return pixels[i].copy()


def _ink(bits: np.ndarray, i: int) -> np.ndarray:
    return np.unpackbits(bits[i], axis=1, count=OMNIGLOT_SIDE)[..., None] * np.uint8(255)


def _torchvision_parts(kind: type, parameters: Any, options: dict[str, Any]) -> list[Any]:
    """The data set's training and test parts, or its only part if it has no split of its own."""
    if "train" in parameters:
        return [kind(train=True, **options), kind(train=False, **options)]
    if "split" not in parameters:
        return [kind(**options)]
    default = parameters["split"].default
    train = default if isinstance(default, str) and default.startswith("train") else "train"
    first = kind(split=train, **options)
    reasons = []
    for split in _TEST_SPLITS:
        try:
            return [first, kind(split=split, **options)]
        except ValueError as error:  # torchvision raises this for a split that does not exist
            reasons.append(f"{split}: {error}")
    raise FastclError(f"none of its possible test splits could be opened ({'; '.join(reasons)})")


def _visit(name: str, parts: list[Any], max_pixels: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(n,) labels and (n, 2) sizes of all items of all parts, and the channel count."""
    labels, sizes, modes = [], [], set()
    for i in range(sum(map(len, parts))):
        with naming(f"torchvision:{name} item {i}"):
            picture, label = _item(parts, i)
            if not isinstance(picture, Image.Image) or not isinstance(label, (int, np.integer)) or label < 0:
                raise FastclError(f"must be (PIL image, integer label >= 0), got ({type(picture).__name__}, {label!r})")
            check_pixels(picture, max_pixels)
            with picture:
                sizes.append((picture.height, picture.width))
                modes.add(picture.mode)
            labels.append(int(label))
    shape = (len(labels), 2)
    return np.array(labels, np.int64), np.array(sizes, np.int64).reshape(shape), 1 if modes <= _GREY_MODES else 3


def _item(parts: list[Any], i: int) -> Any:
    first = len(parts[0])
    return parts[0][i] if i < first else parts[1][i - first]


def _open_items(
    name: str, parts: list[Any], sizes: np.ndarray, channels: int, max_pixels: int, ids: np.ndarray
) -> Opened:
    return sizes[ids], partial(_item_pixels, name, parts, channels, max_pixels, ids), None


def _item_pixels(name: str, parts: list[Any], channels: int, max_pixels: int, ids: np.ndarray, i: int) -> np.ndarray:
    with naming(f"torchvision:{name} item {ids[i]}"), _item(parts, int(ids[i]))[0] as picture:
        return decode(picture, channels, max_pixels)
