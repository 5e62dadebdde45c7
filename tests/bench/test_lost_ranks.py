"""bench.lost_ranks: a rank under torchrun that is killed, and what the command writes."""

import json
from itertools import count
from pathlib import Path

import pytest

from bench import lost_ranks
from bench.lost_ranks import MOMENTS, Loss
from fastcl.errors import FastclError

SMALL = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "stem_type": "deep", "stem_width": 4}


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_names_a_killed_rank(tmp_path: Path) -> None:
    found = lost_ranks.measure(Loss("killed", 2, 1, "a step"), SMALL, tmp_path)
    assert found["named"] and found["status"] == 1 and found["epoch"] >= 1 and found["seconds"] > 0, found


def test_the_command_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticks = count(1)

    def measure(loss: Loss, *_: object) -> dict[str, object]:
        if loss == Loss("killed", 3, 2, "a checkpoint"):
            raise FastclError("the run went on for 240 s")
        return {"seconds": next(ticks), "status": 1, "named": loss.ranks == 2, "said": "", "epoch": 1}

    monkeypatch.setattr(lost_ranks, "measure", measure)
    assert lost_ranks.main(["--out", str(tmp_path), "--how", "killed"]) == 1
    records = json.loads((tmp_path / "lost_ranks.json").read_text())
    assert len(records) == 4 * len(MOMENTS) - 1 and records[-1]["timeout"] == lost_ranks.TIMEOUT
    text = (tmp_path / "lost_ranks.md").read_text()
    assert "| killed during a step | 1-2 | 3-4 | 2 of 4 |" in text
    assert "| killed during a checkpoint | 9-10 | 11 | 2 of 3 |" in text
    assert "error: Loss(" in capsys.readouterr().err
