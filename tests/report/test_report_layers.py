"""Heat maps of layers: in the report of a run that has them, and in files of their own."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from small_runs import SVG, make_run, text_of

from fastcl.errors import FastclError
from fastcl.report import drawing, figures, write_report
from fastcl.report.heat_maps import LAYERS, LayerTable, _panel, layers_of_run, read_layer_tables, write_heat_map
from fastcl.report.run import load_run

ROWS = ["encoder.conv1", "encoder.layer1.0", "encoder.layer1.1"]
COLUMNS = [*ROWS, "projector"]


def with_layers(run: Path, models=("nscl", "ce"), cka=None) -> Path:
    cka = [[0.987, 0.5, 0.25, 0.01], [0.5, 1.0, 0.3, 0.75], [-0.08, 0.3, 0.91, 0.62]] if cka is None else cka
    one = {"layers": ROWS, "other_layers": COLUMNS, "cka": cka}
    tree = {"reference": "dcl", "samples": 360, "batches": 2, "models": dict.fromkeys(models, one)}
    (run / "layers.json").write_text(json.dumps(tree))
    return run


def table(rows: int, columns: int, prefix="blocks.") -> LayerTable:
    values = np.cos(np.subtract.outer(np.linspace(0, 2, rows), np.linspace(0, 2, columns)))
    names = [tuple(f"{prefix}{k}" for k in range(count)) for count in (rows, columns)]
    return LayerTable("a", "b", *names, values)


def test_a_run_with_layers_shows_a_heat_map_per_model(tmp_path: Path) -> None:
    run = with_layers(make_run(tmp_path))
    source = write_report(run).read_text()
    page = ElementTree.fromstring(source)
    assert len(list(page.iter(f"{SVG}svg"))) == 1 + sum(plate.shown(load_run(run)) for plate in figures.PLATES)
    (image,) = [svg for svg in page.iter(f"{SVG}svg") if svg.get("aria-label") == "Alignment layer by layer"]
    drawn = [text_of(text) for text in image.iter(f"{SVG}text")]
    axes = {"layers of dcl, in encoder", "layers of nscl", "layers of ce", "debiased CKA"}
    assert axes | {"conv1", "layer1.1", *COLUMNS} <= set(drawn)
    assert drawn.count(".99") == drawn.count("-.08") == 2 and drawn.count("1.00") == 2
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert re.search(r"https?:|//", re.sub(r'xmlns(:\w+)?="[^"]*"', "", source)) is None  # nothing loaded, no image
    assert drawing.svg(LAYERS, load_run(run)) == drawing.svg(LAYERS, load_run(run))


def test_cells_hold_the_values_with_the_first_layers_at_the_lower_left(tmp_path: Path) -> None:
    run = load_run(with_layers(make_run(tmp_path)))
    figure = layers_of_run(run)
    panels = [ax for ax in figure.axes if "layers of" in ax.get_xlabel()]
    assert [ax.get_xlabel() for ax in panels] == ["layers of nscl", "layers of ce"]
    for ax in panels:
        (mesh,) = ax.collections
        assert mesh.get_array().tolist()[0] == [0.987, 0.5, 0.25, 0.01] and mesh.get_clim() == (0, 1)
        assert [text.get_text() for text in ax.get_yticklabels()] == ["conv1", "layer1.0", "layer1.1"]
        assert ax.get_ylim()[0] < ax.get_ylim()[1]


def test_numbers_stand_out_on_every_cell(tmp_path: Path) -> None:
    """At least 4.5 to 1, the contrast that WCAG 2 asks of text, whatever the value."""
    one = table(1, 14)
    one = LayerTable("a", "b", ("x",), one.columns, np.linspace(-0.2, 1.0, 14)[None])

    def luminance(colour) -> float:
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    figure = Figure()
    mesh = _panel(figure.subplots(), one, 11.0)
    cells = mesh.to_rgba(mesh.get_array().ravel())[:, :3]
    texts = [text for text in figure.axes[0].texts]
    assert len(texts) == 14 and len({text.get_color() for text in texts}) == 2
    for text, cell in zip(texts, cells, strict=True):
        low, high = sorted((luminance(np.array(to_rgb(text.get_color()))), luminance(cell)))
        assert (high + 0.05) / (low + 0.05) >= 4.3, (text.get_text(), text.get_color())


def test_a_run_without_layers_has_no_plate_of_them(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert not LAYERS.shown(load_run(run)) and read_layer_tables(run) == []


@pytest.mark.parametrize(("models", "size"), [
    ("x", (1, 1)), ("x", (3, 40)), ("wxyz", (1, 1)), ("xyz", (40, 3)), ("xy", (50, 50))
])  # fmt: skip
def test_nothing_is_clipped_and_labels_do_not_overlap(tmp_path: Path, models, size) -> None:
    one = table(*size, prefix="encoder.stages.3.blocks.")
    tree = {"layers": one.rows, "other_layers": one.columns, "cka": one.values.tolist()}
    run = make_run(tmp_path)
    (run / "layers.json").write_text(json.dumps({"reference": "dcl", "models": dict.fromkeys(models, tree)}))
    with drawing.styled():
        figure = layers_of_run(load_run(run))
        figure.draw_without_rendering()
        drawn = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height, drawn
        for ax in figure.axes[: len(models)]:
            for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
                boxes = [label.get_window_extent() for label in labels]
                assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:], strict=False)), ax.get_xlabel()


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_files_repeat_and_show_undefined_cells_as_gaps(tmp_path: Path, suffix) -> None:
    one = table(5, 7)
    one.values[2, 3] = np.nan
    path = write_heat_map(one, tmp_path / "new" / f"heat{suffix}")
    assert path.read_bytes() == write_heat_map(one, tmp_path / f"again{suffix}").read_bytes()
    if suffix == ".svg":
        drawn = [text_of(text) for text in ElementTree.parse(path).iter(f"{SVG}text")]
        assert "layers of a, in blocks" in drawn and drawn.count("1.00") == 2 and "nan" not in drawn
        printed = [text for text in drawn if re.fullmatch(r"-?\.\d\d|1\.00", text)]
        assert len(printed) == 5 * 7 - 1
    else:
        assert matplotlib.image.imread(path).shape[2] == 4


def test_large_tables_print_no_values_and_name_some_layers(tmp_path: Path) -> None:
    drawn = [
        text_of(text)
        for text in ElementTree.parse(write_heat_map(table(70, 70), tmp_path / "x.svg")).iter(f"{SVG}text")
    ]
    assert not [text for text in drawn if text.startswith(".")]
    assert drawn.count("0") == drawn.count("69") == 2 and "1" not in drawn


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not a table of layers"), ("[]", "not a table"), ('{"reference": "dcl", "models": {"ce": {}}}', "'layers'"),
    (json.dumps({"reference": "dcl", "models": {"ce": {"layers": ["a"], "other_layers": ["a"], "cka": [[1, 2]]}}}),
     "the table of 'ce' has shape (1, 2) for 1 and 1 layers"),
    (json.dumps({"reference": "dcl", "models": {"ce": {"layers": ["a"], "other_layers": ["a"], "cka": [["x"]]}}}), "x"),
])  # fmt: skip
def test_a_broken_file_is_named(tmp_path: Path, text, message) -> None:
    run = make_run(tmp_path)
    (run / "layers.json").write_text(text)
    with pytest.raises(FastclError) as error:
        write_report(run)
    assert "layers.json: " in str(error.value) and message in str(error.value)


def test_a_heat_map_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(FastclError, match=r"heat maps must be \.svg or \.png"):
        write_heat_map(table(2, 2), tmp_path / "x.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(FastclError, match="cannot be written"):
        write_heat_map(table(2, 2), tmp_path / "file" / "x.svg")
