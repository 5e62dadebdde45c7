"""Which published run a run is to be compared with, and what the two differ in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from fastcl.config.written import toml
from fastcl.errors import FastclError, shown
from fastcl.paper.published import Target, targets
from fastcl.report.run import Run

# The published losses have the positive in their denominators; the paper's formulas do not.
CL = {"ntxent": "NT-Xent, as published", "dcl": "decoupled, as in the paper's text"}
SUPERVISED = {"nscl": ("nscl_with_positive", "nscl"), "supcon": ("supcon",), "ce": ("ce",)}
_SOURCES = {
    "torchvision:cifar10": "cifar10", "cifar10": "cifar10", "torchvision:cifar100": "cifar100",
    "torchvision:imagenet": "imagenet-1k",
}  # fmt: skip
_FOLDERS = {"miniimagenet": "mini-imagenet", "tinyimagenet": "tiny-imagenet", "imagenet1k": "imagenet-1k",
            "ilsvrc": "imagenet-1k"}  # fmt: skip
_CHOSEN_BY_HAND = "Fig. 5"  # its runs are of another learning rate, which no data set or temperature tells
_COMPARED = {
    "data": ("order",),
    "views": None,  # all
    "model": ("name", "options", "cifar_stem", "hidden", "projection"),
    "optim": ("name", "lr", "momentum", "weight_decay", "warmup_epochs"),
    "train": ("temperature", "batch_size", "micro_batch", "joint_views", "epochs"),
}
_CLOSE = 1e-3  # numbers as close as this, relatively, are equal: learning rates are rounded
# What the published code does and no setting of fastcl does: (what, here, there).
_LARS = ("LARS", "biases and norms without weight decay and trust ratio",
         "both for every tensor, which leaves the biases of batch norms at 0")  # fmt: skip
_SCHEDULE = ("schedule", "by steps, a cosine after the warm-up", "by epochs, a cosine times the warm-up")


class Difference(NamedTuple):
    """Something that a run has otherwise than a published one, in words."""

    what: str
    ours: str
    published: str


def target_for(run: Run) -> Target:
    """The published run of the same data set, number of classes and temperature.

    Raises:
        FastclError: there is none, or the run's data set is none of the paper's.
    """
    source = run.data.get("source", "")
    data, classes = data_set_of(run), run.data.get("classes")
    temperature = _table(run.config, "train").get("temperature")
    known = {name: target for name, target in targets().items() if target.data == data}
    for target in known.values():
        same = target.classes == classes and _same(target.config().train.temperature, temperature)
        if same and target.figure != _CHOSEN_BY_HAND:
            return target
    names = f"those of {data}: {', '.join(known)}" if known else "fastcl compare --list shows all"
    raise FastclError(
        f"{shown(run.path)}: no published curve is of {shown(_source(run) or source)} with {classes} classes at "
        f"temperature {temperature}; choose one with --target ({names})"
    )


def data_set_of(run: Run) -> str | None:
    """The paper's name for a run's data set, by its source; None if that tells nothing."""
    kind, _, where = _source(run).lower().partition(":")
    if kind == "folder":
        letters = "".join(c for c in where if c.isalnum())
        return next((data for part, data in _FOLDERS.items() if part in letters), None)
    return _SOURCES.get(f"{kind}:{where}", _SOURCES.get(kind))


def models_of(run: Run) -> tuple[str, dict[str, str]]:
    """The run's CL model, and for each of the paper's supervised models the one that stands for it.

    Raises:
        FastclError: the run has no CL model, or nothing to compare it with.
    """
    trained = (run.reference, *run.others)
    cl = next((name for name in trained if name in CL), None)
    if cl is None:
        raise FastclError(
            f"{shown(run.path)}: the published curves compare with CL, and the run has no such model "
            f"({' or '.join(CL)}); its models are {', '.join(trained)}"
        )
    found = {role: next((n for n in names if n in trained), None) for role, names in SUPERVISED.items()}
    supervised = {role: name for role, name in found.items() if name is not None}
    if not supervised:
        raise FastclError(
            f"{shown(run.path)}: the published curves are of nscl, supcon and ce, and the run has none of them; its "
            f"models are {', '.join(trained)}"
        )
    return cl, supervised


def differences(run: Run, target: Target, cl: str, supervised: dict[str, str]) -> list[Difference]:
    """What the run has otherwise than the published one: data, losses, settings, and what no setting can change."""
    return [*_of_data(run, target), *_of_losses(cl, supervised), *_of_settings(run, target), *_of_code(run)]


def _of_data(run: Run, target: Target) -> Iterator[Difference]:
    if (data := data_set_of(run)) != target.data:
        yield Difference("data set", _source(run) or str(run.data.get("source")), target.data)
    elif data is not None and run.data.get("classes") != target.classes:
        yield Difference("number of classes", str(run.data.get("classes")), str(target.classes))


def _of_losses(cl: str, supervised: dict[str, str]) -> Iterator[Difference]:
    if cl != "ntxent":
        yield Difference("loss of CL", f"{cl} ({CL[cl]})", "ntxent")
    if supervised.get("nscl") == "nscl":
        yield Difference("loss of NSCL", "nscl (as in the paper's text)", "nscl_with_positive")


def _of_settings(run: Run, target: Target) -> Iterator[Difference]:
    theirs = json.loads(json.dumps(asdict(target.config())))  # as in run.json
    for table, keys in _COMPARED.items():
        mine = _table(run.config, table)
        for key in keys or theirs[table]:
            if key not in mine:
                yield Difference(f"{table}.{key}", "not recorded", toml(theirs[table][key]))
            elif not _same(mine[key], theirs[table][key]):
                yield Difference(f"{table}.{key}", toml(mine[key]), toml(theirs[table][key]))


def _of_code(run: Run) -> Iterator[Difference]:
    if (ranks := re.search(r" x (\d+) ranks$", str(run.facts.get("device")))) is not None:
        yield Difference("processes", f"{ranks[1]}, each with batch statistics of its part", "1")
    precision = _table(run.config, "train").get("precision", "not recorded")
    yield Difference("precision", str(precision), "fp16 with loss scaling")
    if _table(run.config, "optim").get("name") == "lars":
        yield Difference(*_LARS)
    yield Difference(*_SCHEDULE)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float) and not (isinstance(a, bool) or isinstance(b, bool)):
        return math.isclose(a, b, rel_tol=_CLOSE)
    return a == b


def _source(run: Run) -> str:
    source = _table(run.config, "data").get("source")
    return source if isinstance(source, str) else ""


def _table(config: dict[str, Any], name: str) -> dict[str, Any]:
    table = config.get(name)
    return table if isinstance(table, dict) else {}
