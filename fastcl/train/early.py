"""Checks configs against their data before anything is trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch

from fastcl.config.settings import Config
from fastcl.data import Dataset, ViewLoader, ViewPlan, choose_renderer
from fastcl.data.loader import Order
from fastcl.errors import FastclError
from fastcl.train.group import ALONE
from fastcl.train.inputs import load_data, run_device
from fastcl.train.measures.layer_table import check_layers
from fastcl.train.models import make_optimizer, make_twins
from fastcl.train.network import Network


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
    groups: dict[str, list[str]] = {}
    for name, config in configs.items():
        groups.setdefault(f"{config.data} {config.train.seed} {config.train.models}", []).append(name)
    found: dict[str, Extent] = {}
    networks = _Networks()
    for names in groups.values():
        data = None
        for name in names:
            config = configs[name]
            try:
                data = data or load_data(config)
                steps = _check_views(config, data)
                networks.check(config, data.channels, len(data.classes))
            except FastclError as error:
                raise FastclError(f"{name}: {error}") from error
            found[name] = Extent(len(data.train), len(data.test), len(data.classes), steps)
    return {name: found[name] for name in configs}


def _check_views(config: Config, data: Dataset) -> int:
    """Check what renders a data set and how it is cut into batches; returns the steps of an epoch."""
    device = run_device(config.train.device, ALONE)
    choose_renderer(config.data.renderer, (data.train, data.test), config.views, device)
    plan, workers = ViewPlan(config.views, config.train.seed), config.data.workers or 0
    order = cast(Order, config.data.order)  # the loader checks it
    return len(ViewLoader(data.train, plan, config.train.batch_size, order, workers=workers))


class _Networks:
    """Builds networks and optimisers once for all configs that do not differ in what decides whether they can be."""

    def __init__(self) -> None:
        self._checked: set[str] = set()
        self._network: Network | None = None  # the first one, on which all optimisers are tried

    def check(self, config: Config, channels: int, classes: int) -> None:
        """Raises FastclError if the models of a config cannot be made."""
        optimiser = repr(config.optim)
        if (shape := _shape(config, classes)) not in self._checked:
            twins = make_twins(config, channels, classes, torch.device("cpu"))
            check_layers(twins[0], config.train.layers)
            self._network = self._network or twins[0].network
            self._checked |= {shape, optimiser}
        elif self._network is not None and optimiser not in self._checked:
            make_optimizer(self._network, config.optim)
            self._checked.add(optimiser)


def _shape(config: Config, classes: int) -> str:
    """What decides whether the networks of a config can be made."""
    train = config.train
    parts = (dataclasses.asdict(config.model), config.data.source)
    return json.dumps([*parts, config.views.size, train.models, train.controls, train.layers, classes])
