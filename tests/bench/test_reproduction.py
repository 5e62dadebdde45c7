"""bench.reproduction: planted effects are found, noise is not, the committed page says what its table does."""

import csv
import itertools
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from bench.reproduction import images, report, rows, run
from bench.reproduction.claims import HOLDS, NO, NOISE, NOT, OPEN, PARTLY, UNSHOWN, YES, Finding, interval, verdict
from bench.reproduction.experiments import CIFAR10, EXPERIMENTS, FAMILIES, FRUITS, OMNIGLOT, tiny
from bench.reproduction.questions import CLAIMS, FALL
from bench.reproduction.rows import Row
from fastcl.config.tables import load_config
from fastcl.errors import FastclError
from fastcl.report.run import RESEEDED
from fastcl.sweep import load_sweep
from fastcl.sweep.grid import make_cells

COMMITTED = rows.folder_of(Path(__file__).resolve().parents[2] / "bench" / "results")
SEEDS = (0, 1, 2)
NAMES = {claim.name: claim for claim in CLAIMS}


def made(experiment, pair, cka, *, seed, epoch=10, rsa=None, gap=0.5, **settings):
    """A row with these values, others as they come."""
    fields = {"classes": 10, "temperature": 0.5, "batch": 128, "rule": ""} | settings
    rsa = cka if rsa is None else rsa
    return Row(experiment, *fields.values(), seed, epoch, 2 * epoch, 100, *pair, cka, cka, rsa, gap, None)


def objectives(value, experiment="omniglot", epoch=10):
    """The rows of a sweep over objectives: `value(other, seed)` is the alignment of a model with the reference."""
    others = ("nscl", "supcon", "ce", RESEEDED)
    return [made(experiment, ("dcl", o), value(o, s), seed=s, epoch=epoch) for o in others for s in SEEDS]


class TestIntervals:
    def test_of_known_values(self):
        found = interval([1.0, 2.0, 3.0])
        assert (found.mean, found.spread) == (2.0, 1.0)
        # Student's t has closed quantiles for two degrees of freedom and for one.
        assert found.half == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025) / math.sqrt(3), rel=1e-9)
        assert interval([0.0, 1.0]).half == pytest.approx(math.tan(math.pi * 0.475) / 2, rel=1e-9)

    @pytest.mark.parametrize("values, control, answer", (
        ((0.2, 0.21, 0.19), (0.1, 0.11, 0.12), YES),
        ((0.2, 0.21, 0.19), None, YES),
        ((0.2, 0.21, 0.19), (0.1, -0.1, 0.02), NOISE),
        ((0.2, 0.21, 0.19), (-0.1, -0.1, -0.11), NOISE),
        ((0.2, -0.1, 0.05), (0.1, 0.11, 0.12), OPEN),
        ((-0.2, -0.21, -0.19), (0.1, 0.11, 0.12), NO),
    ))  # fmt: skip
    def test_answers(self, values, control, answer):
        assert Finding("x", "paper", "cka", tuple((0.5 + v, 0.5) for v in values), control).answer == answer

    def test_verdicts(self):
        assert verdict([YES, YES]) == HOLDS and verdict([YES, OPEN, OPEN]) == PARTLY
        assert verdict([YES, OPEN, OPEN, OPEN]) == UNSHOWN and verdict([YES, OPEN, OPEN, NO]) == NOT
        for other in (NOISE, OPEN, NO):
            assert verdict([YES, other]) == PARTLY
            assert verdict([OPEN, other]) == (NOT if other == NO else UNSHOWN)


