"""Sweeps as a user runs them: four tiny cells, what is gathered from them, and what is left after kills."""

import csv
import json
import os
import re
import shutil
import signal
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import SVG, XHTML, tables_of
from tiny_run import results, tiny_toml
from warm_sweeps import last_process, run, start

from fastcl.cli.main import main
from fastcl.report.run import load_run
from fastcl.sweep import load_sweep
from fastcl.train.run_folder.records import locked

COLD, WARM = "0.2", "1.0"  # temperatures
NAMES = [f"temperature={t},seed={seed}" for t in (COLD, WARM) for seed in (7, 8)]
GRID = ["--over", f"train.temperature={COLD},1", "--seeds", "2"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_toml(tmp_path_factory.mktemp("config") / "tiny.toml")
    text = path.read_text().replace('["dcl", "nscl", "ce"]', '["dcl", "nscl"]').replace("epochs = 3", "epochs = 2")
    path.write_text(text.replace("classes = 3", "classes = 2") + 'controls = ["reseeded"]\n')
    return path


@pytest.fixture(scope="module")
def swept(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep, run without a stop."""
    out = tmp_path_factory.mktemp("sweep") / "s"
    status, said = run(config, *GRID, "--out", out, output=out.parent / "output")
    assert status == 0, said
    assert [line for line in said.splitlines() if line.startswith("finished")] == [
        f"finished {name} ({k} of 4)" for k, name in enumerate(NAMES, 1)
    ]
    return out


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page without figures, as that of `swept`: they take as long to draw as all cells to train."""
    monkeypatch.setattr("fastcl.sweep.sweep_page.pictures", lambda sweep: iter(()))


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(out / "table.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def until(condition: Callable[[], object], patience: float = 120) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def gone(pid: int) -> bool:
    """Whether a process has ended, or is a zombie that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_table_holds_every_record_of_every_run(swept: Path) -> None:
    rows = rows_of(swept)
    wanted = []
    for name in NAMES:
        run = json.loads((swept / "cells" / name / "run.json").read_text())
        steps = run["data"]["train"] // 64
        for line in (swept / "cells" / name / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            pair = record.pop("pair", None) or [record.pop("model"), ""]
            known = {"cell": name, "train.temperature": name.split("=")[1].split(",")[0], "seed": name[-1]}
            known |= {"epochs": "2", "steps_per_epoch": str(steps), "test_images": str(run["data"]["test"])}
            known |= {"step": str(record["epoch"] * steps), "model": pair[0], "other": pair[1]}
            wanted.append(known | {key: "" if value is None else repr(value) for key, value in record.items()})
    assert len(rows) == len(wanted) == 4 * 3 * (3 + 3)  # 3 evaluations of 3 models and their pairs
    found = [{key: value for key, value in row.items() if value} for row in rows]
    wanted = [{key: value for key, value in row.items() if value} for row in wanted]
    order = ("cell", "epoch", "model", "other")
    assert sorted(found, key=lambda r: [r.get(k, "") for k in order]) == sorted(
        wanted, key=lambda r: [r.get(k, "") for k in order]
    )
    assert [row["cell"] for row in rows] == [name for name in NAMES for _ in range(18)]
    assert len({row["test_images"] for row in rows}) == 1


def test_the_page_shows_grid_figures_and_numbers(swept: Path, tmp_path: Path) -> None:
    assert main(["report", str(swept), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = ElementTree.fromstring(text)
    assert len(list(page.iter(f"{SVG}svg"))) == 3 and 'class="warning"' not in text
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 100
    assert not re.search(r"\ssrc=|@import|<script|<link", text)
    grid, finals, cells, config = tables_of(page)
    assert grid["train.temperature"] == ["0.2, 1.0"] and grid["train.seed"] == ["7, 8"]
    runs = [load_run(swept / "cells" / name) for name in NAMES[:2]]
    a, b = (run.pair_value("dcl", "nscl", "cka") for run in runs)
    rows = [["".join(cell.itertext()) for cell in row] for row in page.iter(f"{XHTML}tr")]
    nscl = next(row for row in rows if row[:2] == [COLD, "nscl"])
    assert nscl[2] == "2" and nscl[3] == f"{(a + b) / 2:.4f} ± {abs(a - b) / 2**0.5:.4f}"
    assert list(cells)[1:] == NAMES and cells[NAMES[0]][:2] == ["finished", "2 of 2"]
    assert finals["train.temperature"][:3] == ["model", "runs", "CKA"] and config["batch_size"] == ["64"]
    captions = " ".join("".join(c.itertext()) for c in page.iter(f"{XHTML}figcaption"))
    assert "from the lowest to the highest seed" in captions and "noise floor" in captions


def test_the_same_command_repeats_nothing_and_report_writes_the_same(
    swept: Path, config: Path, capsys, undrawn: None
) -> None:
    def times() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in (swept / "cells").rglob("*") if p.is_file() and p.name != ".lock"}

    before = times()
    page, table = (swept / "sweep.html").read_bytes(), (swept / "table.csv").read_bytes()
    (swept / "table.csv").unlink()
    assert main(["sweep", str(config), *GRID, "--out", str(swept)]) == 0
    assert "4 of them finished" in capsys.readouterr().out
    assert before == times()
    (swept / "table.csv").unlink()
    assert main(["report", str(swept)]) == 0
    assert (swept / "sweep.html").read_bytes() == page and (swept / "table.csv").read_bytes() == table


def test_a_real_process_makes_the_same_run(
    swept: Path, config: Path, tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others are forked here from a process that has its libraries imported and uses one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many threads, the same bits
    shutil.copytree(swept, tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "cells" / NAMES[1])
    assert main(["sweep", str(config), *GRID, "--out", str(tmp_path / "s")]) == 0
    assert results(tmp_path / "s" / "cells" / NAMES[1]) == results(swept / "cells" / NAMES[1])
    assert (tmp_path / "s" / "table.csv").read_bytes() == (swept / "table.csv").read_bytes()


def test_kills_at_any_moment_change_nothing(swept: Path, config: Path, tmp_path: Path) -> None:
    out, output = tmp_path / "s", tmp_path / "output"
    arguments = [config, *GRID, "--out", out]
    cells, logs = ([out / folder / name for name in NAMES] for folder in ("cells", "logs"))
    logs = [log.with_name(f"{log.name}.txt") for log in logs]

    sweep = start(*arguments, output=output)  # killed while a cell trains, which goes on
    until(lambda: (cells[0] / "timing.jsonl").exists())
    sweep.kill()
    sweep.join()
    assert not gone(last_process(logs[0]))

    sweep = start(*arguments, output=output)  # a cell is killed: the others go on
    until(lambda: (cells[1] / "timing.jsonl").exists())
    os.kill(last_process(logs[1]), signal.SIGKILL)
    sweep.join(60)
    assert sweep.exitcode == 1
    said = output.read_text()
    assert f"FAILED {NAMES[1]} (" in said and f"  {NAMES[1]}: killed by SIGKILL" in said.splitlines()
    sweep = load_sweep(out)
    assert [cell.state for cell in sweep.cells] == ["finished", "failed", "finished", "finished"]
    page = (out / "sweep.html").read_text(encoding="utf-8")
    assert "of 4 cells 3 finished, 1 failed" in page and "killed by SIGKILL" in page

    shutil.rmtree(cells[3])
    sweep = start(*arguments, output=output)  # ended in the usual way: so is its cell
    until(lambda: (cells[3] / "timing.jsonl").exists())
    sweep.terminate()
    sweep.join(60)
    assert sweep.exitcode == 128 + signal.SIGTERM
    assert output.read_text().endswith("ended by SIGTERM; the same command resumes from the last checkpoint\n")
    until(lambda: gone(last_process(logs[3])))
    assert load_sweep(out).cells[3].state == "unfinished" and not (out / "failed.json").read_text().count("SIG")

    status, said = run(*arguments, output=output)
    assert status == 0, said
    for name in ("table.csv", "sweep.html", "sweep.json", "failed.json"):
        assert (out / name).read_bytes() == (swept / name).read_bytes(), name


def test_a_failed_cell_is_reported_and_the_others_go_on(config: Path, tmp_path: Path) -> None:
    grid = ["--over", "optim.lr=1e30,0.05", "--over", "train.epochs=1"]
    status, said = run(config, *grid, "--jobs", "2", "--out", tmp_path / "s", output=tmp_path / "output")
    assert status == 1 and "error: 1 of 2 runs failed; the same command tries them again" in said, said
    failed, other = load_sweep(tmp_path / "s").cells
    assert (failed.state, other.state) == ("failed", "finished") and failed.run is not None
    assert failed.error.startswith("status 1, error: ") and "is nan at step" in failed.error
    assert {row["cell"] for row in rows_of(tmp_path / "s") if row["epoch"] == "1"} == {other.name}


def test_one_sweep_at_a_time_and_only_the_same(swept: Path, config: Path, tmp_path: Path, capsys) -> None:
    def refused(*arguments: str, out: Path = swept) -> str:
        assert main(["sweep", str(config), *arguments, "--out", str(out)]) == 1
        return capsys.readouterr().err

    with locked(swept):
        assert f"another process is sweeping in {swept}" in refused(*GRID)
    assert "the values of train.temperature (there also 1.0)" in refused("--over", "train.temperature=0.2,0.5")
    assert "the seeds (there also 8)" in refused("--over", "train.temperature=0.2,1")
    assert "the swept keys (train.temperature there, optim.lr here)" in refused("--over", "optim.lr=1,2")
    assert "--equal ('epochs' there, 'steps' here)" in refused(*GRID, "--equal", "steps")
    other = tmp_path / "other.toml"
    other.write_text(config.read_text().replace("projection = 8", "projection = 4"))
    assert main(["sweep", str(other), *GRID, "--out", str(swept)]) == 1
    assert "differs in model.projection (8 there, 4 here)" in capsys.readouterr().err
    assert "holds a run" in refused(*GRID, out=swept / "cells" / NAMES[0])
    (tmp_path / "x" / "cells").mkdir(parents=True)
    assert "holds cells/, but no sweep.json" in refused(*GRID, out=tmp_path / "x")
    assert "is a file" in refused(*GRID, out=config)


def test_a_grid_can_grow(swept: Path, config: Path, capsys) -> None:
    more = ["--over", "train.temperature=0.5,0.2,1", "--seeds", "2", "--dry-run"]
    before = (swept / "sweep.json").read_bytes()
    assert main(["sweep", str(config), *more, "--out", str(swept)]) == 0
    head, *cells = capsys.readouterr().out.splitlines()
    assert head.startswith("6 cells (3 values of train.temperature x 2 seeds) in 6 runs, 4 finished; ")
    assert [cell.endswith(", finished") for cell in cells] == [False, False, True, True, True, True]
    assert cells[0] == "  temperature=0.5,seed=7: 2 epochs of 4 steps, lr 0.05"
    assert (swept / "sweep.json").read_bytes() == before
