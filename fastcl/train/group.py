"""The processes of a run that torchrun has started: their group, what they exchange, and how they end together.

A run in one process has one rank and no group; everything here then does nothing.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fastcl import interrupts
from fastcl.errors import FastclError, ToldElsewhere, ToldHere
from fastcl.train.models import Twin
from fastcl.train.pulse import Pulse, show_traceback

_START = timedelta(minutes=10)  # to find each other, before the config with its train.timeout has been read
_pulses: list[Pulse] = []  # of the group that `start` has made


@dataclass(frozen=True)
class Ranks:
    """Attributes:
    rank, size: this process among all.
    group: for tensors on the CPU and, where there is one, on this rank's GPU; None for one process.
    timeout: seconds that ranks wait for each other.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    timeout: float = 0.0

    @property
    def first(self) -> bool:
        """Whether this process holds the run's folder, and speaks."""
        return self.rank == 0

    @property
    def on_this_machine(self) -> int:
        """The number of ranks that share this machine's cores."""
        told = os.environ.get("LOCAL_WORLD_SIZE", "")
        return max(1, int(told)) if self.size > 1 and told.isdecimal() else 1

    def within(self, timeout: float) -> Ranks:
        """The same ranks, in a group of their own that waits for so many seconds."""
        if self.size == 1:
            return self
        group = dist.new_group(timeout=timedelta(seconds=timeout), backend=_backend())
        return replace(self, group=group, timeout=timeout)

    def error(self, message: str) -> FastclError:
        """An error that all ranks raise, and the first reports."""
        return ToldHere(message) if self.first else ToldElsewhere(message)

    @contextmanager
    def together(self) -> Iterator[None]:
        """If a FastclError ends the block on one rank, it ends on all. The block itself must exchange nothing."""
        problem = None
        try:
            yield
        except FastclError as error:
            if self.size == 1:
                raise
            problem = error
        if self.size == 1:
            return
        failed = torch.tensor([problem is not None], dtype=torch.int32, device="cpu")
        dist.all_reduce(failed, dist.ReduceOp.MAX, self.group)
        if failed.item():
            told = self.gathered(str(problem) if problem is not None else None)
            rank, message = next((rank, text) for rank, text in enumerate(told) if text is not None)
            alone = rank > 0 or told.count(message) < self.size
            raise self.error(f"rank {rank}: {message}" if rank and alone else message) from problem

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn the failure of an exchange into an error that names the ranks that no longer answer."""
        try:
            yield
        except (RuntimeError, FastclError) as error:
            # A loss that waits in vain raises a FastclError from the one of the group.
            if self.size == 1 or not _is_of_the_group(error.__cause__ if isinstance(error, FastclError) else error):
                raise
            raise self._lost() from error

    def failed(self, error: Exception, words: str = "") -> FastclError:
        """What this rank ends with after an error that the others do not know of. They wait for this one, and are told
        the cause.

        Args:
            words: the cause. Without them nobody has expected the error: the traceback goes to torchrun, which shows
                it, or without torchrun to standard error.
        """
        why = f"rank {self.rank} of {self.size} has failed: {words or _in_one_line(error)}"
        try:
            first = _pulses[0].tell(why)
        except (IndexError, RuntimeError):  # as below
            first = True
        if not first:
            return ToldElsewhere("another rank tells why it ends")
        if not words:
            show_traceback(error)
        return ToldHere(why)

    def interrupted(self) -> None:
        """Tell the others, which wait for this rank, that it was interrupted."""
        for pulse in _pulses:
            pulse.end("interrupted")

    def _lost(self) -> FastclError:
        cause = ""
        try:
            silent = _pulses[0].silent()
            cause = _pulses[0].cause()
        except (IndexError, RuntimeError):  # the caller's own group, or torchrun itself has gone
            silent = []
        if silent is None:
            return ToldElsewhere("another rank tells which one no longer answers")
        if cause:
            return ToldHere(f"{cause}; the same command resumes from the last checkpoint")
        who = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent)) or 'unknown'}"
        return ToldHere(
            f"{who} of {self.size} no longer answers: killed, failed, or at a standstill for longer than "
            f"train.timeout = {self.timeout:g} s; the same command resumes from the last checkpoint"
        )

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks, small and picklable."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, self.group)
        return found

    def from_first(self, value: Any) -> Any:
        """The first rank's value, picklable."""
        held = [value]
        if self.size > 1:
            dist.broadcast_object_list(held, 0, self.group)
        return held[0]

    def agree(self, facts: Mapping[str, str], difference: Callable[[Any], str]) -> None:
        """Raise FastclError on all ranks if one has other facts than the first; `difference` of the first rank's and
        this rank's facts gives the reason."""
        first = self.from_first(facts)
        for rank, why in enumerate(self.gathered(difference(first) if first != facts else "")):
            if why:
                raise self.error(f"all ranks must have the same settings and data; rank {rank} differs in {why}")

    def seed(self, seed: int) -> int:
        """This rank's own 64-bit seed; the first rank's is the given one."""
        if self.first:
            return seed
        return int.from_bytes(hashlib.blake2b(f"{seed} {self.rank}".encode(), digest_size=8).digest(), "little")

    def average(self, values: Tensor) -> Tensor:
        """The mean over ranks of a tensor."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values, group=self.group)
        return values.div_(self.size)

    def rows_of_all(self, rows: Mapping[str, Tensor | None], device: torch.device) -> dict[str, Tensor]:
        """On the first rank, the rows of all ranks in their order, by name; else nothing.

        Args:
            rows: (n, width) float32 of one n and one width a name; None on a rank that has none.
            device: of the exchange.
        """
        shapes = self.gathered([None if x is None else tuple(x.shape) for x in rows.values()])
        found = {}
        for k, (name, own) in enumerate(rows.items()):
            counts = [shape[k][0] if shape[k] else 0 for shape in shapes]
            width = next(shape[k][1] for shape in shapes if shape[k])
            padded = torch.zeros(max(counts), width, dtype=torch.float32, device=device)  # gloo wants equal sizes
            if own is not None:
                padded[: len(own)] = own
            parts = [torch.empty_like(padded) for _ in counts] if self.first else None
            dist.gather(padded, parts, 0, self.group)
            if parts is not None:
                found[name] = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
        return found

    def close(self) -> None:
        """Leave the group that `start` has made."""
        if _pulses:
            _pulses.clear()
            dist.destroy_process_group()


ALONE = Ranks()


def start() -> Ranks:
    """The ranks that torchrun's environment tells of, or those of the process group that there is.

    The processes find each other here. One that cannot is an error of PyTorch's after ten minutes.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() or _env("WORLD_SIZE") < 2:
            return ALONE
        dist.init_process_group(_backend(), timeout=_START)
        _pulses.append(Pulse(dist.get_rank(), dist.get_world_size()))
        interrupts.watch(_pulses[0].end)
    if dist.get_world_size() == 1:
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, _START.total_seconds())


