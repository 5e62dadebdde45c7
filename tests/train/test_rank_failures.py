"""What the ranks of a run say when one of them fails: each a line with that rank and the cause."""

import errno
import os
import signal
from functools import partial

import pytest
from test_torchrun import arguments  # noqa: F401
from warm_commands import run_ranks

from fastcl import FastclError
from fastcl.train.epoch import Steps

pytestmark = pytest.mark.dist


def break_step(rank, error):
    """In a rank's process: its third step raises."""
    step = Steps._step

    def broken(self, number, batch):
        if number == 2 and int(os.environ["RANK"]) == rank:
            raise error
        return step(self, number, batch)

    Steps._step = broken


FAILURES = {
    "a file": (1, OSError(errno.EIO, "Input/output error", "a.jpg"), "cannot read or write a.jpg: Input/output error"),
    "a full disk": (
        0, OSError(errno.ENOSPC, "No space left on device"),
        "cannot read or write standard output: No space left on device",
    ),
    "a closed pipe": (
        0, BrokenPipeError(errno.EPIPE, "Broken pipe"), "cannot read or write standard output: Broken pipe",
    ),
    "a library": (
        1, ImportError("libx.so: cannot open shared object file", name="kornia"),
        "module kornia cannot be loaded (libx.so: cannot open shared object file); check that it is completely "
        "installed and readable",
    ),
    "ours": (1, FastclError("image 7 has gone"), "image 7 has gone"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_all_ranks_say_why_one_of_them_ends(arguments, tmp_path, name):  # noqa: F811
    rank, error, words = FAILURES[name]
    given = arguments(tmp_path / "run", "data.classes=2", 'train.models=["dcl"]', "train.controls=[]")
    statuses, said = run_ranks(2, *given, output=tmp_path / "log", before=partial(break_step, rank, error))
    assert statuses == [1, 1], said
    lines = [[line for line in text.splitlines() if "error" in line.lower()] for text in said]
    why = f"error: rank {rank} of 2 has failed: {words}"
    assert lines[rank] == [why] and lines[1 - rank] == [f"{why}; the same command resumes from the last checkpoint"]
    assert "Traceback" not in "".join(said) and not list((tmp_path / "log").glob("*.json"))


def interrupt(rank, number):
    """In a rank's process: a signal comes, or a KeyboardInterrupt, in its third step."""
    step = Steps._step

    def interrupted(self, count, batch):
        if count == 2 and int(os.environ["RANK"]) == rank:
            if number is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)
        return step(self, count, batch)

    Steps._step = interrupted


RESUMES = "; the same command resumes from the last checkpoint\n"


@pytest.mark.parametrize(("number", "word", "status", "own"), [
    (signal.SIGINT, "interrupted", 130, ""), (signal.SIGTERM, "ended by SIGTERM", 143, ""),
    (None, "interrupted", 130, f"interrupted{RESUMES}"),
])  # fmt: skip
def test_a_rank_that_is_interrupted_is_named_as_such(arguments, tmp_path, number, word, status, own):  # noqa: F811
    given = arguments(tmp_path / "run", "data.classes=2", 'train.models=["dcl"]', "train.controls=[]")
    statuses, said = run_ranks(2, *given, output=tmp_path / "log", before=partial(interrupt, 1, number))
    assert statuses == [1, status] and said[1] == own, said
    assert said[0].count("error: ") == 1 and said[0].endswith(f"error: rank 1 of 2 was {word}{RESUMES}"), said
