"""`fastcl align`: all measures for two feature files in one table, or the CKA of all pairs of layers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastcl.cli.feature_files import feature_files, read_features, read_layers
from fastcl.errors import FastclError, shown
from fastcl.io.arrays import ENDINGS
from fastcl.io.files import write_atomic
from fastcl.io.outputs import check_output
from fastcl.similarity import PairStats, SpearmanResult, pair_stats, spearman_rsa
from fastcl.similarity.sums.features import checked

_PRINTED = 12  # columns of a table of layers that fit a terminal

# name in the JSON file -> label in the table, kernel, property of its PairStats
_MEASURES = {
    "cka_linear": ("linear CKA, biased", "linear", "cka"),
    "cka_linear_debiased": ("linear CKA, debiased", "linear", "cka_debiased"),
    "cka_cosine": ("cosine CKA, biased", "cosine", "cka"),
    "cka_cosine_debiased": ("cosine CKA, debiased", "cosine", "cka_debiased"),
    "rsa_cosine": ("RSA, cosine, Pearson", "cosine", "rsa"),
    "rsa_correlation": ("RSA, correlation, Pearson", "correlation", "rsa"),
    "drift": ("drift |K - L|, cosine", "cosine", "drift"),
    "rho": ("rho, relative drift, centred", "cosine", "rho"),
    "cka_bound": ("  CKA >= (1 - rho) / (1 + rho)", "cosine", "cka_bound"),
    "cka_bound_tight": ("  CKA >= sqrt(1 - rho^2)", "cosine", "cka_bound_tight"),
    "r": ("r, relative drift of pairs", "cosine", "r"),
    "rsa_bound": ("  RSA >= (1 - r) / (1 + r)", "cosine", "rsa_bound"),
    "rsa_bound_tight": ("  RSA >= sqrt(1 - r^2)", "cosine", "rsa_bound_tight"),
}


def align(a: Path, b: Path, json_file: Path | None = None, out: Path | None = None, spearman: bool = False) -> None:
    """Print how two models' features of the same samples align; undefined measures are shown with the reason.

    Args:
        a: the first model: a feature file (see `read_features`) or its layers (see `read_layers`).
        b: the same for the second model.
        json_file: file for the same numbers at full precision, null where undefined.
        out: .svg or .png, for the heat map of the layers.
        spearman: also rank all pairs of samples, O(n^2 d + n^2 log n): half a minute at 8,192 samples on a CPU.

    The files are written before anything is printed.

    Raises:
        FastclError: files that cannot be read, hold values that are not finite or differ in the number of samples; one
            matrix against layers; `out` without layers or `spearman` with them; an output that cannot be written or
            would replace an input, which is checked before anything is computed.
    """
    _check_outputs(a, b, json_file, out)
    layers_a, layers_b = read_layers(a), read_layers(b)
    heat_map = None
    if layers_a is not None and layers_b is not None:
        if spearman:
            raise FastclError("--spearman compares two matrices, not layers")
        record, lines = _layers(a, b, layers_a, layers_b, out)
        heat_map = out
    elif layers_a is not None or layers_b is not None:
        several, one = (a, b) if layers_a is not None else (b, a)
        raise FastclError(
            f"{shown(several)} contains layers, {shown(one)} only one matrix; name the matrix to compare 'features'"
        )
    elif out is not None:
        raise FastclError(f"--out draws layers, but {shown(a)} and {shown(b)} contain one matrix each")
    else:
        record, lines = _features(a, b, spearman)
    try:
        if json_file is not None:
            write_atomic(json_file, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
        if heat_map is not None:
            lines.append(f"heat map: {shown(_draw(a, b, record, heat_map))}")
    finally:  # print the numbers even if the disk is full
        print("\n".join(lines))


def _check_outputs(a: Path, b: Path, json_file: Path | None, out: Path | None) -> None:
    if out is not None:
        from fastcl.report.heat_maps import check_ending

        check_ending(out)
    inputs = [*feature_files(a), *feature_files(b)]
    if json_file is not None:
        check_output(json_file, "--json", inputs)
        if json_file.suffix.lower() in ENDINGS:
            raise FastclError(f"--json: {shown(json_file)} looks like a feature file; use the ending .json")
    if out is not None:
        check_output(out, "--out", [*inputs, *([json_file] if json_file else [])])


def _features(a: Path, b: Path, spearman: bool) -> tuple[dict[str, Any], list[str]]:
    """The record for the JSON file, and the lines to print."""
    x, y = read_features(a), read_features(b)
    _check_rows(a, b, x, y)
    lines = [f"{shown(a)} {tuple(x.shape)} against {shown(b)} {tuple(y.shape)}"]
    names = [*_MEASURES, *(["rsa_spearman", "rsa_spearman_error"] if spearman else [])]
    values: dict[str, float | None] = dict.fromkeys(names)
    undefined: dict[str, str] = {}

    def show(name: str, label: str, measure: Callable[[], float | SpearmanResult]) -> None:
        try:
            value, note = measure(), ""
        except FastclError as error:  # one undefined measure must not hide the others
            undefined[name], text = str(error), f" {error}"
        else:
            if isinstance(value, SpearmanResult):
                values[f"{name}_error"] = value.error
                note = " (exact)" if value.bins is None else f" (within {value.error:.1e}: {value.bins:,} bins)"
            values[name] = float(value)
            text = f"{values[name]:10.6f}{note}"
        lines.append(f"  {label:30}{text}")

    stats = {kernel: _stats(x, y, kernel) for kernel in ("linear", "cosine", "correlation")}
    for name, (label, kernel, measure) in _MEASURES.items():
        show(name, label, partial(_measure, stats[kernel], measure))
    if spearman:
        show("rsa_spearman", "RSA, cosine, Spearman", partial(spearman_rsa, x, y))
    return {"a": shown(a), "b": shown(b), "samples": len(x), "measures": values, "undefined": undefined}, lines


def _stats(x: Tensor, y: Tensor, kernel: str) -> PairStats | FastclError:
    """The statistics or the error: sums that overflow must not hide the other kernels."""
    try:
        return pair_stats(x, y, kernel)
    except FastclError as error:
        return error


def _measure(stats: PairStats | FastclError, name: str) -> float:
    if isinstance(stats, FastclError):
        raise stats
    return getattr(stats, name)


def _layers(
    a: Path, b: Path, left: dict[str, Tensor], right: dict[str, Tensor], out: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """The record for the JSON file, and the lines to print."""
    for name, x in left.items():
        checked({f"{shown(a)}: {name}": x})
    for name, y in right.items():
        checked({f"{shown(b)}: {name}": y})
    _check_rows(a, b, next(iter(left.values())), next(iter(right.values())))
    samples = len(next(iter(left.values())))
    counts = f"{len(left)} layers of {shown(a)} against {len(right)} of {shown(b)}"
    lines = [f"debiased linear CKA of {samples} samples: {counts}"]
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
    if len(right) <= _PRINTED:
        lines += _table(list(left), list(right), table)
    elif out is None:
        lines.append(f"  more than {_PRINTED} columns: draw the table with --out or write it with --json")
    reasons: dict[str, list[str]] = {}
    for names, reason in undefined.items():
        reasons.setdefault(reason, []).append(names)
    for reason, pairs in list(reasons.items())[:3]:
        more = f" (and {len(pairs) - 1} more pairs)" if len(pairs) > 1 else ""
        lines.append(f"  {pairs[0]}{more}: {reason}")
    if len(reasons) > 3:
        lines.append(f"  and {len(reasons) - 3} more reasons, for {sum(map(len, list(reasons.values())[3:]))} pairs")
    return {
        "a": shown(a), "b": shown(b), "samples": samples, "layers_a": list(left), "layers_b": list(right),
        "cka_linear_debiased": table, "undefined": undefined,
    }, lines  # fmt: skip


def _draw(a: Path, b: Path, record: dict[str, Any], out: Path) -> Path:
    import numpy as np

    from fastcl.report.heat_maps import LayerTable, write_heat_map

    rows = [[math.nan if value is None else value for value in row] for row in record["cka_linear_debiased"]]
    names = shown(a.name), shown(b.name)
    drawn = LayerTable(*names, tuple(record["layers_a"]), tuple(record["layers_b"]), np.array(rows))
    title = f"{names[0]} against {names[1]}: debiased linear CKA, {record['samples']:,} samples"
    return write_heat_map(drawn, out, title)


def _table(rows: list[str], columns: list[str], table: list[list[float | None]]) -> list[str]:
    widths = [max(7, len(name)) for name in columns]
    first = max(map(len, rows))
    lines = [f"  {'':{first}}  " + "  ".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))]
    for name, values in zip(rows, table, strict=True):
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        shown_cells = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"  {name:{first}}  {shown_cells}")
    return lines


def _check_rows(a: Path, b: Path, x: Tensor, y: Tensor) -> None:
    checked({shown(a): x})
    checked({shown(b): y})
    if len(x) != len(y):
        raise FastclError(
            f"row k of both files must be the same sample: {shown(a)} has {len(x)} rows, {shown(b)} has {len(y)}"
        )
