"""The page of a sweep: its grid, figures and final numbers in one HTML file that loads nothing else."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fastcl.errors import shown
from fastcl.io.files import write_atomic
from fastcl.io.outputs import check_output
from fastcl.report.drawing import inline_svg, label
from fastcl.report.html import Table, identity_control, number, outline, rendered
from fastcl.report.run import IDENTITY, PAIR_MEASURES, known
from fastcl.sweep.long_table import write_table
from fastcl.sweep.outcomes import BROKEN, FINISHED, Outcome, Sweep, load_sweep
from fastcl.sweep.sweep_figures import final_values, pictures
from fastcl.sweep.sweep_folder import OTHERS, PAGE

_ACCURACY = "ncc_test"


def write_sweep_report(sweep_dir: Path, out: Path | None = None) -> Path:
    """Write the table and the page of a sweep, finished or not, from its folder alone.

    Args:
        sweep_dir: the folder of a sweep.
        out: the page; None: sweep.html in the folder.

    Returns:
        The page. The table is always in the folder. The same runs give the same bytes.

    Raises:
        FastclError: the folder holds no sweep, or a file cannot be written.
    """
    out = sweep_dir / PAGE if out is None else out
    sweep = load_sweep(sweep_dir)
    check_output(out, "--out", [sweep_dir / name for name in OTHERS])
    write_table(sweep)
    write_atomic(out, _page(sweep))
    return out


def _page(sweep: Sweep) -> bytes:
    states = Counter(cell.state for cell in sweep.cells)
    by = f" by {' and '.join(sweep.over)}" if sweep.over else " over seeds"
    source = sweep.config.get("data", {}).get("source", shown(sweep.path.name))
    failed = {cell.run.path.name if cell.run else cell.name: cell for cell in sweep.cells if cell.state == BROKEN}
    return rendered(
        "sweep.html.j2",
        "fastcl.sweep",
        title=f"fastcl sweep: {source}{by}",
        warning=_warning(states, len(sweep.cells)),
        guide=_guide(sweep),
        key_numbers={
            "cells": str(len(sweep.cells)),
            **{state: str(count) for state, count in states.items()},
            "seeds": str(len(sweep.seeds)),
            **_identity(sweep),
        },
        grid=Table(["key", "values"], _grid(sweep), "text"),
        failed=Table(["cell", "last error"], [[name, cell.error] for name, cell in failed.items()], "text"),
        figures=[
            {"title": one.title, "caption": one.caption, "svg": inline_svg(one.name, one.title, one.draw)}
            for one in pictures(sweep)
        ],
        finals=_finals(sweep),
        cells=Table(
            ["cell", "state", "epochs", "steps of an epoch", "steps", "peak learning rate", "held-out images"],
            [_cell(cell) for cell in sweep.cells],
        ),
        config=Table(["setting", "value"], outline(dict(sweep.config)), "text"),
    )


def _warning(states: Counter[str], count: int) -> str:
    if states[FINISHED] == count:
        return ""
    told = ", ".join(f"{some} {state}" for state, some in states.items())
    return f"Incomplete sweep: of {count} cells {told}. Final numbers are those of the finished ones."


def _identity(sweep: Sweep) -> dict[str, str]:
    """Whether the identity twin equalled its reference in every run."""
    told = [identity_control(run) for run in sweep.runs if IDENTITY in run.models]
    broken = sum(text.startswith("BROKEN") for text in told)
    return {"identity control": f"BROKEN in {broken}" if broken else "holds"} if told else {}


def _guide(sweep: Sweep) -> str:
    equal = {
        "epochs": "Each cell takes the epochs of its config, so cells with other batch sizes or other data take other "
        "numbers of optimiser steps. ",
        "steps": "The epochs of each cell were chosen so that all take about as many optimiser steps as the config "
        "itself; warm-up and evaluations moved along. ",
    }
    images = (
        f"All cells are evaluated on {sweep.test_images} held-out images, as many as the cell with the fewest has. "
        if sweep.test_images is not None
        else "The config says on how many held-out images each cell is evaluated. "
    )
    others = sorted({run.reference for run in sweep.runs} - {sweep.reference})
    foreign = f" Runs whose reference is {' or '.join(others)} are in table.csv alone." if others else ""
    return (
        "Each cell is a run of its own: several copies of one network trained side by side from the same initial "
        f"weights on the same views; only the loss differs. {equal.get(sweep.equal, '')}{images}"
        "The seed changes the initial weights, the views, the batches and every random split, the choice of classes "
        f"among them.{foreign}"
    )


def _grid(sweep: Sweep) -> list[list[str]]:
    rows = [[key, ", ".join(values)] for key, values in sweep.over.items()]
    return [*rows, ["train.seed", ", ".join(map(str, sweep.seeds))], ["equal in all cells", sweep.equal]]


def _finals(sweep: Sweep) -> Table:
    """Mean and standard deviation of the final values, a row for each combination of values and each model."""
    head = [*sweep.over, "model", "runs", *PAIR_MEASURES.values(), "test accuracy"]
    rows = []
    for cells in sweep.groups:
        done = [cell for cell in cells if cell.state == FINISHED]
        for model in (sweep.reference, *sweep.compared) if done else ():
            pairs = [final_values(sweep, cells, model, measure) for measure in PAIR_MEASURES]
            runs = [cell.run for cell in done if cell.run is not None and model in cell.run.models]
            scores = [run.model_value(model, _ACCURACY) for run in runs]
            spreads = [*(spread.values if spread else () for spread in pairs), [s for s in scores if known(s)]]
            values = [_mean(values) for values in spreads]
            rows.append([*cells[0].values.values(), label(sweep, model), str(len(runs)), *values])
    return Table(head, rows)


def _mean(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return number(None)
    mean = number(statistics.fmean(found))
    return mean if len(found) == 1 else f"{mean} ± {number(statistics.stdev(found))}"


def _cell(cell: Outcome) -> list[str]:
    run = cell.run
    if run is None:
        return [cell.name, cell.state, *["–"] * 5]
    rate = run.config["optim"]["lr"]
    steps = cell.steps * run.planned_epochs
    return [
        cell.name, cell.state, f"{run.last_epoch} of {run.planned_epochs}", f"{cell.steps:,}", f"{steps:,}",
        f"{rate:.6g}", f"{run.data['test']:,}",
    ]  # fmt: skip
