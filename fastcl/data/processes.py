"""Worker processes: each does one step after the other, ahead of who consumes them, and is gone with the iterator.

Not torch's DataLoader: when one of its workers dies, it raises that from a signal handler, in whatever code runs; and
it takes a quarter of a second to end. Here each worker has a socket of its own and shares no lock, so that it can be
ended, or killed, at any moment. Results come in shared memory, whose file descriptors go through the socket.
"""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from fastcl.data.deferred import close_in_finaliser, held
from fastcl.errors import FastclError

T = TypeVar("T")
_LOOK = 1.0  # seconds between looks whether the other side is alive
_GRACE = 0.5  # seconds that workers have for what they are at when the iterator ends
_STEP = struct.Struct("<q")
_ALIGNED = 64  # bytes


class Processes(Iterator[T]):
    """job(step) of each step, in order, from forked worker processes.

    The processes start now, and end when the iterator is exhausted, closed, dropped or fails, and within seconds of
    the death of this process.

    Args:
        job: must not touch a CUDA device; returns arrays, or anything that can be pickled. Arrays are not copied again.
        steps: what to ask it for.
        workers: processes, at least 1.
        depth: results each process may be ahead.

    Raises:
        FastclError: no process can be started here; when iterated, the job's own, or a process that has died.
    """

    def __init__(self, job: Callable[[int], T], steps: range, *, workers: int, depth: int) -> None:
        self._owner, self._workers, self._asked = os.getpid(), workers, 0
        self._crew: list[tuple[BaseProcess, socket.socket]] = []
        self._steps, self._waiting = iter(steps), deque()
        if multiprocessing.current_process().daemon:
            raise FastclError(
                f"data.workers is {workers}, but this is a daemonic process, which may have no processes of its own: "
                "use data.workers = 0 here"
            )
        try:
            with held():  # a forked process begins with the handlers of its parent
                for _ in range(min(workers, len(steps))):
                    self._crew.append(_start(job))
            for _ in range(depth * len(self._crew)):
                self._ask()
        except OSError as error:
            number = len(self._crew) + 1
            self.close()
            raise FastclError(f"data.workers: process {number} of {workers} cannot be started ({error})") from error
        except BaseException:
            self.close()
            raise

    def __next__(self) -> T:
        if not self._waiting:
            self.close()
            raise StopIteration
        process, ours = self._waiting.popleft()
        try:
            answer = _taken(process, ours)
            self._ask()
        except OSError as error:
            process.join(_LOOK)  # its exit code is known in a moment
            reason = _end_of(process)
            self.close()
            raise FastclError(
                f"one of the {self._workers} processes that render (data.workers) has died: {reason}"
            ) from error
        except BaseException:
            self.close()
            raise
        if isinstance(answer, _Failure):
            self.close()
            raise answer.error from answer.cause()
        return answer

    def close(self) -> None:
        """End the processes."""
        with held():
            self._end()

    def __del__(self) -> None:
        if self._crew:
            close_in_finaliser(self._end, Processes.__del__.__code__)

    def _ask(self) -> None:
        """Give the next step, if there is one, to the worker whose turn it is."""
        step = next(self._steps, None)
        if step is None or not self._crew:
            return
        worker = self._crew[self._asked % len(self._crew)]
        worker[1].sendall(_STEP.pack(step))
        self._asked += 1
        self._waiting.append(worker)

    def _end(self) -> None:
        crew, self._crew = self._crew, []
        self._waiting.clear()
        if os.getpid() != self._owner:
            return  # a forked process has a copy of this object, but not its workers
        for _, ours in crew:
            try:
                ours.shutdown(socket.SHUT_RDWR)  # close alone would leave the copies that other workers have
            except OSError:
                pass  # the worker is gone
            ours.close()
        last = time.monotonic() + _GRACE
        for process, _ in crew:
            process.join(max(0.0, last - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


@dataclass(frozen=True)
class _Failure:
    """What a job raised. A traceback does not travel, so its text does."""

    error: Exception
    text: str

    def cause(self) -> Exception | None:
        return None if isinstance(self.error, FastclError) else RuntimeError(f"in a worker process\n{self.text}")


def _start(job: Callable[[int], Any]) -> tuple[BaseProcess, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # Forked, so that it shares the images in memory.
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(job, ours, theirs, os.getpid()), name="fastcl-render", daemon=True
        )
        process.start()
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    ours.settimeout(_LOOK)
    return process, ours


def _serve(job: Callable[[int], Any], ours: socket.socket, theirs: socket.socket, parent: int) -> None:
    """The worker: answers steps until its socket ends or its parent is gone."""
    for number in (signal.SIGINT, signal.SIGHUP):  # they reach the whole group; the parent ends its workers itself
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    ours.close()
    theirs.settimeout(_LOOK)

    def here() -> bool:
        return os.getppid() == parent

    try:
        while request := _patiently(lambda: theirs.recv(_STEP.size), here):
            sizes, file = _packed(_answer(job, *_STEP.unpack(request)))
            try:
                _patiently(lambda: socket.send_fds(theirs, [sizes], [file]), here)  # noqa: B023 (called at once)
            finally:
                os.close(file)
    except OSError:
        return  # nobody listens any more


def _answer(job: Callable[[int], T], step: int) -> T | _Failure:
    try:
        return job(step)
    except Exception as error:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return _Failure(error, text)


def _taken(process: BaseProcess, ours: socket.socket) -> Any:
    """The next answer of a worker. Raises OSError where it has died."""
    sizes, files, *_ = _patiently(lambda: socket.recv_fds(ours, 1 << 16, 1), process.is_alive)
    if not files:
        raise ConnectionResetError("the worker has closed its socket")
    (file,) = files
    try:
        return _unpacked(sizes, file)
    finally:
        os.close(file)


def _patiently(operation: Callable[[], T], alive: Callable[[], bool]) -> T:
    """An operation on a socket with a timeout, tried until it is done. Raises OSError where the other side is gone."""
    while True:
        try:
            return operation()
        except TimeoutError:
            if not alive():
                raise


def _packed(answer: Any) -> tuple[bytes, int]:
    """(the sizes of its parts, a file descriptor of shared memory with those parts, one after the other)."""
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(answer, protocol=5, buffer_callback=arrays.append)
    parts = [memoryview(head), *(array.raw() for array in arrays)]
    sizes = [part.nbytes for part in parts]
    starts = _starts(sizes)
    file = _shared_file()
    try:
        os.posix_fallocate(file, 0, starts[-1])  # else a full /dev/shm would kill the process as it writes
    except OSError as error:
        os.close(file)
        if isinstance(answer, _Failure):
            raise
        room = FastclError(f"data.workers: no shared memory for a batch of {starts[-1]:,} bytes ({error})")
        return _packed(_Failure(room, ""))
    with mmap.mmap(file, starts[-1]) as memory:
        for start, part in zip(starts, parts, strict=False):
            memory[start : start + part.nbytes] = part
    return struct.pack(f"<{len(sizes)}q", *sizes), file


def _unpacked(packed: bytes, file: int) -> Any:
    sizes = struct.unpack(f"<{len(packed) // 8}q", packed)
    starts = _starts(sizes)
    memory = memoryview(mmap.mmap(file, starts[-1]))
    head, *arrays = (memory[start : start + size] for start, size in zip(starts, sizes, strict=False))
    return pickle.loads(head, buffers=arrays)


def _starts(sizes: list[int] | tuple[int, ...]) -> list[int]:
    """Where each part begins, and where the last one ends."""
    return [0, *itertools.accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]


def _shared_file() -> int:
    """A file in memory, which goes with its last descriptor."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fastcl")
    with tempfile.TemporaryFile(dir="/dev/shm") as file:  # a Python made for an old C library has no memfd_create
        return os.dup(file.fileno())


def _end_of(process: BaseProcess) -> str:
    code = process.exitcode
    if code is None or code >= 0:
        return f"it ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = "; the system kills what takes too much memory: use fewer data.workers" if name == "SIGKILL" else ""
    return f"signal {-code}, {name}{hint}"
