"""A sweep from its command to its page: checks every cell, runs what is not finished, writes what was measured."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.contrib.logging import logging_redirect_tqdm

from fastcl.choices import EQUAL, Equal
from fastcl.config.settings import Config
from fastcl.config.tables import load_config
from fastcl.config.written import written
from fastcl.errors import FastclError, one_of, shown
from fastcl.io.files import write_atomic
from fastcl.io.outputs import check_folder
from fastcl.io.run_names import SWEEP
from fastcl.sweep.children import Job, run_jobs, slots_for, visible_gpus
from fastcl.sweep.fairness import with_equal_images, with_equal_steps
from fastcl.sweep.grid import Cell, make_cells
from fastcl.sweep.long_table import write_table
from fastcl.sweep.outcomes import load_sweep
from fastcl.sweep.sweep_folder import (
    CELLS,
    CONFIGS,
    FAILED,
    TABLE,
    check_same,
    described,
    is_finished,
    read_failures,
    read_sweep,
    write_json,
)
from fastcl.sweep.sweep_page import write_sweep_report
from fastcl.train.early import Extent, check_configs
from fastcl.train.inputs import data_paths, image_folders
from fastcl.train.run_folder.records import check_run_folder, locked

log = logging.getLogger("fastcl")
BASE = "the config itself"
_TOLD = 5  # failed runs that the error names
_ABOUT = "# The run of a sweep's cell: {name}. Written by fastcl sweep, which overwrites it.\n"


class Plan(NamedTuple):
    """A sweep that has been checked.

    Attributes:
        cells: all of them, in order.
        head: its sweep.json.
        before: the sweep.json that is there; None if there is none.
        jobs: the runs of the cells, each once.
    """

    cells: list[Cell]
    head: dict[str, Any]
    before: dict[str, Any] | None
    jobs: list[Job]

    def finished(self, out: Path) -> set[str]:
        """Names of the runs that are finished. Raises FastclError if a folder holds another run."""
        own = (cell for cell in self.cells if cell.run == cell.name)
        return {cell.name for cell in own if is_finished(out / CELLS / cell.name, cell.config)}


def plan_sweep(config: Path, over: Sequence[str], seeds: int, out: Path, equal: Equal = "epochs") -> Plan:
    """Make the cells of a sweep and check each of them; creates nothing.

    Args:
        config: the config file.
        over: "KEY=V1,V2,..." items, as for `make_cells`.
        seeds: number of seeds.
        out: the folder of the sweep, which may hold it already.
        equal: "epochs", or "steps": the epochs of each cell are set so that all take about as many steps.

    Raises:
        FastclError: a cell that could not run, an output folder that cannot be written or holds something else, such as
            another sweep (the message says what differs).
    """
    if equal not in EQUAL:
        raise FastclError(one_of("--equal", EQUAL, equal))
    base = load_config(config)
    check_folder(out, "--out", [config])
    before = read_sweep(out)
    if before is not None:  # names of cells depend on the order of the keys
        order = list(before["over"])
        over = sorted(over, key=lambda item: _place(order, item.partition("=")[0].strip()))
    cells = make_cells(config, over, seeds)
    if before is not None:
        check_same(out, before, described(base, cells, equal, None))
    extents = _extents(cells, base if equal == "steps" else None)
    if equal == "steps":
        cells = with_equal_steps(cells, extents, base, extents[BASE].steps)
    cells, images = with_equal_images(cells, extents, (before or {}).get("test_images"))
    cells = _with_runs(cells, before)
    jobs = []
    for cell in cells:
        if cell.run == cell.name:
            folder = out / CELLS / cell.name
            check_run_folder(folder, [config, *data_paths(cell.config)], image_folders(cell.config))
            jobs.append(Job(cell.name, cell.config.train.epochs, extents[cell.name].steps))
    return Plan(cells, described(base, cells, equal, images), before, jobs)


def run_sweep(
    config: Path, over: Sequence[str], seeds: int, out: Path, *, equal: Equal = "epochs", jobs: int | None = None
) -> None:
    """Run a sweep, or what is left of it, and write its table and page.

    All cells are checked before the first one runs. Finished runs are not repeated, others resume. The table is written
    after each run.

    Args:
        config, over, seeds, out, equal: as for `plan_sweep`.
        jobs: runs at a time; None: one, or one for each GPU if there are several.

    Raises:
        FastclError: as `plan_sweep`; another process sweeps in this folder; or runs have failed, after all others have
            ended.
    """
    if jobs is not None and jobs < 1:
        raise FastclError(f"--jobs must be at least 1, got {jobs}")
    plan = plan_sweep(config, over, seeds, out, equal)
    with locked(out, "sweeping"):
        if read_sweep(out) != plan.before:
            raise FastclError(f"another sweep has begun in {shown(out)} meanwhile; give the command again")
        write_json(out / SWEEP, plan.head)
        for cell in plan.cells:
            if cell.run == cell.name:
                about = _ABOUT.format(name=cell.name)
                write_atomic(out / CONFIGS / f"{cell.name}.toml", written(cell.config, about).encode())
        failures = _run(out, plan, jobs)
        page = write_sweep_report(out)
    parquet = out / f"{TABLE}.parquet"
    also = f", {parquet.name}" if parquet.exists() else f" (no {parquet.name}: pyarrow is not installed)"
    log.info("table: %s%s", shown(out / f"{TABLE}.csv"), also)
    log.info("report: %s", shown(page))
    if failures:
        told = [f"{name}: {error}" for name, error in list(failures.items())[:_TOLD]]
        told += [f"and {len(failures) - _TOLD} more"] if len(failures) > _TOLD else []
        many = f"{len(failures)} of {len(plan.jobs)} runs failed; the same command tries them again"
        raise FastclError("\n  ".join([many, *told]))


def listing(plan: Plan, out: Path) -> str:
    """The cells of a plan as text, a line each."""
    axes = [f"{len(values)} value{'s' * (len(values) > 1)} of {key}" for key, values in plan.head["over"].items()]
    seeds = len(plan.head["seeds"])
    parts = " x ".join([*axes, f"{seeds} seed{'s' * (seeds > 1)}"])
    images, finished = plan.head["test_images"], plan.finished(out)
    told = f"; each is evaluated on {images} held-out images" if images is not None else ""
    lines = [f"{len(plan.cells)} cells ({parts}) in {len(plan.jobs)} runs, {len(finished)} finished{told}"]
    jobs = {job.name: job for job in plan.jobs}
    for cell in plan.cells:
        job = jobs[cell.run]
        state = ", finished" if cell.run in finished else ""
        same = f", the run of {cell.run}" if cell.run != cell.name else ""
        steps = f"{job.epochs} epoch{'s' * (job.epochs > 1)} of {job.steps} steps, lr {cell.config.optim.lr:.6g}"
        lines.append(f"  {cell.name}: {steps}{same}{state}")
    return "\n".join(lines)


def _run(out: Path, plan: Plan, jobs: int | None) -> dict[str, str]:
    """Run what is not finished; the errors of the runs that failed, by name."""
    finished = plan.finished(out)
    left = [job for job in plan.jobs if job.name not in finished]
    failures = {name: error for name, error in read_failures(out).items() if name in {job.name for job in left}}
    configs = {cell.name: cell.config for cell in plan.cells}
    ended = len(finished)

    def done(job: Job, error: str | None) -> None:
        nonlocal ended
        ended += 1
        if error is None and not is_finished(out / CELLS / job.name, configs[job.name]):
            error = "it ended without an error, but is not finished"
        failures.pop(job.name, None)
        if error is not None:
            failures[job.name] = error
        write_json(out / FAILED, failures)
        write_table(load_sweep(out))
        log.info("%s %s (%d of %d)%s", "finished" if error is None else "FAILED", job.name, ended, len(plan.jobs),
                 f": {error}" if error is not None else "")  # fmt: skip

    write_json(out / FAILED, failures)
    log.info("%d cells, %d runs, %d of them finished", len(plan.cells), len(plan.jobs), ended)
    if left:
        gpus = list(visible_gpus()) if any(config.train.device != "cpu" for config in configs.values()) else []
        count = jobs or max(1, len(gpus))
        with logging_redirect_tqdm():
            run_jobs(out, left, slots_for(min(count, len(left)), gpus), done)
    return failures


def _extents(cells: Sequence[Cell], base: Config | None) -> dict[str, Extent]:
    """The extent of each cell by its name, and of the config by the name BASE. Equal configs are checked once."""
    configs = ({BASE: base} if base is not None else {}) | {cell.name: cell.config for cell in cells}
    first: dict[str, str] = {}
    for name, config in configs.items():
        first.setdefault(repr(config), name)
    found = check_configs({name: configs[name] for name in first.values()})
    return {name: found[first[repr(config)]] for name, config in configs.items()}


def _with_runs(cells: Sequence[Cell], before: Mapping[str, Any] | None) -> list[Cell]:
    """Cells with the same config share a run: that of an earlier sweep in this folder, else that of the first one."""
    owners = {cell["name"]: cell["run"] for cell in before["cells"]} if before is not None else {}
    runs: dict[str, str] = {}
    for cell in cells:
        if cell.name in owners:
            runs.setdefault(repr(cell.config), owners[cell.name])
    return [dataclasses.replace(cell, run=runs.setdefault(repr(cell.config), cell.name)) for cell in cells]


def _place(order: Sequence[str], key: str) -> int:
    return order.index(key) if key in order else len(order)
