"""Time and memory of the losses, compared with plain PyTorch, other libraries and the published N x N x D form."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import fastcl
from bench.harness import ceilings, figures
from bench.harness.clocks import PASSES, Peak, first_line, interleave, measure_peak, timer_of
from bench.harness.records import (
    GIB,
    Record,
    agree,
    exit_status,
    machine,
    milliseconds,
    over_memory,
    record,
    shortage,
    write,
)
from bench.losses import peers, providers, report
from bench.losses.arguments import parse
from bench.losses.providers import CHUNKED, FUSED, PROVIDERS, TOLERANCES, Provider, passes

BENCH = "losses"
WARM_UP_ROWS = 8  # small, so that the warm-up does not raise the high-water mark: N x N x D floats are 32 kB
DENSE = {"fwd": 2, "bwd": 4}  # times N x N x D, a quarter for two towers: one product forward, two backward
WARM_UP = {"cpu": 0, "cuda": 0.2}  # seconds of untimed rounds first, since a GPU's clocks rise under load
LONG = 0.5  # seconds; a longer pass needs neither a graph nor warm-up to be timed on a GPU
OVERHEAD = {"cpu": 0.5, "cuda": 0.01}  # upper limit of the seconds of a call that do not grow with n


@dataclass
class Run:
    """State shared by all cases of a run."""

    args: argparse.Namespace
    device: torch.device
    facts: Record
    ceilings: ceilings.Ceilings | None
    pace: dict[tuple[str, str, int], float] = field(default_factory=dict)  # by provider, objective, d: seconds / n^2
    failed: list[str] = field(default_factory=list)


@dataclass
class Entry:
    """A provider that can be timed on a case."""

    provider: Provider
    peak: Peak
    result: tuple[Tensor, Tensor]


def make_batch(n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Standard normal z (n, d) that requires a gradient, and labels (n / 2,) that cycle through 2 to 100 classes."""
    batch = n // 2
    # Drawn on the CPU: the same rows on every device, and no temporary that raises the high-water mark.
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    return z, torch.arange(batch, device=device) % max(2, min(100, batch // 4))


def memory_case(device: str, name: str, objective: str, n: int, d: int) -> tuple[Callable[[], object], ...]:
    """Warm-up and call for `measure_peak`: one forward and backward pass of a provider."""
    loss = next(p.loss for p in PROVIDERS if p.name == name)
    batches = [make_batch(rows, d, torch.device(device)) for rows in (WARM_UP_ROWS, n)]
    return tuple(partial(passes, loss, *batch, objective) for batch in batches)


def peak_of(provider: Provider, case: Record, batch: tuple[Tensor, Tensor]) -> Peak:
    """Peak memory and duration of one forward and backward pass."""
    z, objective = batch[0], case["objective"]
    if z.device.type == "cpu":
        return measure_peak(memory_case, "cpu", provider.name, objective, case["n"], case["d"])
    call = partial(passes, provider.loss, *batch, objective)

    def warm_up() -> None:
        call()  # at full size, so that compilation is not part of the time
        z.grad = None  # not part of the memory before the call

    return measure_peak(lambda device: (warm_up, call), "cuda")


def probe(
    provider: Provider, case: Record, batch: tuple[Tensor, Tensor], run: Run
) -> tuple[str | None, Peak | None, tuple[Tensor, Tensor] | None]:
    """The reason why a provider cannot be timed on a case, or None, its peak memory, and its loss and gradient."""
    objective, n, d = case["objective"], case["n"], case["d"]
    limit = run.args.seconds
    if reason := provider.obstacle(run.device, objective):
        return reason, None, None
    if reason := over_memory(provider.floats(n, d), run.args.memory):
        return reason, None, None
    expected = n * n * run.pace.get((provider.name, objective, d), 0)
    if expected > limit:
        return f"skipped: one call would take about {expected:.3g} s, the limit is {limit:g} s", None, None
    try:
        peak = peak_of(provider, case, batch)
        run.pace[provider.name, objective, d] = max(0, peak.seconds - OVERHEAD[run.device.type]) / n**2
        if peak.seconds > limit:
            return f"skipped: one call takes {peak.seconds:.3g} s, the limit is {limit:g} s", peak, None
        return None, peak, passes(provider.loss, *batch, objective)
    except Exception as error:  # any unsupported or failing case is recorded
        if reason := shortage(error):
            return reason, None, None
        if provider.ours:
            run.failed.append(f"{objective}, n={n}, d={d}: {provider.name}: {first_line(error)}")
        return f"failed: {first_line(error)}", None, None


def disagreements(entries: dict[str, Entry]) -> dict[str, str]:
    """Messages of providers that differ from the first by more than the tolerance of the less precise of the two."""
    found: dict[str, str] = {}
    tensors = {name: dict(zip(("loss", "gradient"), e.result, strict=True)) for name, e in entries.items()}
    if not tensors:
        return found
    reference, *others = tensors
    # Check the reference too: NaN does not even agree with itself.
    for name in (reference, *others):
        tolerance = max(TOLERANCES[entries[k].provider.precision] for k in (reference, name))
        try:
            agree({reference: tensors[reference], name: tensors[name]}, tolerance)
        except fastcl.FastclError as error:
            found[name] = str(error)
    return found


def run_case(case: Record, run: Run) -> list[Record]:
    """Measure memory, agreement and times of all providers on one objective and size; print a line for each."""
    objective, n, d = case["objective"], case["n"], case["d"]
    peers.forget_compiled()
    batch = make_batch(n, d, run.device)
    label = f"{objective:7} n={n:<6}"
    found, entries = [], {}

    def give_up(provider: Provider, reason: str, peak: Peak | None) -> None:
        used = peak.bytes if peak else None
        full = case | {"precision": provider.precision}
        found.append(record(BENCH, provider.name, full, run.facts, peak_bytes=used, reason=reason))

    for provider in (p for p in PROVIDERS if p.name in run.args.providers):
        reason, peak, result = probe(provider, case, batch, run)
        print(f"{label} {provider.name:23} {reason or f'peak memory {peak.bytes / 2**20:.1f} MiB'}", flush=True)
        if reason:
            give_up(provider, reason, peak)
        else:
            entries[provider.name] = Entry(provider, peak, result)
    for name, reason in disagreements(entries).items():
        print(f"{label} {reason}", file=sys.stderr, flush=True)
        entry = entries.pop(name)
        if entry.provider.ours:
            run.failed.append(f"{objective}, n={n}, d={d}: {reason}")
        give_up(entry.provider, reason, entry.peak)
    if entries:
        found += _times(case, batch, entries, run, label)
    order = [p.name for p in PROVIDERS]
    return sorted(found, key=lambda r: order.index(r["provider"]))


def _times(case: Record, batch: tuple[Tensor, Tensor], entries: dict[str, Entry], run: Run, label: str) -> list[Record]:
    objective, n, d = case["objective"], case["n"], case["d"]
    z, labels = batch
    bounds = run.ceilings.bound_ms(objective, n, d) if run.ceilings else dict.fromkeys(PASSES)
    pairs = n * n / 4 if objective == "clip" else n * n
    timers, timing, found = {}, {}, []
    # Each graph keeps the memory of its passes, and eager passes need theirs in addition.
    room = run.args.memory * GIB - max(e.peak.bytes for e in entries.values())
    for name, entry in entries.items():
        capture = entry.provider.capture and entry.peak.seconds <= LONG and entry.peak.bytes <= room
        forward = partial(entry.provider.loss, z, labels, objective)
        timers[name], timing[name] = timer_of(forward, z, capture)
        room -= entry.peak.bytes if timing[name] == "graph" else 0
    warm = any(e.peak.seconds > LONG for e in entries.values())
    rounds = interleave(timers, run.args.repeats, run.args.seconds, 0 if warm else WARM_UP[run.device.type])
    for name, samples in rounds.items():
        provider = entries[name].provider
        own = dict(zip(("fwd", "bwd"), provider.work(objective, d), strict=True))
        for which in PASSES:
            used = entries[name].peak.bytes if which == "both" else None
            parts = PASSES[:2] if which == "both" else (which,)
            flops = tuple(sum(counts[part] for part in parts) * pairs * d for counts in (own, DENSE))
            full = case | {"precision": provider.precision}
            arguments = full, run.facts, which, samples[which], flops, used, bounds[which], timing[name]
            found.append(record(BENCH, name, *arguments))
        times = found[-1]["samples_ms"]
        print(f"{label} {name:23} {milliseconds(times)} ms, {len(times)} rounds", flush=True)
    return found


def _run_or_fail(case: Record, run: Run) -> list[Record]:
    """The records of a case; empty, with a failure noted, if the providers together exceed the memory."""
    try:
        return run_case(case, run)
    except torch.OutOfMemoryError as error:
        run.failed.append(f"{case['objective']}, n={case['n']}, d={case['d']}: {first_line(error)}")
        return []


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status (0 done, 1 a provider failed or disagrees, 130 interrupted)."""
    args, device = parse(argv)
    facts = machine(device)
    facts["versions"] |= providers.versions()
    run = Run(args, device, facts, None)
    if device.type == "cuda":
        run.ceilings, measured = ceilings.measure(device)
        write(args.out, ceilings.BENCH, ceilings.records(measured, facts), f"# Ceilings\n\n{run.ceilings}\n")
    conditions = report.header(facts, args, run.ceilings, WARM_UP_ROWS)
    print(f"{facts['device']}; results go to {args.out}", flush=True)
    ours = FUSED if device.type == "cuda" else CHUNKED
    found: list[Record] = []
    try:
        for objective in args.objectives:
            for d in args.d:
                for n in sorted(args.n):
                    case = {"objective": objective, "n": n, "d": d, "dtype": "float32"}
                    found += _run_or_fail(case, run)
                    text = report.body(found, ours, figures.losses(found, args.out))
                    write(args.out, BENCH, found, conditions + text)
                    if device.type == "cuda":
                        torch.cuda.empty_cache()  # the graphs' memory pools are free now
    except KeyboardInterrupt:
        print("interrupted; the files hold the objectives and sizes that were finished", file=sys.stderr)
        return 130
    return exit_status(run.failed)
