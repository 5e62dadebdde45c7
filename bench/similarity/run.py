"""Time and memory of the pair statistics (CKA, debiased CKA, RSA), compared with other ways to compute them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from bench.harness import ceilings, figures
from bench.harness.clocks import Peak, Sample, first_line, interleave, measure_peak, time_call
from bench.harness.records import (
    MEMORY_HELP,
    Record,
    add_arguments,
    check_out,
    device_of,
    exit_status,
    machine,
    memory_limit,
    milliseconds,
    over_memory,
    record,
    require_positive,
    shortage,
    write,
)
from bench.losses.providers import versions
from bench.similarity import plain, report, two_models
from bench.similarity.inputs import OTHERS, SECTIONS, SIZES, TINY, Case, Features
from bench.similarity.providers import DRAWN, GATE, PROVIDERS, TOLERANCES, Found, Provider, least

BENCH = "similarity"
WARM_UP = {"cpu": 0, "cuda": 0.2}  # seconds of untimed rounds first, since a GPU's clocks rise under load
OVERHEAD = {"cpu": 0.2, "cuda": 0.01}  # upper limit of the seconds of a call that do not grow with the case

_DESCRIPTION = f"""\
Time and memory of the pair statistics of two models or more, forward only, against what a user would write or install
otherwise; and of fastcl.twin_stats against its parts.

providers, all in one run and interleaved, so that a drift of the machine hits all alike:
  fastcl PairAccumulator      CKA, debiased CKA and RSA of all pairs of models from a stream of batches
  fastcl linear, cosine, ...  fastcl.pair_stats of a kernel; "features" and "tiles" are its routes, else it chooses
  dense Gram                  n x n matrices and dot products of them, in PyTorch: the best dense form
  X'Y                         moments of centred features, in PyTorch: the biased CKA alone
  authors' formulation        as in the code published with arXiv 2510.08852: CKA of a subsample, RSA of whole RDMs
  torch-cka, ckatorch, rsatoolbox
                              those installed: pip install '.[peers]'

Before it is timed, each must be right on {GATE} rows against its measures by definition in float64, to
{", ".join(f"{tolerance:g} ({name})" for name, tolerance in TOLERANCES.items())} by its precision.
One that is not is not timed, and if it is no other library the exit status is 1. A case over the limits (--memory,
--seconds) is recorded with the reason instead of times.
"""
_EPILOG = """\
examples:
  python -m bench.similarity --out runs/bench                                   everything
  python -m bench.similarity --out runs/try --sections pair --sizes 10000x512   one table

