"""What is planned before the first cell runs: cells, names, what is equal in all of them, and all refusals."""

import dataclasses
import io
import json
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from tiny_run import tiny_toml
from tqdm import tqdm

from fastcl.config.tables import load_config
from fastcl.config.written import written
from fastcl.errors import FastclError
from fastcl.sweep import children, plan_sweep
from fastcl.sweep.children import Job, slots_for
from fastcl.sweep.grid import cell_name, make_cells
from fastcl.sweep.sweeping import listing


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tiny_toml(tmp_path / "tiny.toml")


def test_cells_are_all_combinations_with_seeds_innermost(config):
    cells = make_cells(config, ["optim.lr=1e-1,1", "model.options.stem_width=2,4"], 2)
    assert [cell.name for cell in cells] == [
        f"lr={lr},stem_width={width},seed={seed}" for lr in ("0.1", "1.0") for width in (2, 4) for seed in (7, 8)
    ]
    for cell in cells:
        base = load_config(config)
        optim = dataclasses.replace(base.optim, lr=float(cell.values["optim.lr"]))
        options = base.model.options | {"stem_width": int(cell.values["model.options.stem_width"])}
        model, train = dataclasses.replace(base.model, options=options), dataclasses.replace(base.train, seed=cell.seed)
        assert cell.config == dataclasses.replace(base, optim=optim, model=model, train=train)


def test_commas_within_lists_separate_nothing(config):
    cells = make_cells(config, ['train.models=["dcl", "ce"],["dcl","nscl"]', "views.preset=characters,cifar"], 1)
    assert [cell.config.train.models for cell in cells[::2]] == [("dcl", "ce"), ("dcl", "nscl")]
    assert [cell.values["views.preset"] for cell in cells[:2]] == ["characters", "cifar"]
    assert cells[0].name == "models=dcl+ce,preset=characters,seed=7"


def test_values_that_fit_together_need_not_fit_the_config(config):
    """A kernel of 23 is too large for the config's 8 pixels."""
    cells = make_cells(config, ["views.size=16,32", "views.blur=0.5", "views.blur_kernel=3,23"], 1)
    assert len(cells) == 4
    with pytest.raises(FastclError, match="blur_kernel=23: views.blur_kernel must be less than 2"):
        make_cells(config, ["views.size=8,32", "views.blur=0.5", "views.blur_kernel=3,23"], 1)


def test_names_are_short_distinct_and_fit_for_files():
    texts = ["a/b", "a b", "a-b", 'a"b', "ä", ".." * 90, "..", "{ layers = [1, 2] }", '["a", "b"]', '["a/b"]', ""]
    names = [cell_name({"data.source": text}, 3) for text in texts]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name.encode()) < 160 and "/" not in name and name.isascii() and name.endswith(",seed=3")
    assert cell_name({"optim.name": "sgd", "model.name": "vit"}, 0) == "optim.name=sgd,model.name=vit,seed=0"
    assert cell_name({}, 5) == "seed=5"


def test_a_rule_ties_the_learning_rate_to_the_batch_size(config, tmp_path):
    grid = ["train.batch_size=16,64,128", "lr_rule=constant,fourth-root,sqrt,linear"]
    plan = plan_sweep(config, grid, 1, tmp_path / "s")
    rates = {tuple(cell.values.values()): cell.config.optim.lr for cell in plan.cells}
    power = {"constant": 0, "fourth-root": 0.25, "sqrt": 0.5, "linear": 1}
    assert rates == {(str(b), rule): 0.05 * (b / 64) ** p for b in (16, 64, 128) for rule, p in power.items()}
    owners = {cell.run for cell in plan.cells if cell.values["train.batch_size"] == "64"}
    assert owners == {"batch_size=64,lr_rule=constant,seed=7"} and len(plan.jobs) == 9
    assert listing(plan, tmp_path / "s").count(", the run of batch_size=64,lr_rule=constant,seed=7") == 3


