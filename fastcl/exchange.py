"""The ranks of a process group that compute one loss together, and what they send each other.

torch.distributed is used on the first call that names a group. All collectives are functional ones, which torch.compile
sees. Ranks may hold different numbers of rows.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcl.errors import FastclError, shown, type_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_GRACE = 1.5  # seconds that ranks have to say that they wait, once one of them no longer does
_KEPT = 64  # agreements that a captured call can go back to
_agreements: dict[tuple[str, int, str], list[list[int]]] = {}  # of group, world and facts: both counts of every rank
_told: list[bool] = []  # not empty: this process has been warned


@dataclass(frozen=True)
class Ranks:
    """The ranks of a group, and the number of rows that each holds; empty before `agree`."""

    group: str  # the name that functional collectives take
    rank: int  # this rank's place in the group
    world: int
    sizes: tuple[int, ...] = ()
    device: str = "cpu"  # type of device on which the group can exchange a few numbers

    @classmethod
    def of(cls, group: ProcessGroup | None) -> Ranks:
        """The ranks of a group; None: of all processes.

        Raises:
            FastclError: there is no process group, `group` is none, or it does not hold this process.
        """
        name, rank, world, device = _place(group)
        return cls(name, rank, world, device=device)

    @property
    def total(self) -> int:
        """Number of rows of all ranks."""
        return sum(self.sizes)

    @property
    def table(self) -> Tensor:
        """(world,) int64 on the CPU: the sizes as operators take them."""
        return torch.tensor(self.sizes, dtype=torch.int64, device="cpu")

    @property
    def weight(self) -> float:
        """What turns a sum over own rows into this rank's share of the mean over all."""
        return self.world / self.total

    def agree(self, counts: Sequence[int], text: str, numbers: Mapping[str, Tensor]) -> tuple[Ranks, ...]:
        """These ranks with their sizes, once for each of the counts: this rank's numbers of rows, two at most.

        While a CUDA graph is captured nothing is exchanged, for nothing can be read: the call takes the sizes of the
        last one with these facts. All ranks have agreed in that one, so that all remember the same.

        Args:
            text, numbers: the facts that have to be the same on all ranks, as `facts.packed` takes them.

        Raises:
            FastclError: on every rank, with the same message: facts differ, or a rank called `refuse`. On this rank: a
                graph is captured, and no call before has agreed on these facts with as many rows of this rank.
        """
        own, key = (*counts, 0)[:2], (self.group, self.world, text)
        if _is_capturing():
            sizes = self._remembered(own, key)
        else:
            sizes = self._compared(own, text, numbers)
            _agreements.pop(key, None)
            _agreements[key] = sizes
            if len(_agreements) > _KEPT:  # the oldest: forgotten, a captured call is refused
                del _agreements[next(iter(_agreements))]
        return tuple(replace(self, sizes=tuple(side)) for side, _ in zip(sizes, counts, strict=False))

    def refuse(self, error: Exception) -> FastclError:
        """Tell the other ranks, which are in `agree`, about an error of this one; returns what all of them raise."""
        if _is_capturing():
            return FastclError(told(error))
        from fastcl.facts import REFUSED

        try:
            self._compared((REFUSED, 0), told(error), {})
        except FastclError as common:
            return common
        raise AssertionError("a refusal that no rank has seen")

    def _remembered(self, counts: Sequence[int], key: tuple[str, int, str]) -> list[list[int]]:
        sizes = _agreements.get(key)
        if sizes is None or [side[self.rank] for side in sizes] != list(counts):
            before = "no such call" if sizes is None else f"{[side[self.rank] for side in sizes]} rows"
            raise FastclError(
                f"a loss with gather_distributed=True can be captured into a CUDA graph once all ranks have run the "
                f"same call without capture: rank {self.rank} of {self.world} has {list(counts)} rows now "
                f"and had {before}"
            )
        return sizes

    def _compared(self, counts: Sequence[int], text: str, numbers: Mapping[str, Tensor]) -> list[list[int]]:
        """Both counts of every rank. Raises FastclError if the facts differ or a rank has refused."""
        from fastcl.facts import are_same, difference, packed  # which one process does not need

        own = packed(counts, text, numbers, _current(self.device))
        try:
            table = _all_gather(own, self).view(self.world, -1).cpu()
        except RuntimeError as error:
            raise FastclError(
                f"{self._in_vain()}; does every rank call the same function with gather_distributed=True? ({error})"
            ) from error
        if not are_same(table):
            raise FastclError(difference(table.tolist()))
        return table[:, :2].T.tolist()

    def start(self, rows: Tensor) -> Tensor:
        """Begin to gather this rank's rows (n, ...). `gather` and `others` take what it returns."""
        most = max(self.sizes)
        if rows.shape[0] < most:
            rows = torch.cat([rows, rows.new_zeros((most - rows.shape[0], *rows.shape[1:]))])
        return _started(rows, self)

    def gather(self, started: Tensor) -> Tensor:
        """(N, ...) rows of all ranks, in the order of the ranks."""
        rows = self._arrived(started)
        if all(size == self.sizes[0] for size in self.sizes):
            return rows
        return torch.cat([part[:size] for part, size in zip(rows.chunk(self.world), self.sizes, strict=True)])

    def others(self, started: Tensor) -> Tensor:
        """The same without this rank's own rows."""
        parts = zip(self._arrived(started).chunk(self.world), self.sizes, strict=True)
        return torch.cat([part[:size] for rank, (part, size) in enumerate(parts) if rank != self.rank])

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over all ranks of a tensor that has the same shape on each."""
        return self._arrived(torch.ops._c10d_functional.all_reduce(values.contiguous(), "sum", self.group))

    def _arrived(self, started: Tensor) -> Tensor:
        try:
            return _finished(started)
        except RuntimeError as error:
            raise FastclError(
                f"{self._in_vain()}; does every rank run the same forward and backward passes, and has none ended? "
                f"({error})"
            ) from error

    def _in_vain(self) -> str:
        """For which ranks this one has waited: those that do not say, in the store of all processes, that they wait."""
        absent: list[int] = []
        # The process that holds the store may itself have stopped: who asks it waits without end.
        asking = threading.Thread(target=self._ask, args=(absent,), name="fastcl-absent", daemon=True)
        asking.start()
        asking.join(2 * _GRACE)
        ranks = f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}"
        late = f", of which {ranks} did not come within a second of it" if absent else ""
        return f"rank {self.rank} of {self.world} waited in vain for the other ranks of its process group{late}"

    def _ask(self, absent: list[int]) -> None:
        """Say that this rank waits; add the ranks that have not said so a while later."""
        from torch.distributed.distributed_c10d import _get_default_store

        key, silent = f"fastcl waits in {self.group}", [k for k in range(self.world) if k != self.rank]
        try:
            store = _get_default_store()
            store.set(f"{key} {self.rank}", "")
            until = time.monotonic() + (_GRACE if self.rank else 1.5 * _GRACE)  # the first may hold the store
            while silent and time.monotonic() < until:
                time.sleep(0.02)
                silent = [k for k in silent if not store.check([f"{key} {k}"])]
        except (RuntimeError, ValueError):  # it has gone
            return
        absent += silent


def told(error: Exception) -> str:
    """An error in the words in which other ranks read it."""
    words = str(*error.args) if isinstance(error, FastclError) else f"{type(error).__name__}: {error}"
    return "\n".join(map(shown, words.split("\n")))


def gathers(asked: bool | None) -> bool:
    """Whether a loss is to be that of all ranks. None stands for False, with one warning in a group of several ranks:
    the loss of each rank's own rows is rarely what is meant there."""
    if asked is not None or torch.compiler.is_compiling() or _told:
        return bool(asked)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        world = distributed.get_world_size()
        if world > 1:
            _told.append(True)
            warnings.warn(
                f"this loss compares the rows of one rank only, although {world} ranks run; pass "
                "gather_distributed=True for the loss of the global batch, or gather_distributed=False if this is "
                "meant",
                stacklevel=callers(),
            )
    return False


