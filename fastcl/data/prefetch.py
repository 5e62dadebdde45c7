"""Rendering ahead of who consumes it, in processes or in a thread; bounded, in order, and gone when the iterator is.

torchvision's operators on small images are mostly Python, which threads do not share: two threads render no faster
than one, two processes nearly twice as fast. So processes render where the CPU renders. A renderer that works on a
device has threads of its own, and one thread keeps it busy.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from fastcl.errors import FastclError

T = TypeVar("T")
_END: Any = object()


def in_processes(job: Callable[[int], T], steps: range, *, workers: int, depth: int, pin: bool) -> Iterator[T]:
    """job(step) of each step, in order, from forked worker processes (torch's DataLoader).

    The processes end with the iterator: when it is exhausted, closed or fails, with the parent's interrupt, and, within
    seconds, with a parent that was killed.

    Args:
        job: must not touch a CUDA device; returns tensors and tuples of them.
        steps: what to ask it for.
        workers: processes, at least 1.
        depth: results each process may be ahead.
        pin: hand the tensors over in pinned memory, from which a CUDA device copies while others compute.

    Raises:
        FastclError: the job's own, or a process that has died (out of memory, say).
    """
    loader = DataLoader(
        _Jobs(job), batch_size=None, sampler=steps, num_workers=workers, prefetch_factor=depth, pin_memory=pin,
        multiprocessing_context="fork",  # shares the images in memory
        collate_fn=_as_it_is, worker_init_fn=_ignore_interrupts,
        generator=torch.Generator("cpu"),  # else it would draw a number from the caller's
    )  # fmt: skip
    with _interrupt_later(), torch.device("cpu"):  # the loader draws a seed on the default device
        results = iter(loader)
    try:
        for result in results:
            if isinstance(result, FastclError):
                raise result
            yield result
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise FastclError(f"one of the {workers} processes that render (data.workers) has died: {error}") from error
    finally:
        results._shutdown_workers()  # torch has no public way; its own, __del__, waits for the last traceback to go


def in_thread(results: Iterator[T], *, depth: int) -> Iterator[T]:
    """The results of an iterator, which one background thread asks for at most depth of them ahead.

    The thread ends with the returned iterator, after the result that it is at, and closes the given one.

    Raises:
        Exception: whatever the iterator raises.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="fastcl-render")
    waiting = deque(pool.submit(next, results, _END) for _ in range(depth))
    try:
        while (result := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, results, _END))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
        results.close()


class _Jobs(Dataset):
    """A job as what DataLoader indexes; a FastclError comes back as a value, since torch would bury its message."""

    def __init__(self, job: Callable[[int], Any]) -> None:
        self.job = job

    def __getitem__(self, step: int) -> Any:
        try:
            return self.job(step)
        except FastclError as error:
            return FastclError(str(error))


def _as_it_is(result: T) -> T:
    return result


@contextmanager
def _interrupt_later() -> Iterator[None]:
    """Ctrl-C counts when the block is left: what it raises while processes are forked, Python swallows."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        signal.raise_signal(signal.SIGINT)


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers itself
