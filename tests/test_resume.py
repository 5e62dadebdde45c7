"""Bit-exactness through the command line: the same command twice, killed at random moments, damaged, out of space."""

import random
import resource
import signal
import time

import pytest
from tiny_run import results, run, start, tiny_toml

KILLS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_toml(tmp_path_factory.mktemp("config") / "tiny.toml")


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """Folder of a run that nothing disturbed, and the seconds it took from its first file on."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    process = start("train", config, "--out", out)
    while not (out / "run.json").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    begun = time.monotonic()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return out, time.monotonic() - begun


def test_the_same_command_twice_gives_the_same_bytes(config, unbroken, tmp_path):
    done = run("train", config, "--out", tmp_path / "again")
    assert done.returncode == 0, done.stdout
    assert results(tmp_path / "again") == results(unbroken[0])


def test_a_finished_run_is_left_as_it_is(config, unbroken):
    before = results(unbroken[0])
    done = run("train", config, "--out", unbroken[0])
    assert done.returncode == 0, done.stdout
    assert results(unbroken[0]) == before


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(config, unbroken, tmp_path):
    reference, seconds = unbroken
    out = tmp_path / "killed"
    moments = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        process = start("train", config, "--out", out)
        mark = (out / "run.json").stat().st_mtime_ns if out.exists() else None
        # Imports take most of a short run: count from the moment the run touches its folder or its checkpoints.
        while process.poll() is None and not (out / "run.json").exists():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, seconds) if mark is None else moments.uniform(0, 1.5 * seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 2
    done = run("train", config, "--out", out)
    assert done.returncode == 0, done.stdout
    assert results(out) == results(reference)


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
    assert results(out) == results(unbroken[0])


def test_a_full_disk_is_one_clear_error_and_the_run_continues_later(config, unbroken, tmp_path):
    out = tmp_path / "full"
    limit = sorted((unbroken[0] / "checkpoints").glob("*.pt"))[-1].stat().st_size - 1

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    failed = run("train", config, "--out", out, preexec_fn=small_disk)
    assert failed.returncode == 1
    assert f"error: cannot write {out / 'checkpoints'}" in failed.stdout and "Traceback" not in failed.stdout
    done = run("train", config, "--out", out)
    assert done.returncode == 0, done.stdout
    assert results(out) == results(unbroken[0])
