"""Times that were measured on a card beside those that the cycle model predicts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from bench.gpu.plan import OURS
from bench.harness.records import Record, digits, read, table
from bench.static.predict.assumptions import OPTIMISTIC
from bench.static.predict.report import key
from bench.static.predict.run import committed


def beside(measured: Iterable[Record], predicted: Iterable[Record]) -> list[tuple[str, ...]]:
    """A row for each pass of ours that was both measured on a GPU and predicted: loss, precision, D, N, pass, predicted
    ms, measured ms, their ratio, and whether that is what the model is trusted to."""
    model = {key(one): one["predicted_ms"] for one in predicted}
    low, high = OPTIMISTIC
    rows = []
    for one in measured:
        if one["provider"] not in OURS or one.get("gpu_ms") is None or key(one) not in model:
            continue
        expected = model[key(one)]
        ratio = one["gpu_ms"] / expected
        verdict = "" if low <= ratio <= high else "faster than predicted" if ratio < low else "slower than predicted"
        case = one["objective"], one["precision"], str(one["d"]), f"{one['n']:,}", one["pass"]
        rows.append((*case, digits(expected), digits(one["gpu_ms"]), f"{ratio:.2f}", verdict))
    return rows


def section(out: Path) -> str:
    """Markdown that compares the records of bench.losses under `out` with the committed predictions for this card;
    empty if there is nothing to compare."""
    measured = read(*sorted(out.glob("*/losses.json")))
    if not measured or not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    model = committed(10 * major + minor)
    rows = beside(measured, model)
    if not rows:
        return ""
    head = ("loss", "precision", "D", "N", "pass", "predicted ms", "measured ms", "measured / predicted", "")
    low, high = OPTIMISTIC
    versions = ", ".join(sorted({one["triton"] for one in model}))
    return (
        f"\n## Predicted and measured\n\nGPU time; predicted for code of Triton {versions}. The model is trusted to "
        f"{low:.1f} to {high:.2f} times its own time; where a pass is outside, it errs.\n\n{table(head, rows)}"
    )
