"""The Markdown of the training benchmark: conditions, targets, and a table for each section."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from bench.harness import markdown as md
from bench.harness.records import Record, digits, grouped, having, milliseconds, table
from bench.training.runs import ALIGNMENT
from bench.training.speed import PUBLISHED, SECTION

LIMIT = 0.05  # maximum share of losses and waiting for views, together, in a step on a GPU
BATCH, PRECISIONS = 1024, ("fp32", "bf16")  # of the target


def markdown(records: Sequence[Record], facts: Record, source: str, args: argparse.Namespace) -> str:
    """The report on everything measured so far."""
    small = ", made small unless said otherwise" if "cuda" not in facts["versions"] else ""
    text = (
        f"# Training\n\n{md.conditions(facts, args)}\n- Images: {source}. ResNet-18 with the CIFAR stem{small}; LARS.\n"
    )
    sections = {"steps": _steps, SECTION: _speed, "memory": _memory, "runs": _runs, "precision": _precision}
    for name, write in sections.items():
        mine = having(records, section=name)
        text += write(mine) if mine else ""
    return text


def _steps(records: Sequence[Record]) -> str:
    text = f"""
## Steps

A step trains all models on one batch: two views of each image. Waiting: the share of its time before its batch is
there. Encoders, losses, metrics and optimisers: shares of the device's time, on a CPU of the wall clock, without the
views, by a profile of two more steps. "Losses" holds the backward pass of fastcl's operators and the forward pass of
twin_stats, which is shown by itself too: it returns the pair statistics of a step with the losses of two models.
"Metrics" is what every model records besides its loss, with the row statistics of the one that trains without them.

{md.target_table(targets(records))}
"""
    return text + steps_table(records)


def targets(records: Sequence[Record]) -> Iterator[md.Target]:
    """Rows of the target table."""
    for precision in PRECISIONS:
        found = having(records, section="steps", batch=BATCH, precision=precision, models=4, reason=None)
        r = next((r for r in found if "cuda" in r["versions"]), None)
        share = None
        if r is not None and r["shares"]["losses"] is not None:
            share = waiting(r) + (1 - waiting(r)) * r["shares"]["losses"]
        where = f"four models, B = {BATCH:,}, {precision}, CUDA"
        yield md.goal(f"losses and waiting at most {LIMIT:.0%} of a step", where, share, LIMIT, "{:.1%}".format)


def waiting(r: Record) -> float:
    """The share of the steps' time spent waiting for their batches."""
    return sum(r["waiting_seconds"]) / sum(r["step_seconds"])


def steps_table(records: Sequence[Record]) -> str:
    """A table with one row per case of the section "steps"."""
    head = ("B", "precision", "models", "s a step", "images/s", "images/s and model", "waiting", "encoders", "losses",
            "twin_stats", "metrics", "optimisers", "peak GiB")  # fmt: skip
    return table(head, map(_step_row, records))


def _step_row(r: Record) -> list[str]:
    start = [f"{r['batch']:,}", r["precision"], str(r["models"])]
    if r["reason"]:
        return [*start, r["reason"], *[""] * 9]
    rate, of = r["images_per_second"], r["shares"]
    shares = (of["encoders"], of["losses"], r["twin_share"], of["metrics"], of["optimisers"])
    return [
        *start, milliseconds(r["step_seconds"]), f"{rate:,.0f}", f"{rate * r['twins']:,.0f}", f"{waiting(r):.1%}",
        *("-" if s is None else f"{s:.1%}" for s in shares), md.gib(r["peak_bytes"]),
    ]  # fmt: skip


def _speed(records: Sequence[Record]) -> str:
    text = """
## Speed

Whole steps, with the wait for their batches. Every loop takes the same network, optimiser, batch and precision; the
views are of one recipe, rendered by fastcl from its plan and by torchvision's transforms in a DataLoader otherwise.
Images of a step count once for each network that it trains. The loops take turns.
"""
    return text + "\n" + speed_tables(records)


