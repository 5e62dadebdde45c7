"""A run directory as one validated record: run.json, metrics.jsonl, pairs.jsonl and timing.jsonl."""

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from fastcl.errors import FastclError, brief, shown
from fastcl.io.files import read_if_there
from fastcl.io.json_text import parse_json
from fastcl.io.run_names import absent

IDENTITY = "identity"
RESEEDED = "reseeded"
CONTROLS = (IDENTITY, RESEEDED)

PAIR_MEASURES = {"cka": "CKA", "cka_debiased": "debiased CKA", "rsa": "RSA", "weight_gap": "weight gap"}
CERTIFICATE_MEASURES = {
    "drift": "drift (fraction of the largest)",
    "rho": "ρ",
    "cka_cosine": "CKA of the cosines",
    "cka_bound": "lower bound of CKA",
    "r": "r",
    "rsa": "RSA",
    "rsa_bound": "lower bound of RSA",
}
STEP_MEASURES = {"drift": "drift", "cka": "CKA", "cka_debiased": "debiased CKA", "rsa": "RSA"}
MODEL_MEASURES = {
    "loss": "training loss",
    "dcl_loss": "DCL loss",
    "nscl_loss": "NSCL loss",
    "loss_gap": "loss gap",
    "same_class_mass": "same-class mass",
    "ncc_train": "NCC train",
    "ncc_test": "NCC test",
    "cdnv": "CDNV",
    "cdnv_directional": "directional CDNV",
}

Number = float | None
Series = dict[int, dict[str, Number]]  # epoch or step -> measure -> value; None where undefined


def known(value: Number) -> bool:
    """Whether a measure has a finite value."""
    return value is not None and math.isfinite(value)


@dataclass(frozen=True)
class Run:
    """The contents of a run directory.

    ``facts`` is run.json without its ``config``; ``pairs`` and ``steps`` are keyed by two model names in the order of
    ``models``. An epoch is a number of completed epochs; a step is one batch, measured before its update.
    """

    path: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    models: tuple[str, ...]
    reference: str
    data: dict[str, Any]
    planned_epochs: int
    pairs: dict[tuple[str, str], Series]
    per_model: dict[str, Series]
    steps: dict[tuple[str, str], Series]
    timing: tuple[dict[str, Number], ...]

    @property
    def others(self) -> tuple[str, ...]:
        """The models with an objective of their own: neither the reference nor a control."""
        return tuple(m for m in self.models if m != self.reference and m not in CONTROLS)

    @cached_property
    def _records_of(self) -> dict[int, int]:
        series = [*self.pairs.values(), *self.per_model.values()]
        return dict(sorted(Counter(epoch for one in series for epoch in one).items()))

    @property
    def epochs(self) -> list[int]:
        """Evaluated epochs, ascending."""
        return list(self._records_of)

    @cached_property
    def last_epoch(self) -> int:
        """The last epoch with a full set of records; an interrupted run has fewer for its last epoch."""
        full = max(self._records_of.values())
        return max(epoch for epoch, count in self._records_of.items() if count == full)

    @property
    def finished(self) -> bool:
        """Whether the last planned epoch has been evaluated in full."""
        return self.last_epoch >= self.planned_epochs

    def pair_series(self, a: str, b: str) -> Series:
        """All evaluations of a pair, in either order of names; empty if there are none."""
        return self.pairs.get(_key(self.models, a, b), {})

    def pair_value(self, a: str, b: str, measure: str) -> Number:
        """The measure of a pair at the last epoch."""
        return self.pair_series(a, b).get(self.last_epoch, {}).get(measure)

    def model_value(self, model: str, measure: str) -> Number:
        """The measure of a model at the last epoch."""
        return self.per_model.get(model, {}).get(self.last_epoch, {}).get(measure)

    def noise_floor(self, measure: str) -> Number:
        """The reseeded twin's value at the last epoch; None if the run has no such twin."""
        return self.pair_value(self.reference, RESEEDED, measure) if RESEEDED in self.models else None

    def inside_floor(self, model: str, measure: str) -> bool | None:
        """Whether a model is at least as close to the reference as the reseeded twin; None if unknown."""
        value, floor = self.pair_value(self.reference, model, measure), self.noise_floor(measure)
        if not (known(value) and known(floor)):
            return None
        return value <= floor if measure == "weight_gap" else value >= floor

    def images_per_second(self) -> Number:
        """The median over epochs; None if no epoch was timed."""
        rates = [row["images_per_second"] for row in self.timing if known(row["images_per_second"])]
        return median(rates) if rates else None


def load_run(run_dir: Path, *, with_steps: bool = True) -> Run:
    """Read a run directory, finished or not.

    Args:
        run_dir: holds run.json, metrics.jsonl, pairs.jsonl if steps of a pair were measured, and timing.jsonl if
            epochs were timed. An incomplete last line is ignored; of two lines for one epoch or step the later one
            counts.
        with_steps: whether to read pairs.jsonl, which grows with the steps; otherwise `steps` is empty.

    Raises:
        FastclError: a file is missing, unreadable or invalid, or no evaluation has been written.
    """
    run_dir = Path(run_dir)
    head = _read_header(run_dir / "run.json")
    pairs, per_model = _read_metrics(head["models"], run_dir / "metrics.jsonl")
    steps = _read_steps(head["models"], run_dir / "pairs.jsonl") if with_steps else {}
    rows = _read_lines(run_dir / "timing.jsonl", optional=True)
    timed = tuple(_numbers(row, ("seconds", "images_per_second"), where) for where, row in rows)
    return Run(path=run_dir, pairs=pairs, per_model=per_model, steps=steps, timing=timed, **head)


