"""Worker processes that compute steps ahead of the consumer and end with the iterator.

torch's DataLoader is not used: when a worker dies, it raises from a signal handler, in whatever code is running, and
it takes a quarter of a second to shut down. Here each worker has its own socket and shares no lock, so it can be
stopped or killed at any moment. Results arrive in shared memory, whose file descriptors are sent through the socket.
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
_LOOK = 1.0  # seconds between checks that the other side is alive
_GRACE = 0.5  # seconds that workers have to finish their current step when the iterator ends
_STEP = struct.Struct("<q")
_ALIGNED = 64  # bytes


class Processes(Iterator[T]):
    """Yields job(step) for each step, in order, computed in forked worker processes.

    The processes start now, and end when the iterator is exhausted, closed, dropped or fails, and within seconds of
    the death of this process.

    Args:
        job: must not touch a CUDA device; returns arrays, or anything that can be pickled. The consumer gets arrays
            in shared memory, without a further copy.
        steps: arguments for the job.
        workers: number of processes, at least 1.
        depth: results that each process may be ahead.

    Raises:
        FastclError: no process can be started here; while iterating: the job's own error, or a process that died.
    """

    def __init__(self, job: Callable[[int], T], steps: range, *, workers: int, depth: int) -> None:
        self._owner, self._workers, self._asked = os.getpid(), workers, 0
        self._crew: list[tuple[BaseProcess, socket.socket]] = []
        self._steps, self._waiting = iter(steps), deque()
        if multiprocessing.current_process().daemon:
            raise FastclError(
                f"data.workers must be 0 in a daemonic process, which cannot start processes of its own, got {workers}"
            )
        try:
            with held():  # a forked process starts with its parent's signal handlers
                for _ in range(min(workers, len(steps))):
                    self._crew.append(_start(job))
            for _ in range(depth * len(self._crew)):
                self._ask()
        except OSError as error:
            number = len(self._crew) + 1
            self.close()
            raise FastclError(f"data.workers: cannot start process {number} of {workers} ({error})") from error
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
            process.join(_LOOK)  # wait for its exit code
            reason = _end_of(process)
            self.close()
            raise FastclError(f"one of the {self._workers} worker processes (data.workers) died: {reason}") from error
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
        """Send the next step, if any, to the worker whose turn it is."""
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
            return  # in a forked process: a copy of this object, whose workers belong to the parent
        for _, ours in crew:
            try:
                ours.shutdown(socket.SHUT_RDWR)  # close() would leave open the copies that other workers inherited
            except OSError:
                pass  # the worker has already ended
            ours.close()
        last = time.monotonic() + _GRACE
        for process, _ in crew:
            process.join(max(0.0, last - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


@dataclass(frozen=True)
class _Failure:
    """An exception raised by a job, with its traceback as text since tracebacks cannot be pickled."""

    error: Exception
    text: str

    def cause(self) -> Exception | None:
        return None if isinstance(self.error, FastclError) else RuntimeError(f"in a worker process\n{self.text}")


def _start(job: Callable[[int], Any]) -> tuple[BaseProcess, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # Forked, so that it shares the images in memory with the parent.
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
    """The worker: answers steps until its socket is closed or its parent is gone."""
    for number in (signal.SIGINT, signal.SIGHUP):  # sent to the whole process group; the parent ends its workers itself
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
        return  # the parent no longer listens


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
    """The next answer of a worker. Raises OSError if it has died."""
    sizes, files, *_ = _patiently(lambda: socket.recv_fds(ours, 1 << 16, 1), process.is_alive)
    if not files:
        raise ConnectionResetError("the worker closed its socket")
    (file,) = files
    try:
        return _unpacked(sizes, file)
    finally:
        os.close(file)


def _patiently(operation: Callable[[], T], alive: Callable[[], bool]) -> T:
    """Retry a socket operation after each timeout while the other side is alive. Raises OSError if it is gone."""
    while True:
        try:
            return operation()
        except TimeoutError:
            if not alive():
                raise


def _packed(answer: Any) -> tuple[bytes, int]:
    """Pickle an answer into shared memory: (the sizes of its parts, the file descriptor that holds them in order)."""
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(answer, protocol=5, buffer_callback=arrays.append)
    parts = [memoryview(head), *(array.raw() for array in arrays)]
    sizes = [part.nbytes for part in parts]
    starts = _starts(sizes)
    file = _shared_file()
    try:
        os.posix_fallocate(file, 0, starts[-1])  # otherwise writing to a full /dev/shm would kill the process (SIGBUS)
    except OSError as error:
        os.close(file)
        if isinstance(answer, _Failure):
            raise
        room = FastclError(f"data.workers: cannot allocate shared memory for a batch of {starts[-1]:,} bytes ({error})")
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
    """Offset of each aligned part, followed by the end of the last one."""
    return [0, *itertools.accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]


def _shared_file() -> int:
    """An in-memory file, freed with its last descriptor."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fastcl")
    with tempfile.TemporaryFile(dir="/dev/shm") as file:  # Python built against an old C library lacks memfd_create
        return os.dup(file.fileno())


def _end_of(process: BaseProcess) -> str:
    code = process.exitcode
    if code is None or code >= 0:
        return f"it ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = "; the system may be out of memory: use fewer data.workers" if name == "SIGKILL" else ""
    return f"signal {-code}, {name}{hint}"
