"""The Markdown of the benchmark of the trainer: conditions, targets, and a table for each section."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from bench.records import Record, digits, table
from bench.training_runs import ALIGNMENT

LIMIT = 0.05  # of a step: what losses and waiting for views may take together on a card


def markdown(records: Sequence[Record], facts: Record, source: str, tiny: bool) -> str:
    """Everything measured so far."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    text = f"""\
# Training

- Machine: {facts["device"]}; {versions}; {facts["date"]}.
- Images: {source}. ResNet-18 with the CIFAR stem{", made small" if "cuda" not in facts["versions"] else ""}; LARS.
"""
    text += "- Tiny sizes: they prove that the benchmark works and measure nothing.\n" if tiny else ""
    sections = {"steps": _steps, "runs": _runs, "precision": _precision}
    for name, write in sections.items():
        mine = [r for r in records if r["section"] == name]
        text += write(mine) if mine else ""
    return text


def _steps(records: Sequence[Record]) -> str:
    text = f"""
## Steps

A step trains all models on one batch: two views of each image. Waiting: the share of its time before its batch is
there. Encoders, losses and optimisers: shares of the device's time, on a CPU of the wall clock, without the views, by a
profile of two more steps; "losses" holds the backward pass of fastcl's operators, and twin_stats is its forward pass.
Target on a card: losses and waiting at most {LIMIT:.0%} of a step of four models at B = 1,024.

"""
    head = ("B", "precision", "models", "s a step", "images/s", "images/s and model", "waiting", "encoders", "losses",
            "twin_stats", "optimisers", "peak GiB")  # fmt: skip
    return text + table(head, map(_step_row, records))


def _step_row(r: Record) -> tuple[str, ...]:
    start = (f"{r['batch']:,}", r["precision"], str(r["models"]))
    if r["reason"]:
        return (*start, r["reason"], *[""] * 8)
    seconds, rate = r["step_seconds"], r["images_per_second"]
    waiting = sum(r["waiting_seconds"]) / sum(seconds)
    peak = "not measured" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.1f}"
    shares = [r["shares"]["encoders"], r["shares"]["losses"], r["twin_share"], r["shares"]["optimisers"]]
    return (
        *start, f"{digits(median(seconds))} ({digits(min(seconds))}-{digits(max(seconds))})", f"{rate:,.0f}",
        f"{rate * r['twins']:,.0f}", f"{waiting:.1%}", *("-" if s is None else f"{s:.1%}" for s in shares), peak,
    )  # fmt: skip


def _runs(records: Sequence[Record]) -> str:
    text = "\n## Runs\n\nHeld-out images. The reseeded twin is the noise floor: dcl again, on other random views.\n"
    for r in records:
        text += f"\n### Temperature {r['temperature']:g}, {r['epochs']} epochs, B = {r['batch']:,}\n\n"
        if r["reason"]:
            text += f"{r['reason']}\n"
            continue
        text += table(("model", "", "CKA with dcl", "debiased CKA", "RSA", "nearest centre", "ridge probe"), _models(r))
        peak = "not measured" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.1f} GiB"
        text += f"\n{r['images_per_second']:,.0f} images/s, all models together; peak memory {peak}.\n"
    return text


def _models(r: Record) -> Iterator[tuple[str, ...]]:
    for model, ncc in r["ncc"].items():
        pair = r["pairs"].get(model)
        aligned = [_four(pair[name]) if pair else "" for name in ALIGNMENT]
        yield (model, "", *aligned, _four(ncc), _four(r["probe"][model]))


def _precision(records: Sequence[Record]) -> str:
    text = ""
    for r in records:
        text += f"\n## Precision of the networks, {r['epochs']} epochs, B = {r['batch']:,}\n\n"
        if r["reason"]:
            text += f"{r['reason']}\n"
            continue
        rows = [("dcl fp32, dcl reseeded fp32", "the noise floor", r["floor"]),
                ("dcl fp32, dcl bf16", "what the precision changes", r["between"])]  # fmt: skip
        rows += [(f"dcl {p}, nscl {p}", "the alignment of interest", found) for p, found in r["alignment"].items()]
        text += table(("models", "", *ALIGNMENT), [(a, b, *(_four(v[name]) for name in ALIGNMENT)) for a, b, v in rows])
    return text


def _four(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