class TestClaims:
    def test_objectives(self):
        level = {"nscl": 0.9, RESEEDED: 0.85, "supcon": 0.5, "ce": 0.87}
        found = objectives(lambda other, seed: level[other] + 0.001 * seed * (1 + len(other)))
        assert [one.answer for one in NAMES["close"].find(found)] == [YES, YES]
        supcon = NAMES["nearer than SCL"].find(found)
        assert [one.answer for one in supcon] == [YES, YES] and {one.family for one in supcon} == {"paper"}
        assert supcon[0].values[1] == pytest.approx((0.9 + 0.005, 0.5 + 0.007))
        assert supcon[0].control == pytest.approx([0.35 + 0.001 * seed * 2 for seed in SEEDS])
        # Nearer to CL than CE is, but CE is no farther than a rerun.
        assert [one.answer for one in NAMES["nearer than CE"].find(found)] == [NOISE, NOISE]

    def test_the_published_codes_objectives_have_a_reference_of_their_own(self):
        pairs = [("ntxent", other) for other in ("nscl_with_positive", "supcon", "ce", RESEEDED)]
        found = [made("fruits-published", p, 0.9 - 0.1 * k, seed=s) for k, p in enumerate(pairs) for s in SEEDS]
        for one in NAMES["nearer than CE"].find(found):
            assert one.family == "code" and one.values == ((0.9, 0.7),) * 3

    @pytest.mark.parametrize("name, key, places, kind", (
        ("classes", "classes", (2, 4, 10), "cifar10-classes"),
        ("temperature", "temperature", (0.1, 0.5, 1.0), "omniglot-temperature"),
    ))  # fmt: skip
    @pytest.mark.parametrize("rerun, answer", ((0.0, YES), (0.1, NOISE)))
    def test_trends(self, name, key, places, kind, rerun, answer):
        pairs = {FAMILIES["paper"]: 0.1, FAMILIES["code"]: 0.05, ("dcl", RESEEDED): rerun}
        found = [
            made(kind, pair, 0.5 + k * slope + 0.001 * seed * k, seed=seed, **{key: value})
            for (k, value), (pair, slope), seed in itertools.product(enumerate(places), pairs.items(), SEEDS)
        ]
        ours = NAMES[name].find(found)
        paper, code = ours[0], ours[2]
        assert (paper.family, code.family) == ("paper", "code") and len(ours) == 4
        assert paper.difference.mean == pytest.approx(0.2 + 0.002) and code.difference.mean == pytest.approx(
            0.1 + 0.002
        )
        assert paper.answer == answer and code.answer == answer
        assert all(not NAMES[other].find(found) for other in NAMES if other != name)

    def test_batches_of_the_linear_rule_fall(self):
        found = [
            made("omniglot-batch", pair, 0.9 - fall * k + 0.001 * seed, seed=seed, rule=rule, batch=64 << k)
            for pair, falls in ((FAMILIES["paper"], 0.1), (("dcl", RESEEDED), 0.01))
            for rule, fall in (("linear", falls), ("sqrt", -falls))
            for k, seed in itertools.product(range(3), SEEDS)
        ]
        ours = NAMES["batch"].find(found)
        assert [one.answer for one in ours] == [YES, YES] and ours[0].difference.mean == pytest.approx(0.2)
        assert ours[0].control == pytest.approx([0.18] * 3)

    def test_weights_drift_while_cka_stays(self):
        def run_of(end, gap, rerun=0.5):
            first = [
                row
                for epoch, cka in enumerate((1.0, 0.9, 0.2))
                for row in objectives(lambda o, s, c=cka: c, epoch=epoch)
            ]
            last = [row._replace(cka=end + 0.001 * row.seed, weight_gap=gap) for row in objectives(lambda o, s: 0.0)]
            last = [row._replace(weight_gap=rerun) if row.other == RESEEDED else row for row in last]
            return first + last

        assert [one.answer for one in NAMES["weights apart"].find(run_of(0.9, 0.7, rerun=0.7))] == [NOISE]
        assert [one.answer for one in NAMES["weights apart"].find(run_of(0.9, 0.7))] == [YES]
        assert [one.answer for one in NAMES["weights apart"].find(run_of(0.9, 0.3))] == [NO]
        assert [one.answer for one in NAMES["representations alike"].find(run_of(0.9 - FALL / 2, 0.7))] == [YES]
        assert [one.answer for one in NAMES["representations alike"].find(run_of(0.9 - 2 * FALL, 0.7))] == [NO]


