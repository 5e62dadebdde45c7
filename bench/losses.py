"""Time and memory of the losses against plain PyTorch and the published N x N x D formulation."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

import fastcl
from bench import plain
from bench.records import (
    GIB,
    PASSES,
    Peak,
    Record,
    add_arguments,
    agree,
    device_of,
    digits,
    interleave,
    machine,
    measure_peak,
    milliseconds,
    record,
    table,
    time_passes,
    total_memory,
    write,
)

BENCH = "losses"
OBJECTIVES = ("ntxent", "nscl", "supcon")
TOLERANCE = 1e-4  # relative, of the loss and of the gradient's Euclidean norm; float32 leaves about 1e-6
WARM_UP_ROWS = 8  # the warm-up of a memory measurement may leave no mark: N x N x D floats are 32 kB then
FLOPS = {"fwd": 2, "bwd": 4, "both": 6}  # times N x N x D: one product forward, two backward

MEMORY_GIB = 12

Loss: TypeAlias = Callable[[Tensor, Tensor, str], Tensor]

_DESCRIPTION = """\
Time and memory of the contrastive losses, forward and backward, against what a user would write otherwise.

providers, all in one run and interleaved, so that a drift of the machine hits all alike:
  fastcl chunked        the default backend
  fastcl dense          fastcl.backend("dense"): the specification, N x N, not meant to be fast
  plain PyTorch         normalise, one matrix product, masks, cross entropy or log-sum-exp
  authors' formulation  similarities over an N x N x D broadcast, as in the code published with arXiv 2510.08852

Before they are timed, all must agree on the loss and its gradient; one that does not ends the run with an error.
A case that does not fit (--memory, --seconds) is recorded with the reason instead of times.
"""
_EPILOG = """\
examples:
  python -m bench.losses --out runs/bench                          the whole table: 10 to 30 minutes on two cores
  python -m bench.losses --out runs/try --n 512 --repeats 5        a first look, under a minute

DIR/losses.json holds every single time, DIR/losses.md the tables; both are rewritten after each objective and size, so
a run that is stopped keeps what it has. For numbers worth quoting leave the machine to the run alone: other processes
on the same cores change not only the times but their ratios. Where they cannot be stopped, OMP_NUM_THREADS=1 makes
the times steadier: with several threads each waits for the slowest.
"""


@dataclass(frozen=True)
class Provider:
    """One implementation of the objectives: `loss` takes z (N, D), labels (N / 2,) and the objective's name."""

    name: str
    loss: Loss
    floats: Callable[[int, int], float]  # of n, d: peak memory beyond the inputs in float32 numbers, measured on a CPU
    objectives: tuple[str, ...] = OBJECTIVES


