"""What a run's folder may lack, or hold besides, without finished work being lost or taken for another run's."""

import hashlib
import io
import json
import os
import shutil

import pytest
import torch
from tiny_run import results, tiny_config

from fastcl import FastclError
from fastcl.report import write_report
from fastcl.train import Lockstep
from fastcl.train.run_folder.records import locked

SMALL = dict(train__models=["dcl"], train__controls=[], train__epochs=2, data__classes=2)


def small(**changes):
    return tiny_config(**SMALL | changes)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    out = tmp_path_factory.mktemp("original") / "run"
    Lockstep(small(), out).run()
    return out


@pytest.fixture
def done(original, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(original, tmp_path / "run")


def files(out):
    """The bytes of all files but the lock, which is empty, and the curves, of which each start makes a file."""
    paths = (p for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock" and "tensorboard" not in p.parts)
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def last(out):
    return sorted((out / "checkpoints").glob("*.pt"))[-1]


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(path, state):
    """A checkpoint with other content and the right digest."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue() if not isinstance(state, bytes) else state
    path.unlink()
    path = path.with_name(f"{path.name.partition('-')[0]}-{hashlib.sha256(payload).hexdigest()[:16]}.pt")
    path.write_bytes(payload)
    return path


def state_of(out):
    return torch.load(last(out), weights_only=True)


def test_a_finished_run_without_checkpoints_is_left_as_it_is(done, caplog):
    shutil.rmtree(done / "checkpoints")
    before = files(done)
    with caplog.at_level("INFO", "fastcl"):
        Lockstep(small(), done).run()
    assert files(done) == before and "already finished: 2 epochs" in caplog.text
    with pytest.raises(FastclError, match=r"another run, which differs in optim.lr \(0.05 there, 0.1 here\)"):
        Lockstep(small(optim__lr=0.1), done)
    (done / "run.json").unlink()
    with pytest.raises(FastclError, match="but neither run.json nor a checkpoint tells which run they belong to"):
        Lockstep(small(), done)
    assert files(done) == {name: data for name, data in before.items() if name != "run.json"}


def test_a_finished_run_with_its_last_checkpoint_gone_is_not_trained_again(done):
    last(done).unlink()
    before = files(done)
    Lockstep(small(), done).run()
    assert files(done) == before


@pytest.mark.parametrize("gone", ("metrics.jsonl", "weights", "features"))
def test_trained_epochs_without_a_checkpoint_are_never_cut(done, gone):
    shutil.rmtree(done / "checkpoints")
    shutil.rmtree(done / gone, ignore_errors=True)
    (done / gone).unlink(missing_ok=True)
    before = files(done)
    with pytest.raises(FastclError, match="but no checkpoint to resume from"):
        Lockstep(small(), done).run()
    assert files(done) == before


def test_somebody_else_s_records_are_never_cut(tmp_path):
    for text in ("not JSON\n", '{"loss": 1}\n', "[1]\n", '{"epoch": 1' + "0" * 400 + "}\n"):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(FastclError, match="metrics.jsonl, but neither run.json nor a checkpoint"):
            Lockstep(small(), tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text() == text


def test_missing_timing_loses_nothing(done):
    before = results(done, ("metrics.jsonl", "steps.jsonl"))
    (done / "timing.jsonl").unlink()
    with pytest.raises(FastclError, match=r"another run, which differs in optim.lr"):
        Lockstep(small(optim__lr=0.1), done)
    assert len(list((done / "checkpoints").iterdir())) == 2
    Lockstep(small(), done).run()
    assert results(done, ("metrics.jsonl", "steps.jsonl")) == before


def test_a_run_without_run_json_is_told_by_its_checkpoint(done, caplog):
    before = results(done, ("metrics.jsonl", "steps.jsonl"))
    described = (done / "run.json").read_bytes()
    (done / "run.json").unlink()
    with pytest.raises(FastclError, match=r"another run, which differs in train.temperature \(0.5 there, 0.1 here\)"):
        Lockstep(small(train__temperature=0.1), done)
    assert not (done / "run.json").exists()
    Lockstep(small(), done).run()
    assert (done / "run.json").read_bytes() == described and "run.json was missing from" in caplog.text
    assert results(done, ("metrics.jsonl", "steps.jsonl")) == before


def test_a_run_json_of_other_settings_does_not_rename_the_weights(done):
    config = json.loads((done / "run.json").read_text())["config"]
    change(done / "run.json", config=config | {"optim": config["optim"] | {"lr": 0.1}})
    before = files(done)
    with pytest.raises(
        FastclError, match=r"does not belong to this run \(it differs in optim.lr \(0.05 there, 0.1 here\)\)"
    ):
        Lockstep(small(optim__lr=0.1), done).run()
    assert files(done) == before


@pytest.mark.parametrize("name", ("metrics", "steps"))
def test_a_changed_digit_before_the_checkpoint_is_noticed(done, name):
    path = done / f"{name}.jsonl"
    data = bytearray(path.read_bytes())
    at = next(k for k in range(len(data) // 2, len(data)) if data[k : k + 1].isdigit())
    data[at] = ord("1") if data[at] != ord("1") else ord("2")
    path.write_bytes(data)
    with pytest.raises(
        FastclError, match=rf"{name}.jsonl was changed: its first {len(data)} bytes are not as they were"
    ):
        Lockstep(small(), done).run()
    path.write_bytes(data[:-1])
    with pytest.raises(
        FastclError, match=rf"{name}.jsonl has {len(data) - 1} bytes, but had {len(data)} when epoch_000002"
    ):
        Lockstep(small(), done).run()
    assert path.read_bytes() == data[:-1]


def test_checkpoints_of_earlier_versions_go_on(done, caplog):
    """They have neither settings nor digests, and run.json had fewer keys."""
    before = results(done, ("metrics.jsonl", "steps.jsonl"))
    old = {key: value for key, value in state_of(done).items() if key not in ("run", "digests")}
    rewrite(last(done), old)
    config = json.loads((done / "run.json").read_text())["config"]
    del config["data"]["corrupt"], config["train"]["layers"]
    change(done / "run.json", config=config)
    Lockstep(small(), done).run()
    assert "was written by an earlier version" in caplog.text
    assert results(done, ("metrics.jsonl", "steps.jsonl")) == before
    (done / "run.json").unlink()
    with pytest.raises(FastclError, match="but neither run.json nor a checkpoint tells which run they belong to"):
        Lockstep(small(), done)


def foreign(state):
    """What a checkpoint may hold instead: (content, what the message says)."""
    twins = {"dcl": state["twins"]["dcl"]}
    network = {key: value[:1] if value.ndim else value for key, value in twins["dcl"]["network"].items()}
    optimizer = {**twins["dcl"]["optimizer"], "param_groups": [
        {**group, "weight_decay": 5.0} for group in twins["dcl"]["optimizer"]["param_groups"]]}  # fmt: skip
    buffers = {key: {name: torch.zeros(3, 3, 3, 3, 3) for name in value}
               for key, value in twins["dcl"]["optimizer"]["state"].items()}  # fmt: skip
    held = twins["dcl"]["optimizer"]["state"]
    halves, infinite = ({key: {name: change(buffer) for name, buffer in value.items()} for key, value in held.items()}
                        for change in (torch.Tensor.half, lambda buffer: buffer / 0))  # fmt: skip

    def with_network(change):
        weights = twins["dcl"]["network"].items()
        network = {key: change(value) if value.is_floating_point() else value for key, value in weights}
        return state | {"twins": {"dcl": twins["dcl"] | {"network": network}}}

    def with_state(content):
        optimizer = twins["dcl"]["optimizer"] | {"state": content}
        return state | {"twins": {"dcl": twins["dcl"] | {"optimizer": optimizer}}}

    return {
        "bytes": (b"no archive", "torch cannot read it"),
        "list": ([1, 2], "it contains a list"),
        "epoch": (state | {"epoch": 1}, "its name says epoch 2, its content says 1"),
        "lengths": (state | {"lengths": {"metrics": -1}}, "its lengths are"),
        "digests": (state | {"digests": [1]}, "its digests are"),
        "settings": (state | {"run": "{"}, "settings in checkpoint .* not valid JSON"),
        "no settings": (state | {"run": "[]"}, r"its settings are \[\]"),
        "twins": (state | {"twins": 3}, "its models are 3"),
        "names": (state | {"twins": {"nscl": 1}}, r"its models are \['nscl'\], the run's are \['dcl'\]"),
        "empty": (state | {"twins": {"dcl": 1}}, "model 'dcl': "),
        "shapes": (state | {"twins": {"dcl": twins["dcl"] | {"network": network}}}, "model 'dcl': .*size mismatch"),
        "groups": (state | {"twins": {"dcl": twins["dcl"] | {"optimizer": optimizer}}}, "differs in weight_decay"),
        "halves": (with_network(lambda value: value.half()), "is torch.float16, the run's is torch.float32"),
        "not finite": (with_network(lambda value: value * float("nan")), "is not finite"),
        "no state": (with_state({}), r"after 2 epochs its optimiser has no momentum_buffer for encoder\."),
        "half state": (with_state(halves), "momentum_buffer for .* is torch.float16, not torch.float32"),
        "infinite state": (with_state(infinite), "momentum_buffer for .* is not finite"),
        "odd state": (with_state([1]), r"state is \[1\]"),
        "buffers": (state | {"twins": {"dcl": twins["dcl"] | {"optimizer": twins["dcl"]["optimizer"] |
                                                              {"state": buffers}}}}, "differs in momentum_buffer"),
    }  # fmt: skip


def test_a_checkpoint_with_the_right_digest_and_foreign_content_is_one_error(done):
    for content, message in foreign(state_of(done)).values():
        rewrite(last(done), content)
        before = files(done)
        with pytest.raises(FastclError, match=message):
            Lockstep(small(), done).run()
        assert files(done) == before, message


@pytest.mark.parametrize("content, message", (
    ("[" * 100_000, "nested too deeply"), ("[" * 50 + "]" * 50, "nested more than 32 levels"),
    ("[1]", "does not describe a run"),
    ("{}", "does not describe a run"), ('{"config": 3}', "does not describe a run"),
    ('{"config": {}, "seed": 1' + "0" * 5000 + "}", "digits"),
    ('{"config": {}, "seed": 1' + "0" * 400 + "}", "401 digits"), ('{"config": {"data": []}}', "contains another run"),
    ("\udce9", "not valid JSON"),
))  # fmt: skip
def test_a_run_json_that_was_edited_is_one_error(done, content, message):
    (done / "run.json").write_bytes(os.fsencode(content))
    before = files(done)
    with pytest.raises(FastclError, match=message):
        Lockstep(small(), done)
    assert files(done) == before


@pytest.mark.parametrize("skipped", ({"x": "why"}, {"3": ["why"]}, [3], {"-1": "why"}))
def test_edited_reasons_of_left_out_images_are_one_error(done, skipped):
    change(done / "run.json", skipped=skipped)
    with pytest.raises(FastclError, match="run.json: 'skipped' must give a reason for each id"):
        Lockstep(small(), done)


def test_the_report_takes_no_number_beyond_a_float(done):
    with (done / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "model": "dcl", "loss": 1' + "0" * 400 + "}\n")
    with pytest.raises(FastclError, match=r"metrics.jsonl, line \d+: not valid JSON \(an integer of 401 digits\)"):
        write_report(done)


def test_what_killed_writes_left_is_removed_under_the_lock(done):
    left = [done / name for name in ("checkpoints/epoch_000002-0123.pt.tmp", "weights/.fastcl-01.part", "run.json.tmp")]
    for path in left:
        path.write_bytes(b"half")
    with locked(done), pytest.raises(FastclError, match="another process is training"):
        Lockstep(small(), done)
    assert all(path.exists() for path in left)
    Lockstep(small(), done)
    assert not any(path.exists() for path in left)


def test_a_run_that_was_begun_elsewhere_says_so_once(done, caplog):
    for folder in (done / "weights", done / "features"):
        shutil.rmtree(folder)
    last(done).unlink()  # one epoch is left to train
    change(done / "run.json", device="cpu (97 threads)")
    Lockstep(small(), done).run()
    assert caplog.text.count("resuming a run made elsewhere: device ('cpu (97 threads)' there") == 1
