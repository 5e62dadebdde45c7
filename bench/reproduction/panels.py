"""How the figures are drawn: a row of panels for each measure, a column for each source, published ones first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bench.harness.figures import drawing

Points = Mapping[float, Sequence[float]]  # x -> the values of the seeds


class Line(NamedTuple):
    """Attributes:
    label: in the legend.
    colour, marker: of the line and its points.
    points: what it joins.
    dash: "-", or "--" for what was published.
    """

    label: str
    colour: str
    marker: str
    points: Points
    dash: str = "-"


class Column(NamedTuple):
    """Attributes:
    title: where the values come from.
    x: what is along the axis.
    lines: function from a measure to the lines of its panel; none: nothing was published.
    spaced: whether the values along x are evenly spaced, and not to scale.
    """

    title: str
    x: str
    lines: Callable[[str], list[Line]]
    spaced: bool = False
    without: str = "not run"


def write_figure(file: Path, measures: Mapping[str, str], columns: Sequence[Column], same_y: bool = True) -> None:
    """Write a figure as an SVG.

    Args:
        measures: measure -> its name.
        columns: of panels.
        same_y: whether the panels of a row share their scale.
    """
    with drawing(file, max(8.4, 3.1 * len(columns)), 0.6 + 2.5 * len(measures)) as figure:
        axes = figure.subplots(len(measures), len(columns), squeeze=False, sharey="row" if same_y else False)
        labels: dict[str, Artist] = {}
        for row, (measure, name) in zip(axes, measures.items(), strict=True):
            for ax, column in zip(row, columns, strict=True):
                lines = column.lines(measure)
                _fill(ax, column, lines)
                ax.set_title(f"{column.title}: {name}", fontsize=9, loc="left")
                ax.set_xlabel(column.x)
                for line in lines:
                    look = {"color": line.colour, "marker": line.marker, "markersize": 4, "label": line.label}
                    labels.setdefault(line.label, Line2D([], [], **look))
            row[0].set_ylabel("relative distance from CL" if measure == "weight_gap" else "alignment with CL")
        labels["dashed: published"] = Line2D([], [], color="#57606a", linestyle="--")
        figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=min(4, len(columns) + 1))
        figure.patch.set_facecolor("white")


def _fill(ax: Axes, column: Column, lines: Sequence[Line]) -> None:
    if not any(line.points for line in lines):
        ax.text(0.5, 0.5, column.without, transform=ax.transAxes, ha="center", va="center", color="#57606a")
        ax.set_xticks([])
        return
    xs = sorted({x for line in lines for x in line.points})
    place = {x: k for k, x in enumerate(xs)} if column.spaced else {x: x for x in xs}
    for line in lines:
        at = sorted(line.points)
        means = [statistics.fmean(line.points[x]) for x in at]
        where = [place[x] for x in at]
        ax.plot(where, means, line.dash, color=line.colour, marker=line.marker, markersize=4, linewidth=1.5)
        low, high = ([limit(line.points[x]) for x in at] for limit in (min, max))
        if len(at) == 1:  # a band would have no width
            ax.vlines(where, low, high, color=line.colour, alpha=0.6, linewidth=3)
        elif any(len(line.points[x]) > 1 for x in at):
            ax.fill_between(where, low, high, color=line.colour, alpha=0.18, linewidth=0)
    if column.spaced:
        ax.set_xticks(range(len(xs)), [f"{x:g}" for x in xs], fontsize=None if len(xs) < 9 else "x-small")
        ax.set_xlim(-0.3, len(xs) - 0.7)
    ax.grid(True)
