"""The images of the sweeps, and the configs that name them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from bench.reproduction.experiments import CIFAR10, DIGITS, FRUITS, NETWORK, OMNIGLOT, Experiment
from fastcl.config.tables import load_config
from fastcl.config.written import preset_file, written
from fastcl.data.sources.readers import read_cifar10
from fastcl.errors import FastclError, shown
from fastcl.io.files import write_atomic

OF_A_CLASS = (500, 200)  # of the training and the test images of CIFAR-10, the first ones
_KINDS = {OMNIGLOT: "omniglot", CIFAR10: "cifar10", FRUITS: "folder"}
FILES = tuple(_KINDS)
_ABOUT = "# The runs of the sweep {name}. Written by python -m bench.reproduction, which overwrites it.\n"


def check(experiment: Experiment, images: Path) -> None:
    """Raise FastclError unless the folder has the experiment's images."""
    path = images / experiment.data
    if experiment.data != DIGITS and not path.exists():
        raise FastclError(f"{experiment.name}: there is no {shown(path)}; --data takes the folder that has it")


def write_config(experiment: Experiment, images: Path, folder: Path) -> Path:
    """Write the config of a sweep, Omniglot's preset with the experiment's settings; returns its path.

    Args:
        experiment: the sweep.
        images: folder of the images.
        folder: where to write it, and a part of CIFAR-10 where that is the data.

    Raises:
        FastclError: images that cannot be read, or a file that cannot be written.
    """
    path = folder / f"{experiment.name}.toml"
    models = ", ".join(f'"{name}"' for name in experiment.models)
    own = (f"data.source={_source(experiment, images, folder)}", f"train.models=[{models}]")
    with preset_file("omniglot") as preset:
        config = load_config(preset, [*own, *NETWORK, *experiment.settings])
    write_atomic(path, written(config, _ABOUT.format(name=experiment.name)).encode())
    return path


def _source(experiment: Experiment, images: Path, folder: Path) -> str:
    if experiment.data == DIGITS:
        return DIGITS
    path = images / experiment.data
    if experiment.data == CIFAR10:
        whole, path = path, folder / f"part_of_{CIFAR10}"
        write_atomic(path, part_of_cifar10(whole))
    return f"{_KINDS[experiment.data]}:{path.resolve()}"


def part_of_cifar10(path: Path) -> bytes:
    """The first images of every class of an .npz of CIFAR-10 (see `fastcl.data.load`), as such a file.

    Raises:
        FastclError: a file that is no such archive, or has too few images of a class.
    """
    read_cifar10(path)  # refuses what is damaged
    with np.load(path) as file:
        whole = {name: file[name] for name in ("jpeg", "offset", "label", "split", "class_names")}
    label, split, offset = whole["label"], whole["split"], whole["offset"]
    kept = np.concatenate([
        np.flatnonzero((split == part) & (label == k))[:count]
        for part, count in enumerate(OF_A_CLASS)
        for k in range(len(whole["class_names"]))
    ])  # fmt: skip
    if len(kept) < (wanted := sum(OF_A_CLASS) * len(whole["class_names"])):
        train, test = OF_A_CLASS
        raise FastclError(
            f"{shown(path)}: {train} training and {test} test images of each class are needed, {wanted} in all, and "
            f"there are {len(kept)}"
        )
    images = [whole["jpeg"][offset[k] : offset[k + 1]] for k in kept]
    whole |= {"jpeg": np.concatenate(images), "label": label[kept], "split": split[kept]}
    whole["offset"] = np.cumsum([0, *map(len, images)], dtype=offset.dtype)
    buffer = io.BytesIO()
    np.savez(buffer, **whole)
    return buffer.getvalue()
