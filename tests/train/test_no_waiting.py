"""No step waits for the device. The meta device shows it: its tensors have no values, so to read one is an error."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from tiny_run import tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastcl
from fastcl import FastclError, checks
from fastcl.train import epoch as epoch_module
from fastcl.train.epoch import Steps, Waiting
from fastcl.train.group import ALONE
from fastcl.train.inputs import open_inputs
from fastcl.train.models import make_twins
from fastcl.train.run_folder.logbook import Logbook
from fastcl.train.step import Measured, StepTable
from fastcl.train.step_profile import StepProfile

META = torch.device("meta")
MODELS = ["dcl", "nscl", "supcon", "ce"]


class Copies(TorchDispatchMode):
    """Notes which copies between devices happen: how often, and whether the host waits for them."""

    def __init__(self):
        super().__init__()
        self.waited, self.count = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        devices = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and len(devices) > 1:
            self.count += 1
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                self.waited.append(str(func))
        return result


@pytest.fixture
def without_values(monkeypatch):
    """Lets fastcl work on the meta device, which it refuses, with the Triton operators, as on a GPU."""
    monkeypatch.setattr(checks, "check_not_meta", lambda *_: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    # Few layers, because PyTorch works out the shapes of convolutions on this device in Python.
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: nn.Sequential(*copy.deepcopy(layers)))
    with fastcl.backend("triton"):
        yield


def _epoch(monkeypatch, folder, **changes):
    """One epoch of all models: how many steps each read of measurements covered, and the copies."""
    config = tiny_config(model__cifar_stem=False, **({"train__models": MODELS} | changes))
    inputs = open_inputs(config, folder, META)
    twins, reads = make_twins(config, 1, 3, META), []

    def fetch(held):
        reads.append(len(held))
        return [StepTable(np.zeros((len(twins), 5)), None, 1, 0.0)] * len(held)

    monkeypatch.setattr(epoch_module, "fetch", fetch)
    monkeypatch.setattr(StepTable, "pair", lambda _: {})
    steps = Steps(config, twins, ALONE, Logbook(folder, False), len(inputs.loader), META, "here")
    bar = SimpleNamespace(update=lambda _: None, set_postfix_str=lambda *_, **__: None)
    with Copies() as copies:
        steps.epoch(0, inputs.loader.batches(0), bar)
    return reads, copies


@pytest.mark.parametrize(("reads", "changes"), [
    ([1], {"train__batch_size": 400}),
    ([2, 1], {"train__batch_size": 140, "train__models": ["dcl"], "train__controls": ["reseeded"],
              "train__micro_batch": 80, "train__joint_views": False, "optim__name": "lars"}),
])  # fmt: skip
def test_an_epoch_waits_only_to_read_its_measurements(without_values, monkeypatch, tmp_path, reads, changes):
    found, copies = _epoch(monkeypatch, tmp_path, train__log_every=2, **changes)
    assert found == reads
    assert copies.waited == [] and copies.count == 6 * sum(reads)  # four views, labels and ids of each batch


def test_a_step_that_waits_is_seen(without_values, monkeypatch, tmp_path):
    monkeypatch.setattr(Waiting, "seconds", lambda _: torch.zeros(1, device=META).item())
    with pytest.raises(RuntimeError, match="meta"):
        _epoch(monkeypatch, tmp_path, train__batch_size=400, train__models=MODELS[:1], train__controls=[])
    with Copies() as copies:
        torch.zeros(1).to(META)
    assert copies.waited == ["aten._to_copy.default"]


def test_the_first_step_that_is_not_finite_is_named(tmp_path):
    noted = []
    log = SimpleNamespace(step=lambda step, *_: noted.append(step))
    twins = [SimpleNamespace(name=name) for name in ("dcl", "identity")]
    steps = Steps(tiny_config(), twins, ALONE, log, 6, torch.device("cpu"), str(tmp_path))
    held = [Measured(torch.zeros(10, dtype=torch.float64), 2, rows=8, rounding=0.0) for _ in range(4)]
    held[1].flat[7], held[2].flat[0] = torch.inf, torch.nan
    with pytest.raises(FastclError, match=r"nscl_loss of model 'identity' is inf at step 9 \(epoch 1, .* up to 1 are"):
        steps._read(1, 2, held)
    assert noted == [8]


def test_a_profile_has_steps_of_every_epoch(tmp_path):
    found = {n: StepProfile(tmp_path, torch.device("cpu"), n, "")._steps for n in (1, 2, 3, 6, 7, 50)}
    assert found == {1: range(1), 2: range(1, 2), 3: range(1, 3), 6: range(3, 6), 7: range(3, 7), 50: range(3, 7)}
