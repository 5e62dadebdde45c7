"""Heat maps of the CKA between all layers of two models: for a run's report, or of any table as a file."""

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from fastcl.errors import FastclError, shown
from fastcl.io.files import read_if_there, write_atomic
from fastcl.io.json_text import parse_json
from fastcl.report.drawing import WIDTH, Plate, styled
from fastcl.report.run import Run

_MAP = "viridis"
_DARK = "#111111"
_LABELS = 32  # maximum per axis; with more layers only every second, third, ... is labelled
_PRINTED, _CELL = 16, 0.27  # values are printed in tables of at most 16 columns with cells at least 0.27 inches wide
_LETTERS = 8  # letters of a title per inch
_VECTOR = 4096  # cells; larger tables are rasterised


@dataclass(frozen=True)
class LayerTable:
    """CKA of the layers of `rows_of` (one row each) with those of `columns_of`; NaN where undefined."""

    rows_of: str
    columns_of: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray


def read_layer_tables(run_dir: Path) -> list[LayerTable]:
    """The tables of a run's layers.json, one per model; empty if there is no such file.

    Raises:
        FastclError: the file cannot be read or is invalid.
    """
    path = Path(run_dir) / "layers.json"
    name, text = shown(path), read_if_there(path)
    if text is None:
        return []
    try:
        tree = parse_json(text, name)
        tables = [
            LayerTable(
                shown(tree["reference"]), shown(model), tuple(map(shown, one["layers"])),
                tuple(map(shown, one["other_layers"])), np.array(one["cka"], dtype=float),
            )
            for model, one in tree["models"].items()
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FastclError(f"{name}: not a table of layers ({type(error).__name__}: {error})") from error
    for table in tables:
        if table.values.shape != (len(table.rows), len(table.columns)) or not table.values.size:
            raise FastclError(
                f"{name}: the table of {table.columns_of!r} has shape {table.values.shape} for {len(table.rows)} and "
                f"{len(table.columns)} layers"
            )
    return tables


def check_ending(path: Path) -> None:
    """Raise FastclError unless heat maps can be written with this file ending."""
    if path.suffix not in (".svg", ".png"):
        raise FastclError(f"{path}: heat maps must be .svg or .png")


def write_heat_map(table: LayerTable, path: Path, title: str | None = None) -> Path:
    """Draw one table into a file; the same table gives the same SVG bytes.

    Args:
        table: what to draw.
        path: .svg or .png.
        title: above it; None: the models' names.

    Raises:
        FastclError: an unsupported ending, or a file that cannot be written.
    """
    path = Path(path)
    check_ending(path)
    side = [min(9.0, max(2.2, 0.36 * count)) for count in (len(table.columns), len(table.rows))]
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) if path.suffix == ".svg" else {}
    with styled():
        figure = Figure(figsize=(side[0] + 2.6, side[1] + 1.6), layout="constrained")
        _draw(figure, [figure.subplots()], [table], side[0])
        figure.axes[0].set_title("")
        letters = round(_LETTERS * figure.get_figwidth())
        figure.suptitle(textwrap.fill(title or f"{table.rows_of} against {table.columns_of}", letters))
        picture = io.BytesIO()
        figure.savefig(picture, format=path.suffix[1:], facecolor="white", dpi=150, metadata=metadata)
    write_atomic(path, picture.getvalue())
    return path


def layers_of_run(run: Run) -> Figure:
    """One heat map per model: its layers against those of the reference."""
    tables = read_layer_tables(run.path)
    columns = 2 if len(tables) in (2, 4) else min(3, len(tables))
    rows = math.ceil(len(tables) / columns)
    width = WIDTH / max(columns, 2) - 0.9
    height = max(min(width, 0.34 * len(table.rows)) for table in tables)
    figure = Figure(figsize=(WIDTH, rows * (max(1.6, height) + 1.5)), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[len(tables) :]:
        spare.remove()
    _draw(figure, axes[: len(tables)], tables, width)
    return figure


def _draw(figure: Figure, axes: Sequence[Axes], tables: Sequence[LayerTable], width: float) -> None:
    """Draw panels `width` inches wide and one colour bar."""
    meshes = [_panel(ax, table, width) for ax, table in zip(axes, tables, strict=True)]
    extend = "min" if any(np.nanmin(table.values, initial=0.0) < 0 for table in tables) else "neither"
    bar = figure.colorbar(meshes[0], ax=list(axes), label="debiased CKA", extend=extend, aspect=30)
    bar.solids.set_rasterized(False)  # a rasterised bar would not scale with the page
    bar.solids.set_edgecolor("face")
    bar.outline.set_visible(False)


def _panel(ax: Axes, table: LayerTable, width: float) -> QuadMesh:
    values = table.values
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(values), cmap=_MAP, vmin=0.0, vmax=1.0, rasterized=values.size > _VECTOR,
        edgecolors="face", linewidth=0.2,
    )  # fmt: skip
    ax.set_title(table.columns_of)
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)
    for axis, of, names in ((ax.xaxis, table.columns_of, table.columns), (ax.yaxis, table.rows_of, table.rows)):
        prefix, short = _shortened(names)
        step = math.ceil(len(names) / _LABELS)
        axis.set_ticks(np.arange(0, len(names), step) + 0.5, short[::step])
        axis.set_tick_params(length=0, labelsize=7.5, labelrotation=90 if axis is ax.xaxis else 0)
        axis.set_label_text(f"layers of {of}" + (f", in {prefix}" if prefix else ""))
    if len(table.columns) <= _PRINTED and width / len(table.columns) >= _CELL:
        for (i, j), value in np.ndenumerate(values):
            text = f"{value:.2f}".replace("0.", ".") if math.isfinite(value) else ""
            colour = legible_on(mesh.to_rgba(value)[:3])
            ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7, color=colour)
    return mesh


def legible_on(colour: Sequence[float]) -> str:
    """Dark or white, whichever contrasts more with a cell by the contrast ratio of WCAG 2.

    The page's ink would not do: a cell keeps its colour on a dark page.

    Args:
        colour: red, green and blue in [0, 1], sRGB.
    """
    luminance, dark = _luminance(colour), _luminance(to_rgb(_DARK))
    return _DARK if (luminance + 0.05) / (dark + 0.05) > 1.05 / (luminance + 0.05) else "#ffffff"


def _luminance(colour: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _shortened(names: Sequence[str]) -> tuple[str, list[str]]:
    """The levels that all names start with, and the rest of each name."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ".".join(parts[0][:shared]), [".".join(part[shared:]) for part in parts]


LAYERS = Plate(
    "layers",
    "Alignment layer by layer",
    "CKA of every layer of {reference} (vertical) with every layer of another model (horizontal), on up to 1,024 "
    "held-out images at the end of the run, computed as the ratio of the unbiased HSIC over batches (Nguyen et al. "
    "2021) with flattened layer outputs. A bright diagonal means that both models compute similar features at the "
    "same depth.",
    layers_of_run,
    band=" The panel of the reseeded twin is the noise floor: where another model's diagonal is darker than there, "
    "the loss made a larger difference than other random views did.",
    shown=lambda run: bool(read_layer_tables(run.path)),
)
