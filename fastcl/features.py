"""Feature files: (samples, width) matrices as .npy, .npz or .safetensors, one or one per layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastcl.errors import FastclError


def read_features(path: Path) -> Tensor:
    """Read a feature matrix.

    Args:
        path: .npy, or .npz / .safetensors with a single array or one named "features".

    Returns:
        (samples, width) floating point, on the CPU.

    Raises:
        FastclError: a missing or damaged file, an unknown ending, several arrays, or an array that is no float matrix.
    """
    path = Path(path)
    return _matrix(_array(path), str(path))


def read_layers(path: Path) -> dict[str, Tensor] | None:
    """Read the features of several layers of one model.

    Args:
        path: a folder of feature files, one a layer (the layer's name is the file's without its ending), or an .npz /
            .safetensors file of several arrays, none of which is named "features".

    Returns:
        Per layer (samples, width) floating point on the CPU, outputs of more dimensions flattened; in the order of the
        file, or by name with numbers in their order (blocks.2 before blocks.10) for a folder and for .safetensors.
        None for a path that holds one matrix, for `read_features`.

    Raises:
        FastclError: a missing or damaged file, a folder without feature files, an array that is no float array of
            samples, or layers with different numbers of samples.
    """
    path = Path(path)
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix in _READERS]
        if not files:
            raise FastclError(f"{path} holds no feature file ({', '.join(_READERS)})")
        arrays = {file.stem: _array(file) for file in sorted(files, key=lambda file: _natural(file.stem))}
        if len(arrays) < len(files):
            raise FastclError(f"{path} holds two files of one name: {_shown(sorted(file.name for file in files))}")
    elif path.suffix == ".npy":
        return None
    else:
        arrays = _read(path)
        if len(arrays) == 1 or "features" in arrays:
            return None
        if path.suffix == ".safetensors":  # which keeps no order
            arrays = {name: arrays[name] for name in sorted(arrays, key=_natural)}
    layers = {k: _matrix(x.flatten(1) if x.ndim > 2 else x, f"{path}: {k!r}") for k, x in arrays.items()}
    rows = {name: len(x) for name, x in layers.items()}
    if len(set(rows.values())) > 1:
        raise FastclError(f"{path}: row k of every layer must be one sample, got numbers of rows {rows}")
    return layers


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FastclError(f"{path} does not exist")
    if path.suffix not in _READERS:
        raise FastclError(f"{path}: features are read from {', '.join(_READERS)}")
    try:
        arrays = _READERS[path.suffix](path)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # each format fails in its own way
        raise FastclError(f"{path} cannot be read: {error}") from error
    if not arrays:
        raise FastclError(f"{path} holds no array")
    return arrays


def _array(path: Path) -> Tensor:
    arrays = _read(path)
    if len(arrays) > 1 and "features" not in arrays:
        raise FastclError(f"{path} holds {len(arrays)} arrays ({_shown(arrays)}); name the one to read 'features'")
    return arrays.get("features", next(iter(arrays.values())))


def _matrix(x: Tensor, where: str) -> Tensor:
    if x.ndim != 2 or not x.is_floating_point():
        raise FastclError(f"{where} must hold a float matrix (samples, width), got {tuple(x.shape)} {x.dtype}")
    return x


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts digits by their number."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read_npy(path: Path) -> dict[str, Tensor]:
    import numpy as np

    return {"features": torch.from_numpy(np.load(path, allow_pickle=False))}


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


_READERS = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}
