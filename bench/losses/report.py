"""The Markdown of the losses benchmark: conditions, a table per objective and width, and the targets on an H200."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from bench.harness import markdown as md
from bench.harness.ceilings import Ceilings
from bench.harness.records import Record, digits, duration, grouped, milliseconds, table
from bench.losses.plain import BIAS, SCALE, TEMPERATURE
from bench.losses.providers import CHUNKED, FUSED, TOLERANCES

CARD = "H200"
TIMES_MS = {  # NT-Xent, forward and backward on the device, by (rows, width)
    (65536, 128): 5.5, (65536, 256): 10.5, (65536, 512): 15.5, (65536, 1024): 30, (4096, 128): 0.06,
    (1048576, 512): 4200,
}  # fmt: skip
WALL_MS = {(4096, 128): 0.15}  # for an eager call
LARGE, LARGE_GIB = (1048576, 512), 8
EQUAL = (65536, 128)
RELATIVE = {"nscl": 1.1, "supcon": 1.1, "ntxent+supcon": 1.1, "clip": 2.1 / 4}  # at most, times NT-Xent on equal rows
HALF = ("chunked bf16", "torch.compile bf16", "flex_attention bf16")
FASTER = {"Inf-CL": (10.0, ("Inf-CL",)), "PyTorch in bf16": (2.0, HALF)}  # at least, against providers at FASTER_AT
FASTER_AT = ((65536, 256), (65536, 512))
PLAIN = ("plain PyTorch", "plain PyTorch bf16", *HALF)


def header(facts: Record, args: argparse.Namespace, ceilings: Ceilings | None, warm_up_rows: int) -> str:
    """The conditions of the run, written before its first measurement."""
    text = f"""\
# Losses: time and memory

{md.conditions(facts, args)}
- Inputs: n standard normal rows, two views of n / 2 samples (clip, sigmoid: pairs of two towers) in 2 to 100
  classes; temperature {TEMPERATURE}, sigmoid: products times {SCALE:g} plus {BIAS:g}; float32, matrix products at
  precision "{torch.get_float32_matmul_precision()}" where a provider does not lower it.
- Time: ms, {md.rounds(args)}; warm-up
  calls before. All providers of a size agreed with the first on the loss and its gradient, by the precision of their
  products to {md.allowed(TOLERANCES)}.
- TFLOP/s: what a provider really computes, recomputation and split precision included. Dense TFLOP/s: the same count
  for all, n x n x d x 2 forward, twice that backward, n x n x d x 2 x 3 together; a quarter for clip and
  sigmoid.
- nscl has other classes alone in its denominator; the published code adds the positive, at the same cost.
- Memory: peak of one eager forward and backward pass beyond the inputs, """
    if ceilings is None:
        return f"""{text}in a fresh process after a warm-up on
  {warm_up_rows} rows: the high-water mark of the resident set, with what the C allocator keeps back (more than the
  arrays while they are small). No bound of the machine was measured.
"""
    return f"""{text}by PyTorch's allocator.
- On the device: replays of CUDA graphs of the forward pass, the backward pass and both, queued behind other work, so
  that the device never waits for Python; "e" marks eager calls between CUDA events, for what no graph can hold. Caches
  are as the provider before leaves them. Wall: an eager forward and backward pass to its synchronisation.
- Bound: {ceilings}, measured at the start of the run: the slowest of the three in each pass. Of the bound: the bound's
  share of the time of forward and backward together.
