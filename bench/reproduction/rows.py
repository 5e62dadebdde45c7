"""What the sweeps have measured, as one table: a row for each cell, evaluation, and pair of models or model."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, get_type_hints

from bench.harness.records import write_file
from bench.reproduction.experiments import BATCH_RULE, FAMILIES, Experiment
from fastcl.errors import FastclError, shown
from fastcl.io.files import cause
from fastcl.report.run import PAIR_MEASURES
from fastcl.sweep import load_sweep
from fastcl.sweep.outcomes import FINISHED, Outcome

FILE = "results.csv"
_DIGITS = 6


class Row(NamedTuple):
    """One evaluation of a pair of models, or of one model.

    Attributes:
        experiment: name of the sweep.
        classes, temperature, batch: of the run.
        rule: how its learning rate follows the batch size; "" where that is not swept.
        seed: of the run.
        epoch, step: how long it had trained.
        images: held-out images that were looked at.
        model: the reference, or the model that was evaluated.
        other: what it is compared with; "" for a row of one model.
        cka, cka_debiased, rsa, weight_gap: of the pair.
        ncc: nearest-class-centre accuracy of the model on the held-out images.
    """

    experiment: str
    classes: int
    temperature: float
    batch: int
    rule: str
    seed: int
    epoch: int
    step: int
    images: int
    model: str
    other: str
    cka: float | None
    cka_debiased: float | None
    rsa: float | None
    weight_gap: float | None
    ncc: float | None

    @property
    def run(self) -> tuple[object, ...]:
        """What identifies the run."""
        return self[: self._fields.index("epoch")]


def having(rows: Iterable[Row], **values: object) -> list[Row]:
    """The rows that have these values in their fields."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in values.items())]


def folder_of(results: Path) -> Path:
    """The folder of the committed results, by that of the benchmarks, bench/results."""
    return results.parents[1] / "docs" / "reproduction"


def committed(results: Path) -> list[Row]:
    """The committed rows; none without the file."""
    folder = folder_of(results)
    return read(folder) if (folder / FILE).is_file() else []


def gathered(experiments: Iterable[Experiment], sweeps: Path) -> list[Row]:
    """The rows of all sweeps, in order.

    Raises:
        FastclError: a sweep that is not finished.
    """
    found: list[Row] = []
    for experiment in experiments:
        for cell in load_sweep(sweeps / experiment.name).cells:
            if cell.state != FINISHED:
                raise FastclError(f"{experiment.name}: the run {cell.name} is {cell.state} {cell.error}".rstrip())
            found += _of_cell(experiment, cell)
    return found


def _of_cell(experiment: Experiment, cell: Outcome) -> Iterator[Row]:
    """The pairs of models that the questions are about, and the accuracies at the end."""
    run = cell.run
    assert run is not None
    train, classes = run.config["train"], int(run.data["classes"])
    rule = cell.values.get(BATCH_RULE, "")
    head = (experiment.name, classes, float(train["temperature"]), int(train["batch_size"]), rule, cell.seed)
    pairs = [(run.reference, other) for other in run.models[1:]]
    pairs += [pair for pair in FAMILIES.values() if pair[0] != run.reference and set(pair) <= set(run.models)]
    for epoch in run.epochs:
        when = (epoch, epoch * cell.steps, int(run.data["test"]))
        for pair in pairs:
            measured = run.pairs[pair][epoch]
            yield Row._make([*head, *when, *pair, *(measured[key] for key in PAIR_MEASURES), None])
        if epoch == run.last_epoch:
            for model in run.models:
                accuracy = run.per_model[model][epoch]["ncc_test"]
                yield Row._make([*head, *when, model, "", *(None for _ in PAIR_MEASURES), accuracy])


def write(rows: Iterable[Row], folder: Path) -> None:
    """Write the table into a folder, with six significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows([f"{v:.{_DIGITS}g}" if isinstance(v, float) else v for v in row] for row in rows)
    write_file(folder / FILE, text.getvalue())


def read(folder: Path) -> list[Row]:
    """The table of a folder.

    Raises:
        FastclError: there is none, or what it holds is no such table.
    """
    path = folder / FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = cause(error) if isinstance(error, OSError) else "it is not UTF-8"
        raise FastclError(f"{shown(path)} cannot be read ({why})") from None
    kinds = [kind if kind in (str, int) else float for kind in get_type_hints(Row).values()]
    found = list(csv.reader(lines))
    if not found or tuple(found[0]) != Row._fields:
        raise FastclError(f"{shown(path)}: its columns must be {', '.join(Row._fields)}")
    rows = []
    for number, line in enumerate(found[1:], 2):
        try:
            values = [kind(text) if text or kind is str else None for kind, text in zip(kinds, line, strict=True)]
        except ValueError as error:
            raise FastclError(f"{shown(path)}: line {number}: {error}") from None
        rows.append(Row._make(values))
    return rows
