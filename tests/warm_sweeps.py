"""`fastcl sweep` in a process that has its libraries imported, and its cells in processes forked from that one.

A cell that starts as users start it takes as long to import its libraries as many tiny runs take to train;
tests/sweep/test_sweep.py looks at one that does.
"""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from warm_commands import context

MARK = "process "  # begins the line of a cell's log that gives the id of its process


class Forked:
    """What the sweep uses of `subprocess.Popen`, for a command that trains."""

    def __init__(self, command: list[str], *, stdout: IO[bytes], env: Mapping[str, str], **options: Any) -> None:
        assert command[:4] == [sys.executable, "-m", "fastcl", "train"] and options["start_new_session"]
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            try:
                os.setsid()
                os.write(stdout.fileno(), f"{MARK}{os.getpid()}\n".encode())
                os.environ.update(env)
                _become(command[3:], stdout.fileno())
            finally:
                os._exit(70)

    def poll(self) -> int | None:
        """The exit status, negative after a signal; None while it runs."""
        return self._ended(os.WNOHANG)

    def wait(self) -> int | None:
        """The exit status, once it has ended."""
        return self._ended(0)

    def _ended(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def start(*arguments: str | Path, output: Path) -> Any:
    """`fastcl sweep` with these arguments, beginning to work. Both of its streams go into the file `output`."""
    process = context.Process(target=_sweep, args=([str(a) for a in arguments], output))
    process.start()
    return process


def run(*arguments: str | Path, output: Path) -> tuple[int, str]:
    """Exit status and output of `fastcl sweep` with these arguments."""
    process = start(*arguments, output=output)
    process.join(120)
    process.kill()
    process.join()
    return process.exitcode, output.read_text(encoding="utf-8")


def last_process(log: Path) -> int:
    """The id of the process that a cell's log begins with, the last one if it has begun more than once; 0: none."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return next((int(line.removeprefix(MARK)) for line in reversed(lines) if line.startswith(MARK)), 0)


def _sweep(arguments: list[str], output: Path) -> None:
    from fastcl.sweep import children, sweep_page

    children.subprocess.Popen = Forked
    sweep_page.pictures = lambda sweep: iter(())  # as long to draw as all cells take to train
    _become(["sweep", *arguments], os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))


def _become(arguments: list[str], stream: int) -> None:
    """Be the command, with both streams in a file; the reports of cells are left out, which take long to draw."""
    for number in (1, 2):
        os.dup2(stream, number)
    sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    import torch

    from fastcl import report
    from fastcl.cli.main import main

    if arguments[0] == "train":
        report.write_report = lambda folder: None
    torch.set_num_threads(1)
    sys.argv = ["fastcl", *arguments]
    status = 1
    try:
        status = main()
    finally:
        sys.stdout.flush()
        os._exit(status)
