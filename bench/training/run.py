"""The training benchmark: parts of a step, training speed, alignment of the models, and the effect of bfloat16."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from bench.data.inputs import data_folder
from bench.harness.clocks import first_line
from bench.harness.records import (
    Record,
    add_arguments,
    check_out,
    device_of,
    exit_status,
    machine,
    record,
    require_positive,
    shortage,
    write,
)
from bench.training import profile, report, runs
from fastcl.config.settings import Config
from fastcl.config.tables import parse_config
from fastcl.errors import shown
from fastcl.io.outputs import named_path, same

BENCH = "training"
STEPS, RUNS, PRECISION = SECTIONS = ("steps", "runs", "precision")
CIFAR = "cifar10_jpeg75.npz"
MODELS = ("dcl", "nscl", "supcon", "ce")
TEMPERATURES = (0.1, 1.0)
# Batch and precision of the profiled steps. The largest batch trains one model: the activations that two models save
# for their backward passes fit no GPU.
CASES = {
    "cuda": ((1024, "fp32"), (1024, "bf16"), (4096, "bf16"), (16384, "bf16")),
    "cpu": ((64, "fp32"), (64, "bf16")),
    "tiny": ((16, "fp32"), (16, "bf16")),
}
FOUR_UP_TO = 4096  # largest batch on which all four models train
# Settings of the runs. A GPU trains in bfloat16, for more epochs in the same time; the section "precision" measures its
# effect.
BATCH = {"cuda": 1024, "cpu": 64, "tiny": 16}
PRECISION_OF_RUNS = {"cuda": "bf16", "cpu": "fp32", "tiny": "fp32"}
_SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_type": "deep", "stem_width": 4}

_DESCRIPTION = """\
The lockstep trainer on CIFAR-10 (digits where the file is absent): ResNet-18 with the CIFAR stem.

sections, in this order:
  steps      seconds of a step of all models together, images/s, peak memory, and the shares of views, encoders, losses,
             metrics and optimisers, by torch.profiler; float32 and bfloat16 networks, several batch sizes
  runs       dcl, nscl, supcon and ce side by side at two temperatures for as many epochs as --seconds allow, on a card
             in bfloat16: alignment with dcl, accuracy by nearest class centre and by a ridge probe, seconds of an epoch
             and of an evaluation; DIR/runs/ keeps the records and the report of each
  precision  two epochs in float32 and in bfloat16: is the difference in alignment larger than the noise floor, that is,
             than what other random views change?
"""
_EPILOG = """\
examples:
  python -m bench.training --out runs/bench                      everything
  python -m bench.training --out runs/try --sections steps       the profile alone

