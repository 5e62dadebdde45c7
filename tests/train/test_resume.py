"""Bit-exactness through the command line: the same command twice, killed at random moments, damaged, out of space."""

import gzip
import json
import random
import signal
import time
from contextlib import suppress

import pytest
import tiny_run
from tiny_run import results, tiny_toml
from warm_commands import run, start

from fastcl.train.step import BACKWARD, ENCODERS, WAITING
from fastcl.train.step_profile import PARTS

KILLS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tiny_toml(tmp_path_factory.mktemp("config") / "tiny.toml")
    path.write_text(path.read_text().replace("classes = 3", "classes = 2"))  # four steps an epoch
    return path


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """Folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    status, said = run("train", config, "--out", out, output=out.parent / "log")
    assert status == 0, said
    return out


@pytest.fixture
def train(config, tmp_path):
    """Function that trains into a folder to the end; returns what was said."""

    def call(out):
        status, said = run("train", config, "--out", out, output=tmp_path / "log")
        assert status == 0, said
        return said

    return call


def state(folder):
    """Every file with its size and time, as far as they can be told while files come and go."""
    found = []
    with suppress(FileNotFoundError):
        for path in sorted(folder.rglob("*")):
            found.append((path, path.stat().st_size, path.stat().st_mtime_ns))
    return found


def test_the_same_command_twice_gives_the_same_bytes(config, unbroken, tmp_path):
    """In a new process, and under a profile, which changes nothing else."""
    done = tiny_run.run("train", config, "--out", tmp_path / "again", "--profile")
    assert done.returncode == 0, done.stdout
    shares = (tmp_path / "again" / "profile" / "shares.txt").read_text()
    assert shares in done.stdout and "2 steps after 2 others" in shares and "ERROR" not in done.stdout
    parts = {line.split("  ")[0]: float(line.split()[-1][:-1]) for line in shares.splitlines() if line.endswith("%")}
    assert list(parts) == ["data wait", *PARTS, "other", "step"] and parts.pop("step") == 100
    assert sum(parts.values()) == pytest.approx(100, abs=0.5) and parts["forward"] > 1 and parts["backward"] > 1
    with gzip.open(tmp_path / "again" / "profile" / "trace.json.gz") as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert {WAITING, ENCODERS, BACKWARD} <= names
    assert results(tmp_path / "again") == results(unbroken)


def test_a_finished_run_is_left_as_it_is(train, unbroken):
    before = results(unbroken)
    train(unbroken)
    assert results(unbroken) == before


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(config, train, unbroken, tmp_path):
    out = tmp_path / "killed"
    moments = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        # By what the run writes and not by the clock: a busy machine kills it at the same points.
        wanted, seen, last = moments.randint(1, 10), 0, state(out)
        process = start("train", config, "--out", out, output=tmp_path / "log")
        while process.is_alive() and seen < wanted:
            time.sleep(0.002)
            now = state(out)
            seen, last = seen + (now != last), now
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 2
    train(out)
    assert results(out) == results(unbroken)


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(train, unbroken, tmp_path):
    out = tmp_path / "damaged"
    train(out)
    last = sorted((out / "checkpoints").glob("*.pt"))[-1]
    last.write_bytes(last.read_bytes()[:-1000])
    for name in ("weights", "features"):
        for path in (out / name).iterdir():
            path.unlink()
    said = train(out)
    assert f"checkpoint {last} is damaged" in said and "resuming from" in said
    assert results(out) == results(unbroken)


def test_a_full_disk_is_one_clear_error_and_the_run_continues_later(config, train, unbroken, tmp_path):
    out = tmp_path / "full"
    limit = sorted((unbroken / "checkpoints").glob("*.pt"))[-1].stat().st_size - 1
    status, said = run("train", config, "--out", out, output=tmp_path / "log", largest_file=limit)
    assert status == 1
    assert f"error: cannot write {out / 'checkpoints'}" in said and "Traceback" not in said
    train(out)
    assert results(out) == results(unbroken)