DIR/similarity.json holds every single time, DIR/similarity.md the tables, DIR/similarity.svg the figure where
matplotlib is installed and a width has two sizes; they are rewritten after each case, so a run that is stopped keeps
what it has. Everything takes up to half an hour on two cores. For numbers worth quoting leave the machine to it alone.
"""


@dataclass
class Run:
    """State shared by all cases of a run."""

    args: argparse.Namespace
    device: torch.device
    facts: Record
    ceilings: ceilings.Ceilings
    pace: dict[tuple[str, int], float] = field(default_factory=dict)  # by provider and d: seconds per operation
    truths: dict[Case, tuple[Features, Found]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


@dataclass
class Entry:
    """A provider that can be timed on a case."""

    provider: Provider
    peak: Peak
    error: float
    values: Found


def memory_case(device: str, name: str, case: Case) -> tuple[Callable[[], object], ...]:
    """Warm-up and call for `measure_peak`: one call of a provider."""
    provider = next(p for p in PROVIDERS if p.name == name)
    cases = replace(case.shrunk(8), d=8), case
    return tuple(partial(provider.measure, Features(one, torch.device(device))) for one in cases)


def peak_of(provider: Provider, features: Features) -> Peak:
    """Peak memory and duration of one call."""
    if features.device.type == "cpu":
        return measure_peak(memory_case, "cpu", provider.name, features.case)
    call = partial(provider.measure, features)
    # Warm up at full size, so that compilation is not part of the time.
    return measure_peak(lambda device: (call, call), "cuda")


def error_of(provider: Provider, case: Case, run: Run) -> float:
    """Largest absolute error of a provider against float64, on the case with at most GATE rows."""
    small = case.shrunk(min(GATE, case.n))
    if small not in run.truths:
        features = Features(small, run.device)
        run.truths[small] = features, plain.reference(features.whole())
    features, truth = run.truths[small]
    return largest_difference(provider.measure(features), truth)


def largest_difference(found: Found, other: Found) -> float:
    """Largest absolute difference over the measures of `found`; NaN if any is NaN."""
    differences = [a - b for name in found for a, b in zip(found[name], other[name], strict=True)]
    return float(torch.tensor(differences or [0.0], dtype=torch.float64).abs().max())


def probe(provider: Provider, features: Features, run: Run) -> tuple[str | None, Peak | None, float | None, Found]:
    """The reason why a provider cannot be timed on a case, or None, its peak memory, error and values."""
    case, limit, error = features.case, run.args.seconds, None
    if reason := provider.obstacle(run.device) or over_memory(provider.floats(case), run.args.memory):
        return reason, None, None, {}
    key = provider.name, case.d
    # Use the pace at another width if needed: it may be off by a factor of 2, but a case may be 1,000 times too large.
    pace = run.pace.get(key) or min((p for (name, _), p in run.pace.items() if name == provider.name), default=0)
    if provider.work(case) * pace > limit:
        return f"over the limit of {limit:g} s by its time on fewer rows", None, None, {}
    try:
        error = error_of(provider, case, run)
        tolerance = TOLERANCES[provider.precision]
        if not error <= tolerance:
            raise ValueError(f"off by {error:.3g} on {min(GATE, case.n)} rows, allowed is {tolerance:g}")
        peak = peak_of(provider, features)
        run.pace[key] = max(0, peak.seconds - OVERHEAD[run.device.type]) / max(1, provider.work(case))
        if peak.seconds > limit:
            return f"over the limit of {limit:g} s: one call takes {peak.seconds:.3g} s", peak, error, {}
        return None, peak, error, provider.measure(features)
    except Exception as problem:  # any unsupported or failing case is recorded
        if reason := shortage(problem):
            return reason, None, error, {}
        if provider.ours:
            run.failed.append(f"{case.section}, {case}: {provider.name}: {first_line(problem)}")
        return f"failed: {first_line(problem)}", None, error, {}


def run_case(case: Case, run: Run) -> list[Record]:
    """Check correctness, memory and times of all providers on one case; print a line for each."""
    features = Features(case, run.device)
    found, entries = [], {}
    for provider in PROVIDERS:
        if provider.name not in run.args.providers or (provider.name == DRAWN and not case.chunk):
            continue
        reason, peak, error, values = probe(provider, features, run)
        print(f"{case.section}, {case}: {provider.name}: {reason or f'peak {peak.bytes / 2**20:.1f} MiB'}", flush=True)
        if reason:
            found.append(_record(case, provider, run, error, peak=peak, reason=reason))
        else:
            entries[provider.name] = Entry(provider, peak, error, values)
    if entries:
        found += _times(features, entries, run)
    order = [p.name for p in PROVIDERS]
    return sorted(found, key=lambda r: order.index(r["provider"]))


def _times(features: Features, entries: dict[str, Entry], run: Run) -> list[Record]:
    def timer(call: Callable[[], object]) -> dict[str, Sample]:
        return {"fwd": time_call(call, run.device)}

    timers = {name: partial(timer, partial(e.provider.measure, features)) for name, e in entries.items()}
    rounds = interleave(timers, run.args.repeats, run.args.seconds, WARM_UP[run.device.type])
    first: Found = {}
    found = []
    for name, entry in entries.items():
        first = entry.values | first
        difference = largest_difference(entry.values, first)
        samples = rounds[name]["fwd"]
        found.append(_record(features.case, entry.provider, run, entry.error, entry.values, difference, entry.peak,
            samples=samples, timing="events" if samples[0].gpu is not None else None))  # fmt: skip
        print(f"{features.case}: {name}: {milliseconds(found[-1]['samples_ms'])} ms, {len(samples)} rounds", flush=True)
    return found


def _record(
    case: Case, provider: Provider, run: Run, error: float | None, values: Found | None = None,
    difference: float | None = None, peak: Peak | None = None, **others: object,
) -> Record:  # fmt: skip
    full = {
        "section": case.section, "n": case.n, "d": case.d, "models": case.models, "dtype": case.dtype,
        "chunk": case.chunk, "precision": provider.precision, "computes": provider.label,
        "measures": list(provider.measures), "dense": provider.dense, "values": values, "difference": difference,
        "error": error if error == error else None,  # JSON has no NaN
    }  # fmt: skip
    needed, bound = least(case, {plain.MEASURES[name] for name in provider.measures}, run.ceilings)
    return record(BENCH, provider.name, full, run.facts, "fwd", flops=(provider.work(case), needed),
        peak_bytes=peak.bytes if peak else None, bound_ms=bound, **others)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status (0 done, 1 a provider failed or is wrong, 130 interrupted)."""
    args, device = _arguments(argv)
    facts = machine(device)
    facts["versions"] |= versions(p.package for p in PROVIDERS if p.package)
    bounds = ceilings.measure(device)[0] if device.type == "cuda" else ceilings.of_host(args.tiny)
    run = Run(args, device, facts, bounds)
    head = report.header(facts, args, device, bounds)
    print(f"{facts['device']}; results go to {args.out}", flush=True)
    found: list[Record] = []

    def save() -> None:
        figure = figures.similarity(found, args.out)
        write(args.out, BENCH, found, head + report.body(found, figure, device))

    try:
        for case in _cases(args, device):
            found += run_case(case, run)
            save()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if "twins" in args.sections:
            made, failed = two_models.run(args, device, facts)
            found += made
            run.failed += failed
            save()
    except KeyboardInterrupt:
        print("interrupted; the files hold the cases that were finished", file=sys.stderr)
        return 130
    return exit_status(run.failed)


