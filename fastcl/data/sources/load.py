"""Loads data sets by name. Images, classes and splits are a function of the source, the arguments and the seed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Literal

import numpy as np

from fastcl.config.settings import MAX_PIXELS
from fastcl.data.limits import check_max_pixels
from fastcl.data.philox import Stream, check_integer, permutation, words
from fastcl.data.sources.decode import unreadable
from fastcl.data.sources.readers import Source, read_cifar10, read_digits, read_omniglot, read_torchvision
from fastcl.data.sources.trees.folders import read_folder
from fastcl.errors import FastclError, brief, one_of, shown, suggest

log = logging.getLogger("fastcl")
KINDS = ("digits", "omniglot", "cifar10", "folder", "torchvision")
_NAMED = 20  # unreadable images per split that the log names one by one


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """The images of one split, in source order. Picklable, and safe to read from several threads or forked workers.

    Attributes:
        ids: (n,) int64 sample ids: the image's position in the whole source, unique over train and test and
            independent of which classes are used.
        labels: (n,) int64 in [0, n_classes).
        sizes: (n, 2) int64 height and width in pixels.
        read: position in the split -> (H, W, C) uint8.
        encoded: for sources of files: position in the split -> the bytes of a grey or RGB JPEG file, or None if the
            image is not one or its file is truncated.
    """

    ids: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    read: Callable[[int], np.ndarray]
    encoded: Callable[[int], bytes | None] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Split({len(self)} images)"

    def image(self, i: int) -> np.ndarray:
        """The i-th image of the split, (H, W, C) uint8, as a copy.

        Raises:
            FastclError: i outside [0, n), or a file that cannot be decoded (named).
        """
        check_integer(i, "the position of an image")
        if not 0 <= i < len(self.ids):
            raise FastclError(f"the position of an image must be in [0, {len(self.ids)}), got {i}")
        with _hinting():
            return self.read(i)

    def file(self, i: int) -> bytes | None:
        """The bytes of the i-th image's JPEG file, or None if it is not a complete JPEG or the source keeps no files.

        Raises:
            FastclError: a file that cannot be read (named).
        """
        if self.encoded is None:
            return None
        with _hinting():
            return self.encoded(i)


@contextmanager
def _hinting() -> Iterator[None]:
    try:
        yield
    except FastclError as error:
        raise FastclError(f"{error}; corrupt=skip leaves out images that cannot be decoded") from error


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split over the same classes; `labels` are positions in `classes`.

    Names are printable: unprintable characters of folder and file names are escaped. `skipped` lists the images
    that were removed because they cannot be decoded: sample id -> which one, and why. `left_out` describes what else
    was found but not used, with counts.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    train: Split
    test: Split
    skipped: Mapping[int, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def load(
    source: str,
    *,
    classes: int | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
    root: str | None = None,
    download: bool = False,
    corrupt: Literal["stop", "skip"] = "stop",
    skipped: Mapping[int, str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """Loads a data set.

    Sources: `digits` (scikit-learn's, 8x8), `omniglot:FILE.npz` (105x105, ink 255 on 0), `cifar10:FILE.npz` (32x32
    RGB), `folder:PATH` (an image tree or a zip of one, RGB) and `torchvision:NAME` (a class of torchvision.datasets).
    The readers in `fastcl.data.sources.readers` and `fastcl.data.sources.trees.folders` state each one's layout.

    Args:
        source: what to load.
        classes: number of classes to use: the first ones of a seeded permutation of all, labelled by their position
            in it. The classes and labels of a smaller number are a prefix of a larger number's. None takes all classes
            with the source's own order and numbers, whatever the seed.
        seed: key of the class permutation and of the random split.
        test_fraction: for sources without a split of their own, the fraction of each class that becomes test images
            (rounded; at least 1, and at least 1 stays for training). Which images depends on the seed and their
            sample ids, not on the other classes used; a larger fraction contains the images of a smaller one.
        root: torchvision only: its folder.
        download: torchvision only: whether it may download.
        corrupt: what to do about images that cannot be decoded. "stop": only the sizes are read now, and an image
            whose size cannot be read is an error; other bad images raise when read. "skip": every image is decoded once
            now, and those that fail are removed from their split with a warning; the others keep their split and sample
            ids, and so their views. Outside folders and zips, an image whose size cannot be read is always an error.
        skipped: result of an earlier check (`Dataset.skipped`): these images are removed, and none is checked again.
        max_pixels: limit per image; one with more counts as undecodable, and is not unpacked.

    Raises:
        FastclError: an unknown source, a missing, truncated or malformed file, more classes than there are (or fewer
            than 2), a class with too few images, test_fraction outside (0, 1), an unknown `corrupt`, or an argument of
            the wrong type.
    """
    _check_arguments(source, root, test_fraction, corrupt, max_pixels, download, skipped)
    found = _find(os.fspath(source), root, download, max_pixels)
    _tell(source, found)
    chosen = _choose(found, classes, seed)
    names = tuple(shown(found.classes[c]) for c in chosen)
    label_of = np.full(len(found.classes) + 1, -1)  # the last entry is for images without a split, whose label is -1
    label_of[chosen] = np.arange(len(chosen))
    labels = label_of[found.labels]
    test = _draw_test(labels, names, test_fraction, seed) if found.test is None else found.test
    members = {"training": ~test & (labels >= 0), "test": test & (labels >= 0)}
    left_out = dict(skipped or {})
    splits = _open(found, members, labels, names, left_out)
    if corrupt == "skip" and skipped is None and (left_out := _unreadable(splits)):
        splits = _open(found, members, labels, names, left_out)
    for split in splits.values():
        _ = [split.image(int(i)) for i in np.flatnonzero(split.sizes.min(1) == 0)]  # size 0: raises the header's error
    name = shown(found.name)
    return Dataset(name, names, found.channels, splits["training"], splits["test"], left_out, tuple(found.left_out))


def _tell(source: str, found: Source) -> None:
    """Log what a source leaves out. Raises FastclError if no image remains."""
    for line, loud in found.left_out.items():
        log.log(logging.WARNING if loud else logging.INFO, "%s: left out %s", shown(found.name), line)
    if not len(found.labels):
        raise FastclError(f"{shown(source)} contains no images")


def _check_arguments(
    source: object,
    root: object,
    test_fraction: float,
    corrupt: object,
    max_pixels: int,
    download: object,
    skipped: object,
) -> None:
    for key, value in {"source": source, "root": root}.items():
        if not isinstance(value, str | os.PathLike) and (key, value) != ("root", None):
            raise FastclError(f"data.{key} must be a string, got {value!r} ({type(value).__name__})")
    if isinstance(test_fraction, bool) or not isinstance(test_fraction, Real):
        raise FastclError(f"test_fraction must be a number, got {test_fraction!r}")
    if not isinstance(download, bool):
        raise FastclError(f"data.download must be true or false, got {brief(download)}")
    if skipped is not None:
        _check_skipped(skipped)
    check_max_pixels(max_pixels)
    if corrupt not in ("stop", "skip"):
        raise FastclError(one_of("data.corrupt", ("stop", "skip"), corrupt))
    if not 0 < test_fraction < 1:
        raise FastclError(f"test_fraction must be in (0, 1), got {test_fraction}")


def _check_skipped(skipped: object) -> None:
    if not isinstance(skipped, Mapping):
        raise FastclError(f"skipped must map sample ids to reasons, as Dataset.skipped does, got {brief(skipped)}")
    for i in skipped:
        check_integer(i, "a sample id of skipped")


def _open(
    found: Source, members: dict[str, np.ndarray], labels: np.ndarray, names: tuple[str, ...], left_out: Collection[int]
) -> dict[str, Split]:
    splits = {}
    for what, member in members.items():
        ids = np.flatnonzero(member)
        ids = ids[~np.isin(ids, sorted(left_out))] if left_out else ids
        empty = np.flatnonzero(np.bincount(labels[ids], minlength=len(names)) == 0)
        if len(empty):
            readable = "readable " if left_out else ""
            raise FastclError(
                f"{shown(found.name)}: class {names[empty[0]]!r} has no {readable}{what} images "
                f"({len(empty)} such classes)"
            )
        splits[what] = Split(ids, labels[ids], *found.open(ids))
    return splits


def _unreadable(splits: dict[str, Split]) -> dict[int, str]:
    """Sample id -> error of every image that cannot be decoded; logs warnings."""
    found: dict[int, str] = {}
    for what, split in splits.items():
        errors = unreadable(split, what)
        for error in list(errors.values())[:_NAMED]:
            log.warning("skipped: %s", error)
        if errors:
            log.warning("%d of %d %s images cannot be decoded and are left out", len(errors), len(split), what)
        found |= {int(split.ids[i]): error for i, error in errors.items()}
    return dict(sorted(found.items()))


def _find(source: str, root: str | None, download: bool, max_pixels: int) -> Source:
    kind, _, where = source.partition(":")
    if kind not in KINDS:
        is_path = os.sep in source or os.path.exists(source)
        meant = ("omniglot", "cifar10") if source.endswith(".npz") else ("folder",)
        hint = (
            f"; did you mean {' or '.join(repr(f'{k}:{source}') for k in meant)}?" if is_path else suggest(kind, KINDS)
        )
        raise FastclError(f"unknown source {source!r}{hint}")
    if kind == "digits":
        if where:
            raise FastclError(
                f"source {source!r}: digits takes no path, got {where!r} (its images come with scikit-learn)"
            )
        return read_digits()
    if not where:
        raise FastclError(f"source {source!r} needs a {'name' if kind == 'torchvision' else 'path'}: '{kind}:...'")
    if kind == "torchvision":
        return read_torchvision(where, None if root is None else os.fspath(root), download, max_pixels)
    try:
        path = Path(where).expanduser()
    except RuntimeError as error:  # ~unknown_user
        raise FastclError(f"source {source!r}: {shown(error)}") from None
    if kind == "folder":
        return read_folder(path, max_pixels)
    return read_omniglot(path) if kind == "omniglot" else read_cifar10(path)


def _choose(found: Source, classes: int | None, seed: int) -> np.ndarray:
    """The chosen classes in label order, (k,) positions in the source's classes."""
    total = len(found.classes)
    if classes is None:
        return np.arange(total)
    if isinstance(classes, bool) or not isinstance(classes, (int, np.integer)) or not 2 <= classes <= total:
        raise FastclError(
            f"classes must be an integer in [2, {total}] ({shown(found.name)} has {total}), got {classes!r}"
        )
    return permutation(total, seed=seed, stream=Stream.CLASSES)[:classes]


def _draw_test(labels: np.ndarray, names: tuple[str, ...], fraction: float, seed: int) -> np.ndarray:
    """(n,) bool, the test images: those of each class with the smallest random keys (one key per sample id)."""
    ids = np.flatnonzero(labels >= 0)
    label = labels[ids]
    count = np.bincount(label, minlength=len(names))
    small = np.flatnonzero(count < 2)
    if len(small):
        raise FastclError(
            f"class {names[small[0]]!r} has {count[small[0]]} images: too few for a training and a test image "
            f"({len(small)} such classes)"
        )
    wanted = np.clip(np.rint(fraction * count), 1, count - 1)
    high, low = words(2, seed=seed, stream=Stream.SPLIT, index=ids).astype(np.uint64).T
    order = np.lexsort((high << np.uint64(32) | low, label))
    rank = np.arange(len(ids)) - (np.cumsum(count) - count)[label[order]]
    test = np.zeros(len(labels), bool)
    test[ids[order]] = rank < wanted[label[order]]
    return test
