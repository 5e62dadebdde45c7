"""Images per second and core-seconds per image for decoding and two views, by every renderer and other libraries."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import torch

from bench.data import inputs, report, waiting
from bench.data.inputs import CASES, TINY, Case, Photos
from bench.data.providers import LEVELS, PROVIDERS, Batch, Provider, reference
from bench.harness.clocks import Peak, Sample
from bench.harness.command import Command
from bench.harness.records import Record, machine
from bench.harness.suite import Comparison, Entry, Run

BENCH = "data"
SECTIONS = ("views", waiting.SECTION)
PACKAGES = ("triton", "torchvision", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "kornia")

_DESCRIPTION = f"""\
From stored images to two float32 views of each on the device: images a second and core-seconds per image, by the
renderers of fastcl and by what a user would write or install otherwise. All providers run interleaved.

  fastcl torchvision, dali, triton  the renderers of fastcl.data, with drawing the plan
  torchvision v2, ..., workers      its transforms on Pillow's images or on tensors, in a DataLoader's workers
  DALI, operator seeds              random operators with seeds of their own, as self-supervised libraries have it
  kornia                            augmentations of whole batches on the device
  ... alone                         parts of the others' time, or bounds of it

Before they are timed, the views of each renderer of fastcl are compared with those of the reference function: over
{LEVELS:g} grey levels in the mean it is not timed, and the exit status is 1. The others draw their own random numbers:
of them the views' shape and finite values are checked. What cannot run here is named with its reason.
"""
_EPILOG = f"""\
examples:
  python -m bench.data --out runs/bench                     everything
  python -m bench.data --out runs/try --sizes 32            one table

Real images are {", ".join(case.file for case in CASES["cpu"])}.
DIR/data.json holds every single time, DIR/data.md the tables; both are rewritten after each size. For numbers worth
quoting leave the machine to the run alone.
"""


class Views(Comparison):
    """A pass over the images of a case."""

    table = PROVIDERS
    reported = "fwd"
    measured = "over the limit of {limit:g} s: one pass takes {seconds:.3g} s"

    def __init__(self, run: Run, case: Case, photos: Photos) -> None:
        super().__init__(run, case)
        self.photos = photos

    def obstacle(self, provider: Provider) -> str | None:
        return provider.obstacle(self.photos, self.case, self.device)

    def check(self, entry: Entry) -> None:
        """Make one pass, which also loads code, starts workers and compiles kernels, and look at its first batch.

        Raises:
            ValueError: the views cannot be right.
        """
        entry.result = entry.provider.open(self.photos, self.case, self.device), itertools.count()
        views, shape = self._pass(entry), (self.case.batch, 3, self.case.size, self.case.size)
        if not entry.provider.views:
            return
        for view in views:
            if tuple(view.shape) != shape or view.dtype != torch.float32 or view.device.type != self.device.type:
                found = f"{tuple(view.shape)} {view.dtype} on {view.device.type}"
                raise ValueError(f"views are {found}, wanted are {shape}")
            if not torch.isfinite(view).all():
                raise ValueError("views are not finite")
        if len(views) != 2 or torch.equal(*views):
            raise ValueError(f"{len(views)} views, or twice the same")
        if entry.provider.ours:
            std = torch.tensor(self.case.spec.std)[:, None, None]
            wanted = reference(self.photos, self.case)
            apart = torch.cat([(a.cpu() - b).abs() * std * 255 for a, b in zip(views, wanted, strict=True)])
            mean, largest = float(apart.mean()), float(apart.max())
            if not mean <= LEVELS:
                raise ValueError(f"off by {mean:.3g} grey levels in the mean, allowed are {LEVELS:g}")
            entry.fields = {"difference_mean": mean, "difference_max": largest}

    def peak(self, entry: Entry) -> Peak:
        """The time of a second pass; memory is not measured."""
        began = perf_counter()
        self._pass(entry)
        return Peak(None, perf_counter() - began)

    def time(self, entry: Entry) -> dict[str, Sample]:
        """Times of one pass in ms: wall clock, and all cores together if known."""
        before, began = core_seconds(), perf_counter()
        self._pass(entry)
        wall, after = perf_counter() - began, core_seconds()
        cores = None if before is None or after is None else 1e3 * (after - before)
        return {"fwd": Sample(1e3 * wall, cores=cores)}

    def _pass(self, entry: Entry) -> Batch:
        """Make all views of the next epoch and wait until they are on the device; return the first batch."""
        feed, epochs = entry.result
        batches = feed(next(epochs))
        first = next(batches)
        for _ in batches:
            pass
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return first

    def fields(self, entry: Entry, samples: Sequence[Sample]) -> Record:
        return {
            "section": "views", "size": self.case.size, "source": self.photos.name, "preset": self.case.preset,
            "images": len(self.photos.split), "batch": self.case.batch, "views": 2 if entry.provider.views else 0,
            "cores_ms": [s.cores for s in samples if s.cores is not None], "difference_mean": None,
            "difference_max": None,
        }  # fmt: skip


def core_seconds() -> float | None:
    """Processor time so far of this process, its threads and its workers; None if a worker has just ended."""
    ended, tick = os.times(), os.sysconf("SC_CLK_TCK")
    total = process_time() + ended.children_user + ended.children_system
    for child in multiprocessing.active_children():
        try:
            text = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        fields = text.rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick
    return total


def comparisons(run: Run, scratch: Path) -> Iterator[Callable[[], None]]:
    """What is measured, in order; images that are made up go into `scratch`."""
    args = run.args
    for case in TINY if args.tiny else [c for c in CASES[run.device.type] if c.size in args.sizes]:
        own = scratch / str(case.size)
        own.mkdir()
        photos = inputs.read(case, args.data, own)
        if "views" in args.sections:
            yield Views(run, case, photos).measure
        if waiting.SECTION in args.sections and case.size == waiting.SIZE[args.tiny]:
            yield partial(waiting.measure, run, case, photos, scratch)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options, sizes = ("device", "repeats", "seconds", "data", "tiny"), [case.size for case in CASES["cpu"]]
    parser = Command(BENCH, (_DESCRIPTION, _EPILOG), *options, repeats=5, seconds=20)
    parser.add_names("--sections", SECTIONS, "views: every provider; training: what a step of the trainer waits, at "
        f"{waiting.SIZE[False]} pixels (default: both)")  # fmt: skip
    parser.add_argument("--sizes", type=int, nargs="+", choices=sizes, default=sizes, metavar="PIXELS",
        help=f"sides of the views (default: {' '.join(map(str, sizes))})")  # fmt: skip
    parser.add_names("--providers", [p.name for p in PROVIDERS])
    args = parser.parse(argv)
    facts = machine(args.device, PACKAGES)
    head = report.header(facts, args)
    run = Run(BENCH, args, facts, lambda found: head + report.body(found))
    with tempfile.TemporaryDirectory() as scratch:
        return run.execute(comparisons(run, Path(scratch)))