class TestImages:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        """The files' names with the smallest content that a config needs."""
        monkeypatch.setattr(images, "OF_A_CLASS", (3, 1))
        (tmp_path / OMNIGLOT).touch()
        (tmp_path / FRUITS).touch()
        pictures = [bytes([k] * (k + 1)) for k in range(12)]  # 2 classes, 4 + 2 images of each
        np.savez(
            tmp_path / CIFAR10,
            jpeg=np.frombuffer(b"".join(pictures), np.uint8),
            offset=np.cumsum([0, *map(len, pictures)]),
            label=np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1], np.int16),
            split=np.array([0] * 8 + [1] * 4, np.uint8),
            class_names=np.array(["a", "b"]),
        )
        return tmp_path

    def test_the_part_of_cifar_is_the_first_of_each_class(self, folder, monkeypatch, tmp_path):
        path = tmp_path / "part.npz"
        path.write_bytes(images.part_of_cifar10(folder / CIFAR10))
        found = dict(np.load(path))
        offset = found["offset"]
        kept = [int(found["jpeg"][a]) for a in offset[:-1]]
        assert kept == [0, 1, 2, 4, 5, 6, 8, 10] and list(np.diff(offset)) == [k + 1 for k in kept]
        assert list(found["label"]) == [0, 0, 0, 1, 1, 1, 0, 1] and list(found["split"]) == [0] * 6 + [1] * 2
        monkeypatch.setattr(images, "OF_A_CLASS", (3, 3))
        with pytest.raises(FastclError, match="3 test images of each class are needed, 12 in all, and there are 10"):
            images.part_of_cifar10(folder / CIFAR10)

    @pytest.mark.parametrize("small", (False, True))
    @pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: one.name)
    def test_every_config_is_valid_and_names_its_models(self, experiment, small, folder, tmp_path):
        experiment = tiny(experiment) if small else experiment
        out = tmp_path / "out"
        path = images.write_config(experiment, folder, out)
        config = load_config(path)
        assert config.train.models == experiment.models and config.train.controls == (RESEEDED,)
        cells = make_cells(path, experiment.over, experiment.seeds)
        values = math.prod(len(item.split(",")) for item in experiment.over)
        assert len(cells) == values * experiment.seeds and experiment.seeds >= (2 if small else 3)

    def test_missing_images_are_named(self, folder, tmp_path, capsys):
        (folder / FRUITS).unlink()
        options = ["--data", str(folder), "--out", str(tmp_path / "out"), "--only", "fruits", "omniglot"]
        with pytest.raises(SystemExit, match=f"error: fruits: there is no .*{FRUITS}; --data takes the folder"):
            run.main(options)
        assert not (tmp_path / "out").exists()
        (folder / CIFAR10).write_bytes(b"PK\3\4 no archive")
        with pytest.raises(FastclError, match=CIFAR10):
            images.part_of_cifar10(folder / CIFAR10)
        for wrong, told in (
            (["--jobs", "0"], "--jobs: must be at least 1, got 0"),
            (["--only", "x"], "invalid choice"),
        ):
            with pytest.raises(SystemExit):
                run.main([*options, *wrong])
            assert told in capsys.readouterr().err


