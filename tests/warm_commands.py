"""Commands in processes that have their libraries imported: a new one takes longer for that than for a tiny run.

They are forked from a server that has imported them and done nothing else.
"""

import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["fastcl.cli.main", "fastcl.train.trainer", "fastcl.report", "matplotlib.pyplot", "sklearn.datasets"]
)


def start(*arguments: str | Path, output: Path, largest_file: int | None = None) -> multiprocessing.Process:
    """`fastcl` with these arguments, beginning to work.

    Args:
        output: file that takes both of its streams.
        largest_file: bytes, after which a write fails as on a full disk.
    """
    process = _context.Process(target=_run, args=([str(a) for a in arguments], output, largest_file))
    process.start()
    return process


def run(*arguments: str | Path, output: Path, **options: int) -> tuple[int, str]:
    """Exit status and output of `fastcl` with these arguments."""
    process = start(*arguments, output=output, **options)
    process.join(300)
    process.kill()
    process.join()
    return process.exitcode, output.read_text(encoding="utf-8")


def _run(arguments: list[str], output: Path, largest_file: int | None) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as in any new Python
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    import torch

    from fastcl.cli.main import main

    torch.set_num_threads(1)
    sys.argv = ["fastcl", *arguments]
    sys.exit(main())
