"""A run's curves and the published ones in one figure."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fastcl.errors import FastclError, shown
from fastcl.io.files import write_atomic
from fastcl.paper.beside import Comparison, band
from fastcl.paper.published import HELD_OUT, MEASURES, Curve
from fastcl.report.drawing import INK, curve, finish, look, panels, styled

_LINEAR = 100  # epochs drawn to scale, where most of the published points lie; later ones on a log scale
_GRID = "#d8d8d8"
_TICKS = (0, 20, 40, 60, 80, 100, 200, 400, 800, 1600, 3200)


def check_figure_ending(path: Path) -> None:
    """Raise FastclError unless figures can be written with this file ending."""
    if path.suffix not in (".svg", ".png"):
        raise FastclError(f"--out: {shown(path)}: figures are .svg or .png")


def write_figure(sides: Comparison, path: Path) -> Path:
    """Draw a comparison into a file; the same comparison gives the same SVG bytes.

    Args:
        sides: what to draw.
        path: .svg or .png.

    Raises:
        FastclError: another ending, or a file that cannot be written.
    """
    path = Path(path)
    check_figure_ending(path)
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) if path.suffix == ".svg" else {}
    picture = io.BytesIO()
    with styled(), matplotlib.rc_context({"grid.color": _GRID}):
        figure = _draw(sides)
        figure.savefig(picture, format=path.suffix[1:], facecolor="white", dpi=150, metadata=metadata)
    write_atomic(path, picture.getvalue())
    return path


def _draw(sides: Comparison) -> Figure:
    run, target = sides.run, sides.target
    measures = [key for key in MEASURES if any(one.measure == key for one in sides.curves)]
    images = {one.measure: "held-out" if one.split == HELD_OUT else "training" for one in sides.curves}
    figure_name = target.figure.replace(" ", "\u00a0")  # on one line
    titles = [
        f"{MEASURES[key]} with {sides.cl} on held-out images, beside {target.name} ({figure_name}, {images[key]} "
        "images)"
        for key in measures
    ]
    figure, axes = panels(run, titles, "alignment (1 = same)", sharey=True)
    last = max(run.planned_epochs, run.epochs[-1], 1)
    for ax, measure in zip(axes, measures, strict=True):
        for one in sides.curves:
            if one.measure == measure:
                _draw_published(ax, sides, one)
                model = sides.models[one.model]
                curve(ax, run, model, run.pair_series(sides.cl, model), measure)
        _scale(ax, last)
    drawn = list(dict.fromkeys(sides.models[one.model] for one in sides.curves))
    notes = [
        Line2D([], [], color=INK, linestyle="--", linewidth=1.0, label="published"),
        Patch(facecolor=INK, alpha=0.15, linewidth=0, label="band: cannot be told from it"),
    ]
    if any(one.misplaced for one in sides.curves):
        notes.append(Line2D([], [], color=INK, marker="x", linestyle="none", label="published at a wrong epoch"))
    return finish(figure, run, drawn, notes)


def _draw_published(ax: Axes, sides: Comparison, one: Curve) -> None:
    colour = look(sides.run, sides.models[one.model])["color"]
    epochs, values = list(one.points), list(one.points.values())
    down, up = band(sides.target, one)
    ax.fill_between(epochs, [v - down for v in values], [v + up for v in values], color=colour, alpha=0.15, linewidth=0)
    ax.plot(epochs, values, color=colour, linestyle="--", linewidth=1.0, marker=".", markersize=3)
    if one.misplaced:
        ax.plot(list(one.misplaced), list(one.misplaced.values()), color=colour, marker="x", linestyle="none")


def _scale(ax: Axes, last: int) -> None:
    """Epochs from 0 to the last one that the run plans."""
    logarithmic = last > 1.5 * _LINEAR
    if logarithmic:
        ax.set_xscale("symlog", linthresh=_LINEAR, linscale=2.0)
        ax.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if tick <= last]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_xlabel(f"completed epochs (logarithmic from {_LINEAR} on)")
    ax.set_xlim(-0.03 * min(last, _LINEAR), 1.2 * last if logarithmic else 1.03 * last)
