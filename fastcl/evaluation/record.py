"""The file that an evaluation is written to and resumed from: every model's results, and what they follow from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastcl.errors import FastclError, brief, shown
from fastcl.evaluation.findings import Evaluation, evaluation_from_json, evaluation_to_json
from fastcl.io.files import read_if_there, write_atomic
from fastcl.io.json_text import parse_json

_VERSION = 1  # a file of another version is not resumed from


@dataclass
class ModelRecord:
    """What is known of one model.

    Attributes:
        features: digest of its features, or of what they follow from.
        evaluation: the results.
        settings: by probe that has run, the settings that it ran with.
        epoch: completed epochs of the model; None if that is not known.
    """

    features: str
    evaluation: Evaluation
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    epoch: int | None = None


def read_record(path: Path) -> dict[str, ModelRecord] | None:
    """The models of an evaluation file, or None if there is no file.

    Raises:
        FastclError: the file cannot be read, or is not an evaluation of this version.
    """
    name, text = shown(path), read_if_there(path)
    if text is None:
        return None
    tree = parse_json(text, name)
    models = tree.get("models") if isinstance(tree, dict) and tree.get("version") == _VERSION else None
    if not isinstance(models, dict):
        raise FastclError(f"{name} is not an evaluation that this version can read; remove it, or name another file")
    return {shown(model): _model(one, f"{name}: models.{shown(model)}") for model, one in models.items()}


def write_record(path: Path, models: dict[str, ModelRecord]) -> None:
    """Write an evaluation file, atomically. Raises FastclError if it cannot be written."""
    tree = {
        name: {
            "features": one.features, "epoch": one.epoch, "settings": one.settings,
            "evaluation": evaluation_to_json(one.evaluation),
        }
        for name, one in models.items()
    }  # fmt: skip
    write_atomic(path, (json.dumps({"version": _VERSION, "models": tree}, indent=1, allow_nan=False) + "\n").encode())


def _model(tree: object, where: str) -> ModelRecord:
    kinds = {"features": str, "settings": dict, "epoch": int | None}
    if not isinstance(tree, dict):
        raise FastclError(f"{where} must be a table, got {brief(tree)}")
    for key, kind in kinds.items():
        if not isinstance(tree.get(key), kind):
            raise FastclError(f"{where}.{key} must be {kind}, got {brief(tree.get(key))}")
    evaluation = evaluation_from_json(tree.get("evaluation"), f"{where}.evaluation")
    return ModelRecord(tree["features"], evaluation, tree["settings"], tree["epoch"])
