"""The figures of a sweep, in the manner of those of arXiv 2510.08852, with seeds as bands."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fastcl.report.drawing import (
    COLOURS,
    FLOOR_BAND,
    MARKERS,
    REFERENCE_COLOUR,
    count_axis,
    finish,
    frames,
    label,
    look,
)
from fastcl.report.run import PAIR_MEASURES, RESEEDED, Run, known
from fastcl.sweep.grid import shortened
from fastcl.sweep.outcomes import FINISHED, Outcome, Sweep

MOST_ROWS = 6  # of panels in a figure
MOST_FIGURES = 4  # of curves for one key
_SLOWEST = "A line ends where the slowest of its begun runs is. "
_UNITS = {"weight_gap": "relative distance (0 = same)"}
_SPREAD: dict[str, Any] = {"alpha": 0.18, "linewidth": 0}
_FLOOR: dict[str, Any] = dict(FLOOR_BAND)


@dataclass(frozen=True)
class Picture:
    """A figure of a sweep's page.

    Attributes:
        name: unique in the page.
        title, caption: in words.
        draw: makes it.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Spread:
    """The values of several seeds at one point."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return math.fsum(self.values) / len(self.values)


def pictures(sweep: Sweep) -> Iterator[Picture]:
    """All figures of a sweep; none if no run has measured two models."""
    if not any(run.pairs for run in sweep.runs):
        return
    yield _over_epochs(sweep)
    for key, values in sweep.over.items():
        if len(values) > 1:
            yield _final(sweep, key)
            yield from _by_value(sweep, key)


def final_values(sweep: Sweep, cells: Sequence[Outcome], model: str, measure: str) -> Spread | None:
    """A measure of a model with the reference at the end of the finished runs of some cells; None if no run has it."""
    runs = _runs(sweep, [cell for cell in cells if cell.state == FINISHED], model)
    return _spread([run.pair_value(run.reference, model, measure) for run in runs])


def _told(values: Mapping[str, str]) -> str:
    """Swept values in words: "batch_size = 64, lr_rule = sqrt"; "" if there are none."""
    return ", ".join(f"{key} = {value}" for key, value in shortened(values).items())


def _runs(sweep: Sweep, cells: Sequence[Outcome], model: str) -> list[Run]:
    """The runs of some cells that compare a model with the sweep's reference."""
    runs = [cell.run for cell in cells if cell.run is not None]
    return [run for run in runs if model in run.models and run.reference == sweep.reference]


def _spread(values: Sequence[float | None]) -> Spread | None:
    found = tuple(value for value in values if value is not None and known(value))
    return Spread(found) if found else None


def _series(sweep: Sweep, cells: Sequence[Outcome], model: str, measure: str) -> dict[float, Spread]:
    """A measure of a model with the reference at every point that all begun runs of some cells have reached."""
    series = [run.pair_series(run.reference, model) for run in _runs(sweep, cells, model)]
    epochs = sorted(set(series[0]).intersection(*series[1:])) if series else []
    scale = next((_scale(sweep, cell) for cell in cells if cell.run is not None), 1)
    found = {epoch * scale: _spread([one[epoch][measure] for one in series]) for epoch in epochs}
    return {x: spread for x, spread in found.items() if spread is not None}


def _scale(sweep: Sweep, cell: Outcome) -> int:
    """What an epoch is along x: its steps if cells have equally many of them, else 1."""
    return cell.steps if sweep.equal == "steps" else 1


def _draw(ax: Axes, points: Mapping[float, Spread], **style: Any) -> None:
    """A line of means and a band from the lowest to the highest value."""
    xs = list(points)
    if "marker" in style and len(xs) > 30:  # touching markers would hide the line
        step = math.ceil(len(xs) / 30)
        style["markevery"] = ((len(xs) - 1) % step, step)
    ax.plot(xs, [spread.mean for spread in points.values()], **style)
    if any(len(spread.values) > 1 for spread in points.values()):
        low, high = ([limit(spread.values) for spread in points.values()] for limit in (min, max))
        ax.fill_between(xs, low, high, facecolor=style["color"], **_SPREAD)


def _grid(rows: Sequence[str]) -> tuple[Figure, list[list[Axes]]]:
    """A row of panels, one for each measure, for each title; a column shares its scale."""
    # A line break of a long title falls before a key, not between it and its value.
    told = [row.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}") for row in rows]
    titles = [f"{name}: {row}" if row else name for row in told for name in PAIR_MEASURES.values()]
    figure, axes = frames(titles, len(rows), sharey="col")
    width = len(PAIR_MEASURES)
    for ax, measure in zip(axes, list(PAIR_MEASURES) * len(rows), strict=True):
        if measure in ("cka", "weight_gap"):
            ax.set_ylabel(_UNITS.get(measure, "alignment (1 = same)"))
    return figure, [axes[k : k + width] for k in range(0, len(axes), width)]


def _time_axes(sweep: Sweep, axes: Sequence[Sequence[Axes]]) -> None:
    last = max((run.last_epoch * _scale(sweep, cell) for cell in sweep.cells if (run := cell.run)), default=1)
    for ax in (ax for row in axes for ax in row):
        count_axis(ax, 0, last, "training steps" if sweep.equal == "steps" else "completed epochs")


def _left_out(what: str, count: int, most: int) -> str:
    return f"Only the first {most} of {count} {what} are drawn; all numbers are in table.csv. " if count > most else ""


