"""bench.adapters: what it writes, and the size from which a patch pays."""

import json
from pathlib import Path

import pytest

from bench import adapters
from fastcl.adapters import payoff


def test_the_command_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("info_nce")
    earlier = {"kind": "queue", "rows": 8, "d": 3, "ms": {"original": [1.0], "fastcl": [0.5]}, "ratio": 2.0,
               "device": "another", "date": "yesterday"}  # fmt: skip
    (tmp_path / "adapters.json").write_text(json.dumps([earlier]))
    options = ["--rows", "4", "--width", "3", "--repeats", "3", "--kinds", "one direction", "--out", str(tmp_path)]
    assert adapters.main(options) == 0
    kept, record = json.loads((tmp_path / "adapters.json").read_text())
    assert kept == earlier
    assert (record["kind"], record["rows"]) == ("one direction", 4) and set(record["ms"]) == {"original", "fastcl"}
    assert all(3 <= len(times) <= 3 * adapters.TIMED and min(times) > 0 for times in record["ms"].values())
    assert "times as fast as info_nce" in capsys.readouterr().out
    text = (tmp_path / "adapters.md").read_text()
    for line in ("| one direction | 4 |", "- queue: another, yesterday, 3 columns", "| queue | 8 |"):
        assert line in text


def test_the_fewest_rows_are_those_from_which_all_sizes_pay() -> None:
    ratios = {64: 1.2, 128: 0.9, 256: 1.0, 512: 3.0}
    records = [{"kind": "queue", "rows": rows, "ratio": ratio} for rows, ratio in ratios.items()]
    assert adapters.fewest(records, "queue") == 256
    assert adapters.fewest(records[:2], "queue") is None and adapters.fewest(records, "classes") is None


def test_the_limits_of_the_patches_are_those_of_the_record() -> None:
    records = json.loads((Path(adapters.__file__).parent / "results/cpu/adapters.json").read_text())
    measured = {kind: limit for kind, limit in payoff.FEWEST.items() if kind in adapters.CASES}
    assert {kind: adapters.fewest(records, kind) for kind in adapters.CASES} == measured
