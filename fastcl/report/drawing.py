"""How figures are drawn: inline SVG, with the same colour and marker for a model in all figures."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from textwrap import fill
from typing import Any, Protocol

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import LayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fastcl.report.run import IDENTITY, RESEEDED, Run, Series, known

# Okabe and Ito's colour-blind-safe palette, without black (ink) and yellow (too pale on white).
REFERENCE_COLOUR = "#0072B2"
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("s", "^", "D", "v", "P", "X", "<")
FLOOR_COLOUR = "#808080"
FLOOR_BAND = {"facecolor": FLOOR_COLOUR, "alpha": 0.25, "linewidth": 0}

# Placeholders in the SVG for two colours that the page sets (light, dark, print); nothing else uses these values.
INK, GRID = "#010203", "#040506"
PAGE_COLOURS = {INK: "var(--ink)", GRID: "var(--grid)"}

STYLE = {
    "svg.hashsalt": "fastcl",  # element ids, and so the bytes of the page, depend only on the content
    "svg.fonttype": "none",  # text stays text; laid out for DejaVu Sans, which browsers replace by a narrower font
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9.0,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,  # a factor or offset above the axis would overlap the panel's title
    "axes.formatter.limits": (-9, 9),
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
WIDTH = 11.5  # inches: 1104 CSS pixels


@dataclass(frozen=True)
class Plate:
    """One figure of the report; the caption may use {reference} and {chance}, ``band`` explains the noise floor.

    ``note`` adds text about the run to the caption. The page omits the figure where ``shown`` is false.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Run], Figure]
    band: str = ""
    note: Callable[[Run], str] = lambda run: ""
    shown: Callable[[Run], bool] = lambda run: True


def svg(plate: Plate, run: Run) -> str:
    """The figure as an SVG element for an HTML (or XHTML) page; the same run gives the same bytes."""
    return inline_svg(plate.name, plate.title, lambda: plate.draw(run))


def inline_svg(name: str, title: str, draw: Callable[[], Figure]) -> str:
    """What `draw` draws as an SVG element for a page.

    Args:
        name: of the figure, unique in the page.
        title: what the figure shows, for those who do not see it.
        draw: makes the figure; called within the style of all figures.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with styled():
        # Figure.savefig would draw everything twice, the first time only for the layout.
        figure = draw()
        canvas = FigureCanvasSVG(figure)
        figure.set_dpi(72)  # as print_svg does
        layout = figure.get_layout_engine()
        assert layout is not None
        layout.execute(figure)
        figure.set_layout_engine("none")
        canvas.print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    return re.sub(r"<[^<>]+>", lambda tag: _for_page(tag[0], name), text)


@contextmanager
def styled() -> Iterator[None]:
    """Set the style of all figures, independent of the user's matplotlibrc."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _for_page(tag: str, name: str) -> str:
    """Prefix ids with the figure's name, since they are unique only within a figure, and use the page's colours."""
    tag = tag.replace(' id="', f' id="{name}-').replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for stand_in, colour in PAGE_COLOURS.items():
        tag = tag.replace(stand_in, colour)
    return tag


class GridLayout(LayoutEngine):
    """Places panels of one size above the legend, as large as their labels allow.

    Constrained layout gives nearly the same places, but measures every label several times.
    """

    _adjust_compatible = False
    _colorbar_gridspec = False

    def execute(self, fig: Any) -> None:
        """Place the panels of a figure, whose labels and legend are there."""
        renderer, (width, height) = fig._get_renderer(), fig.bbox.size  # as matplotlib's own layouts do
        panels = [(ax, spec) for ax in fig.axes if (spec := ax.get_subplotspec()) is not None]
        rows, columns = panels[0][1].get_gridspec().get_geometry()
        pad = 3 * fig.dpi / 72
        gap = max(pad, 0.01 * width / columns)
        above, below, left, right = ([pad] * count for count in (rows, rows, columns, columns))
        for ax, spec in panels:
            row, column = spec.rowspan.start, spec.colspan.start
            box = ax.xaxis.get_tightbbox(renderer)
            below[row] = max(below[row], pad + ax.bbox.y0 - box.y0)
            right[column] = max(right[column], gap + box.x1 - ax.bbox.x1)
            for text in ax.get_children():
                if isinstance(text, Text) and text.get_text():
                    above[row] = max(above[row], pad + text.get_window_extent(renderer).y1 - ax.bbox.y1)
        foot = sum(legend.get_window_extent(renderer).height + 2 * pad for legend in fig.legends)
        inner = (height - foot - sum(above) - sum(below)) / rows
        for ax, spec in panels:
            row, column = spec.rowspan.start, spec.colspan.start
            y = height - sum(above[: row + 1]) - sum(below[:row]) - inner * (row + 1)
            ax.set_position((ax.get_position().x0, y / height, ax.get_position().width, inner / height))
            box = ax.yaxis.get_tightbbox(renderer)  # which depends on the height, as the number of ticks does
            if box is not None:
                left[column] = max(left[column], gap + ax.bbox.x0 - box.x0)
        inner = (width - sum(left) - sum(right)) / columns
        for ax, spec in panels:
            column, place = spec.colspan.start, ax.get_position()
            x = sum(left[: column + 1]) + sum(right[:column]) + inner * column
            ax.set_position((x / width, place.y0, inner / width, place.height))


