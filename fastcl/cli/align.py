"""`fastcl align A B`: all similarities of two feature files in one table, or the CKA of all pairs of layers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from fastcl.cli.feature_files import feature_files, read_features, read_layers
from fastcl.cli.layer_similarity import draw_layers, layer_lines, layer_record
from fastcl.cli.similarity_table import Wanted, similarity_table
from fastcl.errors import FastclError, shown
from fastcl.io.arrays import ENDINGS
from fastcl.io.files import write_atomic
from fastcl.io.outputs import check_output
from fastcl.similarity.sums.features import checked


def align(a: Path, b: Path, wanted: Wanted, json_file: Path | None = None, out: Path | None = None) -> None:
    """Print how two models' features of the same samples align; undefined measures are shown with the reason.

    Args:
        a: the first model: a feature file (see `read_features`) or its layers (see `read_layers`).
        b: the same for the second model.
        wanted: what is shown beside the values.
        json_file: file for the same numbers at full precision, null where undefined.
        out: .svg or .png, for the heat map of the layers.

    The files are written before anything is printed.

    Raises:
        FastclError: files that cannot be read, hold values that are not finite or differ in the number of samples; one
            matrix against layers; `out` without layers, or with them what only two matrices have; an output that cannot
            be written or would replace an input, which is checked before anything is computed.
    """
    check_outputs([*feature_files(a), *feature_files(b)], json_file, out)
    layers_a, layers_b = read_layers(a), read_layers(b)
    if layers_a is not None and layers_b is not None:
        check_for_layers(wanted)
        _check_layers(a, b, layers_a, layers_b)
        record = layer_record(shown(a), shown(b), layers_a, layers_b)
        conclude(record, layer_lines(record, drawn=out is not None), json_file, out)
        return
    if layers_a is not None or layers_b is not None:
        several, one = (a, b) if layers_a is not None else (b, a)
        raise FastclError(
            f"{shown(several)} contains layers, {shown(one)} only one matrix; name the matrix to compare 'features'"
        )
    if out is not None:
        raise FastclError(f"--out draws layers, but {shown(a)} and {shown(b)} contain one matrix each")
    x, y = read_features(a), read_features(b)
    _check_rows(a, b, x, y)
    record, lines = similarity_table(x, y, wanted)
    heading = f"{shown(a)} {tuple(x.shape)} against {shown(b)} {tuple(y.shape)}"
    conclude({"a": shown(a), "b": shown(b)} | record, [heading, *lines], json_file)


def check_files(args: Any) -> None:
    """Refuse arguments of `fastcl align` that two feature files do not go with. Raises FastclError."""
    if args.a is None or args.b is None:
        raise FastclError("align compares two feature files, A and B, or models by name: --models A,B --data SOURCE")
    given = {"--root": args.root, "--samples": args.samples, "--layers": args.layers, "--pretrained": args.pretrained}
    for option, value in given.items():
        if value not in (None, False):
            raise FastclError(f"{option} goes with --models, but {shown(args.a)} and {shown(args.b)} are files")


def check_outputs(inputs: Iterable[Path], json_file: Path | None, out: Path | None) -> None:
    """Refuse outputs that cannot be written or would replace an input. Raises FastclError."""
    if out is not None:
        from fastcl.report.heat_maps import check_ending

        check_ending(out)
    inputs = list(inputs)
    if json_file is not None:
        check_output(json_file, "--json", inputs)
        if json_file.suffix.lower() in ENDINGS:
            raise FastclError(f"--json: {shown(json_file)} looks like a feature file; use the ending .json")
    if out is not None:
        check_output(out, "--out", [*inputs, *([json_file] if json_file else [])])


def check_for_layers(wanted: Wanted) -> None:
    """Refuse what a table of layers does not have. Raises FastclError."""
    asked = {"--spearman": wanted.spearman, "--permutations": wanted.permutations, "--bootstrap": wanted.bootstrap}
    for option, value in asked.items():
        if value:
            raise FastclError(f"{option} compares two matrices, not layers")


def conclude(record: dict[str, Any], lines: list[str], json_file: Path | None, out: Path | None = None) -> None:
    """Write the record and, with `out`, draw the layers in it; then print the lines, which are not lost if the disk is
    full."""
    try:
        if json_file is not None:
            write_atomic(json_file, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
        if out is not None:
            lines.append(f"heat map: {shown(draw_layers(record, out))}")
    finally:
        print("\n".join(lines))


def _check_layers(a: Path, b: Path, left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for path, layers in ((a, left), (b, right)):
        for name, x in layers.items():
            checked({f"{shown(path)}: {name}": x})
    _check_rows(a, b, next(iter(left.values())), next(iter(right.values())))


def _check_rows(a: Path, b: Path, x: Tensor, y: Tensor) -> None:
    checked({shown(a): x})
    checked({shown(b): y})
    if len(x) != len(y):
        raise FastclError(
            f"row k of both files must be the same sample: {shown(a)} has {len(x)} rows, {shown(b)} has {len(y)}"
        )
