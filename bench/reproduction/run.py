"""Small networks on a CPU asked the questions of arXiv 2510.08852: how alike do CL and supervised losses become?

Twelve sweeps (fastcl sweep) on Omniglot, a part of CIFAR-10 and fruits, three seeds each; --sweeps has a folder for
each, with its own page. What is finished is not run again, and a stopped command goes on where it stopped. --out gets
results.csv with every alignment, reproduction.md with the claims and what the runs say of them, and the figures.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch

from bench.harness.command import OPTIONS, Command, at_least
from bench.harness.records import machine, write_file
from bench.reproduction import images, pictures, report, rows
from bench.reproduction.experiments import EXPERIMENTS, Experiment, tiny
from fastcl.errors import FastclError
from fastcl.io.outputs import check_folder, named_path
from fastcl.sweep import load_sweep, run_sweep

BENCH = "reproduction"
log = logging.getLogger("fastcl")


def main(argv: list[str] | None = None) -> int:
    """Run what is not finished and write the results; return the exit status."""
    names = [experiment.name for experiment in EXPERIMENTS]
    parser = Command(BENCH, [__doc__ or ""], "tiny")
    text = f"folder of {', '.join(images.FILES)} (default: $FASTCL_DATA, else ../shared/data)"
    parser.add_argument("--data", **{**OPTIONS["data"], "help": text})
    parser.add_argument("--sweeps", type=named_path, metavar="DIR", help="folder of the sweeps (default: OUT/sweeps)")
    parser.add_names("--only", names, f"these sweeps (default: all): {', '.join(names)}")
    text = "runs at a time, with a thread each (default: the cores, %(default)s here)"
    parser.add_argument("--jobs", type=at_least(1), default=len(os.sched_getaffinity(0)), metavar="N", help=text)
    args = parser.parse(argv)
    sweeps = args.sweeps or args.out / "sweeps"
    chosen = [tiny(one) if args.tiny else one for one in EXPERIMENTS if one.name in args.only]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        check_folder(sweeps, "--sweeps", [args.data])
        train(chosen, args.data, sweeps, args.jobs)
        print(_written(chosen, sweeps, args.out, args.tiny))
    except FastclError as error:
        raise SystemExit(f"error: {error}") from error
    return 0


def _written(chosen: Sequence[Experiment], sweeps: Path, out: Path, small: bool) -> str:
    """Write all results; returns the answers."""
    rows.write(rows.gathered(chosen, sweeps), out)
    hours = sum(seconds_of(sweeps / one.name) for one in chosen) / 3600
    about = {**machine(torch.device("cpu")), "core_hours": round(hours, 2)}
    write_file(out / report.ABOUT, json.dumps(about, indent=1) + "\n")
    found = rows.read(out)  # with the digits that the file has
    pictures.draw(found, out)
    title = f"{BENCH.capitalize()}{' in miniature: digits instead of all images, which measures nothing' * small}"
    write_file(out / f"{BENCH}.md", f"# {title}\n\n{report.conditions(about)}\n\n{report.body(found)}")
    return report.answers(found)


def train(experiments: Sequence[Experiment], data: Path, folder: Path, jobs: int) -> None:
    """Run every sweep, each run in one thread, so that its bits do not depend on how many there are at a time.

    Raises:
        FastclError: images that are not there, or a run that failed.
    """
    for experiment in experiments:
        images.check(experiment, data)
    folder.mkdir(parents=True, exist_ok=True)
    configs = [images.write_config(experiment, data, folder) for experiment in experiments]
    with mock.patch.dict(os.environ, OMP_NUM_THREADS=str(jobs)):  # which a sweep divides among them
        for number, (one, config) in enumerate(zip(experiments, configs, strict=True), 1):
            log.info("sweep %d of %d: %s", number, len(experiments), one.name)
            run_sweep(config, one.over, one.seeds, folder / one.name, equal=one.equal, jobs=jobs)


def seconds_of(sweep: Path) -> float:
    """Seconds that the epochs of all runs of a sweep took."""
    runs = {cell.run.path: cell.run for cell in load_sweep(sweep).cells if cell.run is not None}
    return sum(epoch["seconds"] or 0.0 for run in runs.values() for epoch in run.timing)