def _over_epochs(sweep: Sweep) -> Picture:
    groups = sweep.groups

    def draw() -> Figure:
        drawn = groups[:MOST_ROWS]
        figure, axes = _grid([_told(cells[0].values) for cells in drawn])
        _time_axes(sweep, axes)
        for cells, row in zip(drawn, axes, strict=True):
            for ax, measure in zip(row, PAIR_MEASURES, strict=True):
                for model in sweep.compared:
                    style = look(sweep, model)
                    _draw(ax, _series(sweep, cells, model, measure), **style)
        return finish(figure, sweep, sweep.compared)

    return Picture(
        "over-epochs",
        "Alignment with the reference during training",
        f"Each line compares one model with {sweep.reference} on the same held-out images; each row has other swept "
        f"values. {_bands(sweep)}{_SLOWEST}{_floor_note(sweep)}{_left_out('combinations', len(groups), MOST_ROWS)}"
        "As Fig. 2 and Fig. 6 of arXiv 2510.08852.",
        draw,
    )


def _bands(sweep: Sweep) -> str:
    if len(sweep.seeds) == 1:
        return "There is one seed, so there are no error bars. "
    return "Lines are means over the seeds, bands reach from the lowest to the highest seed. "


def _floor_note(sweep: Sweep) -> str:
    if RESEEDED not in sweep.models:
        return ""
    return (
        f"The grey line is the reseeded twin, {sweep.reference} with other views: the noise floor, one rerun for each "
        "seed. "
    )


def _final(sweep: Sweep, key: str) -> Picture:
    """Final values against the values of a key: Fig. 3 (classes), Fig. 4 (temperature), Fig. 5 (batch size)."""
    held = _combinations(sweep, key)
    values = sweep.over[key]

    def draw() -> Figure:
        drawn = held[:MOST_ROWS]
        figure, axes = _grid([_told(fixed) for fixed in drawn])
        for fixed, row in zip(drawn, axes, strict=True):
            at = {value: sweep.group(fixed | {key: value}) for value in values}
            for ax, measure in zip(row, PAIR_MEASURES, strict=True):
                for model in sweep.compared:
                    points = {k: final_values(sweep, at[value], model, measure) for k, value in enumerate(values)}
                    _draw(ax, {k: spread for k, spread in points.items() if spread is not None}, **look(sweep, model))
                _named_places(ax, key, values)
                _floor(ax, [final_values(sweep, at[value], RESEEDED, measure) for value in values], measure)
        band = Patch(**_FLOOR, label="noise floor: as close as the mean reseeded twin")
        return finish(figure, sweep, sweep.compared, [band] if RESEEDED in sweep.models else [])

    return Picture(
        f"final-{_id(key)}",
        f"At the end of training, by {key}",
        f"Alignment with {sweep.reference} after the last epoch of the finished runs; the values of {key} are evenly "
        f"spaced along x. {_bands(sweep)}{_floor_note(sweep)}{_left_out('combinations', len(held), MOST_ROWS)}",
        draw,
    )


def _floor(ax: Axes, floor: Sequence[Spread | None], measure: str) -> None:
    points = {k: spread.mean for k, spread in enumerate(floor) if spread is not None}
    perfect = 0.0 if measure == "weight_gap" else 1.0
    ax.fill_between(list(points), list(points.values()), perfect, **_FLOOR)


def _named_places(ax: Axes, key: str, values: Sequence[str]) -> None:
    """The values of a key along x; long ones are cut."""
    texts = [value if len(value) <= 12 else f"{value[:11]}…" for value in values]
    ax.set_xticks(list(range(len(values))), texts, rotation=0 if len("  ".join(texts)) < 34 else 30)
    ax.set_xlim(-0.3, len(values) - 0.7)
    ax.set_xlabel(key)


def _by_value(sweep: Sweep, key: str) -> Iterator[Picture]:
    """Curves over epochs with a line for each value of a key, and a row for each model."""
    held = _combinations(sweep, key)
    for number, fixed in enumerate(held[:MOST_FIGURES]):

        def draw(fixed: Mapping[str, str] = fixed) -> Figure:
            models = sweep.compared[:MOST_ROWS]
            figure, axes = _grid([label(sweep, model) for model in models])
            _time_axes(sweep, axes)
            styles = {value: _style(k) for k, value in enumerate(sweep.over[key])}
            for model, row in zip(models, axes, strict=True):
                for ax, measure in zip(row, PAIR_MEASURES, strict=True):
                    for value, style in styles.items():
                        cells = sweep.group({**fixed, key: value})
                        _draw(ax, _series(sweep, cells, model, measure), **style)
            return finish(figure, sweep, [], [Line2D([], [], label=f"{key} = {v}", **s) for v, s in styles.items()])

        where = f" ({_told(fixed)})" if fixed else ""
        yield Picture(
            f"curves-{_id(key)}-{number}",
            f"During training, by {key}{where}",
            f"Each row compares one model with {sweep.reference}, each line is one value of {key}. {_bands(sweep)}"
            f"{_SLOWEST}"
            f"{_left_out('combinations of the other values', len(held), MOST_FIGURES)}",
            draw,
        )


def _id(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "-", key)


def _style(k: int) -> dict[str, Any]:
    colours, markers = (REFERENCE_COLOUR, *COLOURS), ("o", *MARKERS)
    return {"color": colours[k % len(colours)], "marker": markers[k % len(markers)]}


def _combinations(sweep: Sweep, key: str) -> list[dict[str, str]]:
    """The combinations of the other keys' values."""
    found = [{k: v for k, v in cells[0].values.items() if k != key} for cells in sweep.groups]
    return [one for at, one in enumerate(found) if one not in found[:at]]