def callers(*libraries: str) -> int:
    """How far above the function that calls this the first frame outside of this package and of torch.nn is.

    Args:
        libraries: further modules to leave, such as "sentence_transformers.".
    """
    level, frame = 2, sys._getframe(2)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("fastcl.", "torch.nn.", *libraries)):
        level, frame = level + 1, frame.f_back
    return level


def _constant_while_compiling(function):
    """Same as torch.compiler.assume_constant_result, which would import torch._dynamo immediately."""
    function._dynamo_marked_constant = True
    return function


@_constant_while_compiling
def _place(group: ProcessGroup | None) -> tuple[str, int, int, str]:
    """Name of the group, this process's rank in it, number of ranks, type of device: the CPU if the group can."""
    from torch import distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise FastclError(
            "gather_distributed=True needs a process group: call torch.distributed.init_process_group first, in "
            "processes that torchrun has started"
        )
    import torch.distributed._functional_collectives  # noqa: F401  (registers what torch.compile needs)

    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise FastclError("group does not hold this process: call the loss only on ranks that belong to it")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise FastclError(f"group must be a torch.distributed.ProcessGroup or None, got {type_of(group)}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise FastclError(
            f"group does not hold this process, rank {dist.get_rank()} of all: its ranks are "
            f"{dist.get_process_group_ranks(group)}"
        )
    kinds = [part.partition(":")[0] for part in str(dist.get_backend_config(group)).split(",")]
    return group.group_name, rank, dist.get_world_size(group), "cpu" if "cpu" in kinds else kinds[0]


def _is_capturing() -> bool:
    """Whether a CUDA graph is captured. PyTorch's own answer is an error where there is no driver."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _current(kind: str) -> torch.device:
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def _started(rows: Tensor, ranks: Ranks) -> Tensor:
    return torch.ops._c10d_functional.all_gather_into_tensor(rows.contiguous(), ranks.world, ranks.group)


def _finished(started: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(started)


def _all_gather(rows: Tensor, ranks: Ranks) -> Tensor:
    return _finished(_started(rows, ranks))
