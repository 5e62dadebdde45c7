"""Time and memory of the losses, compared with plain PyTorch, other libraries and the published N x N x D form."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from bench.harness import ceilings, figures
from bench.harness.clocks import PASSES, Sample, Timer
from bench.harness.command import Command, at_least
from bench.harness.markdown import allowed
from bench.harness.records import Record, agree, machine, over_memory, write
from bench.harness.suite import Comparison, Entry, Run
from bench.losses import peers, report
from bench.losses.providers import (
    CHUNKED,
    FUSED,
    OBJECTIVES,
    PACKAGES,
    PROVIDERS,
    TOLERANCES,
    TOWERS,
    Provider,
    passes,
)
from fastcl.errors import FastclError

BENCH = "losses"
SIZES = {
    "cpu": (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "cuda": (512, 4096, 16384, 65536, 262144, 1048576),
}
WARM_UP_ROWS = 8  # small, so that the warm-up does not raise the high-water mark: N x N x D floats are 32 kB
DENSE = {"fwd": 2, "bwd": 4}  # times N x N x D, a quarter for two towers: one product forward, two backward

_DESCRIPTION = f"""\
Time and memory of the contrastive losses, forward and backward, against what a user would write or install otherwise.
All providers run interleaved, so that a drift of the machine hits all alike:

  fastcl chunked, dense    the torch backend in float32; the specification, N x N and not meant to be fast (CPU only)
  fastcl fp16, fastcl fp32 the Triton backend on float32 rows, its two precisions; CUDA, or a CPU's interpreter
  plain PyTorch            one matrix product, masks, cross entropy or log-sum-exp; also under autocast to bfloat16, and
                           that with torch.compile (CUDA only)
  chunked bf16             PyTorch in chunks of rows, recomputed in the backward pass
  flex_attention bf16      its log-sum-exp, compiled (CUDA only)
  Inf-CL, cut-cross-entropy, lightly, pytorch-metric-learning, open_clip
                           those installed: pip install '.[peers]'
  authors' formulation     similarities over an N x N x D broadcast, as in the code published with arXiv 2510.08852

All must first agree with the first that runs on the loss and its gradient, to
{allowed(TOLERANCES)} by the precision of their products. One that does
not is not timed, and if it is no other library the exit status is 1. What does not fit (--memory, --seconds) is
recorded with the reason.
"""
_EPILOG = """\
examples:
  python -m bench.losses --out runs/bench                          the whole table
  python -m bench.losses --out runs/try --providers "fastcl chunked" "plain PyTorch" --repeats 25 --seconds 10
                                                                   the two on all sizes, some 7 minutes on a CPU