def speed_tables(records: Sequence[Record]) -> str:
    """A table with a row for each loop for each case of the section "speed"."""
    head = ("loop", "networks", "ms a step", "images/s", "images/s, all networks", f"of the {PUBLISHED}",
            "peak GiB")  # fmt: skip
    tables = []
    for (network, batch, precision), rows in grouped(records, "network", "batch", "precision").items():
        published = next(map(_rate, having(rows, provider=PUBLISHED, reason=None)), None)
        body = table(head, (_speed_row(r, published) for r in rows), left=1)
        tables.append(f"{network}, B = {batch:,}, {precision}:\n\n{body}")
    return "\n".join(tables)


def _rate(r: Record) -> float:
    """Images per second, once for each network."""
    return 1e3 * r["networks"] * r["batch"] / r["wall_ms"]


def _speed_row(r: Record, published: float | None) -> list[str]:
    start = [r["provider"], str(r["networks"])]
    if r["reason"]:
        return [*start, r["reason"], *[""] * 4]
    faster, alone = md.times(published and _rate(r) / published), f"{_rate(r) / r['networks']:,.0f}"
    return [*start, milliseconds(r["samples_ms"]), alone, f"{_rate(r):,.0f}", faster, md.gib(r["peak_bytes"])]


def _memory(records: Sequence[Record]) -> str:
    return f"""
## Memory

One step of one model (NT-Xent, float32), forward and backward, beyond weights and images: one part alone, the batch in
parts by `fastcl.micro_step`, the batch at once.

{memory_table(records)}"""


def memory_table(records: Sequence[Record]) -> str:
    """A table with one row per case of the section "memory"."""
    rows = ((f"{r['batch']:,}", str(r["parts"]), r["reason"] or md.mib(r["peak_bytes"], ",.0f"),
             "" if r["reason"] else digits(r["seconds"])) for r in records)  # fmt: skip
    return table(("B", "parts", "peak MiB", "s"), rows)


def _cases(records: Sequence[Record], heading: str, body: Callable[[Record], str]) -> str:
    """A part for each record: its heading, then its results or the reason for having none."""
    heading = f"\n{heading}, {{epochs}} epochs, B = {{batch:,}}\n\n"
    return "".join(heading.format(**r) + (f"{r['reason']}\n" if r["reason"] else body(r)) for r in records)


def _runs(records: Sequence[Record]) -> str:
    text = "\n## Runs\n\nHeld-out images. The reseeded twin is the noise floor: dcl again, on other random views.\n"
    return text + _cases(records, "### Temperature {temperature:g}, {precision}", _run)


def _run(r: Record) -> str:
    head = ("model", "CKA with dcl", "debiased CKA", "RSA", "nearest centre", "ridge probe")
    peak = md.gib(r["peak_bytes"]) + (" GiB" if r["peak_bytes"] is not None else "")
    rate = f"{r['images_per_second']:,.0f} images/s, all models together"
    evaluation = f"an evaluation of all {digits(r['evaluation_seconds'])} s, an epoch {digits(r['epoch_seconds'])} s"
    return f"{table(head, models(r), left=1)}\n{rate}; {evaluation}; peak memory {peak}.\n"


def models(r: Record) -> Iterator[list[str]]:
    """Rows for the models of a run: name, ALIGNMENT with dcl, accuracy of the nearest centre and of the probe."""
    for model, ncc in r["ncc"].items():
        yield [model, *_aligned(r["pairs"].get(model)), f"{ncc:.4f}", f"{r['probe'][model]:.4f}"]


def _precision(records: Sequence[Record]) -> str:
    head = ("models", "", *ALIGNMENT)
    return _cases(records, "## Precision of the networks", lambda r: table(head, compared(r)))


def compared(r: Record) -> Iterator[list[str]]:
    """Rows for a comparison of precisions: the two models, the meaning of their comparison, their ALIGNMENT."""
    yield ["dcl fp32, dcl reseeded fp32", "the noise floor", *_aligned(r["floor"])]
    yield ["dcl fp32, dcl bf16", "what the precision changes", *_aligned(r["between"])]
    for p, found in r["alignment"].items():
        yield [f"dcl {p}, nscl {p}", "the alignment of interest", *_aligned(found)]


def _aligned(pair: Record | None) -> list[str]:
    """ALIGNMENT of a pair of models; empty for the reference itself."""
    values = [pair[name] for name in ALIGNMENT] if pair else [""] * len(ALIGNMENT)
    return ["undefined" if v is None else v and f"{v:.4f}" for v in values]
