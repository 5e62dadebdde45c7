"""Time and memory of the pair statistics (CKA, debiased CKA, RSA), compared with other ways to compute them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch

from bench.harness import ceilings, figures
from bench.harness.clocks import Sample, time_call
from bench.harness.command import Command
from bench.harness.markdown import allowed
from bench.harness.records import Record, machine, over_memory
from bench.harness.suite import Comparison, Entry, Run
from bench.similarity import plain, report, two_models
from bench.similarity.inputs import OTHERS, SECTIONS, SIZES, TINY, Case, Features
from bench.similarity.providers import DRAWN, GATE, PACKAGES, PROVIDERS, TOLERANCES, Found, Provider, least

BENCH = "similarity"

_DESCRIPTION = f"""\
Time and memory of the pair statistics of two models or more, forward only, against what a user would write or install
otherwise; and of fastcl.twin_stats against its parts. All providers run interleaved:

  fastcl PairAccumulator      CKA, debiased CKA and RSA of all pairs of models from a stream of batches
  fastcl linear, cosine, ...  fastcl.pair_stats of a kernel; "features" and "tiles" are its routes, else it chooses
  dense Gram                  n x n matrices and dot products of them, in PyTorch: the best dense form
  X'Y                         moments of centred features, in PyTorch: the biased CKA alone
  authors' formulation        as in the code published with arXiv 2510.08852: CKA of a subsample, RSA of whole RDMs
  torch-cka, ckatorch, rsatoolbox
                              those installed: pip install '.[peers]'

Each must first be right on {GATE} rows against its measures from Gram matrices in float64, to
{allowed(TOLERANCES)} by its precision. One that is not is not timed, and if it is no other library
the exit status is 1. A case over the limits (--memory, --seconds) is recorded with the reason.
"""
_EPILOG = """\
example: python -m bench.similarity --out runs/try --sections pair --sizes 10000x512

DIR/similarity.json holds every single time, DIR/similarity.md the tables, DIR/similarity.svg the figure where
matplotlib is installed and a width has two sizes; they are rewritten after each case. Everything takes up to half an
hour on two cores. For numbers worth quoting leave the machine to it alone.
"""


class Similarity(Comparison):
    """The measures of the models of a case."""

    table = PROVIDERS
    reported = "fwd"
    overhead = {"cpu": 0.2, "cuda": 0.01}
    case: Case

    def __init__(self, run: Run, case: Case) -> None:
        super().__init__(run, case)
        self.where = self.label = f"{case.section}, {case}"

    def providers(self) -> list[Provider]:
        return [p for p in super().providers() if p.name != DRAWN or self.case.chunk]

    @staticmethod
    def prepare(case: Case, device: torch.device) -> Features:
        return Features(case, device)

    @staticmethod
    def shrunk(case: Case) -> Case:
        return replace(case.shrunk(8), d=8)

    @staticmethod
    def call(provider: Provider, inputs: Features) -> Found:
        return provider.measure(inputs)

    def obstacle(self, provider: Provider) -> str | None:
        return provider.absence(self.device) or over_memory(provider.floats(self.case), self.run.args.memory)

    def work(self, provider: Provider) -> tuple[object, float]:
        return self.case.d, provider.work(self.case)

    def forecast(self, provider: Provider) -> float:
        # The pace at another width may be off by a factor of 2, but a case may be 1,000 times too large.
        others = (p for (name, _), p in self.run.pace.items() if name == provider.name)
        return super().forecast(provider) or provider.work(self.case) * min(others, default=0)

    def check(self, entry: Entry) -> None:
        """Reject a provider whose largest error against float64 on at most GATE rows is over its tolerance."""
        small = self.case.shrunk(min(GATE, self.case.n))
        if small not in self.run.truths:
            features = Features(small, self.device)
            self.run.truths[small] = features, plain.reference(features.whole())
        features, truth = self.run.truths[small]
        error = largest_difference(entry.provider.measure(features), truth)
        entry.fields["error"] = error if error == error else None  # JSON has no NaN
        tolerance = TOLERANCES[entry.provider.precision]
        if not error <= tolerance:
            raise ValueError(f"off by {error:.3g} on {small.n} rows, allowed is {tolerance:g}")

    def compare(self, entries: Sequence[Entry]) -> None:
        """Note the largest difference of each entry from the first that has the measure."""
        first: Found = {}
        for entry in entries:
            first = entry.result | first
            entry.fields |= {"values": entry.result, "difference": largest_difference(entry.result, first)}

    def time(self, entry: Entry) -> dict[str, Sample]:
        return {"fwd": time_call(partial(entry.provider.measure, self.inputs), self.device)}

    def costs(self, provider: Provider, which: str) -> tuple[tuple[float, float], float | None]:
        needed, bound = least(self.case, {plain.MEASURES[name] for name in provider.measures}, self.run.ceilings)
        return (provider.work(self.case), needed), bound

    def fields(self, entry: Entry, samples: Sequence[Sample]) -> Record:
        provider = entry.provider
        return asdict(self.case) | {
            "precision": provider.precision, "computes": provider.label, "measures": list(provider.measures),
            "dense": provider.dense, "values": None, "difference": None, "error": None,
        }  # fmt: skip


def largest_difference(found: Found, other: Found) -> float:
    """Largest absolute difference over the measures of `found`; NaN if any is NaN."""
    differences = [a - b for name in found for a, b in zip(found[name], other[name], strict=True)]
    return float(torch.tensor(differences or [0.0], dtype=torch.float64).abs().max())


def comparisons(run: Run) -> Iterator[Callable[[], None]]:
    """What is measured, in order."""
    args, kind = run.args, run.device.type
    pairs = (Case("pair", n, d) for n, d in args.sizes or SIZES[kind])
    chosen = [c for c in (TINY if args.tiny else (*pairs, *OTHERS[kind])) if c.section in args.sections]
    for case in sorted(chosen, key=lambda case: args.sections.index(case.section)):
        yield Similarity(run, case).measure
    if two_models.SECTION in args.sections:
        for case in two_models.cases(args):
            yield two_models.TwoModels(run, case).measure


def size_of(text: str) -> tuple[int, int]:
    """Rows and width of "NxD"."""
    n, d = map(int, text.split("x"))
    if n < 4 or d < 1:
        raise argparse.ArgumentTypeError(f"{text}: rows are at least 4, the width at least 1")
    return n, d


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = ("device", "repeats", "seconds", "memory", "tiny")
    parser = Command(BENCH, (_DESCRIPTION, _EPILOG), *options, repeats=7, seconds=10)
    parser.add_names("--sections", SECTIONS, f"in this order, twins last (default: {' '.join(SECTIONS)})")
    defaults = "; ".join(f"{kind}: {' '.join(f'{n}x{d}' for n, d in sizes)}" for kind, sizes in SIZES.items())
    parser.add_argument("--sizes", type=size_of, nargs="+", metavar="NxD",
        help=f"rows and width of the section pair, n at least 4 (default: {defaults})")  # fmt: skip
    parser.add_names("--providers", [p.name for p in PROVIDERS])
    args = parser.parse(argv)
    facts = machine(args.device, PACKAGES)
    bounds = ceilings.measure(args.device)[0] if args.device.type == "cuda" else ceilings.of_host(args.tiny)
    head = report.header(facts, args, bounds)

    def markdown(found: list[Record]) -> str:
        return head + report.body(found, figures.similarity(found, args.out), args.device)

    run = Run(BENCH, args, facts, markdown, bounds)
    return run.execute(comparisons(run))
