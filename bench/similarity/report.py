"""The Markdown of the benchmark of the pair statistics: its conditions, its targets, and a table per case."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence

import torch

from bench.harness.ceilings import Ceilings
from bench.harness.figures import CAPTION
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
FASTER, SMALLER = 5, 0.05  # against the best dense form: times as fast at least, of its memory at most
CARD_TARGET, CARD, CARD_MS = Case("models", 50_000, 2048, 4, "bfloat16"), "H200", 60


def header(facts: Record, args: argparse.Namespace, device: torch.device, ceilings: Ceilings) -> str:
    """The conditions of the run, before its first measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    allowed = ", ".join(f"{tolerance:g} ({name})" for name, tolerance in TOLERANCES.items())
    cuda = device.type == "cuda"
    memory = (
        "peak of PyTorch's allocator" if cuda else "high-water mark of the resident set of a fresh process, after a "
        "warm-up on 8 x 8, with what the C allocator keeps back"
    )  # fmt: skip
    product = "half-precision" if cuda else "float32"
    return f"""\
# Pair statistics: time and memory

- Machine: {facts["device"]}; {versions}; {facts["date"]}. Load average at the start: {os.getloadavg()[0]:.1f}; other
  processes change not only the times but their ratios.{_tiny(args)}
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


def _tiny(args: argparse.Namespace) -> str:
    return "\n- Tiny sizes: they prove that the benchmark works and measure nothing." if args.tiny else ""


def body(records: Sequence[Record], figure: str | None, device: torch.device) -> str:
    """Targets, figure and tables of what has been measured so far.

    Args:
        figure: name of the file, or None where there is none.
    """
    text = f"\n## Targets\n\n{table(('target', 'where', 'found', 'reached'), targets(records))}"
    text += f"\n![Time and memory against the number of rows]({figure})\n\n{CAPTION}\n" if figure else ""
    for section, title in TITLES.items():
        chosen = [r for r in records if r["section"] == section]
        if chosen:
            tables = _twins(chosen) if section == "twins" else _cases(chosen)
            text += f"\n## {title}\n{tables}"
        elif section in NOT_HERE and device.type != "cuda":
            text += f"\n## {title}\n\n{NOT_HERE[section]}.\n"
    return text


def targets(records: Sequence[Record]) -> Iterator[tuple[str, str, str, str]]:
    """Rows: target, where, found, reached."""
    found = [r for r in records if _is(r, DENSE_TARGET)]
    date = next((r["date"] for r in found if r["dense"]), None)  # of the run that has them: times of two do not compare
    at = {r["provider"]: r for r in found if r["date"] == date}
    ours, best = at.get(ALL_THREE), best_dense(at.values(), at.get(ALL_THREE))
    time = memory = None
    if best and ours["wall_ms"]:
        time, memory = best["wall_ms"] / ours["wall_ms"], ours["peak_bytes"] / best["peak_bytes"]
    where = str(DENSE_TARGET)
    yield (f"{FASTER} times as fast as the best dense Gram form with the same measures", where,
           *_outcome(time, f"{digits(time)}x" if time else "", time is not None and time >= FASTER))  # fmt: skip
    yield (f"at most {100 * SMALLER:g} % of its memory", where,
           *_outcome(memory, f"{100 * memory:.3g} %" if memory is not None else "", memory is not None
                     and memory <= SMALLER))  # fmt: skip
    card = next((r for r in records if _is(r, CARD_TARGET) and r["provider"] == ALL_THREE), {})
    here = card.get("wall_ms") if CARD in card.get("device", "") else None
    yield (f"CKA, debiased CKA and RSA of all pairs in {CARD_MS} ms on an {CARD}", str(CARD_TARGET),
           *_outcome(here, f"{digits(here)} ms" if here else "", here is not None and here <= CARD_MS))  # fmt: skip


def _outcome(value: float | None, found: str, reached: bool) -> tuple[str, str]:
    return ("not measured", "") if value is None else (found, "yes" if reached else "no")


def _is(r: Record, case: Case) -> bool:
    return all(r.get(key) == getattr(case, key) for key in KEYS)


def best_dense(records: Sequence[Record], r: Record | None) -> Record | None:
    """The fastest dense Gram form among the records of a case that returns all that record `r` does."""
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
        text += f"\n### {Case(*case)}\n\n{table(head, rows)}"
        if never:
            reasons = {why: [name for name in never if never[name] == why] for why in never.values()}
            text += "\nNot run. " + "; ".join(f"{why}: {', '.join(names)}" for why, names in reasons.items()) + ".\n"
    return text


def _absent(r: Record) -> bool:
    return bool(r["reason"]) and (r["reason"].startswith("timed on ") or r["reason"].endswith(" is not installed"))


def _row(r: Record, others: Sequence[Record]) -> list[str]:
    error, differs = ("" if r[key] is None else f"{r[key]:.1e}" for key in ("error", "difference"))
    if not r["measures"]:
        error = differs = ""
    peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.1f}"
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
            rows.append([name, precision, *times, f"{both['peak_bytes'] / 2**20:.1f}"])
        text += f"\n### n = {n:,}, d = {d}\n\n{table(head, rows)}"
    return text
