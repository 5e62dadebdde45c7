"""The Markdown of the similarity benchmark: conditions, targets, and a table per case."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from bench.harness.ceilings import Ceilings
from bench.harness.markdown import Target, machine_and_load, mib, not_run, outcome, target_table, time_and_memory
from bench.harness.records import Record, digits, milliseconds, table
from bench.similarity import two_models
from bench.similarity.inputs import KEYS, MEAN, OWN, SHARED, Case
from bench.similarity.providers import ALL_THREE, DRAWN, GATE, TOLERANCES

TITLES = {
    "pair": "Two models, features at hand",
    "stream": "Two models, features drawn on the way",
    "models": "Four models, all pairs",
    "twins": "Losses and similarities of two models",
}
NOT_HERE = {"models": "not measured: timed on CUDA only"}
DENSE_TARGET = Case("pair", 10_000, 512)
FASTER, SMALLER = 5, 0.05  # against the best dense form: minimum speed-up, maximum share of its memory
CARD_TARGET, CARD, CARD_MS = Case("models", 50_000, 2048, 4, "bfloat16"), "H200", 60


def header(facts: Record, args: argparse.Namespace, device: torch.device, ceilings: Ceilings) -> str:
    """The conditions of the run, written before its first measurement."""
    allowed = ", ".join(f"{tolerance:g} ({name})" for name, tolerance in TOLERANCES.items())
    cuda = device.type == "cuda"
    memory = (
        "peak of PyTorch's allocator" if cuda else "high-water mark of the resident set of a fresh process, after a "
        "warm-up on 8 x 8, with what the C allocator keeps back"
    )  # fmt: skip
    product = "half-precision" if cuda else "float32"
    return f"""\
# Pair statistics: time and memory

{machine_and_load(facts, args.tiny)}
- Features: {SHARED} times standard normal rows that all models share and {OWN} times a model's own, about a mean of
  {MEAN}. In chunks, they are drawn again in every call: "{DRAWN}" is that time, and part of all others.
- Time: ms on the wall clock, median (minimum-maximum) of at most {args.repeats} rounds, fewer after {args.seconds:g} s
  per provider; every call ends with numbers on the host. In a round every provider runs once, each round beginning
  with another.
- Computes: the measures of all pairs that one call returns. A provider is compared with the fastest dense Gram form
  that returns at least the same; "is faster by" says how many times.
- Error: largest, absolute, on {GATE} rows of as wide features, against the definitions in float64; over
  {allowed} by the provider's precision it is not timed. Differs: largest difference from the first
  provider of the table that has the measure, at the size of the table.
- Of the bound: the bound's share of the time. The bound is the slowest of {product} products, exponentials and the
  reading of the features, at what this run reached: {ceilings}. Products: X'Y of all pairs and half of each X'X for
  each kernel (2 n d d a pair and n d d a model), or half of each model's Gram matrix (n n d), from which all kernels
  follow, whichever is less; RBF needs the latter, and n n / 2 exponentials. TFLOP/s: of the products that the provider
  makes itself.
- Memory: beyond the features that are at hand: {memory}.
- Over the limit: more than {args.seconds:g} s in one call, measured or by the time on fewer rows. Nothing is
  extrapolated.
