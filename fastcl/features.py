"""Feature files: one (samples, width) matrix as .npy, .npz or .safetensors."""

from __future__ import annotations

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
    if path.suffix not in _READERS:
        raise FastclError(f"{path}: features are read from {', '.join(_READERS)}")
    try:
        arrays = _READERS[path.suffix](path)
    except FileNotFoundError:
        raise FastclError(f"{path} does not exist") from None
    except ModuleNotFoundError:
        raise
    except Exception as error:  # each format fails in its own way
        raise FastclError(f"{path} cannot be read: {error}") from error
    if len(arrays) > 1 and "features" not in arrays:
        shown = ", ".join(list(arrays)[:3]) + (", ..." if len(arrays) > 3 else "")
        raise FastclError(f"{path} holds {len(arrays)} arrays ({shown}); name the one to read 'features'")
    if not arrays:
        raise FastclError(f"{path} holds no array")
    x = arrays.get("features", next(iter(arrays.values())))
    if x.ndim != 2 or not x.is_floating_point():
        raise FastclError(f"{path} must hold a float matrix (samples, width), got {tuple(x.shape)} {x.dtype}")
    return x


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
