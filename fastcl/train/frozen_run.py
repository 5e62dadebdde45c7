"""The models of a run's folder with their last weights, for measures of what they have learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fastcl.config.settings import Config
from fastcl.config.tables import overridden, parse_config
from fastcl.errors import FastclError, brief, shown
from fastcl.io.files import cause
from fastcl.io.run_names import absent
from fastcl.train.inputs import Inputs, images_digest, open_inputs, run_device
from fastcl.train.measures.evaluate import encode
from fastcl.train.models import Twin, make_twins
from fastcl.train.network import plain_defaults
from fastcl.train.run_folder.checkpoints import load_checkpoint
from fastcl.train.run_folder.identity import missing_files, read_run, settings

# What another machine may need to say otherwise: where the images are, and what reads them.
OVERRIDES = ("data.source", "data.root", "data.renderer", "data.workers", "train.device")


@dataclass(frozen=True, eq=False)
class FrozenRun:
    """Attributes:
    epoch: completed epochs of the weights.
    twins: the models.
    inputs: the images.
    digests: by model, the SHA-256 of what its features follow from: the encoder, its weights, the images, their views.
    """

    epoch: int
    twins: list[Twin]
    inputs: Inputs
    digests: dict[str, str]

    def features(self, models: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """By model, encoder outputs of the training and of the held-out images, float32; each image is rendered once
        for all of them."""
        twins = [twin for twin in self.twins if twin.name in models]
        train, test = (encode(twins, views) for views in (self.inputs.train, self.inputs.test))
        return {twin.name: (train[twin.name], test[twin.name]) for twin in twins}


@plain_defaults()
def open_frozen(out: Path, overrides: Iterable[str] = ()) -> FrozenRun:
    """Load the models of a run: the final weights if all are there, else those of the last checkpoint. Writes nothing.

    Args:
        out: the folder of a run, finished or not.
        overrides: "table.key=value" items for the keys of OVERRIDES. Images must be the same ones; train.device is
            "auto" by default, whatever the run was trained on.

    Raises:
        FastclError: no run, no weights yet, damaged ones, other keys, data that cannot be read or are not those of the
            run.
    """
    run = read_run(out)
    if run is None:
        raise FastclError(absent(out / "run.json"))
    config = _config(run, [*overrides])
    device = run_device(config.train.device)
    inputs = open_inputs(config, out, device)
    data, there = inputs.data, run.get("data")
    here = {"train": len(data.train), "test": len(data.test), "classes": len(data.classes)}
    if not isinstance(there, dict) or any(there.get(key) != count for key, count in here.items()):
        raise FastclError(f"the images are not those of {shown(out)}: it had {brief(there)}, {data.name} has {here}")
    twins = make_twins(config, data.channels, len(data.classes), device)
    epoch = config.train.epochs
    if missing_files(out, [twin.name for twin in twins], ("weights",)):
        checkpoint = load_checkpoint(out / "checkpoints")
        if checkpoint is None:
            raise FastclError(f"{shown(out)} has neither the weights of all its models nor a checkpoint")
        checkpoint.restore(twins)
        epoch = checkpoint.epoch
    else:
        for twin in twins:
            _load(twin, out / "weights" / f"{twin.name}.safetensors")
    asked = settings(config)
    views = {"views": asked["views"], "renderer": inputs.renderer, "images": images_digest(data)}
    digests = {twin.name: _digest(twin, views | {"model": asked["model"]}) for twin in twins}
    return FrozenRun(epoch, twins, inputs, digests)


def _config(run: dict[str, Any], overrides: Sequence[str]) -> Config:
    for item in overrides:
        if item.partition("=")[0].strip() not in OVERRIDES:
            raise FastclError(f"--set: only {', '.join(OVERRIDES)} may differ from the run, got {brief(item)}")
    # In TOML, which has no null, an absent value is "none".
    tables = {
        name: {key: "none" if value is None else value for key, value in table.items()}
        for name, table in run["config"].items()
        if isinstance(table, dict)
    }
    tables.setdefault("train", {})["device"] = "auto"
    options = tables.get("model", {}).get("options")
    if isinstance(options, dict):  # the run's own weights replace those that it began with
        tables["model"]["options"] = {k: v for k, v in options.items() if k not in ("pretrained", "checkpoint_path")}
    return parse_config(overridden(tables, overrides))


def _load(twin: Twin, path: Path) -> None:
    try:
        twin.network.load_state_dict(safetensors.torch.load(path.read_bytes()))
    except OSError as error:
        raise FastclError(f"{shown(path)} cannot be read ({cause(error)})") from error
    except (SafetensorError, RuntimeError) as error:  # torch lists what is missing or misshapen
        raise FastclError(f"{shown(path)} does not hold the weights of {twin.name!r}: {brief(str(error))}") from error


def _digest(twin: Twin, sources: dict[str, Any]) -> str:
    found = hashlib.sha256(json.dumps(sources, sort_keys=True).encode())
    weights = twin.network.encoder.state_dict()
    found.update(safetensors.torch.save({name: value.contiguous().cpu() for name, value in weights.items()}))
    return found.hexdigest()