"""


def body(records: Sequence[Record], figure: str | None, device: torch.device) -> str:
    """Targets, figure and tables of what has been measured so far.

    Args:
        figure: file name of the figure, or None.
    """
    text = f"\n## Targets\n\n{target_table(targets(records))}{time_and_memory(figure)}"
    for section, title in TITLES.items():
        chosen = [r for r in records if r["section"] == section]
        if chosen:
            tables = _twins(chosen) if section == "twins" else _cases(chosen)
            text += f"\n## {title}\n{tables}"
        elif section in NOT_HERE and device.type != "cuda":
            text += f"\n## {title}\n\n{NOT_HERE[section]}.\n"
    return text


def targets(records: Sequence[Record]) -> Iterator[Target]:
    """Rows of the target table: target, where, found, reached."""
    found = [r for r in records if _is(r, DENSE_TARGET)]
    date = next((r["date"] for r in found if r["dense"]), None)  # compare times of one run only
    at = {r["provider"]: r for r in found if r["date"] == date}
    ours, best = at.get(ALL_THREE), best_dense(at.values(), at.get(ALL_THREE))
    time = memory = None
    if best and ours["wall_ms"]:
        time, memory = best["wall_ms"] / ours["wall_ms"], ours["peak_bytes"] / best["peak_bytes"]
    where = str(DENSE_TARGET)
    yield (f"{FASTER} times as fast as the best dense Gram form with the same measures", where,
           *outcome(time, lambda t: f"{digits(t)}x", lambda t: t >= FASTER))  # fmt: skip
    yield (f"at most {100 * SMALLER:g} % of its memory", where,
           *outcome(memory, lambda m: f"{100 * m:.3g} %", lambda m: m <= SMALLER))  # fmt: skip
    card = next((r for r in records if _is(r, CARD_TARGET) and r["provider"] == ALL_THREE), {})
    here = card.get("wall_ms") if CARD in card.get("device", "") else None
    yield (f"CKA, debiased CKA and RSA of all pairs in {CARD_MS} ms on an {CARD}", str(CARD_TARGET),
           *outcome(here, lambda ms: f"{digits(ms)} ms", lambda ms: ms <= CARD_MS))  # fmt: skip


def _is(r: Record, case: Case) -> bool:
    return all(r.get(key) == getattr(case, key) for key in KEYS)


def best_dense(records: Sequence[Record], r: Record | None) -> Record | None:
    """The fastest dense Gram form among the records of a case that returns all measures of record `r`."""
    if not r or not r["measures"]:
        return None
    rivals = [q for q in records if q["dense"] and q["wall_ms"] and set(r["measures"]) <= set(q["measures"])]
    return min(rivals, key=lambda q: q["wall_ms"], default=None)


def _cases(records: Sequence[Record]) -> str:
    head = ("provider", "computes", "ms", "peak MiB", "error", "differs", "TFLOP/s", "of the bound", "is faster by")
    text = ""
    for case in dict.fromkeys(tuple(r[key] for key in KEYS) for r in records):
        chosen = [r for r in records if tuple(r[key] for key in KEYS) == case]
        never = {r["provider"]: r["reason"] for r in chosen if _absent(r)}
        rows = [_row(r, chosen) for r in chosen if r["provider"] not in never]
        text += f"\n### {Case(*case)}\n\n{table(head, rows)}{not_run(never)}"
    return text


def _absent(r: Record) -> bool:
    return bool(r["reason"]) and (r["reason"].startswith("timed on ") or r["reason"].endswith(" is not installed"))


def _row(r: Record, others: Sequence[Record]) -> list[str]:
    error, differs = ("" if r[key] is None else f"{r[key]:.1e}" for key in ("error", "difference"))
    if not r["measures"]:
        error = differs = ""
    peak = mib(r["peak_bytes"])
    if r["reason"]:
        return [r["provider"], r["computes"], r["reason"], peak, error, *[""] * 4]
    rival = best_dense(others, r)
    ratio = "" if rival is None or rival is r else f"{digits(rival['wall_ms'] / r['wall_ms'])}x"
    share = "" if r["bound_ms"] is None else f"{100 * r['bound_ms'] / r['wall_ms']:.3g} %"
    rate = f"{r['tflops']:.3g}" if r["tflops"] else ""
    times = milliseconds(r["wall_samples_ms"] or r["samples_ms"])
    return [r["provider"], r["computes"], times, peak, error, differs, rate, share, ratio]


def _twins(records: Sequence[Record]) -> str:
    head = ("provider", "precision", "forward + backward", "forward", "backward", "peak MiB")
    text = f"""
Two views of n / 2 samples, temperature {two_models.TEMPERATURE}: the decoupled loss of one model, the
negatives-only loss of the other. "{two_models.TOGETHER}" and "{two_models.APART}" return RSA of the cosines too;
"{two_models.ALONE}" is the losses alone. All agree with float64 on loss, gradient and RSA before they are timed.
"""
    for n, d in dict.fromkeys((r["n"], r["d"]) for r in records):
        chosen = [r for r in records if (r["n"], r["d"]) == (n, d)]
        at = {(r["provider"], r["precision"], r["pass"]): r for r in chosen}
        rows = []
        for name, precision in dict.fromkeys((r["provider"], r["precision"]) for r in chosen):
            both = at[name, precision, "both"]
            if both["reason"]:
                rows.append([name, precision, both["reason"], "", "", ""])
                continue
            times = (milliseconds(at[name, precision, which]["samples_ms"]) for which in ("both", "fwd", "bwd"))
            rows.append([name, precision, *times, mib(both["peak_bytes"])])
        text += f"\n### n = {n:,}, d = {d}\n\n{table(head, rows)}"
    return text