def _fastcl(backend: str, z: Tensor, labels: Tensor, objective: str) -> Tensor:
    sample = torch.arange(len(z) // 2, device=z.device).repeat(2)
    classes = None if objective == "ntxent" else labels.repeat(2)
    with fastcl.backend(backend):
        return fastcl.contrastive_loss(z, sample, classes, objective, plain.TEMPERATURE)


def _plain(prefix: str, z: Tensor, labels: Tensor, objective: str) -> Tensor:
    return getattr(plain, prefix + objective)(z, labels)


CHUNKED = "fastcl chunked"
PROVIDERS = (
    Provider(CHUNKED, partial(_fastcl, "chunked"), lambda n, d: 8 * n * d + 8 * min(n, 4096) ** 2),
    Provider("fastcl dense", partial(_fastcl, "dense"), lambda n, d: 10.9 * n * n),
    Provider("plain PyTorch", partial(_plain, ""), lambda n, d: 4.8 * n * n),
    Provider("authors' formulation", partial(_plain, "broadcast_"), lambda n, d: 6.07 * n * n * d, ("ntxent", "nscl")),
)


def make_batch(n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Standard normal z (n, d) that requires a gradient, and labels (n / 2,) of 2 to 100 classes in turn."""
    batch = n // 2
    # Drawn on the CPU: the same rows on every device, and no temporary that would raise the high-water mark.
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    return z, torch.arange(batch, device=device) % max(2, min(100, batch // 4))


def passes(loss: Loss, z: Tensor, labels: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """One forward and backward pass: the loss and the gradient of z, whose old one goes beforehand."""
    z.grad = None
    value = loss(z, labels, objective)
    value.backward()
    return value.detach(), z.grad


def memory_case(device: str, name: str, objective: str, n: int, d: int) -> tuple[Callable[[], object], ...]:
    """Warm-up and call for `measure_peak`: one forward and backward pass of a provider."""
    loss = next(p.loss for p in PROVIDERS if p.name == name)
    batches = [make_batch(rows, d, torch.device(device)) for rows in (WARM_UP_ROWS, n)]
    return tuple(partial(passes, loss, *batch, objective) for batch in batches)


def obstacle(
    provider: Provider, case: Record, device: torch.device, args: argparse.Namespace
) -> tuple[str | None, Peak | None]:
    """Why a case cannot be timed (None: it can), and its peak memory where it was measured."""
    n, d = case["n"], case["d"]
    needed = provider.floats(n, d) * 4 / GIB
    if needed > args.memory:
        return f"skipped: needs {needed:.3g} GiB, the limit is {args.memory:.3g} GiB", None
    try:
        peak = measure_peak(memory_case, device.type, provider.name, case["objective"], n, d)
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0]}", None
    except BrokenProcessPool:
        return "its process was killed, most likely for want of memory", None
    if peak.seconds > args.seconds:
        return f"skipped: one call takes {peak.seconds:.3g} s, the limit is {args.seconds:g} s", peak
    return None, peak


def run_case(case: Record, device: torch.device, facts: Record, args: argparse.Namespace) -> list[Record]:
    """All providers on one objective and size: memory, agreement, times. Prints a line for each."""
    objective, n, d = case["objective"], case["n"], case["d"]
    z, labels = make_batch(n, d, device)
    label = f"{objective:7} n={n:<6}"
    records, peaks, losses = [], {}, {}
    for provider in PROVIDERS:
        if objective not in provider.objectives:
            continue
        reason, peak = obstacle(provider, case, device, args)
        print(f"{label} {provider.name:20} {reason or f'peak memory {peak.bytes / 2**20:.1f} MiB'}", flush=True)
        if reason:
            used = peak.bytes if peak else None
            records.append(record(BENCH, provider.name, case, facts, peak_bytes=used, reason=reason))
        else:
            peaks[provider.name] = peak.bytes
            losses[provider.name] = provider.loss
    if not losses:
        return records
    results = {name: passes(loss, z, labels, objective) for name, loss in losses.items()}
    agree({name: {"loss": value, "gradient": grad} for name, (value, grad) in results.items()}, TOLERANCE)
    timers = {name: partial(time_passes, partial(loss, z, labels, objective), z) for name, loss in losses.items()}
    for name, samples in interleave(timers, args.repeats, args.seconds).items():
        for run in PASSES:
            used = peaks[name] if run == "both" else None
            flops = FLOPS[run] * n * n * d
            records.append(record(BENCH, name, case, facts, run, samples[run], flops, used))
        times = records[-1]["samples_ms"]
        print(f"{label} {name:20} {milliseconds(times)} ms, {len(times)} rounds", flush=True)
    order = [p.name for p in PROVIDERS]
    return sorted(records, key=lambda r: order.index(r["provider"]))


def header(facts: Record, args: argparse.Namespace) -> str:
    """The conditions of the run, before its first measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"""\
# Losses: time and memory

- Machine: {facts["device"]}; {versions}; {facts["date"]}. Load average at the start: {os.getloadavg()[0]:.1f}; other
  processes change not only the times but their ratios.
- Inputs: n standard normal rows of width {args.d}, two views of n / 2 samples, in 2 to 100 classes; temperature
  {plain.TEMPERATURE}; float32, matrix products at precision "{torch.get_float32_matmul_precision()}".
- Time: ms, median (minimum-maximum) of at most {args.repeats} rounds, fewer after {args.seconds:g} s per provider. In a
  round every provider runs forward and backward once, each round beginning with another; one warm-up call before.
  On a GPU the times lie between CUDA events.
- All providers of a size agreed on the loss and its gradient to {TOLERANCE:g} before they were timed.
- TFLOP/s: the dense count, whatever a provider really computes: n x n x d x 2 forward, twice that backward,
  n x n x d x 2 x 3 together. No bound of the machine was measured.
- Memory: peak of one forward and backward pass beyond the inputs, in a fresh process after a warm-up on {WARM_UP_ROWS}
  rows: the high-water mark of the resident set, with what the C allocator keeps back (more than the arrays while they
  are small), on a GPU that of PyTorch's allocator.
- nscl has other classes alone in its denominator; the published code adds the positive, at the same cost.
"""


def tables(records: Sequence[Record]) -> str:
    """A Markdown table per objective."""
    head = ("n", "provider", "forward + backward", "forward", "backward", "TFLOP/s", "peak MiB", "chunked is faster by")
    text = ""
    for objective in dict.fromkeys(r["objective"] for r in records):
        rows = _rows([r for r in records if r["objective"] == objective])
        text += f"\n## {objective}\n\n{table(head, rows)}"
    return text


def _rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    by_key = {(r["n"], r["provider"], r["pass"]): r for r in records}
    rows = []
    for (n, name, run), both in by_key.items():
        if run != "both":
            continue
        peak = "" if both["peak_bytes"] is None else f"{both['peak_bytes'] / 2**20:.1f}"
        if both["reason"]:
            rows.append((str(n), name, both["reason"], "", "", "", peak, ""))
            continue
        times = [milliseconds(by_key[n, name, run]["samples_ms"]) for run in ("both", "fwd", "bwd")]
        ours = by_key.get((n, CHUNKED, "both"))
        ratio = f"{digits(_time(both) / _time(ours))}x" if ours and name != CHUNKED and not ours["reason"] else ""
        rows.append((str(n), name, *times, f"{both['tflops']:.3g}", peak, ratio))
    return rows


def _time(r: Record) -> float:
    return r["gpu_ms"] or r["wall_ms"]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status (0 done, 1 providers disagree, 130 interrupted)."""
    args, device = _arguments(argv)
    facts = machine(device)
    conditions = header(facts, args)
    print(f"{facts['device']}; results go to {args.out}", flush=True)
    records: list[Record] = []
    try:
        for objective in OBJECTIVES:
            for n in args.n:
                case = {"objective": objective, "n": n, "d": args.d, "dtype": "float32"}
                records += run_case(case, device, facts, args)
                write(args.out, BENCH, records, conditions + tables(records))
    except fastcl.FastclError as error:
        print(f"error: {objective}, n={n}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the files hold the objectives and sizes that were finished", file=sys.stderr)
        return 130
    return 0


def _arguments(argv: list[str] | None) -> tuple[argparse.Namespace, torch.device]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.losses", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser)
    parser.add_argument("--n", type=int, nargs="+", default=[512, 2048, 8192, 16384], metavar="N",
        help="rows: two views of N / 2 samples, even, at least 8 (default: 512 2048 8192 16384)")  # fmt: skip
    parser.add_argument("--d", type=int, default=128, metavar="D", help="width of the rows (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=MEMORY_GIB, metavar="GIB",
        help="skip what would need more, or three quarters of the device's memory (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if bad := [n for n in args.n if n < 8 or n % 2]:
        parser.error(f"--n: rows must be even and at least 8, got {bad[0]}")
    for name in ("d", "repeats", "seconds", "memory"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name}: must be positive, got {getattr(args, name)}")
    device = device_of(args, parser)
    args.memory = min(args.memory, 0.75 * total_memory(device) / GIB)
    return args, device


if __name__ == "__main__":
    sys.exit(main())