def _read_header(path: Path) -> dict[str, Any]:
    head, name = _parse(_read(path), shown(path)), shown(path)
    kinds = {
        "config": dict, "seed": int, "versions": dict, "device": str, "models": list, "reference": str, "data": dict
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(head.get(key), kind):
            raise FastclError(f"{name}: '{key}' must be {kind.__name__}, got {brief(head.get(key))}")
    models = head["models"]
    if not all(isinstance(m, str) and m and m.isprintable() for m in models) or len(set(models)) != len(models):
        raise FastclError(f"{name}: 'models' must be distinct printable names, got {brief(models)}")
    if head["reference"] not in models or head["reference"] in CONTROLS:
        raise FastclError(f"{name}: 'reference' {head['reference']!r} is not one of the trained models {brief(models)}")
    config = head.pop("config")
    train = config.get("train")
    epochs = train.get("epochs") if isinstance(train, dict) else None
    if type(epochs) is not int or epochs < 0:
        raise FastclError(f"{name}: config.train.epochs must be an integer, got {brief(epochs)}")
    own = {"models": tuple(models), "reference": head["reference"], "data": head["data"]}
    return {"config": config, "facts": head, "planned_epochs": epochs, **own}


def _read_metrics(models: tuple[str, ...], path: Path) -> tuple[dict[tuple[str, str], Series], dict[str, Series]]:
    pairs: dict[tuple[str, str], Series] = {}
    per_model: dict[str, Series] = {}
    for where, row in _read_lines(path):
        epoch, names = _whole(row, "epoch", where), _names(row, models, where)
        if len(names) == 1:
            per_model.setdefault(names[0], {})[epoch] = _numbers(row, MODEL_MEASURES, where)
        else:
            measures = _numbers(row, PAIR_MEASURES | CERTIFICATE_MEASURES, where)
            pairs.setdefault(_key(models, *names), {})[epoch] = measures
    if not pairs and not per_model:
        raise FastclError(f"{shown(path)}: no evaluation has been written yet")
    return pairs, per_model


def _read_steps(models: tuple[str, ...], path: Path) -> dict[tuple[str, str], Series]:
    steps: dict[tuple[str, str], Series] = {}
    for where, row in _read_lines(path, optional=True):
        step, names = _whole(row, "step", where), _names(row | {"pair": row.get("pair")}, models, where)
        steps.setdefault(_key(models, *names), {})[step] = _numbers(row, [*STEP_MEASURES, "lr"], where)
    return steps


def _whole(row: dict[str, Any], name: str, where: str) -> int:
    value = row.get(name)
    if type(value) is not int or value < 0:
        raise FastclError(f"{where}: '{name}' must be an integer, got {brief(value)}")
    return value


def _names(row: dict[str, Any], models: tuple[str, ...], where: str) -> list[str]:
    """The two models of a record with a ``pair``, or the one of any other record."""
    wanted = 2 if "pair" in row else 1
    names = row["pair"] if wanted == 2 else [row.get("model")]
    if not isinstance(names, list) or len(names) != wanted or not all(name in models for name in names):
        raise FastclError(f"{where}: {brief(names)} does not name {wanted} of the models {list(models)}")
    if wanted == 2 and names[0] == names[1]:
        raise FastclError(f"{where}: the pair {names!r} is one model twice")
    return names


def _key(models: tuple[str, ...], a: str, b: str) -> tuple[str, str]:
    return (a, b) if models.index(a) < models.index(b) else (b, a)


def _numbers(row: dict[str, Any], names: Iterable[str], where: str) -> dict[str, Number]:
    for name in names:
        value = row.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise FastclError(f"{where}: '{name}' must be a number or null, got {brief(value)}")
    return {name: row.get(name) for name in names}


def _read_lines(path: Path, optional: bool = False) -> list[tuple[str, dict[str, Any]]]:
    if optional and not os.path.lexists(path):  # unlike Path.exists(), raises no PermissionError
        return []
    *lines, tail = _read(path).split(b"\n")
    name = shown(path)
    rows = [(f"{name}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    records = [(where, _parse(line, where)) for where, line in rows]
    where = f"{name}, line {len(lines) + 1}"
    try:
        return [*records, (where, _parse(tail, where))]
    except FastclError:  # an incomplete last line of a stopped writer, or the empty rest after the last newline
        return records


def _read(path: Path) -> bytes:
    text = read_if_there(path)
    if text is None:
        raise FastclError(absent(path))
    return text


def _parse(text: bytes, where: str) -> dict[str, Any]:
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise FastclError(f"{where}: must be a JSON object, got {type(value).__name__}")
    return value
