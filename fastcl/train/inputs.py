"""The inputs of a run: its data set, renderer, training batches and evaluation views."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastcl import OBJECTIVES
from fastcl.config.settings import Config
from fastcl.data import (
    Dataset,
    EvalViews,
    ViewLoader,
    ViewPlan,
    choose_renderer,
    keep_decoded,
    load,
    make_renderer,
    subsample,
)
from fastcl.errors import FastclError, brief, one_of, shown
from fastcl.train.group import ALONE, Ranks, own_gpu
from fastcl.train.models import CROSS_ENTROPY, RESEEDED
from fastcl.train.run_folder.identity import read_run, same_data

_RESEED = 0x5EED_0000_0000_0000  # XORed into the seed for the reseeded twin's views
_STREAMED = ("folder", "torchvision")  # sources that decode an image at each access


@dataclass(frozen=True)
class Inputs:
    """Attributes:
    data: the data set.
    renderer: name of the renderer of all views.
    loader: the training batches; if the run has a reseeded twin, its two views come after the others'.
    train, test: unaugmented views of both splits.
    """

    data: Dataset
    renderer: str
    loader: ViewLoader
    train: EvalViews
    test: EvalViews


def open_inputs(config: Config, out: Path, device: torch.device, ranks: Ranks = ALONE) -> Inputs:
    """Open a run's data.

    If torchvision renders files, splits whose pixels take at most DECODED_LIMIT bytes are decoded now and kept in
    memory. A resumed run leaves out the same images as when it began, without checking them again.

    Args:
        config: the run's config.
        out: its folder, which may hold its run.json.
        device: device of the views.
        ranks: the processes that share each batch.

    Raises:
        FastclError: data that cannot be read, a renderer that cannot be used here, or an invalid batch size.
    """
    d, t = config.data, config.train
    before = read_run(out)
    skipped = before.get("skipped") if before and same_data(before, config) else None
    if skipped is not None and not _are_reasons(skipped):
        raise FastclError(f"{shown(out / 'run.json')}: 'skipped' must give a reason for each id, got {brief(skipped)}")
    skipped = {int(key): why for key, why in skipped.items()} if skipped is not None else None
    data = load_data(config, skipped)
    name = choose_renderer(d.renderer, (data.train, data.test), config.views, device)
    plan, other = (ViewPlan(config.views, seed) for seed in (t.seed, t.seed ^ _RESEED))
    options = {
        "others": (other,) if RESEEDED in t.controls else (), "workers": _workers(d.workers, device, ranks),
        "rank": ranks.rank, "world_size": ranks.size,
    }  # fmt: skip
    ViewLoader(data.train, plan, t.batch_size, d.order, **options)  # validates the values before any image is decoded
    if name == "torchvision" and d.source.partition(":")[0] in _STREAMED:
        kept = {split: keep_decoded(getattr(data, split), data.channels) for split in ("train", "test")}
        data = dataclasses.replace(data, **kept)
    threads = max(1, options["workers"]) if name != "torchvision" else 0
    train, test = (make_renderer(name, s, config.views, device, threads) for s in (data.train, data.test))
    return Inputs(
        data=data,
        renderer=name,
        loader=ViewLoader(data.train, plan, t.batch_size, d.order, renderer=train, **options),
        train=EvalViews(data.train, plan, train, options["workers"]),
        test=EvalViews(data.test, plan, test, options["workers"]),
    )


def load_data(config: Config, skipped: Mapping[int, str] | None = None) -> Dataset:
    """A run's data set.

    Args:
        config: the run's config.
        skipped: images that an earlier check left out, as for `load`.

    Raises:
        FastclError: data that cannot be read, or fewer classes than the models need.
    """
    d, seed = config.data, config.train.seed
    data = load(
        d.source, classes=d.classes, seed=seed, test_fraction=d.test_fraction, root=d.root, download=d.download,
        corrupt=d.corrupt, skipped=skipped, max_pixels=d.max_pixels,
    )  # fmt: skip
    _check_classes(data, config.train.models)
    if d.test_images is not None:
        data = dataclasses.replace(data, test=subsample(data.test, d.test_images, seed))
    return data


def _check_classes(data: Dataset, models: Sequence[str]) -> None:
    """Refuse objectives that use labels if there is only one class: there is nothing to learn."""
    using = [name for name in models if name == CROSS_ENTROPY or (name in OBJECTIVES and OBJECTIVES[name].needs_labels)]
    if len(data.classes) < 2 and using:
        raise FastclError(
            f"the models {', '.join(using)} need at least 2 classes; {data.name} has {len(data.classes)}: "
            f"{data.classes[0]!r}"
        )


def run_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device that train.device names; on a GPU each rank has its own.

    Raises:
        FastclError: another name, or "cuda" where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise FastclError(one_of("train.device", ("auto", "cpu", "cuda"), name))
    if name == "cuda" and not torch.cuda.is_available():
        raise FastclError("train.device is 'cuda', but torch finds no CUDA device")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda") if ranks.size == 1 else own_gpu()


def images_digest(data: Dataset) -> str:
    """Which images a data set has, in which order, and their labels."""
    arrays = [array for split in (data.train, data.test) for array in (split.ids, split.labels)]
    return hashlib.sha256(b"".join(np.ascontiguousarray(a, np.int64).tobytes() for a in arrays)).hexdigest()


def data_paths(config: Config) -> list[Path]:
    """The files and folders that a config names as data."""
    kind, _, where = config.data.source.partition(":")
    found = [where if kind != "torchvision" else "", config.data.root or ""]
    return [Path(path) for path in found if path]


def image_folders(config: Config) -> list[Path]:
    """Folders in which every file counts as an image. torchvision's root may hold other files."""
    kind, _, where = config.data.source.partition(":")
    return [Path(where)] if kind == "folder" and where else []


def _are_reasons(skipped: object) -> bool:
    if not isinstance(skipped, dict):
        return False
    return all(key.isascii() and key.isdigit() and isinstance(why, str) for key, why in skipped.items())


def _workers(given: int | None, device: torch.device, ranks: Ranks) -> int:
    """This rank's share of the configured number, or of a default: none on a CPU, where training already uses all
    cores, else cores - 1. At least one of any."""
    if given is None:
        given = 0 if device.type == "cpu" else max(1, len(os.sched_getaffinity(0)) - 1)
    return min(given, max(1, given // ranks.on_this_machine))
