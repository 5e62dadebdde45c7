"""The training benchmark: parts of a step, training speed, alignment of the models, and the effect of bfloat16."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from bench.harness.command import Command
from bench.harness.records import Record, having, machine, record
from bench.harness.suite import Run
from bench.training import memory, profile, report, runs, speed
from fastcl.config.settings import Config, ModelConfig
from fastcl.config.tables import parse_config
from fastcl.errors import shown
from fastcl.io.outputs import same

BENCH = "training"
STEPS, SPEED, MEMORY, RUNS, PRECISION = SECTIONS = ("steps", speed.SECTION, "memory", "runs", "precision")
CIFAR = "cifar10_jpeg75.npz"
MODELS = ("dcl", "nscl", "supcon", "ce")
SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_type": "deep", "stem_width": 4}
TEMPERATURES = (0.1, 1.0)
# Batch and precision of the profiled steps. The largest batch trains one model: the activations that two models save
# for their backward passes fit no GPU.
CASES = {
    "cuda": ((1024, "fp32"), (1024, "bf16"), (4096, "bf16"), (16384, "bf16")),
    "cpu": ((64, "fp32"), (64, "bf16")),
    "tiny": ((64, "fp32"), (64, "bf16")),
}
# Batch and precision, and whether the network and its images are small: then views take most of a step.
SPEED_CASES = {
    "cuda": ((1024, "bf16", False), (1024, "fp32", False)),
    "cpu": ((64, "fp32", False), (64, "fp32", True)),
    "tiny": ((16, "fp32", True),),
}
FOUR_UP_TO = 4096  # largest batch on which all four models train
# Samples of the step whose memory is measured, side of the images, and options of the ResNet.
MEMORY_CASE = {
    "cuda": (1024, 32, {}),
    "cpu": (256, 32, {"channels": [16, 32, 64, 128], "stem_type": "deep", "stem_width": 8}),
    "tiny": (64, 8, SMALL),
}
# Settings of the runs. A GPU trains in bfloat16, for more epochs in the same time; the section "precision" measures its
# effect.
BATCH = {"cuda": 1024, "cpu": 64, "tiny": 64}
PRECISION_OF_RUNS = {"cuda": "bf16", "cpu": "fp32", "tiny": "fp32"}

_DESCRIPTION = f"""\
The lockstep trainer on CIFAR-10 ({CIFAR}; digits where it is absent): ResNet-18 with the CIFAR stem.

sections, in this order:
  steps      seconds of a step of all models together, images/s, peak memory, and the shares of views, encoders, losses,
             metrics and optimisers, by torch.profiler; float32 and bfloat16 networks, several batch sizes
  speed      images/s of whole steps of 1, 2 and 4 networks, beside the published loop and solo-learn's SimCLR step,
             written from their descriptions: one network each, the same batch and views of the same recipe
  memory     peak memory of one step of one model: one part alone, the batch in {memory.PARTS} parts
             (fastcl.micro_step), and the batch at once
  runs       dcl, nscl, supcon and ce side by side at two temperatures for as many epochs as --seconds allow, on a card
             in bfloat16: alignment with dcl, accuracy by nearest class centre and by a ridge probe, seconds of an epoch
             and of an evaluation; DIR/runs/ keeps the records and the report of each
  precision  two epochs in float32 and in bfloat16: is the difference in alignment larger than the noise floor, that is,
             than what other random views change?