class Cast(Protocol):
    """Whose models are drawn: a run, or a sweep of runs."""

    @property
    def reference(self) -> str:
        """The model that the others are compared with."""
        ...

    @property
    def others(self) -> tuple[str, ...]:
        """The models with an objective of their own."""
        ...


def look(run: Cast, model: str) -> dict[str, Any]:
    """Colour, marker and line style of a model, the same in every figure."""
    if model == run.reference:
        return {"color": REFERENCE_COLOUR, "marker": "o", "linewidth": 2.4, "zorder": 2.5}
    if model == IDENTITY:
        return {"color": INK, "linestyle": (0, (4, 3)), "linewidth": 1.0, "zorder": 3.5}
    if model == RESEEDED:
        return {"color": FLOOR_COLOUR, "marker": ".", "linewidth": 1.2, "zorder": 2.2}
    at = run.others.index(model)
    return {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)], "zorder": 3.0}


def label(run: Cast, model: str) -> str:
    """A model's label in legends."""
    notes = {run.reference: "reference", IDENTITY: "= reference", RESEEDED: "other views"}
    return f"{model} ({notes[model]})" if model in notes else model


def curve(ax: Axes, run: Run, model: str, series: Series, measure: str, above: float = -math.inf) -> None:
    """Plot one model's values over epochs; values that are unknown or not above a limit leave a gap."""
    epochs = sorted(series)
    found = [series[epoch][measure] for epoch in epochs]
    values = [value if known(value) and value > above else math.nan for value in found]
    # Touching markers would hide the line: draw at most 30, including one at the last evaluation.
    step = max(1, math.ceil(len(epochs) / 30))
    ax.plot(epochs, values, markevery=((len(epochs) - 1) % step, step), **look(run, model))


def panels(run: Run, titles: list[str], unit: str, rows: int = 1, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per title, epochs along x."""
    figure, axes = frames(titles, rows, **shared)
    columns = math.ceil(len(titles) / rows)
    for at, ax in enumerate(axes):
        count_axis(ax, run.epochs[0], run.epochs[-1], "completed epochs")
        if at % columns == 0:
            ax.set_ylabel(unit)
    return figure, axes


def frames(titles: Sequence[str], rows: int = 1, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per title, in so many rows."""
    columns = math.ceil(len(titles) / rows)
    figure = Figure(figsize=(WIDTH, 0.65 + 2.75 * rows), layout=GridLayout())
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for spare in axes[len(titles) :]:
        spare.remove()
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(fill(title, int(10 * WIDTH / columns)))  # about 10 letters an inch
    return figure, axes[: len(titles)]


def count_axis(ax: Axes, first: float, last: float, unit: str) -> None:
    """Counts from `first` to `last`, such as epochs, along x."""
    last = max(last, first + 1)
    pad = 0.03 * (last - first)
    ax.set_xlim(first - pad, last + pad)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    ax.set_xlabel(unit)


def log_axis(ax: Axes) -> None:
    """Set a log scale along y with plain-number labels, enough of them for any range."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = math.log10(high / low)
    if decades > 0.7:
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2.5 else (1, 2, 5)))
    else:  # the range may contain no 1, 2 or 5 of a decade
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def finish(figure: Figure, run: Cast, models: Sequence[str], extra: Sequence[Artist] = ()) -> Figure:
    """Mark empty panels and add one legend below all panels."""
    for ax in figure.axes:
        if not any(known(y) for line in ax.lines for y in line.get_ydata()):
            ax.text(0.5, 0.5, "no values", transform=ax.transAxes, ha="center", va="center")
            ax.set_yticks([])
    handles = [Line2D([], [], label=label(run, model), **look(run, model)) for model in models] + list(extra)
    if not handles:
        return figure
    labels = [handle.get_label() for handle in handles]
    widths = [0.6 + 0.08 * len(text) for text in labels]  # inches, a generous estimate
    columns = len(labels) if sum(widths) < WIDTH else max(1, int(WIDTH / max(widths)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    further_rows = math.ceil(len(labels) / columns) - 1
    figure.set_figheight(figure.get_figheight() + 0.18 * further_rows)  # so that the panels keep their height
    return figure
