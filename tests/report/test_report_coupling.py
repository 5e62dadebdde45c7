"""The report's drift per step, the line of Theorem 1 beside it, and the certificates."""

import json
import math
import re
from pathlib import Path

import pytest
from small_runs import certificate_values, change_lines, lines, make_run, page_of, step_line, tables_of, text_of

from fastcl.errors import FastclError
from fastcl.report import coupling, write_report
from fastcl.report.figures import PLATES
from fastcl.report.run import load_run
from fastcl.theory import largest_drift, similarity_coupling_bound

STEPS = range(15)


def _remark(run: Path) -> str:
    return coupling.remark(load_run(run))


def _change_head(run: Path, **changes) -> None:
    head = json.loads((run / "run.json").read_text())
    for key, value in changes.items():
        head["data" if key == "largest_class" else "config"] |= (
            {key: value} if key == "largest_class" else {"train": head["config"]["train"] | {key: value}}
        )
    (run / "run.json").write_text(json.dumps(head))


def test_the_figure_holds_the_recorded_drift_and_the_bound(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path))
    left, right = coupling.DRIFT.draw(run).axes
    bound = similarity_coupling_bound([0.2] * 15, 256, 0.5, 0.1, n=512)
    measured, theorem = (list(line.get_ydata()) for line in left.lines)
    assert measured[0] != measured[0] and theorem[0] != theorem[0]  # 0 has no place on a log scale
    assert measured[1:] == pytest.approx([4 * math.sqrt(s) / (512 * math.sqrt(2)) for s in STEPS[1:]])
    assert theorem[1:] == pytest.approx([10**value / largest_drift(512) for value in bound.log10[1:15]])
    assert left.get_yscale() == "log" and list(left.lines[0].get_xdata()) == list(STEPS)
    for line, measure in zip(right.lines, ("cka", "cka_debiased", "rsa"), strict=True):
        assert list(line.get_ydata()) == [step_line(s, "dcl", "nscl")[measure] for s in STEPS]


def test_the_caption_says_what_the_line_is_worth(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    caption = _remark(run)
    assert "not a bound on this run: the drift is above it at 14 of 15 steps." in caption
    assert "Its Delta" in caption and "vacuous" not in caption
    _change_head(run, temperature=0.01)
    assert "From step 5 on it is vacuous" in _remark(run)
    rows = [step_line(s, "dcl", "nscl") | {"drift": 1e-6 * s} for s in STEPS]
    (run / "pairs.jsonl").write_text(lines(rows))
    _change_head(run, temperature=8.0, batch_size=1024)
    caption = _remark(run)
    assert "at 0 of 15 steps" in caption and "Delta" not in caption and "the paper gives 10^" in caption
    _change_head(run, batch_size=4)
    assert "Its Delta" in (caption := _remark(run)) and "is not defined for this" in caption
    assert "the paper gives" not in caption


@pytest.mark.parametrize("change", [
    {"largest_class": None}, {"largest_class": 2.0}, {"temperature": None}, {"temperature": "warm"},
])  # fmt: skip
def test_without_what_the_theorem_needs_there_is_no_line(tmp_path: Path, change) -> None:
    run = make_run(tmp_path)
    _change_head(run, **change)
    assert "is not drawn: it covers the pair dcl and nscl" in _remark(run)
    assert len(coupling.DRIFT.draw(load_run(run)).axes[0].lines) == 1


def test_the_theorem_speaks_of_one_pair_and_of_all_steps(tmp_path: Path) -> None:
    assert coupling.theorem(load_run(make_run(tmp_path / "ce", ["dcl", "ce"]))) is None
    assert coupling.theorem(load_run(make_run(tmp_path / "swapped", ["nscl", "dcl"]))) is not None
    run = make_run(tmp_path / "gap")
    (run / "pairs.jsonl").write_text(lines([step_line(s, "dcl", "nscl") for s in (0, 2)]))
    assert coupling.theorem(load_run(run)) is None
    (run / "pairs.jsonl").write_text(lines([step_line(0, "dcl", "nscl") | {"lr": None}]))
    assert coupling.theorem(load_run(run)) is None and "is not drawn" in _remark(run)


def test_long_runs_are_thinned_and_undefined_steps_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = [step_line(s, "dcl", "nscl") | {"rsa": None, "cka": 0.5 if s else None} for s in range(2501)]
    (run / "pairs.jsonl").write_text(lines(rows))
    left, right = coupling.DRIFT.draw(load_run(run)).axes
    assert len(left.lines[0].get_xdata()) == 834 and left.lines[0].get_xdata()[-1] == 2500
    assert math.isnan(right.lines[0].get_ydata()[0] + right.lines[2].get_ydata()[-1])
    assert right.lines[0].get_ydata()[1] == 0.5


def test_runs_without_pair_records_have_no_such_figure(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "pairs.jsonl").unlink()
    record = load_run(run)
    assert [plate.name for plate in PLATES if not plate.shown(record)] == ["drift"]
    _change_head(make_run(tmp_path), batch_size=None)  # a share of what?
    assert not coupling.DRIFT.shown(load_run(run))


def test_certificates_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert not coupling.certificates(load_run(run))[1]
    change_lines(run, lambda r: r | certificate_values(r["epoch"], *r["pair"]) if "pair" in r else r)
    page = page_of(run)
    _, table, *_ = tables_of(page)
    assert coupling.remark(load_run(run)).strip() in text_of(page)
    assert list(table) == ["pair", *(f"dcl – {m}" for m in ("nscl", "supcon", "ce", "identity", "reseeded"))]
    rho = math.sqrt(0.008 * 3)
    wanted = [10 * rho / (360 * math.sqrt(2)), rho, 1 - rho / 4, (1 - rho) / (1 + rho), 2 * rho, math.exp(-0.048)]
    assert table["dcl – nscl"][:6] == [f"{value:.4f}" for value in wanted]
    assert table["dcl – identity"] == ["0", "0", "1", "1", "0", "1", "1"] and table["dcl – ce"][-1] == "-1.0000"


@pytest.mark.parametrize(("line", "message"), [
    ('{"pair": ["dcl", "nscl"]}', "'step' must be an integer, got None"),
    ('{"step": 1}', "None does not name 2 of the models"),
    ('{"step": 1, "pair": ["dcl", "moco"]}', "['dcl', 'moco'] does not name 2 of the models"),
    ('{"step": 1, "pair": ["dcl", "dcl"]}', "the pair ['dcl', 'dcl'] is one model twice"),
    ('{"step": 1, "pair": ["dcl", "nscl"], "drift": "0"}', "'drift' must be a number or null, got '0'"),
])  # fmt: skip
def test_a_broken_step_record_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    run = make_run(tmp_path)
    (run / "pairs.jsonl").write_text(lines([step_line(0, "dcl", "nscl")]) + line + "\n")
    with pytest.raises(FastclError, match=r"pairs\.jsonl, line 2: " + re.escape(message)):
        write_report(run)


def test_a_single_step_is_drawn_as_points(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for steps, marker in ((1, "o"), (2, "None")):
        (run / "pairs.jsonl").write_text(lines([step_line(s, "dcl", "nscl") for s in range(steps)]))
        left, right = coupling.DRIFT.draw(load_run(run)).axes
        assert {line.get_marker() for line in (*left.lines, *right.lines)} == {marker}
