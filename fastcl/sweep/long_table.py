"""All measured values of a sweep as one table: a row for each cell, epoch, and pair of models or model."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from fastcl.io.files import write_atomic
from fastcl.report.run import CERTIFICATE_MEASURES, MODEL_MEASURES, PAIR_MEASURES
from fastcl.sweep.outcomes import Outcome, Sweep
from fastcl.sweep.sweep_folder import TABLE

_PAIR = tuple(PAIR_MEASURES | CERTIFICATE_MEASURES)
_MODEL = tuple(MODEL_MEASURES)
# Of a cell; `epochs` and `steps_per_epoch` are what was chosen for it. `other` is the second model of a pair.
_WHOLE = ("seed", "epochs", "steps_per_epoch", "test_images", "epoch", "step")
_TEXT = ("cell", "model", "other")


def columns(sweep: Sweep) -> list[str]:
    """The names of the columns: the swept keys have theirs."""
    return ["cell", *sweep.over, *_WHOLE, "model", "other", *_PAIR, *_MODEL]


def rows(sweep: Sweep) -> Iterator[list[Any]]:
    """The rows, in the order of the cells, by epoch; None where a value is undefined or of the other kind of row."""
    for cell in sweep.cells:
        if cell.run is not None:
            yield from _rows_of(cell)


def _rows_of(cell: Outcome) -> Iterator[list[Any]]:
    run = cell.run
    assert run is not None
    known = [run.planned_epochs, cell.steps, run.data["test"]]
    for epoch in run.epochs:
        if epoch > run.last_epoch:  # an evaluation that is being written
            break
        head = [cell.name, *cell.values.values(), cell.seed, *known, epoch, epoch * cell.steps]
        for (a, b), series in run.pairs.items():
            if epoch in series:
                yield [*head, a, b, *(series[epoch][name] for name in _PAIR), *[None] * len(_MODEL)]
        for model, series in run.per_model.items():
            if epoch in series:
                yield [*head, model, None, *[None] * len(_PAIR), *(series[epoch][name] for name in _MODEL)]


def write_table(sweep: Sweep) -> None:
    """Write table.csv into the folder of a sweep, and table.parquet if pyarrow is installed. The same runs give the
    same bytes. Floats have all their digits; what has no value is empty (CSV) or null (Parquet).

    Raises:
        FastclError: a file that cannot be written.
    """
    names, found = columns(sweep), list(rows(sweep))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(found)
    write_atomic(sweep.path / f"{TABLE}.csv", text.getvalue().encode("utf-8", "backslashreplace"))
    if (payload := _parquet(names, found)) is not None:
        write_atomic(sweep.path / f"{TABLE}.parquet", payload)


def _parquet(names: Sequence[str], found: Sequence[Sequence[Any]]) -> bytes | None:
    """The table as Parquet, swept values as numbers where all are; None if pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return None
    measured = {*_PAIR, *_MODEL}
    arrays = {}
    for k, name in enumerate(names):
        values = [row[k] for row in found]
        if name in _WHOLE:
            kind = pyarrow.int64()
        elif name in measured:
            kind = pyarrow.float64()
        elif name not in _TEXT and (numbers := _numbers(values)) is not None:
            values, kind = numbers, pyarrow.float64()
        else:
            kind = pyarrow.string()
        arrays[name] = pyarrow.array(values, kind)
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(arrays), sink)
    return sink.getvalue().to_pybytes()


def _numbers(texts: Sequence[str]) -> list[float] | None:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None
