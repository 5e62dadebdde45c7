"""Repeatability of DALI's views: equal bits for any batch, threads and order, and their difference from the CPU's.

By default DALI decodes a share of each batch on the GPU's JPEG engine; fastcl turns that off. This measures the effect.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench.data import inputs
from bench.harness.command import Command
from bench.harness.markdown import conditions
from bench.harness.records import machine, table, write
from bench.harness.suite import Run
from fastcl.data import Split, ViewPlan, ViewSpec, make_renderer
from fastcl.data.renderers.choose import RendererName, obstacle

LOADS = (0.0, 0.65)  # share of the JPEG engine: fastcl's setting and DALI's default
CASE = inputs.Case(224, "clothing10.zip", ((400, 533), (533, 400)), "simclr", 64, 64)
TINY = inputs.TINY[1]

_DESCRIPTION = """\
Views by DALI with hw_decoder_load at 0, as fastcl has it, and at DALI's default: compared with themselves in batches of
7, by 4 threads and in another order, bit for bit; and with torchvision's, in grey levels of 255. Exit status 1 where
fastcl's own setting changes a bit.
"""


def compared(split: Split, spec: ViewSpec, device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Each comparison's name, and its mean and largest difference in grey levels."""
    positions = np.arange(len(split))
    params = [ViewPlan(spec, 0).draw(0, split.ids, view, split.sizes) for view in (0, 1)]
    levels = 255 * torch.tensor(spec.std, device=device)[:, None, None]

    def views(name: RendererName, threads: int = 1, order: np.ndarray = positions, size: int = len(split)) -> Tensor:
        renderer = make_renderer(name, split, spec, device, threads)
        batches = (order[start : start + size] for start in range(0, len(order), size))
        found = torch.cat([torch.stack(renderer(batch, [p[batch] for p in params]), 1) for batch in batches])
        return found[torch.from_numpy(np.argsort(order)).to(found.device)].to(device)

    whole = views("dali")
    others = {
        "twice": views("dali"),
        "in batches of 7": views("dali", size=7),
        "by 4 threads": views("dali", threads=4),
        "in another order": views("dali", order=positions[::-1].copy()),
        "torchvision's": views("torchvision"),
    }
    for what, other in others.items():
        apart = (whole - other).abs() * levels
        yield what, apart.mean().item(), apart.max().item()


def main(argv: list[str] | None = None) -> int:
    """Compare and write the results; return the exit status."""
    args = Command("data.decoder", [_DESCRIPTION], "data", "tiny").parse(argv)
    device, case = torch.device("cuda" if torch.cuda.is_available() else "cpu"), TINY if args.tiny else CASE
    run = Run("decoder", args, machine(device), str)
    with tempfile.TemporaryDirectory() as scratch:
        images = inputs.read(case, args.data, Path(scratch))
        for load in LOADS:
            fields = {"bench": "decoder", "hw_decoder_load": load, "images": len(images.split), "size": case.size}
            rows = []
            try:
                reason = obstacle("dali", images.split, case.spec, device)
                with mock.patch("fastcl.data.renderers.dali_graph.HW_DECODER_LOAD", load):
                    rows = [] if reason else list(compared(images.split, case.spec, device))
            except Exception as problem:  # go on with the other setting
                reason = run.reason(f"hw_decoder_load {load}", problem)
            run.found += [fields | {"against": what, "mean": a, "max": b, "reason": None} for what, a, b in rows]
            run.found += [fields | {"reason": reason}] if reason else []
            run.failed += [f"not the same {what}" for what, _, b in rows[:-1] if b and not load]
    lines = [
        [f"{r['hw_decoder_load']:g}", *([r["reason"], "", ""] if r["reason"] else
         [r["against"], f"{r['mean']:.3g}", f"{r['max']:.3g}"])] for r in run.found
    ]  # fmt: skip
    text = table(("hw_decoder_load", "the same views", "mean difference", "largest"), lines)
    head = f"# DALI's views again\n\n{conditions(run.facts, args)}\n- {images.name}; {case} pixels.\n\n"
    write(args.out, "decoder", [r | run.facts for r in run.found], head + text)
    print(text)
    return run.status()


if __name__ == "__main__":
    sys.exit(main())