DIR/training.json holds the numbers, DIR/training.md the tables; they are rewritten after each case.
"""


@dataclass
class Run:
    """State shared by all cases of a run."""

    args: argparse.Namespace
    device: torch.device
    facts: Record
    kind: str  # "cuda", "cpu" or "tiny"
    source: str
    found: list[Record] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def save(self) -> None:
        """Write the results so far."""
        text = report.markdown(self.found, self.facts, self.source_name, self.args.tiny)
        write(self.args.out, BENCH, self.found, text)

    @property
    def source_name(self) -> str:
        """The data set without its path."""
        return Path(self.source.partition(":")[2]).stem or self.source

    def add(self, case: Record, values: Record, reason: str | None = None) -> None:
        """Add a record, print a line and write the results."""
        self.found.append(record(BENCH, "fastcl", case | values, self.facts, reason=reason))
        print(f"{', '.join(f'{k} {v}' for k, v in case.items())}: {reason or 'done'}", flush=True)
        self.save()


def config(run: Run, models: tuple[str, ...], *, batch: int, epochs: int, temperature: float = 0.1,
           precision: str = "fp32", controls: tuple[str, ...] = ()) -> Config:  # fmt: skip
    """The config of a training run by the recipe of arXiv 2510.08852, with ResNet-18."""
    small = run.kind != "cuda"
    train = {
        "models": list(models), "controls": list(controls), "temperature": temperature, "batch_size": batch,
        "epochs": epochs, "eval_every": max(1, epochs // 10), "checkpoint_every": epochs, "precision": precision,
        "device": run.device.type,
    }  # fmt: skip
    return parse_config({
        "data": {"source": run.source, **({"classes": 4} if small else {})},
        "views": {"preset": "cifar" if run.source.startswith("cifar") else "characters", "size": 12 if small else 32},
        "model": {"name": "resnet18", "options": _SMALL if small else {}, **({"hidden": 32, "projection": 16} if small
                  else {"projection": 128})},
        "optim": {"name": "lars", "lr": 0.3 * batch / 256, "warmup_epochs": min(10.0, epochs / 10)},
        "train": train,
    })  # fmt: skip


def measure_steps(run: Run, scratch: Path) -> None:
    """Run the section "steps"."""
    for batch, precision in CASES[run.kind]:
        models = MODELS if batch <= FOUR_UP_TO else MODELS[:1]
        case = {"section": STEPS, "batch": batch, "precision": precision, "models": len(models)}
        try:
            asked = config(run, models, batch=batch, epochs=1, precision=precision)
            values = profile.measure(asked, scratch / f"steps-{batch}-{precision}", run.device, run.args.repeats)
            run.add(case, values)
        except Exception as problem:  # go on with the other cases
            _failed(run, case, problem)


def train_runs(run: Run, scratch: Path) -> None:
    """Run the section "runs"."""
    epochs = epochs_within(run, scratch)
    batch, precision = BATCH[run.kind], PRECISION_OF_RUNS[run.kind]
    for temperature in TEMPERATURES:
        case = {"section": RUNS, "temperature": temperature, "epochs": epochs, "batch": batch, "precision": precision}
        try:
            asked = config(run, MODELS, batch=batch, epochs=epochs, temperature=temperature, precision=precision,
                           controls=("reseeded",))  # fmt: skip
            run.add(case, runs.train(asked, run.args.out / "runs" / f"temperature-{temperature:g}"))
        except Exception as problem:
            _failed(run, case, problem)


def compare_precisions(run: Run, scratch: Path) -> None:
    """Run the section "precision"."""
    case = {"section": PRECISION, "epochs": 2, "batch": BATCH[run.kind]}
    try:
        asked = {
            precision: config(run, MODELS[:2], batch=BATCH[run.kind], epochs=2, precision=precision,
                              controls=("reseeded",))
            for precision in ("fp32", "bf16")
        }  # fmt: skip
        run.add(case, runs.compare(asked, scratch / "precision"))
    except Exception as problem:
        _failed(run, case, problem)


def epochs_within(run: Run, scratch: Path) -> int:
    """Number of epochs that take about --seconds, from the time of a step of four models; at least 2, and 2 if no step
    could be timed."""
    case = {"batch": BATCH[run.kind], "precision": PRECISION_OF_RUNS[run.kind]}
    wanted = {"section": STEPS, **case, "models": len(MODELS)}
    values = next((r for r in run.found if wanted.items() <= r.items()), None)
    if run.kind == "tiny" or (values and values["reason"]):
        return 2
    if values is None:
        values = profile.measure(config(run, MODELS, epochs=1, **case), scratch / "pace", run.device, 3)
    epoch = values["steps_per_epoch"] * median(values["step_seconds"]) * (len(MODELS) + 1) / len(MODELS)
    return max(2, int(run.args.seconds / (1.2 * epoch)))  # a fifth for evaluations


def _failed(run: Run, case: Record, problem: Exception) -> None:
    reason = shortage(problem) or f"failed: {first_line(problem)}"
    if not shortage(problem):
        run.failed.append(f"{case['section']}: {reason}")
    run.add(case, {}, reason)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


_RUN = {STEPS: measure_steps, RUNS: train_runs, PRECISION: compare_precisions}


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Work in a folder, so that a source there needs no path and records and reports are the same on every machine."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status (0 done, 1 something failed, 130 interrupted)."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.training", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser)
    parser.set_defaults(repeats=10, seconds=120)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="NAME",
        help="default: steps runs precision")  # fmt: skip
    parser.add_argument("--data", type=named_path, metavar="FOLDER",
        help=f"folder of {CIFAR} (default: $FASTCL_DATA, else ../shared/data)")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="sizes that prove that it works and measure nothing")
    args = parser.parse_args(argv)
    require_positive(parser, args, "repeats", "seconds")
    device, file = device_of(args, parser), data_folder(args.data) / CIFAR
    check_out(args, parser, file.parent)
    if any(same(args.out / "runs", folder) for folder in file.parents):
        parser.error(f"--out: what is in {shown(args.out / 'runs')} is replaced, but --data lies there")
    real = file.is_file() and not args.tiny
    source, args.out = f"cifar10:{CIFAR}" if real else "digits", args.out.resolve()
    run = Run(args, device, machine(device), "tiny" if args.tiny else device.type, source)
    print(f"{run.facts['device']}, {run.source_name}; results go to {args.out}", flush=True)
    try:
        with tempfile.TemporaryDirectory() as scratch, working_in(file.parent if real else Path.cwd()):
            for section in (s for s in SECTIONS if s in args.sections):
                _RUN[section](run, Path(scratch))
    except KeyboardInterrupt:
        print("interrupted; the files hold the cases that were finished", file=sys.stderr)
        return 130
    return exit_status(run.failed)
