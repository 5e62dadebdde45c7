"""Images per second and core-seconds per image for decoding and two views, by every renderer and other libraries."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import torch

from bench.data import inputs, report
from bench.data.inputs import CASES, TINY, Case, Photos
from bench.data.providers import LEVELS, PROVIDERS, Batch, Feed, Provider, reference
from bench.harness.clocks import Sample, first_line, interleave
from bench.harness.records import (
    Record,
    add_arguments,
    check_out,
    device_of,
    exit_status,
    machine,
    milliseconds,
    record,
    require_positive,
    shortage,
    write,
)
from bench.losses.providers import versions
from bench.training import waiting
from fastcl.io.outputs import named_path

BENCH = "data"
SECTIONS = ("views", waiting.SECTION)
PACKAGES = ("torchvision", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "kornia")
WARM_UP = {"cpu": 0, "cuda": 0.2}  # seconds of untimed rounds first, since a GPU's clocks rise under load

_DESCRIPTION = f"""\
From stored images to two float32 views of each on the device: images a second and core-seconds per image, by the
renderers of fastcl and by what a user would write or install otherwise.

providers, all in one run and interleaved, so that a drift of the machine hits all alike:
  fastcl torchvision, dali, triton  the renderers of fastcl.data, with drawing the plan
  torchvision v2, ..., workers      its transforms on Pillow's images or on tensors, in a DataLoader's workers
  DALI, operator seeds              random operators with seeds of their own, as self-supervised libraries have it
  kornia                            augmentations of whole batches on the device
  drawing the plan alone, reading alone, decoding alone
                                    parts of the others' time, or bounds of it

Before they are timed, the views of each renderer of fastcl are compared with those of the reference function: over
{LEVELS:g} grey levels in the mean it is not timed, and the exit status is 1. The others draw their own random numbers:
of them the views' shape and finite values are checked. What cannot run here is named with its reason.
"""
_EPILOG = """\
examples:
  python -m bench.data --out runs/bench                     everything
  python -m bench.data --out runs/try --sizes 32            one table

