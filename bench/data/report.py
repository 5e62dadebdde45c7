"""The Markdown of the data benchmark: conditions, targets, and a table for each size."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from statistics import median

from bench.data import waiting
from bench.data.providers import DALI_RENDERER, DECODING, LEVELS, TRITON_RENDERER
from bench.harness import markdown as md
from bench.harness.records import Record, digits, grouped, having, table

TRITON_TARGET, TRITON_SIZE, DECODER_SIZE = 1e6, 32, 224


def header(facts: Record, args: argparse.Namespace) -> str:
    """The conditions of the run, written before its first measurement."""
    return f"""\
# Data: decoding and two views

{md.conditions(facts, args)}
- A pass takes the stored images of the table in shuffled order to two float32 views of each on the {args.device.type},
  batch by batch; fastcl's loader starts its workers anew in every pass, as in an epoch of training, the others' stay
  up; nothing is fetched before a pass begins.
- Images/s: on the wall clock, {md.rounds(args, "passes")}.
- Core-ms: processor time of all cores together, workers included, per image, median. Images/s per core: its inverse,
  what a core gives when it does nothing else; it compares providers that use different numbers of cores.
- Off by: grey levels of 255 between the views of the first batch and those of fastcl's reference function: mean
  (largest). Over {LEVELS:g} in the mean a renderer is not timed. The other libraries draw their own random numbers, and
  the order and colour space of DALI's own colour operators are not torchvision's.
- Over the limit: more than {args.seconds:g} s in one pass. Nothing is extrapolated.
"""


def body(records: Sequence[Record]) -> str:
    """Targets and tables of what has been measured so far."""
    text = f"\n## Targets\n\n{md.target_table(targets(records))}"
    for chosen in grouped(having(records, section="views"), "size").values():
        text += _views(chosen)
    training = having(records, section=waiting.SECTION)
    return text + (_training(training) if training else "")


def rate(r: Record) -> float:
    """Images per second of the median pass."""
    return 1e3 * r["images"] / median(r["samples_ms"])


def targets(records: Sequence[Record]) -> Iterator[md.Target]:
    """Rows of the target table."""

    def on_card(name: str, size: int) -> float | None:
        found = having(records, section="views", provider=name, size=size)
        return next((rate(r) for r in found if r["samples_ms"] and "cuda" in r["versions"]), None)

    fused, where = on_card(TRITON_RENDERER, TRITON_SIZE), f"{TRITON_SIZE} pixels, CUDA"
    what = f"{TRITON_RENDERER}: {TRITON_TARGET:,.0f} images/s, two views of each"
    yield md.goal(what, where, fused, TRITON_TARGET, lambda rate: f"{rate:,.0f}", True)
    dali, decoding = on_card(DALI_RENDERER, DECODER_SIZE), on_card(DECODING, DECODER_SIZE)
    share = f"{100 * dali / decoding:.0f} % of {decoding:,.0f} images/s" if dali and decoding else "not measured"
    yield f"{DALI_RENDERER}: beside its decoder alone", f"{DECODER_SIZE} pixels, CUDA", share, ""


def _views(records: Sequence[Record]) -> str:
    first = records[0]
    size, images, batch = (first[key] for key in ("size", "images", "batch"))
    text = f"\n## {size} x {size} pixels\n\n{images:,} images of {first['source']}; preset {first['preset']!r}, "
    text += f"batches of {batch}.\n\n"
    head = ("provider", "makes", "images/s", "core-ms", "images/s per core", "off by")
    timed = [r for r in records if r["samples_ms"]]
    text += table(head, map(_row, timed)) if timed else "Nothing was measured.\n"
    return text + md.not_measured(records)


def _row(r: Record) -> tuple[str, ...]:
    slow, fast = (1e3 * r["images"] / limit(r["samples_ms"]) for limit in (max, min))
    cores = median(r["cores_ms"]) / r["images"] if r["cores_ms"] else None
    per_core = ("", "") if cores is None else (digits(cores), digits(1e3 / cores) if cores else "")
    mean, largest = r["difference_mean"], r["difference_max"]
    off = "" if mean is None else f"{mean:.3g} ({largest:.3g})"
    makes = "two views" if r["views"] else "no views"
    return r["provider"], makes, f"{digits(rate(r))} ({digits(slow)}-{digits(fast)})", *per_core, off


def _training(records: Sequence[Record]) -> str:
    first = records[0]
    text = f"\n## A training step's wait for its views\n\n{first['model']}, one model, batches of {first['batch']} of "
    text += f"{first['source']}, views of {first['size']} pixels; the second epoch, as timing.jsonl has it.\n"
    rows = [(r["provider"], "two views", digits(r["images_per_second"]), digits(r["seconds"]),
             f"{100 * waiting.share_of(r):.1f} %") for r in records if not r["reason"]]  # fmt: skip
    text += "\n" + table(("renderer", "makes", "images/s", "seconds", "waits for views"), rows) if rows else ""
    return text + md.not_measured(records)
