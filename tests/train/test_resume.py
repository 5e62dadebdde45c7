"""Bit-exactness through the command line: the same command twice, killed at random moments, damaged, out of space."""

import random
import resource
import signal
import time
from contextlib import suppress

import pytest
from tiny_run import results, run, start, tiny_toml

KILLS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_toml(tmp_path_factory.mktemp("config") / "tiny.toml")


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """Folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    done = run("train", config, "--out", out)
    assert done.returncode == 0, done.stdout
    return out


def state(folder):
    """Every file with its size and time, as far as they can be told while files come and go."""
    found = []
    with suppress(FileNotFoundError):
        for path in sorted(folder.rglob("*")):
            found.append((path, path.stat().st_size, path.stat().st_mtime_ns))
    return found


def test_the_same_command_twice_gives_the_same_bytes(config, unbroken, tmp_path):
    done = run("train", config, "--out", tmp_path / "again")
    assert done.returncode == 0, done.stdout
    assert results(tmp_path / "again") == results(unbroken)


def test_a_finished_run_is_left_as_it_is(config, unbroken):
    before = results(unbroken)
    done = run("train", config, "--out", unbroken)
    assert done.returncode == 0, done.stdout
    assert results(unbroken) == before


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(config, unbroken, tmp_path):
    out = tmp_path / "killed"
    moments = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        # By what the run writes and not by the clock: a busy machine kills it at the same points.
        wanted, seen, last = moments.randint(1, 10), 0, state(out)
        process = start("train", config, "--out", out)
        while process.poll() is None and seen < wanted:
            time.sleep(0.002)
            now = state(out)
            seen, last = seen + (now != last), now
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 2
    done = run("train", config, "--out", out)
    assert done.returncode == 0, done.stdout
    assert results(out) == results(unbroken)


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(config, unbroken, tmp_path):
    out = tmp_path / "damaged"
    assert run("train", config, "--out", out).returncode == 0
    last = sorted((out / "checkpoints").glob("*.pt"))[-1]
    last.write_bytes(last.read_bytes()[:-1000])
    for name in ("weights", "features"):
        for path in (out / name).iterdir():
            path.unlink()
    done = run("train", config, "--out", out)
    assert done.returncode == 0, done.stdout
    assert f"checkpoint {last} is damaged" in done.stdout and "resuming from" in done.stdout
    assert results(out) == results(unbroken)


def test_a_full_disk_is_one_clear_error_and_the_run_continues_later(config, unbroken, tmp_path):
    out = tmp_path / "full"
    limit = sorted((unbroken / "checkpoints").glob("*.pt"))[-1].stat().st_size - 1

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    failed = run("train", config, "--out", out, preexec_fn=small_disk)
    assert failed.returncode == 1
    assert f"error: cannot write {out / 'checkpoints'}" in failed.stdout and "Traceback" not in failed.stdout
    done = run("train", config, "--out", out)
    assert done.returncode == 0, done.stdout
    assert results(out) == results(unbroken)