def _cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    if args.tiny:
        made = TINY
    else:
        made = (*(Case("pair", n, d) for n, d in args.sizes or SIZES[device.type]), *OTHERS[device.type])
    chosen = (case for case in made if case.section in args.sections)
    return sorted(chosen, key=lambda case: args.sections.index(case.section))


def _size(text: str) -> tuple[int, int]:
    n, d = map(int, text.split("x"))
    if n < 4 or d < 1:
        raise ValueError(text)
    return n, d


def _arguments(argv: list[str] | None) -> tuple[argparse.Namespace, torch.device]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.similarity", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = [p.name for p in PROVIDERS]
    add_arguments(parser)
    parser.set_defaults(seconds=10, repeats=7)
    # fmt: off
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="NAME",
        help=f"in this order, twins last (default: {' '.join(SECTIONS)})")
    parser.add_argument("--sizes", type=_size, nargs="+", metavar="NxD",
        help="rows and width of the section pair, n at least 4 (default: "
        + "; ".join(f"{kind}: {' '.join(f'{n}x{d}' for n, d in sizes)}" for kind, sizes in SIZES.items()) + ")")
    parser.add_argument("--memory", type=float, metavar="GIB", help=MEMORY_HELP)
    parser.add_argument("--providers", nargs="+", choices=names, default=names, metavar="NAME", help="default: all")
    parser.add_argument("--tiny", action="store_true", help="sizes that prove that it works and measure nothing")
    # fmt: on
    args = parser.parse_args(argv)
    device = device_of(args, parser)
    args.memory = memory_limit(args.memory, device)
    check_out(args, parser)
    require_positive(parser, args, "repeats", "seconds", "memory")
    return args, device