DIR/data.json holds every single time, DIR/data.md the tables; both are rewritten after each size, so a run that is
stopped keeps what it has. For numbers worth quoting leave the machine to the run alone.
"""


@dataclass
class Run:
    """State shared by all cases of a run."""

    args: argparse.Namespace
    device: torch.device
    facts: Record
    failed: list[str] = field(default_factory=list)


@dataclass
class Entry:
    """A provider that can be timed on a case, and the difference of its views from the reference in grey levels."""

    provider: Provider
    feed: Feed
    mean: float | None
    largest: float | None


def levels(views: Batch, wanted: Batch, case: Case) -> tuple[float, float]:
    """Mean and largest difference of normalised views, in grey levels (0 to 255)."""
    std = torch.tensor(case.spec.std)[:, None, None]
    apart = torch.cat([(a.cpu() - b).abs() * std * 255 for a, b in zip(views, wanted, strict=True)])
    return float(apart.mean()), float(apart.max())


def check(
    provider: Provider, views: Batch, found: Photos, case: Case, device: torch.device
) -> tuple[float, float] | None:
    """Validate a first batch of views; return the difference in grey levels for our renderers, None for others.

    Raises:
        ValueError: the views cannot be right.
    """
    shape = (case.batch, 3, case.size, case.size)
    for view in views:
        if tuple(view.shape) != shape or view.dtype != torch.float32 or view.device.type != device.type:
            raise ValueError(f"views are {tuple(view.shape)} {view.dtype} on {view.device.type}, wanted are {shape}")
        if not torch.isfinite(view).all():
            raise ValueError("views are not finite")
    if len(views) != 2 or torch.equal(*views):
        raise ValueError(f"{len(views)} views, or twice the same")
    if not provider.renderer:
        return None
    apart = levels(views, reference(found, case), case)
    if not apart[0] <= LEVELS:
        raise ValueError(f"off by {apart[0]:.3g} grey levels in the mean, allowed are {LEVELS:g}")
    return apart


def one_pass(feed: Feed, epoch: int, device: torch.device) -> Batch:
    """Make all views of the case and wait until they are on the device; return the first batch."""
    batches = feed(epoch)
    first = next(batches)
    for _ in batches:
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return first


def core_seconds() -> float | None:
    """Processor time so far of this process, its threads and its workers; None if the system does not report it."""
    ended, tick = os.times(), os.sysconf("SC_CLK_TCK")
    total = process_time() + ended.children_user + ended.children_system
    for child in multiprocessing.active_children():
        try:
            text = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:  # no /proc, or a worker that has just ended
            return None
        fields = text.rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick
    return total


def timer(feed: Feed, epochs: itertools.count, device: torch.device) -> dict[str, Sample]:
    """Times of one pass in ms: wall clock, and all cores together if known."""
    before, began = core_seconds(), perf_counter()
    one_pass(feed, next(epochs), device)
    wall, after = perf_counter() - began, core_seconds()
    cores = None if before is None or after is None else 1e3 * (after - before)
    return {"wall": Sample(1e3 * wall), "cores": Sample(cores)}


def probe(provider: Provider, found: Photos, case: Case, run: Run) -> tuple[str | None, Entry | None]:
    """The reason why a provider cannot be timed on a case, or its entry."""
    try:
        if reason := provider.obstacle(found, case, run.device):
            return reason, None
        feed = provider.open(found, case, run.device)
        # The first pass loads code, starts workers and compiles kernels; the second shows the time of a pass.
        first = one_pass(feed, 0, run.device)
        apart = check(provider, first, found, case, run.device) if provider.views else None
        began = perf_counter()
        one_pass(feed, 1, run.device)
        seconds = perf_counter() - began
        if seconds > run.args.seconds:
            return f"over the limit of {run.args.seconds:g} s: one pass takes {seconds:.3g} s", None
        return None, Entry(provider, feed, *(apart or (None, None)))
    except Exception as problem:  # any unsupported or failing case is recorded
        if reason := shortage(problem):
            return reason, None
        if provider.renderer:
            run.failed.append(f"{case}: {provider.name}: {first_line(problem)}")
        return f"failed: {first_line(problem)}", None


def run_case(case: Case, found: Photos, run: Run) -> list[Record]:
    """Check, then time all providers on one size; print a line for each."""
    records, entries = [], {}
    for provider in (p for p in PROVIDERS if p.name in run.args.providers):
        reason, entry = probe(provider, found, case, run)
        if entry is None:
            records.append(_record(case, found, provider, run, reason=reason))
            print(f"{case}: {provider.name}: {reason}", flush=True)
        else:
            entries[provider.name] = entry
            far = "" if entry.mean is None else f", {entry.mean:.3g} grey levels from the reference"
            print(f"{case}: {provider.name}: runs{far}", flush=True)
    timers = {name: partial(timer, e.feed, itertools.count(2), run.device) for name, e in entries.items()}
    rounds = interleave(timers, run.args.repeats, run.args.seconds, WARM_UP[run.device.type]) if timers else {}
    for name, samples in rounds.items():
        cores = [s.wall for s in samples["cores"] if s.wall is not None]
        entry = entries[name]
        made = _record(case, found, entry.provider, run, samples["wall"], cores, entry.mean, entry.largest)
        records.append(made)
        print(f"{case}: {name}: {milliseconds(made['samples_ms'])} ms, {len(samples['wall'])} rounds", flush=True)
    order = [p.name for p in PROVIDERS]
    return sorted(records, key=lambda r: order.index(r["provider"]))


def _record(
    case: Case, found: Photos, provider: Provider, run: Run, samples: Sequence[Sample] = (),
    cores: Sequence[float] = (), mean: float | None = None, largest: float | None = None, reason: str | None = None,
) -> Record:  # fmt: skip
    full = {
        "section": "views", "size": case.size, "source": found.name, "preset": case.preset,
        "images": len(found.split), "batch": case.batch, "views": 2 if provider.views else 0,
        "cores_ms": list(cores), "difference_mean": mean, "difference_max": largest,
    }  # fmt: skip
    return record(BENCH, provider.name, full, run.facts, "fwd", samples, reason=reason)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status (0 done, 1 a renderer of fastcl failed, 130 interrupted)."""
    args, device = _arguments(argv)
    facts = machine(device)
    facts["versions"] |= versions(PACKAGES)
    run = Run(args, device, facts)
    head = report.header(facts, args, device)
    print(f"{facts['device']}; results go to {args.out}", flush=True)
    found: list[Record] = []

    def save() -> None:
        write(args.out, BENCH, found, head + report.body(found))

    cases = TINY if args.tiny else [c for c in CASES[device.type] if c.size in args.sizes]
    folder = inputs.data_folder(args.data)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for case in cases:
                own = Path(scratch) / str(case.size)
                own.mkdir()
                images = inputs.read(case, folder, own)
                if "views" in args.sections:
                    found += run_case(case, images, run)
                    save()
                if waiting.SECTION in args.sections and case.size == waiting.SIZE[args.tiny]:
                    made, failed = waiting.run(case, images, Path(scratch), args, device, facts)
                    found += made
                    run.failed += failed
                    save()
    except KeyboardInterrupt:
        print("interrupted; the files hold the sizes that were finished", file=sys.stderr)
        return 130
    return exit_status(run.failed)


def _arguments(argv: list[str] | None) -> tuple[argparse.Namespace, torch.device]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.data", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names, sizes = [p.name for p in PROVIDERS], [case.size for case in CASES["cpu"]]
    add_arguments(parser)
    parser.set_defaults(seconds=20, repeats=5)
    # fmt: off
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="NAME",
        help=f"views: every provider; training: what a step of the trainer waits, at {waiting.SIZE[False]} pixels "
        "(default: both)")
    parser.add_argument("--sizes", type=int, nargs="+", choices=sizes, default=sizes, metavar="PIXELS",
        help=f"sides of the views (default: {' '.join(map(str, sizes))})")
    parser.add_argument("--data", type=named_path, metavar="FOLDER", help="folder of the real images: "
        f"{', '.join(c.file for c in CASES['cpu'])} (default: $FASTCL_DATA, else ../shared/data); made up where absent")
    parser.add_argument("--providers", nargs="+", choices=names, default=names, metavar="NAME", help="default: all")
    parser.add_argument("--tiny", action="store_true", help="sizes that prove that it works and measure nothing")
    # fmt: on
    args = parser.parse_args(argv)
    check_out(args, parser, inputs.data_folder(args.data))
    require_positive(parser, args, "repeats", "seconds")
    return args, device_of(args, parser)
