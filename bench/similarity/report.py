"""The Markdown of the similarity benchmark: conditions, targets, and a table per case."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from bench.harness import markdown as md
from bench.harness.ceilings import Ceilings
from bench.harness.records import Record, digits, grouped, having, milliseconds, table
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


def header(facts: Record, args: argparse.Namespace, ceilings: Ceilings) -> str:
    """The conditions of the run, written before its first measurement."""
    cuda = args.device.type == "cuda"
    memory = "PyTorch's allocator" if cuda else "the resident set of a fresh process, after a warm-up on 8 x 8 rows"
    return f"""\
# Pair statistics: time and memory

{md.conditions(facts, args)}
- Features: {SHARED} times standard normal rows that all models share and {OWN} times a model's own, about a mean of
  {MEAN}. In chunks, they are drawn again in every call: "{DRAWN}" is that time, and part of all others.
- Time: ms on the wall clock, {md.rounds(args)};
  every call ends with numbers on the host.
- Computes: the measures of all pairs that one call returns. "Is faster by": than the fastest dense Gram form that
  returns at least the same.
- Error: largest, absolute, on {GATE} rows of as wide features, against Gram matrices in float64; over
  {md.allowed(TOLERANCES)} by the provider's precision it is not timed. Differs: largest difference from the
  first provider of the table that has the measure, at the size of the table.
- Of the bound: the bound's share of the time. The bound is the slowest of {"half-precision" if cuda else "float32"}
  products, exponentials and the reading of the features, at what this run reached: {ceilings}.
  Products: X'Y of all pairs and half of each X'X for each kernel (2 n d d a pair and n d d a model), or half of each
  model's Gram matrix (n n d), from which all kernels follow, whichever is less; RBF needs the latter, and n n / 2
  exponentials. TFLOP/s: of the products that the provider makes itself.
- Memory: peak of {memory}, beyond the features that are at hand.
- Over the limit: more than {args.seconds:g} s in one call, measured or by the time on fewer rows.
"""


def body(records: Sequence[Record], figure: str | None, device: torch.device) -> str:
    """Targets, figure and tables of what has been measured so far.

    Args:
        figure: file name of the figure, or None.
    """
    text = f"\n## Targets\n\n{md.target_table(targets(records))}{md.time_and_memory(figure)}"
    for section, title in TITLES.items():
        chosen = having(records, section=section)
        if chosen:
            text += f"\n## {title}\n{_twins(chosen) if section == 'twins' else _cases(chosen)}"
        elif section in NOT_HERE and device.type != "cuda":
            text += f"\n## {title}\n\n{NOT_HERE[section]}.\n"
    return text


def targets(records: Sequence[Record]) -> Iterator[md.Target]:
    """Rows of the target table."""
    found = having(records, **asdict(DENSE_TARGET))
    date = next((r["date"] for r in found if r["dense"]), None)  # compare times of one run only
    at = {r["provider"]: r for r in having(found, date=date)}
    ours, best = at.get(ALL_THREE), best_dense(list(at.values()), at.get(ALL_THREE))
    time = memory = None
    if ours and best and ours["wall_ms"]:
        time, memory = best["wall_ms"] / ours["wall_ms"], ours["peak_bytes"] / best["peak_bytes"]
    where = str(DENSE_TARGET)
    what = f"{FASTER} times as fast as the best dense Gram form with the same measures"
    yield md.goal(what, where, time, FASTER, md.times, True)
    yield md.goal(f"at most {100 * SMALLER:g} % of its memory", where, memory, SMALLER, md.percent)
    cards = (r for r in having(records, provider=ALL_THREE, **asdict(CARD_TARGET)) if CARD in r["device"])
    what = f"CKA, debiased CKA and RSA of all pairs in {CARD_MS} ms on an {CARD}"
    here = next((r["wall_ms"] for r in cards), None)
    yield md.goal(what, str(CARD_TARGET), here, CARD_MS, lambda ms: f"{digits(ms)} ms")


def best_dense(records: Sequence[Record], r: Record | None) -> Record | None:
    """The fastest dense Gram form among the records of a case that returns all measures of record `r`."""
    if not r or not r["measures"]:
        return None
    rivals = [q for q in records if q["dense"] and q["wall_ms"] and set(r["measures"]) <= set(q["measures"])]
    return min(rivals, key=lambda q: q["wall_ms"], default=None)


def share(r: Record) -> float | None:
    """The bound's share of the time; None without a bound."""
    return None if r["bound_ms"] is None else r["bound_ms"] / r["wall_ms"]


def _cases(records: Sequence[Record]) -> str:
    head = ("provider", "computes", "ms", "peak MiB", "error", "differs", "TFLOP/s", "of the bound", "is faster by")
    text = ""
    for fields, chosen in grouped(records, *KEYS).items():
        missing = md.absent(chosen)
        rows = [_row(r, chosen) for r in chosen if r["provider"] not in missing]
        text += f"\n### {Case(*fields)}\n\n{table(head, rows)}{md.not_run(missing)}"
    return text


def _row(r: Record, others: Sequence[Record]) -> list[str]:
    keys = ("error", "difference")
    error, differs = ("" if r[key] is None or not r["measures"] else f"{r[key]:.1e}" for key in keys)
    start = [r["provider"], r["computes"], r["reason"] or milliseconds(r["wall_samples_ms"] or r["samples_ms"])]
    start += [md.mib(r["peak_bytes"]), error]
    if r["reason"]:
        return [*start, "", "", "", ""]
    rival = best_dense(others, r)
    ratio = None if rival is None or rival is r else rival["wall_ms"] / r["wall_ms"]
    return [*start, differs, f"{r['tflops']:.3g}" if r["tflops"] else "", md.percent(share(r)), md.times(ratio)]


def _twins(records: Sequence[Record]) -> str:
    head = ("provider", "precision", "forward + backward", "forward", "backward", "peak MiB")
    text = f"""
Two views of n / 2 samples, temperature {two_models.TEMPERATURE}: the decoupled loss of one model, the
negatives-only loss of the other. "{two_models.TOGETHER}" and "{two_models.APART}" return RSA of the cosines too;
"{two_models.ALONE}" is the losses alone. All agree with float64 on loss, gradient and RSA before they are timed.
"""
    for (n, d), chosen in grouped(records, "n", "d").items():
        rows = []
        for names, passes in grouped(chosen, "provider", "precision").items():
            at = {r["pass"]: r for r in passes}
            cells = [at["both"]["reason"], "", "", ""]
            if not at["both"]["reason"]:
                cells = [milliseconds(at[which]["samples_ms"]) for which in ("both", "fwd", "bwd")]
                cells.append(md.mib(at["both"]["peak_bytes"]))
            rows.append([*names, *cells])
        text += f"\n### n = {n:,}, d = {d}\n\n{table(head, rows)}"
    return text
