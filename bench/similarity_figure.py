"""The figure of the benchmark of the pair statistics: time and peak memory against the number of rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from bench.records import Record

NAME = "similarity.svg"
# Line by line: provider, colour (Okabe and Ito), marker, dashed where it is another formulation's or library's.
LINES = {
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


def draw(records: Sequence[Record], folder: Path) -> str | None:
    """Write the figure of the width that has most sizes; its name, or None without sizes or matplotlib."""
    measured = [r for r in records if r["section"] == "pair" and r["wall_ms"] and r["provider"] in LINES]
    sizes: dict[int, set[int]] = {}
    for r in measured:
        sizes.setdefault(r["d"], set()).add(r["n"])
    widest = max(sizes, key=lambda d: len(sizes[d]), default=None)
    if widest is None or len(sizes[widest]) < 2 or importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "fastcl", "svg.fonttype": "none", "font.size": 9.0, "axes.spines.top": False,
             "axes.spines.right": False, "legend.frameon": False}  # fmt: skip
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change it
        matplotlib.rcParams.update(style)
        figure = Figure((10, 5.4), layout="constrained")
        axes = figure.subplots(1, 2)
        _panels(axes, [r for r in measured if r["d"] == widest])
        figure.suptitle(f"Two models, d = {widest}; {measured[0]['device']}", fontsize=9.5)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{NAME}.part"
        figure.savefig(part, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        part.replace(folder / NAME)
    return NAME


def _panels(axes: Sequence, records: Sequence[Record]) -> None:
    """Axes of time and of memory, both logarithmic."""
    from matplotlib.ticker import NullFormatter

    panels = (("wall_ms", 1, "time (ms)"), ("peak_bytes", 2**20, "peak memory beyond the features (MiB)"))
    for ax, (key, unit, title) in zip(axes, panels, strict=True):
        for name, (colour, marker, dash) in LINES.items():
            mine = sorted((r for r in records if r["provider"] == name and r[key]), key=lambda r: r["n"])
            if mine:
                label = f"{name}: {mine[0]['computes']}"
                ax.plot([r["n"] for r in mine], [r[key] / unit for r in mine], dash, color=colour, marker=marker,
                        markersize=4.5, linewidth=1.6, label=label)  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="rows n", title=title)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.grid(True, which="major", linewidth=0.6, color="#dddddd")
