"""Commands in processes that have their libraries imported: a new one takes longer for that than for a tiny run.

They are forked from a server that has imported them and done nothing else. Their reports have no figures, which take as
long to draw as a tiny run takes to train; tests/report looks at figures, tests/cli/test_cli.py at a whole command.
"""

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["fastcl.cli.main", "fastcl.train.trainer", "fastcl.report", "matplotlib.pyplot", "sklearn.datasets"]
)

stores: list[Any] = []


def start(
    *arguments: str | Path, output: Path, largest_file: int | None = None, environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> multiprocessing.Process:  # fmt: skip
    """`fastcl` with these arguments, beginning to work.

    Args:
        output: file that takes both of its streams.
        largest_file: bytes, after which a write fails as on a full disk.
        environment: variables to set.
        before: a module's own function that the process calls first.
    """
    given = [str(a) for a in arguments], output, largest_file, dict(environment or {}), before
    process = context.Process(target=_run, args=given)
    process.start()
    return process


def start_ranks(
    world: int, *arguments: str | Path, output: Path, before: Callable[[], None] | None = None
) -> list[multiprocessing.Process]:
    """`fastcl` with these arguments in as many processes, with the environment that torchrun gives them.

    Args:
        output: folder of the files "0", "1", ..., which take both streams of each rank, and "0.json", ...: what
            torchrun is told of an error.
        before: as of `start`.
    """
    output.mkdir(exist_ok=True)
    environments = rank_environments(world)
    for k, found in enumerate(environments):
        found["TORCHELASTIC_ERROR_FILE"] = str(output / f"{k}.json")
    return [
        start(*arguments, output=output / str(k), environment=found, before=before)
        for k, found in enumerate(environments)
    ]


def rank_environments(world: int) -> list[dict[str, str]]:
    """What torchrun adds to the environment of each rank."""
    from torch.distributed import TCPStore

    stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))  # torchrun keeps one
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stores[-1].port), "GLOO_SOCKET_IFNAME": "lo"}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "tests"}
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [common | {"RANK": str(k), "LOCAL_RANK": str(k)} for k in range(world)]


def run_ranks(
    world: int, *arguments: str | Path, output: Path, before: Callable[[], None] | None = None
) -> tuple[list[int | None], list[str]]:
    """Exit statuses and outputs of all ranks."""
    return end_ranks(start_ranks(world, *arguments, output=output, before=before), output)


def end_ranks(ranks: list[multiprocessing.Process], output: Path) -> tuple[list[int | None], list[str]]:
    """Exit statuses and outputs of ranks, once they have ended."""
    for process in ranks:
        process.join(120)
        process.kill()
        process.join()
    return [process.exitcode for process in ranks], [(output / str(k)).read_text() for k in range(len(ranks))]


def run(*arguments: str | Path, output: Path, **options: Any) -> tuple[int, str]:
    """Exit status and output of `fastcl` with these arguments."""
    process = start(*arguments, output=output, **options)
    process.join(300)
    process.kill()
    process.join()
    return process.exitcode, output.read_text(encoding="utf-8")


def _run(
    arguments: list[str], output: Path, largest_file: int | None, environment: dict[str, str],
    before: Callable[[], None] | None,
) -> None:  # fmt: skip
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as in any new Python
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    import torch

    from fastcl.cli.main import main
    from fastcl.report import html

    html._figures = lambda run: []
    torch.set_num_threads(1)
    sys.argv = ["fastcl", *arguments]
    if before is not None:
        before()
    sys.exit(main())
