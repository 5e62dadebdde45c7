"""Finds the splits among the folders of an image tree, and refuses folders that look like splits in another layout."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastcl.errors import FastclError, shown

LEFT_OUT = "left out"
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("unlabeled", "unlabelled", "unsupervised"), "unlabeled"),
}
_LIKE = re.compile(rf"({'|'.join(_SPLITS)})(?:[-_.0-9].*)?", re.DOTALL)
_NAMED = 10  # most folders named in an error message
_EXPECTED = (
    "expected train and test (or val), and unlabeled for images to leave out, as SPLIT/CLASS/image with nothing else "
    "beside them, or class folders only: move or rename folders"
)
_Folders = Sequence[Sequence[str]]


def official_splits(path: str, folders: _Folders) -> tuple[int, list[str]]:
    """Tell splits from classes.

    Args:
        path: name of the tree in errors.
        folders: for each image, the folders that contain it, from the root down.

    Returns:
        How many leading folders are not part of the class (0: no official split), and each image's split: train, test
        (the validation images if there is no test split) or LEFT_OUT.

    Raises:
        FastclError: folders that look like splits in another layout, or whose train and test share no class.
    """
    wrapped = len({folder[0] for folder in folders if folder}) == 1 and all(len(folder) > 1 for folder in folders)
    for depth in (1, 2) if wrapped else (1,):
        kinds = [_SPLITS.get(folder[depth - 1].lower(), "") if len(folder) >= depth else "" for folder in folders]
        found = set(kinds)
        if "train" in found and len(found) > 1 and "" not in found:
            test = "test" if "test" in found else "validation"
            _check_classes(path, folders, depth, kinds, test)
            return depth, [{"train": "train", test: "test"}.get(kind, LEFT_OUT) for kind in kinds]
        _check_no_splits(path, [folder[depth - 1 :] for folder in folders])
    if not wrapped:
        _check_below(path, folders)
    return 0, ["train"] * len(folders)


def _kind(name: str) -> str:
    """The split that a folder's name equals or starts with; empty for other names."""
    match = _LIKE.fullmatch(name.lower())
    return _SPLITS[match[1]] if match else ""


def _check_no_splits(path: str, folders: _Folders) -> None:
    """Refuse folders that look like splits; the caller has ruled out the accepted layout."""
    below: dict[str, set[str]] = {}  # for each folder, its subfolders with images
    for folder in folders:
        below.setdefault(folder[0] if folder else ".", set()).update(folder[1:2])
    like = {name: kind for name in below if (kind := _kind(name))}
    others = below.keys() - like
    kinds = set(like.values())
    exact = all(name.lower() in _SPLITS for name in like)
    nested = {kind for name, kind in like.items() if below[name]}
    if (
        (len(like) > 1 and not others)
        or (len(kinds) > 1 and (not exact or len(nested) > 1))
        or ("unlabeled" in kinds and others)
        or any(below[name] & others for name in like)
    ):
        beside = [folder[0] if folder else "." for folder in folders if not folder or folder[0] in others]
        _refuse(path, sorted(like), f"there are also {len(beside)} images in {_names(others)}" if beside else "")


def _check_below(path: str, folders: _Folders) -> None:
    """Refuse folders that each contain splits (images/train, images/test next to labels/train)."""
    kinds: dict[str, dict[str, str]] = {}
    for folder in folders:
        if len(folder) > 1 and (kind := _kind(folder[1])):
            kinds.setdefault(folder[0], {})["/".join(folder[:2])] = kind
    for inner in kinds.values():
        if "train" in inner.values() and {"test", "validation"} & set(inner.values()):
            _refuse(path, sorted(inner), "they are one folder too deep")


def _refuse(path: str, like: list[str], why: str) -> None:
    why = f" ({why})" if why else ""
    raise FastclError(f"{shown(path)}: {_names(like)} look like splits in an unsupported layout{why}; {_EXPECTED}")


def _check_classes(path: str, folders: _Folders, depth: int, kinds: list[str], test: str) -> None:
    """Refuse a training and a test split without a common class: their subfolders are probably not classes."""
    classes: dict[str, set[str]] = {"train": set(), test: set()}
    tops: dict[str, set[str]] = {"train": set(), test: set()}
    for folder, kind in zip(folders, kinds, strict=True):
        if kind in classes:
            tops[kind].add(folder[depth - 1])
            classes[kind].add("/".join(folder[depth:]))
    if not classes[test] or "" in classes["train"] | classes[test] or classes["train"] & classes[test]:
        return  # the caller reports images outside class folders
    sides = [f"{_names(tops[kind])} (class folders {_names(classes[kind])})" for kind in classes]
    flat = [_names(tops[kind]) for kind in classes if len(classes[kind]) == 1]
    hint = f"{' and '.join(flat)} is flat (all images in one folder); " if flat else ""
    raise FastclError(
        f"{shown(path)}: {' and '.join(sides)} have no class in common; {hint}expected SPLIT/CLASS/image with the "
        "same classes in every split"
    )


def _names(names: Sequence[str] | set[str]) -> str:
    """Names in quotes, shortened if there are many."""
    quoted = [f"'{shown(name)}'" for name in sorted(names)]
    more = f" and {len(quoted) - _NAMED} more" if len(quoted) > _NAMED else ""
    return ", ".join(quoted[:_NAMED]) + more
