"""What of a run's folder is a run's own: links, other names of its files, its lock, inputs that lie in it."""

import hashlib
import os
import signal
import time
from contextlib import suppress

import pytest
from tiny_run import tiny_config

from fastcl import FastclError
from fastcl.train import Lockstep
from fastcl.train.run_folder.records import JsonLines, locked

SMALL = dict(train__models=["dcl"], train__controls=[], train__epochs=2, data__classes=2)


def small(**changes):
    return tiny_config(**SMALL | changes)


OUTSIDE = (".lock", "run.json", "metrics.jsonl", "timing.jsonl", "layers.json", "report.html", "checkpoints", "weights",
           "tensorboard")  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("present", (True, False))
def test_nothing_is_written_through_a_link(tmp_path, name, present):
    out, target = tmp_path / "run", tmp_path / "precious"
    out.mkdir()
    if present and "." in name:
        target.write_text("precious")
    elif present:
        target.mkdir()
    (out / name).symlink_to(target)
    with pytest.raises(FastclError, match=f"{name} is a link to {target}; a run writes only inside its own"):
        Lockstep(small(), out)
    assert target.read_text() == "precious" if present and "." in name else not present or not list(target.iterdir())
    assert target.exists() == present


def wait_for_lock(folder):
    """Until whoever keeps it has let go."""
    for _ in range(1000):
        with suppress(FastclError), locked(folder):
            return
        time.sleep(0.01)
    pytest.fail("the lock is still held")


def test_records_with_another_name_and_things_that_are_no_files(tmp_path):
    records = tmp_path / "metrics.jsonl"
    records.write_text("")
    os.link(records, tmp_path / "kept.jsonl")
    with pytest.raises(FastclError, match=r"metrics.jsonl has a second name \(a hard link\)"):
        Lockstep(small(), tmp_path)
    records.unlink()
    os.mkfifo(records)
    with pytest.raises(FastclError, match="metrics.jsonl is not a regular file"):
        Lockstep(small(), tmp_path)
    records.unlink()
    (tmp_path / "weights").write_text("")
    with pytest.raises(FastclError, match="weights is not a regular folder"):
        Lockstep(small(), tmp_path)


def test_links_that_come_while_a_run_is_going_are_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(FastclError, match="it is a link, and a run writes only"):
        JsonLines(tmp_path / "metrics.jsonl").append([{"epoch": 0}])
    with pytest.raises(FastclError, match="it is a link, and a run writes only"):
        JsonLines(tmp_path / "metrics.jsonl").cut(3)
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(FastclError, match="it is a link, and a run writes only"), locked(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_inputs_are_not_written_over(tmp_path):
    out = tmp_path / "run"
    (out / "weights").mkdir(parents=True)
    for given in (out / "report.html", out / "weights" / "data.zip"):
        given.write_text("input")
        with pytest.raises(FastclError, match=f"the run would overwrite {given}"):
            Lockstep(small(), out, inputs=[given])
        with pytest.raises(FastclError, match=f"the run would overwrite {given}"):
            Lockstep(small(data__source=f"folder:{given}"), out)
        given.unlink()
    with pytest.raises(FastclError, match="run is read by this command"):
        Lockstep(small(data__source=f"folder:{out}"), out)


def test_a_digest_grows_with_its_file(tmp_path):
    lines = JsonLines(tmp_path / "x.jsonl")
    lines.append([{"a": 1}])
    first = lines.length()
    assert lines.digest(first) == hashlib.sha256(b'{"a": 1}\n').hexdigest()
    lines.append([{"a": 2}])
    assert lines.digest(lines.length()) == hashlib.sha256(lines.path.read_bytes()).hexdigest()
    assert lines.digest(first) == hashlib.sha256(b'{"a": 1}\n').hexdigest()


def test_a_link_for_a_lock_empties_nothing_wherever_it_leads(tmp_path):
    for target, content in (("precious", "precious"), ("absent", None)):
        path = tmp_path / target
        if content is not None:
            path.write_text(content)
        (tmp_path / ".lock").symlink_to(path)
        with pytest.raises(FastclError, match="it is a link, and a run writes only"), locked(tmp_path):
            pass
        assert (path.read_text() if path.exists() else None) == content
        (tmp_path / ".lock").unlink()


def test_a_worker_does_not_keep_the_lock_of_a_run_that_was_killed(tmp_path):
    reader, writer = os.pipe()
    run = os.fork()
    if not run:
        with suppress(BaseException), locked(tmp_path):
            worker = os.fork()
            if not worker:
                time.sleep(60)
                os._exit(0)
            os.write(writer, b"%d" % worker)
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    os.waitpid(run, 0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        os.set_blocking(reader, False)
        worker = int(pipe.read())
    try:
        wait_for_lock(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)  # fails if it has ended by itself and so proves nothing


def test_a_worker_does_not_keep_the_lock_of_a_run_that_has_ended(tmp_path):
    with locked(tmp_path):
        worker = os.fork()
        if not worker:
            time.sleep(60)
            os._exit(0)
    try:
        wait_for_lock(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