@pytest.mark.slow
def test_one_sweep_in_miniature(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    out, sweeps = tmp_path / "out", tmp_path / "sweeps"
    options = ["--tiny", "--only", "omniglot", "--out", str(out), "--sweeps", str(sweeps)]
    assert run.main(options) == 0 and os.environ["OMP_NUM_THREADS"] == "7"
    said = capsys.readouterr().out
    found = rows.read(out)
    runs = [cell.run for cell in load_sweep(sweeps / "omniglot").cells]
    assert len(found) == sum(3 * 4 + 5 for _ in runs) == 2 * 17  # evaluations x pairs, and models at the end
    for one in runs:
        for epoch, measured in one.pairs["dcl", "supcon"].items():
            (row,) = [r for r in found if (r.seed, r.other, r.epoch) == (one.facts["seed"], "supcon", epoch)]
            assert row.step == epoch * 6 and row.cka == pytest.approx(measured["cka"], rel=1e-5)
            assert row.weight_gap == pytest.approx(measured["weight_gap"], rel=1e-5)
    assert report.answers(found) in said and "| was not run | 0 of 0 | 0 | 0 | 0 | 0 |" in said
    text = (out / "reproduction.md").read_text(encoding="utf-8")
    assert report.body(found) in text and "in miniature" in text
    assert (
        "not run" in (out / "classes.svg").read_text() and "SCL (SupCon)" in (out / "objectives-paper.svg").read_text()
    )
    assert json.loads((out / report.ABOUT).read_text())["versions"]["torch"]

    before = {path: path.stat().st_mtime_ns for path in sweeps.rglob("metrics.jsonl")}
    table = (out / rows.FILE).read_bytes()
    assert run.main(options) == 0 and (out / rows.FILE).read_bytes() == table  # nothing is repeated
    assert before == {path: path.stat().st_mtime_ns for path in sweeps.rglob("metrics.jsonl")}
    shutil.rmtree(sweeps / "omniglot" / "cells" / "seed=1")
    with pytest.raises(FastclError, match="omniglot: the run seed=1 is not begun"):
        rows.gathered([one for one in EXPERIMENTS if one.name == "omniglot"], sweeps)


class TestCommitted:
    def test_it_is_whole(self):
        found = rows.read(COMMITTED)
        for experiment in EXPERIMENTS:
            mine = [row for row in found if row.experiment == experiment.name]
            seeds = {row.seed for row in mine}
            assert len(seeds) == experiment.seeds >= 3, experiment.name
            values = math.prod(len(item.split(",")) for item in experiment.over)
            ends = [row for row in mine if not row.other]
            models = len(experiment.models) + 1
            assert len(ends) == values * experiment.seeds * models, experiment.name
            assert all(row.cka is not None and 0 <= row.cka <= 1.000001 for row in mine if row.other)
        assert all(claim.find(found) for claim in CLAIMS)

    def test_every_figure_stands_on_the_page(self):
        page = (COMMITTED / "index.md").read_text(encoding="utf-8")
        drawn = {path.name for path in COMMITTED.glob("*.svg")}
        assert len(drawn) == 7 and all(f"]({name})" in page for name in drawn)

    def test_another_table_is_refused(self, tmp_path):
        with pytest.raises(FastclError, match=r"results.csv cannot be read \(No such file"):
            rows.read(tmp_path)
        with (tmp_path / rows.FILE).open("w") as file:
            csv.writer(file).writerow(["experiment", "cka"])
        with pytest.raises(FastclError, match="its columns must be experiment, classes"):
            rows.read(tmp_path)
        rows.write(objectives(lambda other, seed: 0.5), tmp_path)
        text = (tmp_path / rows.FILE).read_text()
        for broken, told in ((text + "omniglot,1\n", "line 14"), (text.replace(",0.5,", ",x,", 1), "line 2: .*'x'")):
            (tmp_path / rows.FILE).write_text(broken)
            with pytest.raises(FastclError, match=told):
                rows.read(tmp_path)

    def test_incomplete_rows_are_refused(self):
        whole = objectives(lambda other, seed: 0.5 + 0.1 * seed)
        find = NAMES["nearer than CE"].find
        for found, told in (
            (whole[1:], r"nscl and ce has the seeds \[1, 2\] and \[0, 1, 2\]"),
            ([whole[0]._replace(cka=None), *whole[1:]], "cka of dcl and nscl is undefined for seed 0"),
            ([whole[0]._replace(epoch=9), *whole[1:]], "the seeds of dcl and nscl were evaluated at different epochs"),
        ):
            with pytest.raises(FastclError, match=told):
                find(found)
        with pytest.raises(FastclError, match="needs two seeds or more, got 1"):
            interval([0.5])