DIR/training.json holds the numbers, DIR/training.md the tables; they are rewritten after each case.
"""

Part: TypeAlias = Callable[[], None]  # measures a case


@dataclass
class Training(Run):
    """A run of this benchmark: its kind is "cuda", "cpu" or "tiny"."""

    kind: str = "tiny"
    source: str = "digits"


def config(
    run: Training, models: tuple[str, ...], batch: int, epochs: int, small: bool | None = None, **train: Any
) -> Config:
    """The config of a training run by the recipe of arXiv 2510.08852, with ResNet-18.

    Args:
        small: network and images are; None: unless on a GPU.
        train: other settings.
    """
    cuda, tiny = run.kind == "cuda", run.kind == "tiny"
    small = not cuda if small is None else small
    model = {"options": SMALL, "hidden": 32, "projection": 16} if small else {"options": {}, "projection": 128}
    return parse_config({
        "data": {"source": run.source, **({} if cuda else {"classes": 2 if tiny else 4})},
        "views": {"preset": "cifar" if run.source.startswith("cifar") else "characters", "size": 12 if small else 32},
        "model": {"name": "resnet18", **model},
        "optim": {"name": "lars", "lr": 0.3 * batch / 256, "warmup_epochs": min(10.0, epochs / 10)},
        "train": {"models": list(models), "controls": [], "temperature": 0.1, "batch_size": batch, "epochs": epochs,
                  "eval_every": max(1, epochs // 10), "checkpoint_every": epochs, "device": run.device.type, **train},
    })  # fmt: skip


def steps(run: Training, scratch: Path) -> Iterator[Part]:
    """The section "steps"."""
    for batch, precision in CASES[run.kind]:
        models = MODELS if batch <= FOUR_UP_TO else MODELS[:1]
        case = {"section": STEPS, "batch": batch, "precision": precision, "models": len(models)}
        asked, folder = config(run, models, batch, 1, precision=precision), scratch / f"steps-{batch}-{precision}"
        yield partial(attempt, run, case, partial(profile.measure, asked, folder, run.device, run.args.repeats))


def speeds(run: Training, scratch: Path) -> Iterator[Part]:
    """The section "speed"."""
    for batch, precision, small in SPEED_CASES[run.kind]:

        def asked(networks: int, batch: int = batch, precision: str = precision, small: bool = small) -> Config:
            return config(run, MODELS[:networks], batch, 1, small, precision=precision)

        yield speed.Speed(run, speed.Case(batch, precision, small, asked, scratch)).measure


def memories(run: Training, scratch: Path) -> Iterator[Part]:
    """The section "memory"."""
    batch, size, options = MEMORY_CASE[run.kind]
    model = ModelConfig(options=options, projection=128)
    for samples, parts in ((batch // memory.PARTS, 1), (batch, memory.PARTS), (batch, 1)):
        case = {"section": MEMORY, "batch": samples, "parts": parts}
        yield partial(attempt, run, case, partial(memory.measure, model, size, samples, parts, run.device))


def trained(run: Training, scratch: Path) -> Iterator[Part]:
    """The section "runs"."""
    epochs = epochs_within(run, scratch)
    batch, precision = BATCH[run.kind], PRECISION_OF_RUNS[run.kind]
    for temperature in TEMPERATURES:
        asked = config(run, MODELS, batch, epochs, temperature=temperature, precision=precision, controls=["reseeded"])
        case = {"section": RUNS, "temperature": temperature, "epochs": epochs, "batch": batch, "precision": precision}
        folder = run.args.out / "runs" / f"temperature-{temperature:g}"
        yield partial(attempt, run, case, partial(runs.train, asked, folder))


def precisions(run: Training, scratch: Path) -> Iterator[Part]:
    """The section "precision"."""
    batch = BATCH[run.kind]
    asked = {p: config(run, MODELS[:2], batch, 2, precision=p, controls=["reseeded"]) for p in ("fp32", "bf16")}
    case = {"section": PRECISION, "epochs": 2, "batch": batch}
    yield partial(attempt, run, case, partial(runs.compare, asked, scratch / "precision"))


def epochs_within(run: Training, scratch: Path) -> int:
    """Number of epochs that take about --seconds, from the time of a step of four models; at least 2, and 2 if no step
    could be timed."""
    batch, precision = BATCH[run.kind], PRECISION_OF_RUNS[run.kind]
    found = having(run.found, section=STEPS, batch=batch, precision=precision, models=len(MODELS))
    values = found[0] if found else None
    if run.kind == "tiny" or (values and values["reason"]):
        return 2
    if values is None:
        values = profile.measure(config(run, MODELS, batch, 1, precision=precision), scratch / "pace", run.device, 3)
    epoch = values["steps_per_epoch"] * median(values["step_seconds"]) * (len(MODELS) + 1) / len(MODELS)
    return max(2, int(run.args.seconds / (1.2 * epoch)))  # a fifth for evaluations


PARTS = {STEPS: steps, SPEED: speeds, MEMORY: memories, RUNS: trained, PRECISION: precisions}


def attempt(run: Training, case: Record, measure: Callable[[], Record]) -> None:
    """Add the record of a case and print a line."""
    values, reason = {}, None
    try:
        values = measure()
    except Exception as problem:  # go on with the other cases
        reason = run.reason(case["section"], problem)
    peak = values.get("peak_bytes")
    run.found.append(record(BENCH, "fastcl", case | values, run.facts, peak_bytes=peak, reason=reason))
    print(f"{', '.join(f'{k} {v}' for k, v in case.items())}: {reason or 'done'}", flush=True)


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
    """Run the benchmark; return the exit status."""
    options = ("device", "repeats", "seconds", "data", "tiny")
    parser = Command(BENCH, [_DESCRIPTION], *options, repeats=10, seconds=120)
    parser.add_names("--sections", SECTIONS, f"default: {' '.join(SECTIONS)}")
    args = parser.parse(argv)
    file = args.data / CIFAR
    if any(same(args.out / "runs", folder) for folder in file.parents):
        parser.error(f"--out: what is in {shown(args.out / 'runs')} is replaced, but --data lies there")
    real = file.is_file() and not args.tiny
    facts, name = machine(args.device), file.stem if real else "digits"
    args.out = args.out.resolve()
    run = Training(BENCH, args, facts, lambda found: report.markdown(found, facts, name, args))
    run.kind, run.source = "tiny" if args.tiny else args.device.type, f"cifar10:{CIFAR}" if real else "digits"
    with tempfile.TemporaryDirectory() as scratch, working_in(file.parent if real else Path.cwd()):
        chosen = (section for section in SECTIONS if section in args.sections)
        return run.execute(part for section in chosen for part in PARTS[section](run, Path(scratch)))