@pytest.mark.parametrize("equal", ("epochs", "steps"))
def test_steps_or_epochs_are_equal(config, tmp_path, equal):
    """287 or 286 training images of two classes, 431 of three, and the config has three: 3 epochs of 6 steps."""
    grid = ["data.classes=2,3,10", "train.batch_size=32,64"]
    plan = plan_sweep(config, [*grid, "optim.warmup_epochs=0.5"], 1, tmp_path / "s", equal)
    base, jobs = load_config(config), {job.name: job for job in plan.jobs}
    for cell in plan.cells:
        train, job = cell.config.train, jobs[cell.name]
        assert train.epochs == job.epochs and cell.config.optim.warmup_epochs == 0.5  # swept: as given
        if equal == "epochs":
            assert cell.config.train == dataclasses.replace(base.train, batch_size=train.batch_size)
        else:
            assert abs(job.epochs * job.steps - 18) <= max(job.steps / 2, job.steps - 18)
    assert len({job.steps for job in plan.jobs}) > 3
    whole = plan_sweep(config, grid, 1, tmp_path / "s", equal).cells
    small = next(cell for cell in whole if cell.values == {"data.classes": "2", "train.batch_size": "64"}).config
    epochs = 3 if equal == "epochs" else round(18 / 4)
    assert (small.train.epochs, small.optim.warmup_epochs) == (epochs, pytest.approx(epochs / 3))
    long = plan_sweep(config, ["train.batch_size=4,8"], 1, tmp_path / "s", equal).cells[0].config
    assert long.train.epochs == (3 if equal == "epochs" else 1)  # of 107 steps, more than the config takes in all


def test_commas_in_quotes_separate_nothing(config):
    cells = make_cells(config, ["data.root='a,b',\"c,'d\",e"], 1)
    assert [cell.values["data.root"] for cell in cells] == ["a,b", "c,'d", "e"]


def test_all_cells_are_evaluated_on_as_many_images_unless_the_config_says_otherwise(config, tmp_path):
    plan = plan_sweep(config, ["data.classes=2,10"], 2, tmp_path / "s")
    fewest = plan.head["test_images"]
    assert {cell.config.data.test_images for cell in plan.cells} == {fewest} and 60 < fewest < 80
    given = plan_sweep(config, ["data.classes=2,10", "data.test_images=30"], 1, tmp_path / "s")
    assert given.head["test_images"] is None and {cell.config.data.test_images for cell in given.cells} == {30}
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(plan.head | {"test_images": fewest + 1}))
    with pytest.raises(FastclError, match=rf"has only {fewest} held-out images, and .* evaluated on {fewest + 1}"):
        plan_sweep(config, ["data.classes=2,10"], 2, tmp_path / "s")


def test_a_shared_run_keeps_its_folder_when_the_grid_grows(config, tmp_path):
    plan = plan_sweep(config, ["train.batch_size=32,64", "lr_rule=sqrt,linear"], 1, tmp_path / "s")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(plan.head))
    more = plan_sweep(config, ["lr_rule=constant,sqrt,linear", "train.batch_size=64,32"], 1, tmp_path / "s")
    owner = "batch_size=64,lr_rule=sqrt,seed=7"
    assert {cell.run for cell in more.cells if cell.values["train.batch_size"] == "64"} == {owner}
    assert list(more.head["over"]) == ["train.batch_size", "lr_rule"]  # in the order that names its cells


