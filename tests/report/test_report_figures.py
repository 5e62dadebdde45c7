"""The figures of the report: what they draw, and that all of it can be read."""

import math
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path

import matplotlib
import pytest
from small_runs import SIX, SVG, change_lines, make_run, model_line, pair_line, text_of

from fastcl.report import drawing, figures
from fastcl.report.run import load_run

PLATES = {plate.name: plate for plate in figures.PLATES}


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("six"))


def test_every_figure_names_its_axes_and_its_models(six: Path) -> None:
    run = load_run(six)
    images = {name: ElementTree.fromstring(drawing.svg(plate, run)) for name, plate in PLATES.items()}
    drawn = {name: [text_of(text) for text in image.iter(f"{SVG}text")] for name, image in images.items()}
    band = "noise floor: as close as the reseeded twin"
    models = ["dcl (reference)", "nscl", "supcon", "ce", "identity (= reference)", "reseeded (other views)"]
    for name, wanted in {
        "alignment": ["CKA", "debiased CKA", "RSA", "alignment (1 = same)", band, *models[1:]],
        "weight-gap": ["weight gap", "relative distance (0 = same)", band, *models[1:]],
        "every-pair": ["dcl", "nscl", "supcon", "ce", "debiased CKA (1 = same)", *models[:4]],
        "training-losses": ["dcl", "nscl", "supcon", "ce", "own training loss (nats)", *models],
        "contrastive-losses": ["DCL (self-supervised) loss", "loss gap: DCL minus NSCL", "gap (nats)", *models],
        "accuracy": ["train", "test", "accuracy (fraction correct)", *models],
        "cdnv": ["CDNV", "directional CDNV", "variance / distance² (log scale)", *models],
    }.items():
        assert set(wanted) <= set(drawn[name]), name
        assert "completed epochs" in drawn[name]
        assert (band in drawn[name]) == (band in wanted)
    axes = ["training steps", "fraction of the largest drift (log scale)", "alignment (1 = same)"]
    theorem = "left: Theorem 1 for similarity descent (not a bound on this run)"
    lines = ["left: nscl and dcl, measured", theorem, "right: CKA", "right: debiased CKA", "right: RSA"]
    assert {*axes, *lines} <= set(drawn["drift"])


@pytest.mark.parametrize(("plate", "measures", "perfect"), [
    ("alignment", ["cka", "cka_debiased", "rsa"], 1.0),
    ("weight-gap", ["weight_gap"], 0.0),
])  # fmt: skip
def test_the_band_lies_between_the_reseeded_twin_and_agreement(six, plate, measures, perfect) -> None:
    axes = PLATES[plate].draw(load_run(six)).axes
    for ax, measure in zip(axes, measures, strict=True):
        (band,) = ax.collections
        corners = band.get_paths()[0].vertices
        for epoch in range(4):
            floor = pair_line(epoch, "dcl", "reseeded")[measure]
            heights = corners[corners[:, 0] == epoch, 1]
            assert {*heights} == {floor, perfect}
        drawn = [list(line.get_ydata()) for line in ax.lines]
        assert drawn == [[pair_line(e, "dcl", m)[measure] for e in range(4)] for m in SIX[1:]]
        (identity,) = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert list(identity.get_ydata()) == [perfect] * 4


@pytest.mark.parametrize(("plate", "measures"), [
    ("contrastive-losses", ["dcl_loss", "nscl_loss", "loss_gap", "same_class_mass"]),
    ("accuracy", ["ncc_train", "ncc_test"]),
    ("cdnv", ["cdnv", "cdnv_directional"]),
])  # fmt: skip
def test_curves_hold_the_recorded_values_and_leave_gaps_at_nulls(six, plate, measures) -> None:
    axes = PLATES[plate].draw(load_run(six)).axes
    for ax, measure in zip(axes, measures, strict=True):
        for line, model in zip(ax.lines, SIX, strict=True):
            wanted = [model_line(epoch, model)[measure] for epoch in range(4)]
            assert list(line.get_ydata()) == pytest.approx([math.nan if v is None else v for v in wanted], nan_ok=True)
    assert {ax.get_yscale() for ax in axes} == ({"log"} if plate == "cdnv" else {"linear"})


def test_every_pair_of_models_is_drawn_in_the_panels_of_both(six: Path) -> None:
    models = SIX[:4]
    for ax, model in zip(PLATES["every-pair"].draw(load_run(six)).axes, models, strict=True):
        others = [m for m in models if m != model]
        pairs = [sorted((model, other), key=SIX.index) for other in others]
        drawn = [list(line.get_ydata()) for line in ax.lines]
        assert drawn == [[pair_line(e, *pair)["cka_debiased"] for e in range(4)] for pair in pairs]


def test_a_model_has_one_colour_and_one_marker_in_all_figures(six: Path) -> None:
    run = load_run(six)
    looks: dict[str, set] = {}
    for plate in figures.PLATES:
        (legend,) = plate.draw(run).legends
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            model = text.get_text().split(" (")[0]
            if model in SIX:  # not the band, nor a line of the drift
                looks.setdefault(model, set()).add((handle.get_color(), handle.get_marker()))
    assert set(looks) == set(SIX) and all(len(one) == 1 for one in looks.values()), looks
    assert len(set.union(*looks.values())) == len(SIX)


@pytest.mark.parametrize("epochs", [0, 60])
@pytest.mark.parametrize("models", [
    SIX,
    ["dcl", "nscl"],
    ["nscl_with_the_positive_in_denominator", "chuang_debiased", "supcon_in", *"abcd", "identity", "reseeded"],
], ids=len)  # fmt: skip
def test_nothing_is_clipped_and_nothing_overlaps(tmp_path: Path, models, epochs) -> None:
    run = load_run(make_run(tmp_path, models, epochs))
    for plate in filter(lambda plate: plate.shown(run), figures.PLATES):
        with matplotlib.rc_context(drawing.STYLE):
            figure = plate.draw(run)
            figure.draw_without_rendering()
            drawn = figure.get_tightbbox()
            boxes = [part.get_tightbbox() for part in [*figure.axes, *figure.legends]]
        width, height = figure.get_size_inches()
        assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height, (plate.name, drawn)
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])], plate.name


@pytest.mark.parametrize("span", [1.0001, 1.04, 1.5, 4.0, 60.0, 1e4, 1e9])
def test_a_log_axis_has_labels_whatever_its_range(tmp_path: Path, span: float) -> None:
    run = make_run(tmp_path, ["dcl"])
    change_lines(run, lambda row: row | {"cdnv": 0.7123 * span ** -(row["epoch"] / 3)} if "model" in row else row)
    figure = PLATES["cdnv"].draw(load_run(run))
    figure.draw_without_rendering()
    ax = figure.axes[0]
    low, high = ax.get_ylim()
    labels = [tick.label1.get_text() for tick in ax.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert 2 <= len(labels) <= 10 and len(set(labels)) == len(labels), labels
    assert all(float(label) > 0 for label in labels)


def test_a_run_of_one_model_has_nothing_to_compare(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path, ["dcl"]))
    for name in ("alignment", "weight-gap"):
        image = ElementTree.fromstring(drawing.svg(PLATES[name], run))
        assert "no values" in [text_of(text) for text in image.iter(f"{SVG}text")]
