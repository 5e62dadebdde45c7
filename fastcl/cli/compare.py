"""`fastcl compare`: a run's alignment beside the curves of arXiv 2510.08852."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from fastcl.errors import FastclError, shown
from fastcl.io.files import write_atomic
from fastcl.io.outputs import check_output
from fastcl.io.run_names import FILES, FOLDERS
from fastcl.paper import Comparison, Row, compare, targets
from fastcl.paper.beside import WITHIN
from fastcl.paper.published import MEASURES

_WIDTH = 118
_MOST = 40  # evaluated epochs in a table; of more, those that are published


def compare_run(args: argparse.Namespace) -> None:
    """Print the comparison that the command asks for and write its files, or list the published runs.

    Raises:
        FastclError: no run, one that cannot be compared (`fastcl.paper.compare`), or an output that cannot be written
            or would replace a file of the run, which is checked before anything is read.
    """
    if args.list:
        print("\n".join(_listing()))
        return
    if args.run is None:
        raise FastclError("compare needs the folder of a run; --list shows what there is to compare with")
    _check_outputs(args.run, args.out, args.json)
    sides = compare(args.run, args.target)
    lines = _lines(sides)
    try:
        if args.json is not None:
            record = {"run": shown(args.run), **sides.record()}
            write_atomic(args.json, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
        if args.out is not None:
            from fastcl.paper.comparison_figure import write_figure

            lines.append(f"figure: {shown(write_figure(sides, args.out))}")
    finally:  # print the numbers even if the disk is full
        print("\n".join(lines))


def _check_outputs(run: Path, out: Path | None, json_file: Path | None) -> None:
    inputs = [run / name for name in (*FILES, *FOLDERS)]
    if json_file is not None:
        check_output(json_file, "--json", inputs)
    if out is not None:
        from fastcl.paper.comparison_figure import check_figure_ending

        check_figure_ending(out)
        check_output(out, "--out", [*inputs, *([json_file] if json_file else [])])


def _listing() -> list[str]:
    found = targets()
    width = max(map(len, found))
    return [f"{name:{width}}  {target.summary()}" for name, target in found.items()]


def _lines(sides: Comparison) -> list[str]:
    run, target = sides.run, sides.target
    state = "finished" if run.finished else f"{run.last_epoch} of {run.planned_epochs} epochs"
    lines = _wrapped(f"{shown(run.path)} ({state}) beside {target.name}, {target.summary()}") + _wrapped(sides.basis())
    for measure, title in MEASURES.items():
        rows = [row for row in sides.rows if row.measure == measure]
        if rows:
            lines += ["", f"{title} with {sides.cl}", *_table(sides, rows)]
    lines += ["", "Where this run differs from the published one:"]
    for one in sides.differences:
        lines += _wrapped(f"- {one.what}: {one.ours}; published: {one.published}", "  ")
    if target.remarks:
        lines += ["", "What is doubtful about the published numbers:"]
        for text in target.remarks:
            lines += _wrapped(f"- {text}", "  ")
    count = len(sides.differences)
    return [*lines, "", f"With {count} differences this is a comparison with the paper, not a reproduction of it."]


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _table(sides: Comparison, rows: list[Row]) -> list[str]:
    """One line for each epoch with four columns for each model, then how many values are in the band."""
    models = list(dict.fromkeys(row.model for row in rows))
    by = {(row.model, row.epoch): row for row in rows}
    epochs = sorted({row.epoch for row in rows})
    shortened = _shortened(rows, epochs)
    names = "".join(f"  | {sides.models[model]:33}" for model in models)
    columns = "".join(f"  |{'ours':>10} {'paper':>7} {'diff':>7} {'band':>7}" for _ in models)
    lines = [f"  {'':>5}{names}".rstrip(), f"  {'epoch':>5}{columns}"]
    for epoch in shortened:
        cells = "".join(f"  |{_cells(by.get((model, epoch)))}" for model in models)
        lines.append(f"  {epoch:>5}{cells}".rstrip())
    if len(shortened) < len(epochs):
        lines.append(f"  and {len(epochs) - len(shortened)} more evaluated epochs: --json has all")
    if any(by[model, epoch].interpolated for model in models for epoch in shortened if (model, epoch) in by):
        lines.append("  ~ interpolated between two published epochs")
    for model in models:
        judged = [row for row in rows if row.model == model and row.place and row.epoch and not row.interpolated]
        within = sum(row.place == WITHIN for row in judged)
        text = f"within the band at {within} of {len(judged)}" if judged else "not evaluated at any"
        lines.append(f"  {sides.models[model]}: {text} published epochs after epoch 0")
    return lines


def _shortened(rows: list[Row], epochs: list[int]) -> list[int]:
    if len(epochs) <= _MOST:
        return epochs
    published = {row.epoch for row in rows if row.paper is not None and not row.interpolated}
    return [epoch for epoch in epochs if epoch in published or epoch == epochs[-1]]


def _cells(row: Row | None) -> str:
    if row is None:
        return f"{'-':>10}{'':24}"
    ours = "undefined" if row.ours is None else f"{row.ours:.4f}"
    if row.paper is None:
        return f"{ours:>10}{'not published':>24}"
    paper = f"{'~' if row.interpolated else ''}{row.paper:.4f}"
    difference = "" if row.difference is None else f"{row.difference:+.4f}"
    return f"{ours:>10} {paper:>7} {difference:>7} {row.place or '':>7}"