REFUSED = {
    "an unknown key": (["train.batchsize=1,2"], "unknown key 'train.batchsize'; did you mean 'train.batch_size'?"),
    "an unknown table": (["trian.epochs=1,2"], "unknown key 'trian'"),
    "a key without a table": (["epochs=1,2"], "lr_rule, got 'epochs'; did you mean 'train.epochs=...'?"),
    "no key of that name": (["epoch=1,2"], "a key of the config such as train.batch_size, or lr_rule, got 'epoch'"),
    "no values": (["train.epochs="], "--over train.epochs has no value"),
    "an empty value": (["train.epochs=1,,2"], "--over train.epochs has an empty value, got 'train.epochs=1,,2'"),
    "an open list": (['train.models=["dcl","ce"],["dcl","nscl"'], "--over train.models: a bracket is not closed, got"),
    "an open quote": (["data.source='digits,omniglot"], "--over data.source: a ' is not closed, got"),
    "no equals sign": (["train.epochs"], "--over takes KEY=V1,V2,..., got 'train.epochs'"),
    "a value out of range": (["train.batch_size=1,64"], "train.batch_size=1: train.batch_size must be at least 2"),
    "a value of another type": (["train.epochs=1,many"], "train.epochs must be an integer, got 'many'"),
    "a value twice": (["optim.lr=0.1,1e-1"], "--over optim.lr repeats a value: '1e-1'"),
    "a key twice": (["optim.lr=0.1,1", "optim.lr=2"], "--over optim.lr is given twice"),
    "the seed": (["train.seed=1,2"], "use --seeds N"),
    "a rule alone": (["lr_rule=sqrt,linear"], "--over lr_rule needs --over train.batch_size"),
    "an unknown rule": (["train.batch_size=8,9", "lr_rule=square"], "unknown rule 'square'"),
    "a single cell": (["train.epochs=2"], "the sweep has a single cell"),
    "nothing": ([], "the sweep has a single cell"),
    "too many cells": ([f"train.epochs={','.join(map(str, range(1, 10_002)))}"], "10,001 cells; at most 10,000"),
    "too many classes": (["data.classes=2,11"], r"classes=11,seed=7: classes must be an integer in \[2, 10\]"),
    "a batch that is too large": (["train.batch_size=64,900"], r"batch_size=900,seed=7: train.batch_size must be in"),
    "an unknown model": (['train.models=["dcl"],["dlc"]'], "models=dlc,seed=7: train.models: unknown name 'dlc'"),
    "an unknown optimiser": (["optim.name=sgd,adam"], "name=adam,seed=7: optim.name must be"),
    "an unknown encoder": (["model.name=resnet18,resnet1"], "name=resnet1,seed=7: "),
    "an unknown layer": (['train.layers=["encoder.*"],["head9"]'], "layers=head9,seed=7: train.layers"),
    "an unknown source": (["data.source=digits,digit"], "source=digit,seed=7: unknown source 'digit'"),
    "a device that is not there": (["train.device=cpu,tpu"], "device=tpu,seed=7: train.device must be"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_anything_runs(config, tmp_path, what):
    over, message = REFUSED[what]
    with pytest.raises(FastclError, match=message.replace("?", r"\?") if "\\" not in message else message):
        plan_sweep(config, over, 1, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_other_refusals(config, tmp_path):
    for arguments, message in (
        ((config, ["optim.lr=1,2"], 0, tmp_path / "s"), "--seeds must be at least 1, got 0"),
        ((config, ["train.epochs=1,2"], 1, tmp_path / "s", "steps"), "leave out --over train.epochs"),
        ((config, ["optim.lr=1,2"], 1, tmp_path / "s", "images"), "--equal must be 'epochs' or 'steps', got 'images'"),
        ((tmp_path / "no.toml", ["optim.lr=1,2"], 1, tmp_path / "s"), "cannot read config"),
    ):
        with pytest.raises(FastclError, match=message):
            plan_sweep(*arguments)


def test_presets_of_a_config_that_sets_every_view_are_one(config, tmp_path):
    whole = tmp_path / "whole.toml"
    whole.write_text(written(load_config(config), ""))
    with pytest.raises(FastclError, match=r"repeats a value: 'cifar'; the keys of \[views\] in the config win"):
        make_cells(whole, ["views.preset=characters,cifar"], 1)


def test_threads_are_divided_and_gpus_given_out_in_turn(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert slots_for(1, ["0", "1"]) == [{}]
    assert slots_for(2, ["5"]) == [{"OMP_NUM_THREADS": "3"}] * 2
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_for(3, ["2", "GPU-x"])] == ["2", "GPU-x", "2"]
    assert slots_for(9, [])[0] == {"OMP_NUM_THREADS": "1"}
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    assert slots_for(3, []) == [{"OMP_NUM_THREADS": "4"}] * 3


def test_one_line_tells_what_runs_and_how_long_it_takes(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(children, "tqdm", partial(tqdm, file=terminal))
    jobs = [Job("a", 4, 10), Job("b", 2, 5), Job("c", 2, 5)]
    (tmp_path / "cells" / "a").mkdir(parents=True)
    (tmp_path / "cells" / "a" / "timing.jsonl").write_text("{}\n")
    with closing(children._Progress(tmp_path, jobs)) as progress:
        (tmp_path / "cells" / "a" / "timing.jsonl").write_text("{}\n{}\n{")
        progress.show(jobs[:2])
        progress.ended(jobs[1])
        progress.show([])
    lines = [line.rstrip() for line in terminal.getvalue().split("\r")]
    wanted = "] 0 of 3 runs; a: epoch 3 of 4, and 1 more"
    assert any(line.startswith(" 33% [00:") and line.endswith(wanted) for line in lines)
    assert any(line.startswith(" 50% [00:") and "] 1 of 3 runs; waiting for a run that" in line for line in lines)