DIR/losses.json holds every single time, DIR/losses.md the tables, DIR/losses.svg the figure of NT-Xent where matplotlib
is installed and a width has two sizes; they are rewritten after each size. For numbers worth quoting leave the machine
to the run alone. Where that cannot be, OMP_NUM_THREADS=1 is steadier: several threads wait for the slowest.
"""


def make_batch(n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Standard normal z (n, d) that requires a gradient, and labels (n / 2,) that cycle through 2 to 100 classes."""
    batch = n // 2
    # Drawn on the CPU: the same rows on every device, and no temporary that raises the high-water mark.
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    return z, torch.arange(batch, device=device) % max(2, min(100, batch // 4))


class Losses(Comparison):
    """An objective on n rows of width d; the case has the fields of its records."""

    table = PROVIDERS
    overhead = {"cpu": 0.5, "cuda": 0.01}
    expected = "skipped: one call would take about {seconds:.3g} s, the limit is {limit:g} s"
    measured = "skipped: one call takes {seconds:.3g} s, the limit is {limit:g} s"

    def __init__(self, run: Run, case: Record) -> None:
        super().__init__(run, case)
        self.objective, self.n, self.d = case["objective"], case["n"], case["d"]
        self.where, self.label = f"{self.objective}, n={self.n}, d={self.d}", f"{self.objective:7} n={self.n:<6}"

    @staticmethod
    def prepare(case: Record, device: torch.device) -> tuple[Tensor, Tensor, str]:
        peers.forget_compiled()
        return *make_batch(case["n"], case["d"], device), case["objective"]

    @staticmethod
    def shrunk(case: Record) -> Record:
        return case | {"n": WARM_UP_ROWS}

    @staticmethod
    def call(provider: Provider, inputs: tuple[Tensor, Tensor, str]) -> tuple[Tensor, Tensor]:
        return passes(provider.loss, *inputs)

    def obstacle(self, provider: Provider) -> str | None:
        needed = provider.floats(self.n, self.d)
        return provider.obstacle(self.device, self.objective) or over_memory(needed, self.run.args.memory)

    def work(self, provider: Provider) -> tuple[object, float]:
        return (self.objective, self.d), self.n**2  # every provider visits all pairs of rows

    def compare(self, entries: Sequence[Entry]) -> None:
        """Reject providers that differ from the first by more than the tolerance of the less precise of the two."""
        for entry in entries:  # the first as well: NaN does not even agree with itself
            pair = {e.provider: {"loss": e.result[0], "gradient": e.result[1]} for e in (entries[0], entry)}
            try:
                agree({p.name: found for p, found in pair.items()}, max(TOLERANCES[p.precision] for p in pair))
            except FastclError as error:
                entry.reason = str(error)
                print(f"{self.label} {error}", file=sys.stderr, flush=True)
                self.run.failed += [f"{self.where}: {error}"] if entry.provider.ours else []

    def timers(self, entries: Sequence[Entry]) -> dict[str, Timer]:
        return self.pass_timers(entries, lambda p: partial(p.loss, *self.inputs), self.inputs[0])

    def costs(self, provider: Provider, which: str) -> tuple[tuple[float, float], float | None]:
        pairs = self.n**2 / 4 if self.objective in TOWERS else self.n**2
        own = dict(zip(PASSES, provider.work(self.objective, self.d), strict=False))
        parts = PASSES[:2] if which == "both" else (which,)
        flops = [sum(counts[part] for part in parts) * pairs * self.d for counts in (own, DENSE)]
        bounds = self.run.ceilings.bound_ms(self.objective, self.n, self.d) if self.run.ceilings else {}
        return (flops[0], flops[1]), bounds.get(which)

    def fields(self, entry: Entry, samples: Sequence[Sample]) -> Record:
        return self.case | {"precision": entry.provider.precision}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = ("device", "repeats", "seconds", "memory")
    parser = Command(BENCH, (_DESCRIPTION, _EPILOG), *options, repeats=15, seconds=60)
    defaults = "; ".join(f"{kind}: {' '.join(map(str, sizes))}" for kind, sizes in SIZES.items())
    parser.add_argument("--n", type=int, nargs="+", metavar="N",
        help=f"rows: two views of N / 2 samples, even, at least 8 (default: {defaults})")  # fmt: skip
    parser.add_argument("--d", type=at_least(1), nargs="+", default=[128], metavar="D", help="widths (default: 128)")
    parser.add_names("--objectives", OBJECTIVES, f"default: all, {' '.join(OBJECTIVES)}")
    parser.add_names("--providers", [p.name for p in PROVIDERS])
    args = parser.parse(argv)
    args.n = args.n or list(SIZES[args.device.type])
    if bad := [n for n in args.n if n < 8 or n % 2]:
        parser.error(f"--n: rows must be even and at least 8, got {bad[0]}")
    facts, cuda, bounds = machine(args.device, PACKAGES), args.device.type == "cuda", None
    if cuda:
        bounds, measured = ceilings.measure(args.device)
        write(args.out, ceilings.BENCH, ceilings.records(measured, facts), f"# Ceilings\n\n{bounds}\n")
    conditions = report.header(facts, args, bounds, WARM_UP_ROWS)

    def markdown(found: list[Record]) -> str:
        return conditions + report.body(found, FUSED if cuda else CHUNKED, figures.losses(found, args.out))

    run = Run(BENCH, args, facts, markdown, bounds)
    cases = itertools.product(args.objectives, args.d, sorted(args.n))
    fields = ({"objective": objective, "n": n, "d": d, "dtype": "float32"} for objective, d, n in cases)
    return run.execute(Losses(run, case).measure for case in fields)