def own_gpu() -> torch.device:
    """This rank's GPU: the one of its number on its machine. Raises FastclError if there are not so many."""
    number, there = _env("LOCAL_RANK"), torch.cuda.device_count()
    if number >= there:
        raise FastclError(f"{number + 1} ranks on a machine with {there} GPUs: start one rank for each GPU")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def average_gradients(network: nn.Module, ranks: Ranks) -> Callable[[], None]:
    """Start to average a network's gradients over the ranks: one all-reduce of all of them, in a fixed order, so that
    the same ranks always round alike.

    Returns:
        A function that waits for the averages and puts them in place.
    """
    if ranks.size == 1:
        return lambda: None
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    work = dist.all_reduce(flat, group=ranks.group, async_op=True)

    def finish() -> None:
        assert work is not None
        work.wait()
        for g, mean in zip(gradients, flat.div_(ranks.size).split([g.numel() for g in gradients]), strict=True):
            g.copy_(mean.view(g.shape))

    return finish


@torch.no_grad()
def average_buffers(network: nn.Module, ranks: Ranks) -> None:
    """Average a network's floating-point buffers, such as running statistics, over the ranks."""
    buffers = [b for b in network.buffers() if b.is_floating_point()]
    if ranks.size == 1 or not buffers:
        return
    flat = torch.cat([b.flatten().double() for b in buffers])  # equal values stay equal to the bit
    means = ranks.average(flat)
    for b, mean in zip(buffers, means.split([b.numel() for b in buffers]), strict=True):
        b.copy_(mean.view(b.shape))


def copy_state(twins: Sequence[Twin], ranks: Ranks) -> None:
    """Load the first rank's networks and optimisers on all others."""
    for twin in twins if ranks.size > 1 else ():
        buffer = io.BytesIO()
        if ranks.first:
            torch.save((twin.network.state_dict(), twin.optimizer.state_dict()), buffer)
        payload = ranks.from_first(buffer.getvalue())
        if not ranks.first:
            network, optimizer = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            twin.network.load_state_dict(network)
            twin.optimizer.load_state_dict(optimizer)


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


def _env(name: str) -> int:
    text = os.environ.get(name, "0")
    if not text.isdecimal():
        raise FastclError(f"the environment variable {name} must be a number, as torchrun sets it, got {text!r}")
    return int(text)


def _in_one_line(error: Exception) -> str:
    """The error's type and the first line of what it says; what follows in PyTorch's errors is where they come from."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _is_of_the_group(error: BaseException | None) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "c10d"))
