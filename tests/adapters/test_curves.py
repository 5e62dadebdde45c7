"""The examples of losses train alike with the original loss and with fastcl's, on real data."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from originals import without_their_init

from bench import curves

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "examples" / "curves.json"


@pytest.mark.parametrize("name", curves.PANELS)
def test_both_losses_give_the_same_curve(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_their_init(monkeypatch)
    monkeypatch.syspath_prepend(curves.EXAMPLES)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            train = importlib.import_module(name).train
            original, ours = (train(way, 5) for way in curves.WAYS)
    except ImportError as error:
        pytest.skip(str(error))
    finally:
        torch.set_default_dtype(kept)
        for module in (name, "curves", "digits"):
            sys.modules.pop(module, None)
    assert len(ours) == 5 and len(set(ours)) == 5  # it learns
    assert ours == pytest.approx(original, rel=1e-10)


def test_the_figure_is_that_of_the_record(tmp_path: Path) -> None:
    """Of all examples, in float32, where the first steps agree; and drawn again."""
    losses = json.loads(RECORD.read_text(encoding="utf-8"))["losses"]
    assert losses.keys() == curves.PANELS.keys()
    for both in losses.values():
        assert len(both["original"]) == len(both["fastcl"]) == curves.STEPS
        assert both["fastcl"][:10] == pytest.approx(both["original"][:10], rel=1e-5)
    (tmp_path / "curves.json").write_bytes(RECORD.read_bytes())
    assert curves.main(["--draw", "--out", str(tmp_path)]) == 0
    drawn = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert all(title in drawn for title, _ in curves.PANELS.values())
