"""Names that no terminal or page can show as they are, and places that cannot be written: found before the work."""

import json
import os
from pathlib import Path

import pytest
from small_images import noise, png, write_tree
from small_runs import make_run
from tiny_run import tiny_config

from fastcl import FastclError
from fastcl.report import write_report
from fastcl.report.heat_maps import read_layer_tables
from fastcl.train import Lockstep

ODD = os.fsdecode(b"caf\xe9")
SMALL = dict(views__preset="cifar", train__models=["dcl", "nscl"], train__controls=[], train__epochs=1)


def test_a_run_of_names_that_are_not_utf_8(tmp_path):
    files = {f"{ODD}/{name}/{k}.png": png(noise(k, 12, 12)) for name in (ODD, "b") for k in range(6)}
    write_tree(tmp_path, files)
    source, out = f"folder:{tmp_path / ODD}", tmp_path / f"run {ODD}"
    config = tiny_config(data__source=source, data__classes="none", train__batch_size=4, **SMALL)
    Lockstep(config, out).run()
    page = write_report(out).read_text(encoding="utf-8")
    assert "caf\\xe9" in page and "\ufffd" not in page
    text = (out / "run.json").read_bytes().decode("ascii")
    described = json.loads(text)
    assert described["config"]["data"]["source"].endswith("caf\\xe9") and "\\udce9" not in text.replace("\\\\", "")
    assert any((out / "tensorboard").iterdir())
    Lockstep(config, out).run()  # it is the same run
    old = described | {"config": described["config"] | {"data": described["config"]["data"] | {"source": source}}}
    (out / "run.json").write_text(json.dumps(old))  # as earlier versions wrote it
    Lockstep(config, out)
    assert "caf\\xe9" in write_report(out).read_text(encoding="utf-8")


def test_layers_of_any_name_are_drawn(tmp_path):
    run = make_run(tmp_path / "run", ["dcl", "nscl"])
    one = {"layers": ["a\udce9", "b\nc"], "other_layers": ["\ud800", "nul\0"], "cka": [[1, 0.5], [0.5, 1]]}
    (run / "layers.json").write_text(json.dumps({"reference": "dcl", "models": {"\udcff": one}}))
    (table,) = read_layer_tables(run)
    assert table.columns_of == "\\xff" and table.rows == ("a\\xe9", "b\\nc")
    assert "a\\xe9" in write_report(run).read_text(encoding="utf-8")


PLACES = ("file/run", "x" * 300, "new/" + "x" * 300, "nul\0", "loop/run")


@pytest.mark.parametrize("place", PLACES)
def test_places_that_cannot_be_written_are_found_before_the_work(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setattr("fastcl.train.trainer.open_inputs", lambda *_: pytest.fail("data were read"))
    monkeypatch.setattr("fastcl.report.html._page", lambda *_: pytest.fail("figures were drawn"))
    run = make_run(tmp_path / "run")
    with pytest.raises(FastclError, match="--out: .* cannot be written|link"):
        Lockstep(tiny_config(**SMALL), tmp_path / place)
    with pytest.raises(FastclError, match="out: .* cannot be written|link"):
        write_report(run, tmp_path / place)
    with pytest.raises(FastclError, match="no such file|cannot be read"):
        write_report(tmp_path / place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_folders_without_rights_are_one_error(tmp_path):
    """Checked as another user, since root may write everywhere."""
    run = make_run(tmp_path / "closed" / "run")
    (tmp_path / "closed").chmod(0o700)
    places = [tmp_path, *tmp_path.parents[:-1]]
    modes = [place.stat().st_mode for place in places]
    for place in places[:-1]:
        place.chmod(0o755)
    try:
        os.seteuid(65534)
        for call, message in (
            (lambda: Lockstep(tiny_config(**SMALL), tmp_path / "closed" / "x"), "cannot be written .Permission denied"),
            (lambda: Lockstep(tiny_config(**SMALL), tmp_path / "x"), "cannot be written .Permission denied"),
            (lambda: write_report(run), "cannot be read .Permission denied"),
        ):  # fmt: skip
            with pytest.raises(FastclError, match=message):
                call()
    finally:
        os.seteuid(0)
        for place, mode in zip(places, modes, strict=True):
            place.chmod(mode & 0o7777)


def test_a_report_takes_no_other_file_of_its_run(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "weights").mkdir()
    (tmp_path / "outside").write_text("precious")
    os.link(run / "metrics.jsonl", tmp_path / "other name")
    (tmp_path / "link.html").symlink_to(tmp_path / "outside")
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    names = ("run.json", "metrics.jsonl", "pairs.jsonl", "timing.jsonl", "layers.json", "weights/x")
    inside = [run / name for name in names]
    for out in (*inside, tmp_path / "other name", tmp_path / "link.html", run, Path("/dev/null"), Path()):
        with pytest.raises(FastclError, match="out: "):
            write_report(run, out)
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert (tmp_path / "outside").read_text() == "precious" and not Path("/dev/null").is_file()
    (run / "report.html").symlink_to(tmp_path / "outside")
    with pytest.raises(FastclError, match="report.html is a link"):
        write_report(run)
    assert (tmp_path / "outside").read_text() == "precious"
    (run / "report.html").unlink()
    assert write_report(run, run / "mine.html") == run / "mine.html"
