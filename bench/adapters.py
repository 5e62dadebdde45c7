"""Losses of other libraries beside the same losses patched by fastcl, on a CPU: where `fastcl.patch` starts to pay.

The last table is what `FEWEST` of fastcl/adapters/payoff.py should be: by kind of loss, the number of rows from
which fastcl was never slower, forward and backward pass together.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastcl
from bench.harness.clocks import MIN_ROUNDS, QUICK, Sample, time_passes
from bench.harness.command import Command
from bench.harness.records import Record, digits, grouped, machine, milliseconds, table, write
from fastcl.adapters import payoff
from fastcl.adapters.targets import DISTRIBUTIONS
from fastcl.errors import FastclError

ROWS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUEUE = 16384
MOST = {"classes": 256}  # rows above which the original takes gigabytes: it has a row of negatives for each pair
WARM, TIMED = 20, 10  # calls of a block, if they are quick


def _classes(loss: Any, a: Tensor, b: Tensor) -> Tensor:
    return loss(torch.cat([a, b]), torch.arange(len(a), dtype=torch.int64, device=a.device).repeat(2))


def _made(module: str, name: str, *options: Any) -> Any:
    return getattr(importlib.import_module(module), name)(*options)


def _in_batch(width: int) -> Callable[[Tensor, Tensor], Tensor]:
    """With a set of further negatives, which is the form that takes most rows to pay."""
    module = "sentence_transformers.sentence_transformer.losses"
    loss = _made(module, "MultipleNegativesRankingLoss", torch.nn.Identity())
    return lambda a, b: loss.compute_loss_from_embeddings([a, b, b.roll(1, 0)], None)


# By kind of loss: library, and the original's loss of two sets of rows of this width.
CASES: dict[str, tuple[str, Callable[[int], Callable[[Tensor, Tensor], Tensor]]]] = {
    "two views": ("lightly", lambda d: _made("lightly.loss.ntx_ent_loss", "NTXentLoss")),
    "queue": ("lightly", lambda d: _made("lightly.loss.ntx_ent_loss", "NTXentLoss", 0.1, (QUEUE, d))),
    "two directions": ("open_clip", lambda d: lambda a, b: _made("open_clip.loss", "ClipLoss")(a, b, 20.0)),
    "all pairs": ("open_clip", lambda d: lambda a, b: _made("open_clip.loss", "SigLipLoss")(a, b, 10.0, -10.0)),
    "in batch": ("sentence_transformers", _in_batch),
    "one direction": ("info_nce", lambda d: _made("info_nce", "InfoNCE")),
    "classes": ("pytorch_metric_learning",
                lambda d: partial(_classes, _made("pytorch_metric_learning.losses", "NTXentLoss"))),
    "peers": ("pytorch_metric_learning",
              lambda d: partial(_classes, _made("pytorch_metric_learning.losses", "SupConLoss"))),
}  # fmt: skip


def measured(kind: str, rows: int, width: int, repeats: int, seconds: float) -> dict[str, list[Sample]]:
    """Samples of both passes together: of the original, and of fastcl in its place.

    The two take turns in blocks of calls: to patch at every call would time an interpreter that has to learn the
    patched code again.
    """
    library, make = CASES[kind]
    generator = torch.Generator().manual_seed(rows)
    a, b = torch.nn.functional.normalize(torch.randn(2, rows, width, generator=generator), dim=2)
    leaf = a.requires_grad_()
    call = partial(make(width), leaf, b)
    found: dict[str, list[Sample]] = {"original": [], "fastcl": []}
    began = perf_counter()
    with mock.patch.object(payoff, "FEWEST", dict.fromkeys(payoff.FEWEST, 0)):
        for k in range(repeats):
            if k >= MIN_ROUNDS and perf_counter() - began > seconds * len(found):
                break
            found["original"] += _block(call, leaf)
            with fastcl.patch(library):
                found["fastcl"] += _block(call, leaf)
    return found


def _block(call: Callable[[], Tensor], leaf: Tensor) -> list[Sample]:
    """The times of a call after untimed ones, if it is quick of several."""
    first, second = (time_passes(call, leaf)["both"] for _ in range(2))
    if first.ms >= QUICK:
        return [second]
    return [time_passes(call, leaf)["both"] for _ in range(WARM + TIMED)][WARM:]


def fewest(records: Sequence[Record], kind: str) -> int | None:
    """The number of rows from which fastcl was never slower; None if it was at the largest size."""
    found = None
    for record in sorted((r for r in records if r["kind"] == kind), key=lambda r: -r["rows"]):
        if record["ratio"] < 1:
            break
        found = record["rows"]
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure and write the results, beside those of other kinds that are there; return the exit status."""
    parser = Command("adapters", [__doc__ or ""], "repeats", "seconds", repeats=30, seconds=5)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="N", help="default: %(default)s")
    parser.add_argument("--width", type=int, default=128, metavar="D", help="default: %(default)s")
    parser.add_names("--kinds", tuple(CASES))
    args = parser.parse(argv)
    libraries = [DISTRIBUTIONS[CASES[kind][0]] for kind in args.kinds]
    facts = machine(torch.device("cpu"), libraries)
    file = args.out / "adapters.json"
    earlier: list[Record] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    records = [record for record in earlier if record["kind"] not in args.kinds]
    for kind in args.kinds:
        for rows in (n for n in args.rows if n <= MOST.get(kind, n)):
            try:
                times = measured(kind, rows, args.width, args.repeats, args.seconds)
            except FastclError as error:  # the library is not installed
                print(f"{kind}: {error}")
                break
            walls = {name: [sample.ms for sample in samples] for name, samples in times.items()}
            ratio = median(walls["original"]) / median(walls["fastcl"])
            records.append({"bench": "adapters", "kind": kind, "rows": rows, "d": args.width, "ms": walls,
                            "ratio": ratio} | facts)  # fmt: skip
            print(f"{kind}, {rows} rows: {digits(ratio)} times as fast as {CASES[kind][0]}")
    lines = [(r["kind"], str(r["rows"]), *map(milliseconds, r["ms"].values()), digits(r["ratio"])) for r in records]
    found = grouped(records, "device", "date", "d", "kind")
    conditions = [f"- {kind}: {device}, {date}, {d} columns\n" for device, date, d, kind in found]
    limits = [(kind, str(fewest(records, kind))) for *_, kind in found]
    text = (
        f"# Patched losses on a CPU\n\nms, both passes\n\n{''.join(conditions)}\n"
        + table(("kind", "rows", "original", "fastcl", "times as fast"), lines)
        + "\n"
        + table(("kind", "fewest rows"), limits, 1)
    )
    write(args.out, "adapters", records, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
