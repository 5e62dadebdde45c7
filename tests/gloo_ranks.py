"""Three processes of one gloo group, started once for all tests of a process, and what the tests run in them.

A function runs on every rank, or on ranks 0 and 1 with `pair` as their group. It is called with the rank and the
arguments, and must be a module's own, as its name travels, not its code.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import pytest
import torch
from torch import distributed as dist
from warm_commands import context

WORLD = 3
NAME = "rank of the tests"  # of the processes
PATIENCE = 120  # seconds for a call, and for a collective
groups: dict[str, Any] = {}  # in a rank's process: "all", "pair" (ranks 0 and 1; None elsewhere) and "last" (rank 2)


class Failed(NamedTuple):
    """What a function raised on a rank."""

    text: str
    trace: str


class Pool:
    """The processes, and a connection to each."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.processes, self.ends = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            given = rank, self.folder.name, theirs
            process = context.Process(target=_serve, args=given, daemon=True, name=f"{NAME} {rank}")
            process.start()
            theirs.close()
            self.processes.append(process)
            self.ends.append(ours)
        self.run(abs)

    def outcomes(self, function: Callable[..., Any], *arguments: Any, world: int = WORLD) -> list[Any]:
        """What the function returns on the first `world` ranks, or `Failed`."""
        for end in self.ends[:world]:
            end.send((function, arguments))
        found = []
        for rank, end in enumerate(self.ends[:world]):
            if not end.poll(PATIENCE):
                self.close()
                pytest.fail(f"{function.__name__} did not return on rank {rank}")
            found.append(end.recv())
        return found

    def run(self, function: Callable[..., Any], *arguments: Any, world: int = WORLD) -> list[Any]:
        """The same; an error on any rank fails the test."""
        found = self.outcomes(function, *arguments, world=world)
        failed = [f"rank {rank}: {one.trace}" for rank, one in enumerate(found) if isinstance(one, Failed)]
        assert not failed, "\n".join(failed)
        return found

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()


def _serve(rank: int, folder: str, end: Connection) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if os.environ.get("TRITON_INTERPRET") == "1":  # as in conftest.py
        import quick_interpreter

        quick_interpreter.install()
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=patience)
    pair, last = dist.new_group([0, 1]), dist.new_group([2])
    groups.update(all=dist.group.WORLD, pair=pair, last=last)
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            result = function(rank, *arguments)
        except Exception as error:
            result = Failed(str(error), traceback.format_exc())
        end.send(result)


@cache
def _pool() -> Pool:
    return Pool()


@pytest.fixture(scope="session")
def ranks() -> Pool:
    """The processes, which end with this one."""
    return _pool()


def own(rank: int, cuts: Sequence[int], n: int) -> slice:
    """The rows of a rank, if the n rows of all are cut at these places."""
    return slice((0, *cuts)[rank], (*cuts, n)[rank])
