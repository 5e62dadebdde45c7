"""A run of a benchmark, and the loop that compares its providers on one case.

A benchmark is its cases, its providers, a subclass of `Comparison` that says how a provider is checked, called and
recorded, and a report.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.harness import clocks
from bench.harness.ceilings import Ceilings
from bench.harness.clocks import Peak, Sample, Timer, first_line
from bench.harness.records import GIB, Record, milliseconds, record, shortage, write

LONG = 0.5  # seconds; a longer call needs neither a CUDA graph nor warm-up to be timed on a GPU
WARM_UP = {"cpu": 0, "cuda": 0.2}  # seconds of untimed rounds first, since a GPU's clocks rise under load


@dataclass(frozen=True)
class Provider:
    """What all providers have.

    Args:
        precision: of its matrix products; a key of the benchmark's tolerances.
        devices: where it is timed: "cpu", "cuda", and "interpreter" for kernels under TRITON_INTERPRET=1 on a CPU.
        module, package: the module it imports and the package that contains it.
        ours: whether a failure or a wrong result sets the benchmark's exit status to 1.
        capture: whether a CUDA graph can capture it; stated here, since a failed capture may harm later ones.
    """

    name: str
    _: KW_ONLY
    precision: str = "fp32"
    devices: tuple[str, ...] = ("cpu", "cuda")
    module: str | None = None
    package: str | None = None
    ours: bool = True
    capture: bool = True

    def absence(self, device: torch.device) -> str | None:
        """Why it cannot run on a device at all, or None."""
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device.type not in self.devices and not (interpreted and "interpreter" in self.devices):
            return f"timed on {'CUDA' if 'cuda' in self.devices else 'a CPU'} only"
        return None if self.module is None or installed(self.module) else f"{self.package} is not installed"


def installed(module: str) -> bool:
    """Whether a module can be imported, by its name with those of the packages around it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package around it
        return False


