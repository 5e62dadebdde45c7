"""Figures, table and page of synthetic sweeps whose every number is known."""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib.collections import PolyCollection
from small_runs import SIX, XHTML, change_lines, make_run, tables_of, text_of

from fastcl.errors import FastclError
from fastcl.report.drawing import styled
from fastcl.sweep import load_sweep, write_sweep_report
from fastcl.sweep.long_table import columns, rows
from fastcl.sweep.sweep_figures import final_values, pictures


def make_sweep(
    out: Path, over: dict[str, list[str]], seeds: Sequence[int] = (0, 1, 2), models: Sequence[str] = SIX, **head
) -> Path:
    """A sweep whose cells hold the synthetic run; the k-th seed's alignment is lower by k / 100."""
    combinations: list[dict[str, str]] = [{}]
    for key, values in over.items():
        combinations = [c | {key: value} for c in combinations for value in values]
    cells = []
    for number, values in enumerate(combinations):
        for k, seed in enumerate(seeds):
            name = f"{number}-{seed}"
            cells.append({"name": name, "run": name, "values": values, "seed": seed})
            folder = make_run(out / "cells" / name, models, timed=False)

            def lower(row: dict, k: int = k) -> dict:
                return row | {"cka": row["cka"] - k / 100} if "pair" in row else row

            change_lines(folder, lower)
            run = json.loads((folder / "run.json").read_text())
            run["config"]["optim"] = {"lr": 0.1 * (number + 1)}
            (folder / "run.json").write_text(json.dumps(run))
    whole = {"config": run["config"], "over": over, "seeds": list(seeds), "equal": "epochs", "test_images": 360}
    (out / "sweep.json").write_text(json.dumps(whole | {"cells": cells} | head))
    return out


@pytest.fixture
def finished(monkeypatch):
    """Synthetic runs have no weights."""
    monkeypatch.setattr("fastcl.sweep.outcomes.lacks", lambda *_: [])


def test_lines_are_means_and_bands_reach_from_the_lowest_to_the_highest_seed(tmp_path, finished):
    sweep = load_sweep(make_sweep(tmp_path / "s", {"train.temperature": ["0.1", "0.5"]}))
    drawn = {}
    for picture in pictures(sweep):
        with styled():
            drawn[picture.name] = picture.draw()
    assert list(drawn) == ["over-epochs", "final-train-temperature", "curves-train-temperature-0"]
    cka = [math.exp(-0.008 * epoch) for epoch in range(4)]
    for name, panel, line, wanted in (
        ("over-epochs", 0, 0, [value - 0.01 for value in cka]),
        ("final-train-temperature", 0, 0, [cka[3] - 0.01] * 2),
        ("curves-train-temperature-0", 0, 1, [value - 0.01 for value in cka]),
        ("over-epochs", 2, 0, [value**2 for value in cka]),  # RSA, equal in all seeds
    ):
        ax = drawn[name].axes[panel]
        assert list(ax.lines[line].get_ydata()) == pytest.approx(wanted)
        band = next(c for c in ax.collections if isinstance(c, PolyCollection))
        ys = band.get_paths()[0].vertices[:, 1]
        spread = 0.01 if panel == 0 else 0
        assert (ys.max(), ys.min()) == pytest.approx((max(wanted) + spread, min(wanted) - spread))
    figure = drawn["final-train-temperature"]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["0.1", "0.5"]
    assert [text.get_text() for text in figure.legends[0].get_texts()][:4] == [
        "nscl", "supcon", "ce", "reseeded (other views)"
    ]  # fmt: skip
    spread = final_values(sweep, sweep.groups[0], "reseeded", "cka")
    assert spread.values == pytest.approx([math.exp(-0.03) - k / 100 for k in range(3)])


def test_rows_of_panels_are_combinations_and_what_is_left_out_is_said(tmp_path, finished):
    grid = {"train.batch_size": ["64", "128"], "optim.lr": [str(k) for k in range(1, 9)], "data.classes": ["2"]}
    sweep = load_sweep(make_sweep(tmp_path / "s", grid, seeds=[0], models=["dcl", "nscl", "reseeded"]))
    found = {picture.name: picture for picture in pictures(sweep)}
    assert len(found) == 1 + (1 + 4) + (1 + 2)  # nothing by the key with one value
    assert "Only the first 6 of 16 combinations" in found["over-epochs"].caption
    assert "Only the first 4 of 8 combinations" in found["curves-train-batch_size-0"].caption
    assert "Only" not in found["final-optim-lr"].caption
    with styled():
        figure = found["final-optim-lr"].draw()
    assert [" ".join(ax.get_title("left").split()) for ax in figure.axes[::4]] == [
        f"CKA: batch_size = {size}, classes = 2" for size in (64, 128)
    ]
    assert found["curves-optim-lr-1"].title == "During training, by optim.lr (batch_size = 128, classes = 2)"


