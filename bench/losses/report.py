"""The Markdown of the losses benchmark: conditions, and a table per objective and width."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from bench.harness.ceilings import Ceilings
from bench.harness.markdown import machine_and_load, mib, not_run, time_and_memory
from bench.harness.records import Record, digits, duration, milliseconds, table
from bench.losses.plain import TEMPERATURE
from bench.losses.providers import TOLERANCES


def header(facts: Record, args: argparse.Namespace, ceilings: Ceilings | None, warm_up_rows: int) -> str:
    """The conditions of the run, written before its first measurement."""
    agreed = ", ".join(f"{tolerance:g} ({name})" for name, tolerance in TOLERANCES.items())
    text = f"""\
# Losses: time and memory

{machine_and_load(facts)}
- Inputs: n standard normal rows, two views of n / 2 samples (clip: pairs of two towers) in 2 to 100 classes;
  temperature {TEMPERATURE}; float32, matrix products at precision
  "{torch.get_float32_matmul_precision()}" where a provider does not lower it.
- Time: ms, median (minimum-maximum) of at most {args.repeats} rounds, fewer after {args.seconds:g} s per provider. In a
  round every provider runs once, each round beginning with another; warm-up calls before.
- All providers of a size agreed with the first on the loss and its gradient before they were timed, by the precision of
  their products to {agreed}.
- TFLOP/s: what a provider really computes, recomputation and split precision included. Dense TFLOP/s: the same count
  for all, n x n x d x 2 forward, twice that backward, n x n x d x 2 x 3 together; a quarter for clip.
- nscl has other classes alone in its denominator; the published code adds the positive, at the same cost.
"""
    return text + (_on_gpu(ceilings) if ceilings else _on_cpu(warm_up_rows))


def _on_cpu(warm_up_rows: int) -> str:
    return f"""\
- Memory: peak of one forward and backward pass beyond the inputs, in a fresh process after a warm-up on {warm_up_rows}
  rows: the high-water mark of the resident set, with what the C allocator keeps back (more than the arrays while they
  are small). No bound of the machine was measured.
"""


def _on_gpu(ceilings: Ceilings) -> str:
    return f"""\
- On the device: replays of CUDA graphs of the forward pass, the backward pass and both, queued behind other work, so
  that the device never waits for Python; "e" marks eager calls between CUDA events, for what no graph can hold. Caches
  are as the provider before leaves them. Wall: an eager forward and backward pass to its synchronisation.
- Bound: {ceilings}, measured at the start of the run: the slowest of the three in each pass. Of the bound: the bound's
  share of the time of forward and backward together.
- Memory: peak of PyTorch's allocator in an eager forward and backward pass beyond the inputs.
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
    text = time_and_memory(figure)
    for objective, d in dict.fromkeys((r["objective"], r["d"]) for r in records):
        chosen = [r for r in records if (r["objective"], r["d"]) == (objective, d)]
        absent = _absent(chosen)
        rows = _rows([r for r in chosen if r["provider"] not in absent], ours, gpu)
        text += f"\n## {objective}, d = {d}\n\n{table(head, rows)}{not_run(absent)}"
    return text


def _absent(records: Sequence[Record]) -> dict[str, str]:
    """Providers without times at any size, all for one reason that does not depend on the size."""
    reasons: dict[str, set[str | None]] = {}
    for r in records:
        reasons.setdefault(r["provider"], set()).add(r["reason"])
    fixed = ("has no ", "timed on ")
    return {
        name: next(iter(found))
        for name, found in reasons.items()
        if len(found) == 1 and None not in found
        and (next(iter(found)).startswith(fixed) or next(iter(found)).endswith(" is not installed"))
    }  # fmt: skip


def _rows(records: Sequence[Record], ours: str, gpu: bool) -> Iterator[list[str]]:
    by_key = {(r["n"], r["provider"], r["pass"]): r for r in records}
    for (n, name, run), both in by_key.items():
        if run != "both":
            continue
        peak = mib(both["peak_bytes"])
        if both["reason"]:
            yield [str(n), name, both["reason"], *[""] * (6 if gpu else 4), peak, ""]
            continue
        mark = " e" if both["timing"] == "events" else ""
        times = [milliseconds(by_key[n, name, which]["samples_ms"]) + mark for which in ("both", "fwd", "bwd")]
        if gpu:
            share = "" if both["bound_ms"] is None else f"{100 * both['bound_ms'] / duration(both):.3g} %"
            times += [digits(both["wall_ms"]), share]
        rates = [f"{both[key]:.3g}" for key in ("tflops", "tflops_dense")]
        fastest = by_key.get((n, ours, "both"))
        other = name != ours and fastest and not fastest["reason"]
        ratio = f"{digits(duration(both) / duration(fastest))}x" if other else ""
        yield [str(n), name, *times, *rates, peak, ratio]