@dataclass
class Run:
    """A run of a benchmark: its arguments and conditions, what it has measured and what has failed.

    Args:
        report: the Markdown of the records so far.
        ceilings: of the machine, where they were measured.
        pace: seconds per unit of work by provider and kind of case, from smaller cases.
        truths: inputs and right results that several cases share.
    """

    bench: str
    args: argparse.Namespace
    facts: Record
    report: Callable[[list[Record]], str]
    ceilings: Ceilings | None = None
    found: list[Record] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    pace: dict[tuple[str, object], float] = field(default_factory=dict)
    truths: dict[Any, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of the run."""
        return self.args.device

    def reason(self, where: str, error: Exception, ours: bool = True) -> str:
        """The reason for a record after an error; one of ours that is no shortage of memory is a failure of the run."""
        if reason := shortage(error):
            return reason
        reason = f"failed: {first_line(error)}"
        self.failed += [f"{where}: {reason}"] if ours else []
        return reason

    def execute(self, parts: Iterable[Callable[[], object]]) -> int:
        """Do all parts and write the results after each; return the exit status (0 done, 1 something of ours failed or
        is wrong, 130 interrupted)."""
        print(f"{self.facts['device']}; results go to {self.args.out}", flush=True)
        try:
            for part in parts:
                part()
                write(self.args.out, self.bench, self.found, self.report(self.found))
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()  # memory pools of CUDA graphs are free now
        except KeyboardInterrupt:
            print("interrupted; the files hold the cases that were finished", file=sys.stderr)
            return 130
        return self.status()

    def status(self) -> int:
        """1 if anything of ours failed, else 0; prints each failure on its own line."""
        for message in self.failed:
            print(f"error: {message}", file=sys.stderr)
        return int(bool(self.failed))


@dataclass
class Entry:
    """A provider on a case: its peak, result and timing method, further fields of its records, and the reason if it is
    not timed."""

    provider: Any
    peak: Peak = Peak()
    result: Any = None
    timing: str | None = None
    fields: Record = field(default_factory=dict)
    reason: str | None = None


class Comparison:
    """One case: every provider is checked and its memory measured; then those that can be timed take turns.

    A benchmark overrides the methods up to `fields`. The defaults suit providers that cannot be wrong and have no cost.
    """

    table: ClassVar[Sequence[Any]] = ()  # all providers
    reported: ClassVar[str] = "both"  # the pass that has the peak memory, and that of records without times
    overhead: ClassVar[Mapping[str, float]] = {}  # by device, at most the seconds of a call that do not grow with n
    expected = "over the limit of {limit:g} s by its time on fewer rows"
    measured = "over the limit of {limit:g} s: one call takes {seconds:.3g} s"

    def __init__(self, run: Run, case: Any) -> None:
        """A comparison on a case; its inputs are made when it is measured."""
        self.run, self.case, self.device = run, case, run.args.device
        self.inputs: Any = None
        self.where = self.label = str(case)  # the case in errors and in printed lines

    def providers(self) -> Sequence[Any]:
        """The providers to compare: those that are asked for."""
        return [p for p in self.table if p.name in self.run.args.providers]

    @staticmethod
    def prepare(case: Any, device: torch.device) -> Any:
        """The inputs of a case."""

    @staticmethod
    def shrunk(case: Any) -> Any:
        """A case so small that its memory does not show in the high-water mark."""

    @staticmethod
    def call(provider: Any, inputs: Any) -> Any:
        """One call of a provider, without a trace in the inputs."""

    def obstacle(self, provider: Any) -> str | None:
        """Why a provider cannot run on this case, or None."""
        return provider.absence(self.device)

    def work(self, provider: Any) -> tuple[object, float]:
        """A kind of case, and what the time of a call is proportional to among cases of that kind."""
        return None, 0

    def forecast(self, provider: Any) -> float:
        """Seconds that a call is expected to take; 0 if nothing is known."""
        kind, work = self.work(provider)
        return work * self.run.pace.get((provider.name, kind), 0)

    def check(self, entry: Entry) -> None:
        """Raise an error if a provider is wrong."""

    def peak(self, entry: Entry) -> Peak:
        """Peak memory and duration of a call."""
        if self.device.type != "cuda":
            name = entry.provider.name
            return clocks.measure_peak(memory_case, "cpu", type(self), name, self.shrunk(self.case), self.case)
        call = partial(self.call, entry.provider, self.inputs)
        return clocks.measure_peak(lambda device: (call, call), "cuda")  # the first at full size, to compile

    def compare(self, entries: Sequence[Entry]) -> None:
        """Give a reason to each entry that disagrees with the others."""

    def time(self, entry: Entry) -> dict[str, Sample]:
        """Time one call."""
        raise NotImplementedError

    def timers(self, entries: Sequence[Entry]) -> dict[str, Timer]:
        """A timer of each entry by the name of its provider."""
        return {entry.provider.name: partial(self.time, entry) for entry in entries}

    def costs(self, provider: Any, which: str) -> tuple[tuple[float, float] | None, float | None]:
        """Floating-point operations of a pass, the provider's own and the dense count, and the bound in ms."""
        return None, None

    def fields(self, entry: Entry, samples: Sequence[Sample]) -> Record:
        """The case as fields of a record."""
        raise NotImplementedError

    def measure(self) -> None:
        """Compare the providers and add their records to the run; print a line for each."""
        try:
            self.inputs = self.prepare(self.case, self.device)
            entries = [Entry(provider) for provider in self.providers()]
            for entry in entries:
                self.probe(entry)
                used = entry.peak.bytes
                ready = "can be timed" if used is None else f"peak memory {used / 2**20:.1f} MiB"
                self._say(entry, entry.reason or ready)
            self.compare([e for e in entries if not e.reason])
            rounds = self._rounds([e for e in entries if not e.reason])
        except torch.OutOfMemoryError as error:  # of all providers together
            self.run.failed.append(f"{self.where}: {first_line(error)}")
            return
        for entry in entries:
            passes = rounds.get(entry.provider.name, {self.reported: ()})
            self.run.found += [self._record(entry, which, samples) for which, samples in passes.items()]
            if times := self.run.found[-1]["samples_ms"]:
                self._say(entry, f"{milliseconds(times)} ms, {len(times)} rounds")

    def probe(self, entry: Entry) -> None:
        """Find the entry's peak and result, or the reason why it is not timed."""
        provider, limit = entry.provider, self.run.args.seconds
        kind, work = self.work(provider)
        try:
            entry.reason = self.obstacle(provider)
            if not entry.reason and (expected := self.forecast(provider)) > limit:
                entry.reason = self.expected.format(seconds=expected, limit=limit)
            if entry.reason:
                return
            self.check(entry)
            entry.peak = self.peak(entry)
            seconds = max(0, entry.peak.seconds - self.overhead.get(self.device.type, 0))
            self.run.pace[provider.name, kind] = seconds / max(1, work)
            if entry.peak.seconds > limit:
                entry.reason = self.measured.format(seconds=entry.peak.seconds, limit=limit)
            elif entry.result is None:
                entry.result = self.call(provider, self.inputs)
        except Exception as error:  # any unsupported or failing case is recorded
            entry.peak, entry.reason = Peak(), self.run.reason(f"{self.where}: {provider.name}", error, provider.ours)

    def _rounds(self, entries: Sequence[Entry]) -> dict[str, dict[str, list[Sample]]]:
        if not entries:
            return {}
        args, long = self.run.args, any(e.peak.seconds > LONG for e in entries)
        warm_up = 0 if long else WARM_UP[self.device.type]
        return clocks.interleave(self.timers(entries), args.repeats, args.seconds, warm_up)

    def pass_timers(
        self, entries: Sequence[Entry], forward: Callable[[Any], Callable[[], Tensor]], leaf: Tensor
    ) -> dict[str, Timer]:
        """Timers of forward passes of providers and of the backward passes to a leaf, by CUDA graphs where they fit."""
        found = {}
        # Each graph keeps the memory of its passes, and eager passes need theirs in addition.
        room = self.run.args.memory * GIB - max(e.peak.bytes or 0 for e in entries)
        for entry in entries:
            used = entry.peak.bytes or 0
            capture = entry.provider.capture and entry.peak.seconds <= LONG and used <= room
            found[entry.provider.name], entry.timing = clocks.timer_of(forward(entry.provider), leaf, capture)
            room -= used if entry.timing == "graph" else 0
        return found

    def _record(self, entry: Entry, which: str, samples: Sequence[Sample]) -> Record:
        flops, bound = self.costs(entry.provider, which)
        peak = entry.peak.bytes if which == self.reported else None
        case, name = self.fields(entry, samples) | entry.fields, entry.provider.name
        timing = entry.timing or ("events" if samples and samples[0].gpu is not None else None)
        return record(
            self.run.bench, name, case, self.run.facts, which, samples, flops, peak, bound, timing, entry.reason
        )

    def _say(self, entry: Entry, text: str) -> None:
        print(f"{self.label} {entry.provider.name:23} {text}", flush=True)


def memory_case(
    device: str, kind: type[Comparison], name: str, small: Any, case: Any
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Warm-up and call for `measure_peak`: one call of a provider, on the small case and on the case."""
    blank = argparse.Namespace(device=torch.device(device), providers=[name])
    provider = next(p for p in kind(Run("", blank, {}, str), case).providers() if p.name == name)
    first, second = (partial(kind.call, provider, kind.prepare(one, blank.device)) for one in (small, case))
    return first, second
