"""Figures of the benchmarks: mostly time and peak memory against the number of rows, one line per provider."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness.records import Record, duration, having, write_file

# Colour (Okabe and Ito, and more), marker and line style by provider; other formulations and libraries are dashed.
SIMILARITY = {
    "fastcl PairAccumulator": ("#0072B2", "o", "-"),
    "dense Gram tf32": ("#E69F00", "^", "-"),
    "dense Gram fp32": ("#D55E00", "s", "-"),
    "dense Gram fp64": ("#CC79A7", "D", "-"),
    "X'Y fp32": ("#009E73", "v", "--"),
    "authors' formulation": ("#000000", "X", "--"),
    "torch-cka": ("#808080", "P", "--"),
    "ckatorch": ("#56B4E9", "<", "--"),
    "rsatoolbox": ("#8B5A2B", ">", "--"),
}
LOSSES = {
    "fastcl chunked": ("#0072B2", "o", "-"),
    "fastcl fp16": ("#0072B2", "s", "-"),
    "fastcl fp32": ("#56B4E9", "D", "-"),
    "plain PyTorch": ("#D55E00", "s", "--"),
    "plain PyTorch bf16": ("#E69F00", "^", "--"),
    "torch.compile bf16": ("#F0B400", "v", "--"),
    "chunked bf16": ("#009E73", "v", "--"),
    "flex_attention bf16": ("#5A9E00", "D", "--"),
    "Inf-CL": ("#CC79A7", "P", "--"),
    "cut-cross-entropy": ("#7B3294", "d", "--"),
    "lightly": ("#808080", "<", "--"),
    "pytorch-metric-learning": ("#8B5A2B", ">", "--"),
    "authors' formulation": ("#000000", "X", "--"),
}
_STYLE: Any = {
    "svg.hashsalt": "fastcl", "svg.fonttype": "none", "font.size": 9.0, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "grid.color": "#dddddd", "grid.linewidth": 0.5,
}  # fmt: skip


class Line(NamedTuple):
    """A line: values along x, None if not measured."""

    label: str
    style: tuple[str, str, str]
    points: Mapping[int, float | None]


class Panel(NamedTuple):
    """One quantity of all lines, on logarithmic axes."""

    x: str
    title: str
    lines: Sequence[Line]


def similarity(records: Sequence[Record], folder: Path) -> str | None:
    """Draw two models held in memory, at the width with the most sizes; return the file name, None if not drawn."""
    chosen, title = _most(having(records, section="pair"), SIMILARITY), "Two models, d = {d}; {device}"
    lines = _lines(chosen, SIMILARITY, "{provider}: {computes}", itemgetter("wall_ms"))
    return _draw(folder / "similarity.svg", title, chosen, lines, _memory(chosen, SIMILARITY, "features"))


def losses(records: Sequence[Record], folder: Path) -> str | None:
    """Draw NT-Xent, forward and backward together, and its bound if any; returns what `similarity` does."""
    chosen = _most(having(records, **{"objective": "ntxent", "pass": "both"}), LOSSES)
    lines = _lines(chosen, LOSSES, "{provider}", duration)
    if bounds := {r["n"]: r["bound_ms"] for r in chosen if r["bound_ms"]}:
        lines.append(Line("bound", ("#000000", "", ":"), bounds))
    title = "NT-Xent, forward and backward, D = {d}; {device}"
    return _draw(folder / "losses.svg", title, chosen, lines, _memory(chosen, LOSSES, "inputs"))


def _most(records: Sequence[Record], styles: Mapping[str, object]) -> list[Record]:
    """The timed records of drawn providers at the width with the most sizes; empty if no width has two."""
    timed = [r for r in records if r["wall_ms"] and r["provider"] in styles]
    sizes = {d: {r["n"] for r in timed if r["d"] == d} for d in dict.fromkeys(r["d"] for r in timed)}
    widest = max(sizes, key=lambda d: len(sizes[d]), default=None)
    return [r for r in timed if r["d"] == widest and len(sizes[widest]) > 1]


def _lines(
    records: Sequence[Record], styles: Mapping[str, Any], label: str, value: Callable[[Record], float | None]
) -> list[Line]:
    """A line for each provider, named by the format `label` of its fields."""
    found = {name: having(records, provider=name) for name in styles}
    return [Line(label.format(**mine[0]), styles[name], {r["n"]: value(r) for r in mine})
            for name, mine in found.items() if mine]  # fmt: skip


def _memory(records: Sequence[Record], styles: Mapping[str, Any], beyond: str) -> Panel:
    lines = _lines(records, styles, "{provider}", lambda r: r["peak_bytes"] and r["peak_bytes"] / 2**20)
    return Panel("rows", f"peak memory beyond the {beyond} (MiB)", lines)


def of_run(run: Path) -> None:
    """Write the report's figures of a run's alignment and, if recorded, its drift, on a white background."""
    from fastcl.report.drawing import svg
    from fastcl.report.figures import PLATES
    from fastcl.report.run import load_run

    found = load_run(run)
    for plate in PLATES:
        if plate.name in ("alignment", "drift") and plate.shown(found):
            text = svg(plate, found)
            for name, colour in (("var(--ink)", "#24292f"), ("var(--grid)", "#d0d7de")):  # no page defines them here
                text = text.replace(name, colour)
            write_file(run / f"{plate.name}.svg", text.replace("<svg ", '<svg style="background:#fff" ', 1))


def _draw(file: Path, title: str, records: Sequence[Record], lines: Sequence[Line], memory: Panel) -> str | None:
    """Write the figure of times and memory; return its name, or None if there is nothing to draw or no matplotlib."""
    if not records:
        return None
    return drawn(file, title.format(**records[0]), [[Panel("rows", "time (ms)", lines), memory]])


def drawn(file: Path, title: str, panels: Sequence[Sequence[Panel]]) -> str | None:
    """Write a figure of rows of panels that have the same lines; return its name, or None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    with drawing(file, 10, 1.8 + 3.6 * len(panels)) as figure:
        axes = figure.subplots(len(panels), len(panels[0]), squeeze=False)
        for row, of_row in zip(axes, panels, strict=True):
            for ax, panel in zip(row, of_row, strict=True):
                _fill(ax, panel)
        figure.suptitle(title, fontsize=9.5)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return file.name


@contextmanager
def drawing(file: Path, width: float, height: float) -> Iterator[Any]:
    """A new figure of so many inches, which is written as an SVG when the block ends: the same bytes for the same
    figure, in the style of all figures, whatever the user's matplotlibrc says."""
    import matplotlib
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure((width, height), layout="constrained")
        yield figure
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    write_file(file, text.getvalue())


def _fill(ax: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogFormatterSciNotation, NullFormatter

    for line in panel.lines:
        colour, marker, dash = line.style
        if points := sorted((n, value) for n, value in line.points.items() if value):
            ax.plot(*zip(*points, strict=True), dash, color=colour, marker=marker, markersize=4.5, linewidth=1.6,
                    label=line.label)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel=panel.x, title=panel.title)
    ax.xaxis.set_minor_formatter(NullFormatter())
    # Less than a decade and a half may hold a single power of ten: label the ticks between as well.
    ax.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(1.5, 0.5)))
    ax.grid(True, linewidth=0.6)
