"""What the cells of a sweep have measured so far, read from their folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastcl.errors import FastclError, brief, shown
from fastcl.io.run_names import SWEEP
from fastcl.report.run import CONTROLS, RESEEDED, Run, load_run
from fastcl.sweep.sweep_folder import CELLS, read_failures, read_sweep
from fastcl.train.run_folder.identity import lacks

FINISHED, UNFINISHED, WAITING, BROKEN = "finished", "unfinished", "not begun", "failed"


@dataclass(frozen=True)
class Outcome:
    """One cell.

    Attributes:
        name: of the cell.
        values: swept key -> value as text.
        seed: of its run.
        state: FINISHED, UNFINISHED, WAITING or BROKEN.
        error: why it is BROKEN; "" otherwise.
        run: what has been measured; None if nothing has.
    """

    name: str
    values: Mapping[str, str]
    seed: int
    state: str
    error: str
    run: Run | None

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch; 0 if nothing has been measured."""
        if self.run is None:
            return 0
        return int(self.run.data["train"]) // int(self.run.config["train"]["batch_size"])


@dataclass(frozen=True)
class Sweep:
    """A sweep and its cells, in order.

    Attributes:
        path: its folder.
        config: its config, as in run.json.
        over: swept key -> its values.
        seeds: of the runs.
        equal: what is equal in all cells: "epochs" or "steps".
        test_images: held-out images of every cell that the sweep has set; None: it has set none.
        cells: one for each combination of values and seed.
    """

    path: Path
    config: Mapping[str, Any]
    over: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    equal: str
    test_images: int | None
    cells: tuple[Outcome, ...]

    @cached_property
    def runs(self) -> list[Run]:
        """Those of the cells that have measured something."""
        return [cell.run for cell in self.cells if cell.run is not None]

    @property
    def reference(self) -> str:
        """The first run's reference; "" if there is no run."""
        return self.runs[0].reference if self.runs else ""

    @property
    def models(self) -> tuple[str, ...]:
        """All models of all runs, controls last."""
        found = dict.fromkeys(model for run in self.runs for model in run.models)
        return tuple(sorted(found, key=lambda model: model in CONTROLS))

    @property
    def others(self) -> tuple[str, ...]:
        """The models with an objective of their own, without the reference."""
        return tuple(m for m in self.models if m != self.reference and m not in CONTROLS)

    @property
    def compared(self) -> tuple[str, ...]:
        """The models that figures compare with the reference: the others, and the reseeded twin."""
        return (*self.others, *(m for m in (RESEEDED,) if m in self.models))

    @cached_property
    def groups(self) -> list[list[Outcome]]:
        """The cells by their values: those that differ in the seed alone are one group."""
        found: dict[tuple[str, ...], list[Outcome]] = {}
        for cell in self.cells:
            found.setdefault(tuple(cell.values.values()), []).append(cell)
        return list(found.values())

    def group(self, values: Mapping[str, str]) -> list[Outcome]:
        """The cells of a value of every swept key."""
        return [cell for cell in self.cells if cell.values == values]


def load_sweep(out: Path) -> Sweep:
    """Read the folder of a sweep, finished or not.

    Raises:
        FastclError: there is no sweep, or its sweep.json cannot be read. A cell that cannot be read is BROKEN.
    """
    head = read_sweep(out)
    if head is None:
        raise FastclError(f"{shown(out / SWEEP)}: no such file; is {shown(out)} the folder of a sweep?")
    failures = read_failures(out)
    read: dict[str, tuple[str, str, Run | None]] = {}
    cells = []
    for cell in head["cells"]:
        name = cell["run"]
        if name not in read:
            read[name] = _outcome(out / CELLS / name, failures.get(name, ""))
        cells.append(Outcome(cell["name"], cell["values"], cell["seed"], *read[name]))
    over = {key: tuple(values) for key, values in head["over"].items()}
    return Sweep(out, head["config"], over, tuple(head["seeds"]), head["equal"], head.get("test_images"), tuple(cells))


def _outcome(folder: Path, failure: str) -> tuple[str, str, Run | None]:
    """The state, the error and the measurements of a run."""
    try:
        measured = (folder / "metrics.jsonl").stat().st_size > 0
    except OSError:
        measured = False
    if not measured:
        begun = (folder / "run.json").exists()
        return BROKEN if failure else UNFINISHED if begun else WAITING, failure, None
    try:
        run = load_run(folder, with_steps=False)
        _check_facts(run)
        if run.finished and not lacks(folder, run.planned_epochs, run.models):
            return FINISHED, "", run
    except FastclError as error:
        return BROKEN, str(error), None
    return BROKEN if failure else UNFINISHED, failure, run


def _check_facts(run: Run) -> None:
    """Refuse a run.json without what the table and the page say of every cell."""
    train, optim = (run.config.get(name) for name in ("train", "optim"))
    facts = {
        "data.train": run.data.get("train"),
        "data.test": run.data.get("test"),
        "config.train.batch_size": train.get("batch_size") if isinstance(train, dict) else None,
        "config.optim.lr": optim.get("lr") if isinstance(optim, dict) else None,
    }
    for name, value in facts.items():
        if type(value) not in ((float, int) if name.endswith("lr") else (int,)) or not value > 0:
            raise FastclError(f"{shown(run.path / 'run.json')}: {name} must be a positive number, got {brief(value)}")
