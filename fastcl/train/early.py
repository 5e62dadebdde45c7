"""Checks configs against their data before anything is trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import NamedTuple

from fastcl.config.settings import Config
from fastcl.data import ViewLoader, ViewPlan, choose_renderer
from fastcl.errors import FastclError
from fastcl.train.group import ALONE
from fastcl.train.inputs import load_data
from fastcl.train.measures.layer_table import check_layers
from fastcl.train.models import make_optimizer, make_twins
from fastcl.train.trainer import run_device


class Extent(NamedTuple):
    """Attributes:
    train, test: images of the two splits.
    classes: number of classes.
    steps: steps of an epoch.
    """

    train: int
    test: int
    classes: int
    steps: int


def check_configs(configs: Mapping[str, Config]) -> dict[str, Extent]:
    """Refuse configs that `Lockstep` would refuse; nothing is trained or written.

    Configs that share their data settings and seed are checked on one reading of the data, and networks are built once
    for all that differ in none of the settings that shape them.

    Args:
        configs: by the name that errors give them.

    Returns:
        The extent of each.

    Raises:
        FastclError: data that cannot be read, more classes than there are, a batch larger than the training split, a
            model, layer, renderer or device that does not exist.
    """
    found: dict[str, Extent] = {}
    built: set[str] = set()
    network = None  # the first one, for all optimisers
    groups: dict[str, list[str]] = {}
    for name, config in configs.items():
        groups.setdefault(f"{config.data} {config.train.seed} {config.train.models}", []).append(name)
    for names in groups.values():
        data = None
        for name in names:
            config = configs[name]
            try:
                device = run_device(config.train.device, ALONE)
                data = data or load_data(config)
                choose_renderer(config.data.renderer, (data.train, data.test), config.views, device)
                plan = ViewPlan(config.views, config.train.seed)
                workers = config.data.workers or 0
                loader = ViewLoader(data.train, plan, config.train.batch_size, config.data.order, workers=workers)
                if (shape := _shape(config, len(data.classes))) not in built:
                    twins = make_twins(config, data.channels, len(data.classes), run_device("cpu", ALONE))
                    check_layers(twins[0], config.train.layers)
                    network = network or twins[0].network
                    built.add(shape)
                elif network is not None and (optimiser := repr(config.optim)) not in built:
                    make_optimizer(network, config.optim)
                    built.add(optimiser)
            except FastclError as error:
                raise FastclError(f"{name}: {error}") from error
            found[name] = Extent(len(data.train), len(data.test), len(data.classes), len(loader))
    return {name: found[name] for name in configs}


def _shape(config: Config, classes: int) -> str:
    """What decides whether the networks of a config can be made."""
    train = config.train
    parts = (dataclasses.asdict(config.model), config.data.source)
    return json.dumps([*parts, config.views.size, train.models, train.controls, train.layers, classes])
