"""The CKA of all layers of one model with all layers of another: a record for a JSON file, a table, a heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastcl.errors import FastclError
from fastcl.similarity import LayerCKA, pair_stats

_PRINTED = 12  # columns of a table of layers that fit a terminal


def layer_record(a: str, b: str, left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Any]:
    """The debiased linear CKA of each pair of layers, for a JSON file; null where it is undefined, with the reason.

    Args:
        a, b: names of the models.
        left, right: per layer checked (n, d) features of the same samples.
    """
    table: list[list[float | None]] = []
    undefined: dict[str, str] = {}
    for p, x in left.items():
        table.append([])
        for q, y in right.items():
            try:
                table[-1].append(pair_stats(x, y, "linear").cka_debiased)
            except FastclError as error:
                table[-1].append(None)
                undefined[f"{p}, {q}"] = str(error)
    return {
        "a": a, "b": b, "samples": len(next(iter(left.values()))), "layers_a": list(left), "layers_b": list(right),
        "cka_linear_debiased": table, "undefined": undefined,
    }  # fmt: skip


def layer_cka_record(a: str, b: str, found: LayerCKA) -> dict[str, Any]:
    """The result of `layer_cka`, which averages over batches, in the same form."""
    undefined = {f"{name} of {model}": why for model, layers in ((a, found.undefined_a), (b, found.undefined_b))
                 for name, why in layers.items()}  # fmt: skip
    return {
        "a": a, "b": b, "samples": found.samples, "batches": found.batches, "layers_a": list(found.names_a),
        "layers_b": list(found.names_b), "undefined": undefined,
        "cka_linear_debiased": [[None if math.isnan(v) else v for v in row] for row in found.matrix.tolist()],
    }  # fmt: skip


def layer_lines(record: Mapping[str, Any], drawn: bool) -> list[str]:
    """The table of a record with its reasons; `drawn`: there will be a heat map."""
    rows, columns = record["layers_a"], record["layers_b"]
    counts = f"{len(rows)} layers of {record['a']} against {len(columns)} of {record['b']}"
    count = record.get("batches")  # the table is a mean over batches
    batches = f" in {count} batch{'es' if count > 1 else ''}" if count else ""
    lines = [f"debiased linear CKA of {record['samples']} samples{batches}: {counts}"]
    if len(columns) <= _PRINTED:
        lines += matrix_lines(rows, columns, record["cka_linear_debiased"])
    elif not drawn:
        lines.append(f"  more than {_PRINTED} columns: draw the table with --out or write it with --json")
    reasons: dict[str, list[str]] = {}
    for names, reason in record["undefined"].items():
        reasons.setdefault(reason, []).append(names)
    for reason, pairs in list(reasons.items())[:3]:
        more = f" (and {len(pairs) - 1} more pairs)" if len(pairs) > 1 else ""
        lines.append(f"  {pairs[0]}{more}: {reason}")
    if len(reasons) > 3:
        lines.append(f"  and {len(reasons) - 3} more reasons, for {sum(map(len, list(reasons.values())[3:]))} pairs")
    return lines


def draw_layers(record: Mapping[str, Any], out: Path) -> Path:
    """Draw the heat map of a record; returns the file."""
    import numpy as np

    from fastcl.report.heat_maps import LayerTable, write_heat_map

    rows = [[math.nan if value is None else value for value in row] for row in record["cka_linear_debiased"]]
    a, b = (Path(record[model]).name for model in ("a", "b"))
    drawn = LayerTable(a, b, tuple(record["layers_a"]), tuple(record["layers_b"]), np.array(rows))
    return write_heat_map(drawn, out, f"{a} against {b}: debiased linear CKA, {record['samples']:,} samples")


def matrix_lines(rows: Sequence[str], columns: Sequence[str], table: Sequence[Sequence[float | None]]) -> list[str]:
    """A matrix with the names of its rows and columns; "-" for None."""
    widths = [max(7, len(name)) for name in columns]
    first = max(map(len, rows))
    lines = [f"  {'':{first}}  " + "  ".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))]
    for name, values in zip(rows, table, strict=True):
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        shown_cells = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"  {name:{first}}  {shown_cells}")
    return lines
