"""The outputs of a finished run: weights, features of the held-out images, CKA of the layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from fastcl.data import EvalViews
from fastcl.train.group import ALONE, Ranks
from fastcl.train.measures.evaluate import encode
from fastcl.train.measures.layer_table import write_layers
from fastcl.train.models import Twin
from fastcl.train.run_folder.identity import missing_files
from fastcl.train.run_folder.records import write_atomic


def write_finals(out: Path, twins: list[Twin], views: EvalViews, layers: Sequence[str], ranks: Ranks) -> None:
    """Write all of them; the ranks share the images, the first writes.

    Args:
        out: the folder of the run.
        views: of the held-out images.
        layers: patterns as for `write_layers`.
    """
    features = encode(twins, views, ranks=ranks)
    if ranks.first:
        _write_tensors(
            out, twins, features, [f"{f}/{t.name}.safetensors" for f in ("weights", "features") for t in twins]
        )
        write_layers(out / "layers.json", twins, views, layers)


def complete_finals(out: Path, twins: list[Twin], views: EvalViews, layers: Sequence[str]) -> list[str]:
    """Write those that a finished run lacks, and those of models whose weights are not the last ones; returns their
    names."""
    wanted = list(missing_files(out, [twin.name for twin in twins]))
    strange = False
    for twin in twins:
        weights, features = (f"{folder}/{twin.name}.safetensors" for folder in ("weights", "features"))
        if weights not in wanted and (out / weights).read_bytes() != _saved(twin.network.state_dict()):
            strange, wanted = True, [*wanted, weights, features]
    wanted = list(dict.fromkeys(wanted))
    needed = any(name.startswith("features/") for name in wanted)
    _write_tensors(out, twins, encode(twins, views, ranks=ALONE) if needed else {}, wanted)
    path = out / "layers.json"
    if strange or not _is_json(path):  # it is also missing if the CKA of all layers is undefined
        write_layers(path, twins, views, layers)
        wanted += [path.name] if path.is_file() else []
    return wanted


def _write_tensors(out: Path, twins: Sequence[Twin], features: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Write the named ones of "weights/MODEL.safetensors" and "features/MODEL.safetensors"."""
    for twin in twins:
        tensors = {"weights": twin.network.state_dict(), "features": {"features": features.get(twin.name)}}
        for folder, content in tensors.items():
            if (name := f"{folder}/{twin.name}.safetensors") in names:
                write_atomic(out / name, _saved(content))


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _saved(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: value.contiguous().cpu() for name, value in tensors.items()})
