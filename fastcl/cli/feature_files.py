"""Feature files: (samples, width) matrices as .npy, .npz or .safetensors, a single one or one per layer."""

from __future__ import annotations

import logging
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastcl.errors import FastclError, shown
from fastcl.io.arrays import ENDINGS, file_status, listed, read_arrays
from fastcl.io.files import cause

log = logging.getLogger("fastcl")


def read_features(path: Path) -> Tensor:
    """Read a feature matrix.

    Args:
        path: .npy, or .npz / .safetensors with a single array or one named "features"; other arrays are not read. The
            format is detected from the content, so any of these endings will do.

    Returns:
        (samples, width) float16, bfloat16, float32 or float64 on the CPU, whatever the byte order of the file.

    Raises:
        FastclError: a missing or damaged file, an unknown ending, several arrays without one named "features", or an
            array that is not a float matrix.
    """
    return _one(Path(path))


def read_labelled(path: Path) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read a feature matrix with a label for each row.

    Args:
        path: .npz or .safetensors with the arrays "features", "labels" and, optionally, "ids"; others are not read.

    Returns:
        Features as `read_features` gives them, (samples,) int64 labels, and (samples,) int64 ids or None.

    Raises:
        FastclError: as for `read_features`; a missing array, labels or ids that are not integers, or not one per row.
    """
    path = Path(path)

    def choose(names: Sequence[str]) -> Sequence[str]:
        if lacks := [name for name in ("features", "labels") if name not in names]:
            raise FastclError(
                f"{shown(path)} must contain the arrays 'features' and 'labels' (.npz or .safetensors); it has "
                f"{listed(names)}, not {' and '.join(lacks)}"
            )
        return [name for name in ("features", "labels", "ids") if name in names]

    arrays = read_arrays(path, choose, integers=("labels", "ids"))
    rows = {name: len(x) for name, x in arrays.items()}
    if len(set(rows.values())) > 1:
        raise FastclError(f"{shown(path)}: all arrays must have the same number of rows, got {rows}")
    return arrays["features"], arrays["labels"], arrays.get("ids")


def read_layers(path: Path) -> dict[str, Tensor] | None:
    """Read the features of several layers of one model.

    Args:
        path: a folder of feature files, one per layer (the layer's name is the file name without its ending), or an
            .npz / .safetensors file of several arrays, none of which is named "features".

    Returns:
        Per layer (samples, width) floating point on the CPU, with further dimensions flattened. Layers keep the order
        of the file; those of a folder or .safetensors file are sorted by name with numbers in numeric order (blocks.2
        before blocks.10). Unprintable names are escaped. None if the path holds one matrix: use `read_features`.

    Raises:
        FastclError: a missing or damaged file, a folder without feature files, an array that is not a float array of
            samples, or layers with different numbers of samples.
    """
    path = Path(path)
    if _is_folder(path):
        files, others = _folder(path)
        if others:
            names = listed(shown(file.name) for file in others)
            log.warning("%s: skipped %d files that are not feature files: %s", shown(path), len(others), names)
        layers = {shown(file.stem): _one(file, layers=True) for file in files}
        if len(layers) < len(files):
            raise FastclError(
                f"{shown(path)} contains two files of the same name: {listed(shown(f.name) for f in files)}"
            )
    else:
        layers = read_arrays(path, _several, layers=True)
        if not layers:
            return None
        if path.suffix.lower() == ".safetensors":  # it keeps no order
            layers = {name: layers[name] for name in sorted(layers, key=_natural)}
    rows = {name: len(x) for name, x in layers.items()}
    if len(set(rows.values())) > 1:
        raise FastclError(f"{shown(path)}: all layers must have the same number of rows, got {rows}")
    return layers


def feature_files(path: Path) -> list[Path]:
    """The files that `read_features` or `read_layers` read: the path itself, or a folder's feature files by name.

    Raises:
        FastclError: the path does not exist or cannot be reached, or a folder has no feature files.
    """
    path = Path(path)
    return _folder(path)[0] if _is_folder(path) else [path]


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(file_status(path).st_mode)


def _folder(path: Path) -> tuple[list[Path], list[Path]]:
    """Feature files and other files of a folder, without hidden ones, such as those that macOS creates."""
    try:
        found = [file for file in path.iterdir() if not file.name.startswith(".")]
    except OSError as error:
        raise FastclError(f"{shown(path)} cannot be read ({cause(error)})") from error
    found.sort(key=lambda file: _natural(file.stem))
    files = [file for file in found if file.suffix.lower() in ENDINGS]
    if not files:
        raise FastclError(f"{shown(path)} contains no feature files ({', '.join(ENDINGS)})")
    return files, [file for file in found if file.suffix.lower() not in ENDINGS]


def _one(path: Path, layers: bool = False) -> Tensor:
    def choose(names: Sequence[str]) -> Sequence[str]:
        if "features" in names:
            return ["features"]
        if len(names) > 1:
            raise FastclError(
                f"{shown(path)} contains {len(names)} arrays ({listed(names)}); name the one to read 'features'"
            )
        return names

    (array,) = read_arrays(path, choose, layers).values()
    return array


def _several(names: Sequence[str]) -> Sequence[str]:
    return [] if len(names) == 1 or "features" in names else names


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that compares digits as numbers: without leading zeros, the longer one is larger."""
    parts = re.split(r"(\d+)", name)  # digits at odd positions
    digits = [part.lstrip("0") for part in parts]
    return [(len(digits[k]), digits[k]) if k % 2 else (-1, part) for k, part in enumerate(parts)]
