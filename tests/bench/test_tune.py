"""The tuner rehearsed on the CPU; what wins, what is dropped, and that it leaves the launches as it found them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import tune, tune_predicted
from bench.static.jobs import StaticError
from bench.static.predict.calls import Loss
from fastcl.kernels.common import launch

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here")


@pytest.fixture(autouse=True)
def table() -> list[dict]:
    """The rows that the launches read; as before after each test."""
    rows = launch._rows()
    before = [dict(row) for row in rows]
    yield rows
    for row, old in zip(rows, before, strict=True):
        row.update(old)
    launch.config.cache_clear()


def always(monkeypatch, wins: bool) -> None:
    """Timing never decides a test: the times are still taken."""
    monkeypatch.setattr(tune, "beats", lambda candidate, present: wins)


@needs_interpreter
@pytest.mark.parametrize("wins", [True, False])
def test_a_rehearsal_tries_candidates_and_writes_a_table_that_can_be_read(tmp_path, monkeypatch, capsys, table, wins):
    always(monkeypatch, wins)
    before = [dict(row) for row in table]
    present = launch.TABLE.read_text()
    path = tmp_path / "table.json"
    assert tune.main(["--rehearse", "--out", str(path)]) == 0
    output = capsys.readouterr().out
    changed = [(new, old) for new, old in zip(json.loads(path.read_text()), before, strict=True) if new != old]
    # The candidate of each is block_s = 32: a row that has it already cannot change.
    tried = [row for row in before if (row["arch"], row["mode"], row["max_d"]) == ("sm_90", "none", 64)]
    tried = [row for row in tried if row["kernel"] in tune.KERNELS and row["block_s"] != 32]
    assert output.count("block_s=32: ") == len(tried) > 0
    assert [old for _, old in changed] == (tried if wins else [])
    assert all(new == old | {"block_s": 32} for new, old in changed)
    assert output.count(" ms against ") == len(tried) and launch.TABLE.read_text() == present
    assert f"{len(changed)} of" in output and wins == (", kept" in output)
    assert wins or path.read_text() == present


@needs_interpreter
def test_candidates_that_fail_or_differ_are_dropped(tmp_path, monkeypatch, capsys):
    always(monkeypatch, True)
    real = tune.passes

    def passes(loss, z, labels, objective):
        config = launch.config("forward", 90, "none", 16, 64)
        if launch.config("backward", 90, "none", 16, 64).block_s == 32:
            raise RuntimeError("out of resource: shared memory\nand more")
        value, grad = real(loss, z, labels, objective)
        return value * (1.01 if config.block_s == 32 else 1), grad

    monkeypatch.setattr(tune, "passes", passes)
    path = tmp_path / "table.json"
    assert tune.main(["--rehearse", "--out", str(path)]) == 0
    output = capsys.readouterr().out
    assert "dropped: FastclError: candidate disagrees with present on the loss" in output
    assert "dropped: RuntimeError: out of resource: shared memory\n" in output
    assert json.loads(path.read_text()) == json.loads(launch.TABLE.read_text())


def test_a_present_row_that_fails_is_told_and_kept(tmp_path, monkeypatch, capsys):
    def broken(row, plan):
        raise RuntimeError("no such launch")

    monkeypatch.setattr(tune, "tune", broken)
    assert tune.main(["--rehearse", "--out", str(tmp_path / "table.json")]) == 1
    captured = capsys.readouterr()
    assert "the present row fails: RuntimeError: no such launch" in captured.err and "0 of 2 rows" in captured.out


def test_a_winner_beats_the_present_row_by_more_than_the_spread():
    present = [10.0, 10.1, 10.2, 10.3, 10.4]
    assert tune.beats([9.0, 9.1, 9.2, 9.3, 9.4], present)
    assert not tune.beats([9.9, 10.0, 10.1, 10.2, 10.3], present)
    assert not tune.beats([9.0, 9.1, 9.2, 19.3, 29.4], present)  # its own spread counts as well
    assert not tune.beats(present, present) and not tune.beats([11.0, 11.1, 11.2], present)


def test_a_row_is_replaced_for_a_while_only(table):
    row = next(r for r in table if (r["kernel"], r["arch"], r["mode"], r["max_d"]) == ("forward", "sm_90", "none", 64))
    before = launch.config("forward", 90, "none", 64, 4096)
    with tune.replaced(row, {"block_s": 16, "warps": 2}):
        config = launch.config("forward", 90, "none", 64, 4096)
        assert (config.block_s, config.warps, config.block_r) == (16, 2, before.block_r)
    with pytest.raises(KeyError), tune.replaced(row, {"block_s": 16}):
        raise KeyError
    assert launch.config("forward", 90, "none", 64, 4096) == before


def test_the_rows_of_an_architecture_that_are_tuned(table):
    rows = tune.rows_of(table, 90)
    assert {row["kernel"] for row in rows} == set(tune.KERNELS) and {row["arch"] for row in rows} == {"sm_90"}
    assert {row["mode"] for row in rows} == set(tune.LOSSES)


def test_tiles_that_are_tried_divide_working_copies(table):
    tried = [(row, tune.axes_of(row)) for row in table if row["kernel"] in tune_predicted.KERNELS]
    assert all(128 % size == 0 for _, axes in tried for name in ("block_r", "block_s") for size in axes[name])
    pieces = {row["kernel"]: axes["block_d"] for row, axes in tried if "block_d" in axes}
    assert pieces.pop("product") == (64, 128, 256)  # it loads no columns beyond the rows
    assert {"forward", "forward_plain", "weights", "weights_peers"} <= pieces.keys()
    # Wide copies are multiples of 64 columns.
    assert all(64 % size == 0 for sizes in pieces.values() for size in sizes)
    assert not [row for row, _ in tried if row["kernel"] in pieces and not row["max_d"] and 64 % row["block_d"]]
    assert not [row for row, axes in tried if "block_d" not in axes and not row["max_d"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rehearse"], "must not replace the table; give --out"), ([], "no CUDA device; --rehearse runs without one")],
)
def test_bad_arguments_are_named(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert message in capsys.readouterr().err


def test_the_table_is_written_as_it_was_read(tmp_path: Path, table):
    tune.write(table, tmp_path / "table.json")
    assert (tmp_path / "table.json").read_bytes() == launch.TABLE.read_bytes()


# Read by every Python that starts: the one that interprets kernels does so as the tests do.
QUICK = """
import os
if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter
    quick_interpreter.install()