"""


def body(records: Sequence[Record], ours: str, figure: str | None) -> str:
    """The figure, then a Markdown table per objective and width with a list of providers that could not run at all.

    Args:
        ours: the provider that the others are compared with.
        figure: file name of the figure, or None.
    """
    gpu = any(r["gpu_ms"] for r in records)
    head = ["n", "provider", "forward + backward", "forward", "backward", *(["wall", "of the bound"] if gpu else [])]
    head += ["TFLOP/s", "dense TFLOP/s", "peak MiB", f"{ours.removeprefix('fastcl ')} is faster by"]
    text = md.time_and_memory(figure)
    for (objective, d), chosen in grouped(records, "objective", "d").items():
        missing = md.absent(chosen)
        rows = _rows([r for r in chosen if r["provider"] not in missing], ours, gpu)
        text += f"\n## {objective}, d = {d}\n\n{table(head, rows)}{md.not_run(missing)}"
    return text


def _rows(records: Sequence[Record], ours: str, gpu: bool) -> Iterator[list[str]]:
    by_key = {(r["n"], r["provider"], r["pass"]): r for r in records}
    for r in (r for r in records if r["pass"] == "both"):
        n, name, peak = r["n"], r["provider"], md.mib(r["peak_bytes"])
        if r["reason"]:
            yield [str(n), name, r["reason"], *[""] * (6 if gpu else 4), peak, ""]
            continue
        mark = " e" if r["timing"] == "events" else ""
        cells = [milliseconds(by_key[n, name, which]["samples_ms"]) + mark for which in ("both", "fwd", "bwd")]
        cells += [digits(r["wall_ms"]), md.percent(share(r))] if gpu else []
        cells += [f"{r[key]:.3g}" for key in ("tflops", "tflops_dense")]
        mine = by_key.get((n, ours, "both"))
        ratio = duration(r) / duration(mine) if mine and mine is not r and not mine["reason"] else None
        yield [str(n), name, *cells, peak, md.times(ratio)]


def share(r: Record) -> float | None:
    """The bound's share of the time; None if no bound was measured."""
    return None if r["bound_ms"] is None else r["bound_ms"] / duration(r)


def ours(records: Sequence[Record]) -> str:
    """The provider that represents fastcl: the Triton kernels if they were timed."""
    return FUSED if any(r["provider"] == FUSED and r["wall_ms"] for r in records) else CHUNKED


def targets(records: Sequence[Record]) -> Iterator[md.Target]:
    """Rows of the target table, from records of one or more runs; those on other devices are ignored.

    Clip's target is 2.1 times NT-Xent's time at equal work; its two towers of n / 2 rows have a quarter of the pairs.
    Times are compared only within a run, identified by its date.
    """
    timed = [r for r in records if r["pass"] == "both" and r["gpu_ms"] and CARD in r["device"]]
    fused = [r for r in timed if r["provider"] == FUSED]

    def first(size: tuple[int, int], key: str) -> float | None:
        return next((r[key] for r in fused if _case(r) == ("ntxent", *size)), None)

    def ratios(size: tuple[int, int], objective: str, rivals: Sequence[str]) -> list[float]:
        """Times of rivals on an objective relative to ours on NT-Xent."""
        mine = [r for r in fused if _case(r) == ("ntxent", *size)]
        theirs = [r for r in timed if r["provider"] in rivals and _case(r) == (objective, *size)]
        return [r["gpu_ms"] / own["gpu_ms"] for r in theirs for own in mine if r["date"] == own["date"]]

    for key, what, limits in (("gpu_ms", "device", TIMES_MS), ("wall_ms", "wall clock", WALL_MS)):
        for size, limit in limits.items():
            what_for = f"ntxent in {limit:g} ms on the {what}"
            yield md.goal(what_for, _at(size), first(size, key), limit, lambda ms: f"{digits(ms)} ms")
    peak = first(LARGE, "peak_bytes")
    gib = None if peak is None else peak / 2**30
    yield md.goal(f"ntxent within {LARGE_GIB} GiB", _at(LARGE), gib, LARGE_GIB, lambda x: f"{digits(x)} GiB")
    for objective, limit in RELATIVE.items():
        found = next(iter(ratios(EQUAL, objective, [FUSED])), None)
        yield md.goal(f"{objective} in at most {limit:g} times ntxent's time", _at(EQUAL), found, limit, md.times)
    for size in FASTER_AT:
        for name, (limit, rivals) in FASTER.items():
            found = min(ratios(size, "ntxent", rivals), default=None)
            yield md.goal(f"{limit:g} times as fast as {name}", _at(size), found, limit, md.times, True)
    for size in sorted({(r["n"], r["d"]) for r in fused if r["objective"] == "ntxent" and r["n"] >= 512}):
        if found := ratios(size, "ntxent", PLAIN):
            yield md.goal("as fast as the best PyTorch", _at(size), min(found), 1, md.times, True)


def _case(r: Record) -> tuple[str, int, int]:
    return r["objective"], r["n"], r["d"]


def _at(size: tuple[int, int]) -> str:
    return f"N = {size[0]:,}, D = {size[1]:,}"
