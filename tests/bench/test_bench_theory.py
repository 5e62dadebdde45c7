"""bench.theory: what it writes can be read, its tables say what the records do, and a bound that fails is told."""

import json
from pathlib import Path

import pytest

from bench.theory import report, run
from bench.theory.settings import COVERED, KINDS, drawn
from bench.theory.slack import Slack, slacks

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def test_the_command_writes_what_it_measured(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "theory"
    options = ["--settings", "4", "--seed", "2", "--samples", "12", "--out", str(folder)]
    assert run.main(options) == 0
    records = report.read(tmp_path)
    assert [r["kind"] for r in records] == [COVERED] * 4 + list(KINDS)[1:]
    assert [r["seed"] for r in records] == [2, 3, 4, 5, 2, 2, 2]
    for r in records:
        found = slacks(drawn(r["seed"], r["kind"], 12))
        known = {name: value for name, value in r["slack"].items() if value is not None}
        assert known == pytest.approx({name: s.log10 for name, s in found.items() if s.log10 is not None}, rel=1e-3)
        assert r["vacuous"] == {name: s.vacuous for name, s in found.items() if s.vacuous is not None}
    assert report.covered(records) in capsys.readouterr().out
    assert report.body(records) in (folder / "theory.md").read_text()
    assert "Theorem 1, convex" in (folder / "slack.svg").read_text()
    assert json.loads((folder / "theory.json").read_text())["versions"]["torch"]


def test_a_failure_within_the_assumptions_is_told(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    values = {"a": Slack(-1e-6, False), "b": Slack(1.0, True), "c": Slack(-1e-12)}
    monkeypatch.setattr(run, "slacks", lambda setting: values if setting.seed == 1 else {"a": Slack(2.0, False)})
    assert run.main(["--settings", "2", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "failed within the assumptions: a\n" in said
    for row in ("| a | 2 | 2 | 1 | 1 | 10 |", "| b | 0 | 1 | 0 | 10 | 10 |", "| c |  | 1 | 0 | 1 | 1 |"):
        assert row in said
    with pytest.raises(SystemExit):
        run.main(["--settings", "0", "--out", str(tmp_path)])
    assert "--settings: must be at least 1, got 0" in capsys.readouterr().err


def test_the_committed_record_is_of_a_thousand_settings_and_its_report_says_what_it_does():
    records = report.read(RESULTS)
    assert sum(r["kind"] == COVERED for r in records) == 1000
    made = report.body(records)
    assert made in (RESULTS / "theory" / "theory.md").read_text(encoding="utf-8")
    # A few of the small settings, again.
    small = [r for r in records if r["samples"] < 12 and r["kind"] == COVERED][:3]
    for r in small:
        found = slacks(drawn(r["seed"]))
        assert all(value is None or found[name].log10 == pytest.approx(value, rel=1e-3, abs=1e-6)
                   for name, value in r["slack"].items())  # fmt: skip