"""


def test_a_rehearsal_needs_nothing_in_the_environment(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    (tmp_path / "sitecustomize.py").write_text(QUICK)
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    command = [sys.executable, "-m", "bench.gpu.tune", "--rehearse", "--out", str(tmp_path / "table.json")]
    done = subprocess.run(command, cwd=launch.TABLE.parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "table.json").exists(), done.stdout + done.stderr


def search(row: dict, times: dict[tuple[int, int, int], float], fit: int = 3) -> tune_predicted.Search:
    """A search whose predictions are given by warps, stages, and the programs for which the launches divide the work;
    a multiprocessor holds `fit` of any candidate."""

    class Stub(tune_predicted.Search):
        def _record(self, config):
            with tune.replaced(self.row, config):
                return [dict(self.row)]

        def _predict(self, recorded):
            (seen,) = recorded
            ms = times.get((seen["warps"], seen["stages"], seen["programs"]))
            return ("", [SimpleNamespace(ms=lambda _: ms)]) if ms else ("spill: 8 bytes", [])

        def _longest(self, found):
            return found[0].ms(""), 100, fit, "shared"

        def everywhere(self, config):
            return "spill: 48 bytes" if config["stages"] == 4 else ""

    return Stub(row, 128, SimpleNamespace(compile=lambda: None), [])


def row_of(table: list[dict], kernel: str, mode: str, d: int | None) -> dict:
    return next(
        row for row in table if (row["kernel"], row["arch"], row["mode"], row["max_d"]) == (kernel, "sm_90", mode, d)
    )


AXES = {"block_r": (64,), "block_s": (64,), "block_d": (128,), "warps": (4, 8), "stages": (2, 3, 4)}


def test_predictions_choose_the_fastest_candidate_that_passes_for_every_launch(table, tmp_path, monkeypatch, capsys):
    """Each is ranked with the programs that a multiprocessor holds of it, which are written with it."""
    monkeypatch.setattr(launch, "TABLE", tmp_path / "table.json")
    row = row_of(table, "backward", "none", 128)
    row |= {"block_r": 64, "block_s": 64, "warps": 4, "stages": 2, "programs": 1}
    by_one = {(4, 2, 1): 4.5, (4, 3, 1): 5.0, (4, 4, 1): 6.0, (8, 2, 1): 4.0}
    by_three = {(4, 2, 3): 4.6, (4, 3, 3): 3.5, (4, 4, 3): 3.0, (8, 2, 3): 9.0}
    assert search(row, by_one | by_three).run(AXES, keep=True) == 0
    lines = capsys.readouterr().out.splitlines()
    ranked = [line.split("  ")[1] for line in lines[:5]]
    assert ranked == [f"64,64,128,{end}" for end in ("4,4 x 3", "4,3 x 3", "4,2 x 1", "4,2 x 3", "8,2 x 3")]
    assert [line.endswith("(the table)") for line in lines[:5]] == [False, False, True, False, False]
    assert lines[5:7] == [f"dropped  64,64,128,8,{s}  spill: 8 bytes" for s in (3, 4)]
    assert lines[7:] == ["not for every launch: 64,64,128,4,4 x 3: spill: 48 bytes", "best: 64,64,128,4,3 x 3"]
    written = row_of(json.loads((tmp_path / "table.json").read_text()), "backward", "none", 128)
    assert written == row and (row["stages"], row["programs"]) == (3, 3)
    assert launch.config("backward", 90, "none", 128, 4096) == launch.Config(64, 64, 128, 4, 3, 3 * 132)


def test_a_search_without_a_candidate_that_passes_changes_nothing(table, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLE", tmp_path / "table.json")
    row = row_of(table, "backward", "none", 128)
    before = dict(row)
    axes = AXES | {"warps": (4,), "stages": (4,)}
    assert search(row, {(4, 4, 3): 3.0}).run(axes, keep=True) == 1
    assert not (tmp_path / "table.json").exists() and row == before


@pytest.mark.parametrize(
    ("kernel", "mode", "d"),
    [("weights", "none", None), ("forward_masked", "all", 128), ("forward", "peers", 64), ("backward", "peers", 128)],
)
def test_a_row_that_no_work_is_divided_by_gets_no_programs(table, tmp_path, monkeypatch, kernel, mode, d):
    monkeypatch.setattr(launch, "TABLE", tmp_path / "table.json")
    row = row_of(table, kernel, mode, d)
    fields = set(row)

    class Stub(tune_predicted.Search):
        def _record(self, config):
            return [config]

        def _predict(self, recorded):
            return "", [SimpleNamespace(ms=lambda _: recorded[0]["warps"])]

        def _longest(self, found):
            return found[0].ms(""), 100, 3, "shared"

        def everywhere(self, config):
            return ""

    assert Stub(row, 128, SimpleNamespace(compile=lambda: None), []).run(AXES, keep=True) == 0
    assert set(row) == fields and row["warps"] == 4


def test_the_row_that_is_searched_is_that_of_the_losses(table):
    few, many = Loss("ntxent", 4096, 128, "fp32"), Loss("ntxent", 65536, 128, "fp32")
    of = [tune_predicted.row_of("forward_plain", 90, "all", 128, [loss]) for loss in (few, many)]
    assert [row["max_n"] for row in of] == [16384, None]
    with pytest.raises(StaticError, match="take different rows forward_plain all"):
        tune_predicted.row_of("forward_plain", 90, "all", 128, [few, many])
    with pytest.raises(StaticError, match="no row backward all for 256 columns"):
        tune_predicted.row_of("backward", 90, "all", 256, [many])


def test_candidates_are_all_that_can_fit(table):
    narrow = row_of(table, "backward", "none", 128)
    axes = tune_predicted.axes_to_try(narrow, {"stages": [3]})
    found = [tune_predicted.describe(one) for one in tune_predicted.candidates(narrow, 128, axes)]
    assert f"{found[0]} x 3" == tune_predicted.describe(narrow) and len(set(found)) == len(found)
    every = {f"{r},{s},128,{w},3" for r in (32, 64, 128) for s in (32, 64, 128) for w in (4, 8)}
    # Sums of 256 registers.
    assert every - set(found) == {"128,128,128,4,3"}
    wide = row_of(table, "weights", "none", None)
    axes = tune_predicted.axes_to_try(wide, {})
    assert {one["block_d"] for one in tune_predicted.candidates(wide, 512, axes)} == {32, 64}


@pytest.mark.parametrize(
    ("kernel", "given", "message"),
    [
        ("backward", {"block_r": [64, 63]}, "--block-r 63: must be of 16 32 64 128 in this row"),
        ("backward", {"block_s": [96, 256]}, "--block-s 96 256: must be of 16 32 64 128 in this row"),
        ("backward", {"block_d": [64]}, "--block-d 64: must be of 128 in this row"),
        ("weights", {"block_d": [32, 128]}, "--block-d 128: must be of 16 32 64 in this row"),
        ("product", {"block_d": [256, 512]}, "--block-d 512: must be of 16 32 64 128 256 in this row"),
        ("product", {"warps": [6]}, "--warps 6: must be of 1 2 4 8 16 in this row"),
        ("product", {"stages": [0, 4]}, "--stages 0: must be of 1 2 3 4 5 6 7 8 in this row"),
    ],
)
def test_values_that_no_launch_can_take_are_refused(table, kernel, given, message):
    row = row_of(table, kernel, "none", 128 if kernel == "backward" else None)
    with pytest.raises(StaticError, match=f"^{message}$"):
        tune_predicted.axes_to_try(row, given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["forward", "none", "96"], "no loss has '^ntxent fp16 n=65,536 d=96$' in its name; --losses chooses others"),
        (["forward", "none", "64", "--losses", "["], "'[' is no regular expression"),
        (["forward", "none", "64", "--workers", "0"], "must be at least 1, got 0"),
        (["forward", "peers", "64", "--arch", "sm_75"], "invalid choice: 'sm_75'"),
    ],
)
def test_what_cannot_be_searched_is_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        tune.main(["--predict", *arguments])
    assert message in capsys.readouterr().err