def test_equal_steps_are_drawn_over_steps(tmp_path, finished):
    sweep = load_sweep(make_sweep(tmp_path / "s", {"data.classes": ["2", "5"]}, equal="steps"))
    with styled():
        figure = next(iter(pictures(sweep))).draw()
    assert figure.axes[0].get_xlabel() == "training steps"
    assert list(figure.axes[0].lines[0].get_xdata()) == [epoch * (1437 // 256) for epoch in range(4)]


def test_unfinished_broken_and_absent_cells(tmp_path):
    out = make_sweep(tmp_path / "s", {"train.temperature": ["0.1", "0.5"]}, seeds=[0, 1])
    (out / "cells" / "0-1" / "metrics.jsonl").write_text("")
    (out / "cells" / "1-0" / "metrics.jsonl").write_text("nonsense\n")
    for path in (out / "cells" / "1-1").iterdir():
        path.unlink()
    (out / "failed.json").write_text(json.dumps({"0-1": "status 1, <b>error</b>"}))
    sweep = load_sweep(out)
    assert [cell.state for cell in sweep.cells] == ["unfinished", "failed", "failed", "not begun"]
    assert "metrics.jsonl, line 1: not valid JSON" in sweep.cells[2].error
    assert {row[0] for row in rows(sweep)} == {"0-0"}
    page = ElementTree.fromstring(write_sweep_report(out).read_text(encoding="utf-8"))
    warning = next(p for p in page.iter(f"{XHTML}p") if p.get("class") == "warning")
    assert text_of(warning).startswith("Incomplete sweep: of 4 cells 1 unfinished, 2 failed, 1 not begun.")
    tables = tables_of(page)
    assert tables[1]["0-1"] == ["status 1, <b>error</b>"] and list(tables[1])[1:] == ["0-1", "1-0"]
    assert "model" not in [cell for table in tables for cell in table.get("train.temperature", [])][2:]


def test_nothing_measured_yet(tmp_path):
    out = make_sweep(tmp_path / "s", {"train.temperature": ["0.1", "0.5"]}, seeds=[0])
    for name in ("0-0", "1-0"):
        (out / "cells" / name / "run.json").unlink()
        (out / "cells" / name / "metrics.jsonl").unlink()
    page = ElementTree.fromstring(write_sweep_report(out).read_text(encoding="utf-8"))
    assert "2 not begun" in text_of(page)
    lines = (out / "table.csv").read_text().splitlines()
    assert lines == [",".join(columns(load_sweep(out)))]


def test_a_broken_identity_control_is_told(tmp_path, finished, monkeypatch):
    monkeypatch.setattr("fastcl.sweep.sweep_page.pictures", lambda sweep: iter(()))
    out = make_sweep(tmp_path / "s", {"train.temperature": ["0.1", "0.5"]}, seeds=[0])
    assert "identity control holds" in text_of(_page(out))
    change_lines(out / "cells" / "1-0", lambda row: row | {"cka": 0.999} if "identity" in row.get("pair", []) else row)
    assert "identity control BROKEN in 1" in text_of(_page(out))


def _page(out: Path) -> ElementTree.Element:
    return ElementTree.fromstring(write_sweep_report(out).read_text(encoding="utf-8").replace("</dt>", "</dt> "))


def test_folders_that_hold_no_sweep(tmp_path):
    cell = {"name": "seed=0", "run": "seed=0", "values": {}, "seed": 0}

    def whole(**changes):
        return json.dumps({"config": {}, "over": {}, "seeds": [0], "equal": "epochs", "cells": [cell]} | changes)

    with pytest.raises(FastclError, match=r"sweep.json: no such file; is .* the folder of a sweep"):
        write_sweep_report(tmp_path)
    for text, message in (
        ("{", "not valid JSON"), ("[]", "must be a JSON object"), ("{}", "'config' is missing"),
        (whole(cells=[{}]), "{} is no cell of it"), (whole(config={"data": 5}), "5 in 'config' is no dict"),
        (whole(over={"optim.lr": 5}), "5 in 'over' is no list"), (whole(seeds=["x"]), "'x' in 'seeds' is no int"),
        (whole(cells=[cell | {"run": "../x"}]), "'../x'.* is no cell of it"),
        (whole(over={"optim.lr": [1]}, cells=[cell | {"values": {"optim.lr": 1}}]), "1 is no value of 'optim.lr'"),
    ):  # fmt: skip
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(FastclError, match=message):
            load_sweep(tmp_path)


def test_parquet_holds_the_same(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = make_sweep(tmp_path / "s", {"train.temperature": ["0.1", "0.5"]}, seeds=[0])
    write_sweep_report(out)
    table, sweep = parquet.read_table(out / "table.parquet"), load_sweep(out)
    assert table.column_names == columns(sweep)
    wanted = [[row[0], float(row[1]), *row[2:]] for row in rows(sweep)]
    assert [list(row.values()) for row in table.to_pylist()] == wanted
