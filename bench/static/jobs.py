"""Turn launches of the host code into compile jobs for Triton, and run these in worker processes."""

from __future__ import annotations

import inspect
import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness.command import ROOT
from bench.static.compile import Facts, Job, Signature
from fastcl.kernels.common.launch import Launch

HOST = "fastcl."  # kernels are fastcl.kernels.* here, but kernels.* in a worker, which has no fastcl
SECONDS = 600  # per kernel; ptxas can take minutes for tiles that are far too large
_CONSTANTS = (bool, int, float, str, type(None))


class Compiled(NamedTuple):
    """A compiled job: what was found in its machine code, and the file of the disassembly."""

    facts: Facts
    listing: str


Result = Compiled | str  # a string says why there is no kernel


class StaticError(Exception):
    """The gate cannot run; the message says why."""


def job(launch: Launch, arch: int) -> Job:
    """What Triton would compile for a launch; Triton itself specialises the arguments.

    Raises:
        StaticError: the arguments do not fit the kernel or cannot be stored in a job.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    if not hasattr(kernel, "arg_names"):
        raise StaticError(f"{kernel!r} is no @triton.jit function")
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    try:
        values, kinds, surplus = bind(**launch.arguments)
    except TypeError as error:
        raise StaticError(f"{kernel.__name__}: {str(error).replace('dynamic_func', 'the kernel')}") from error
    if surplus:
        raise StaticError(f"{kernel.__name__} has no parameter {', '.join(surplus)}")
    found = _Found(kernel.__name__, backend)
    signature = {
        name: found.take(name, values[name], kind, trait)
        for name, (kind, trait) in zip(kernel.arg_names, kinds, strict=True)
    }
    root, module = _origin(kernel)
    return Job(
        root, module, kernel.__name__, signature, found.constants, found.divisible, arch, launch.warps, launch.stages
    )  # fmt: skip


class _Found:
    """Collects constants and divisible arguments by their paths."""

    def __init__(self, kernel: str, backend: Any) -> None:
        self.kernel, self.backend = kernel, backend
        self.constants: dict[str, Any] = {}
        self.divisible: list[str] = []

    def take(self, path: str, value: Any, kind: Any, trait: Any) -> Signature:
        """The signature of an argument or of one of its fields."""
        if isinstance(kind, tuple):
            fields = getattr(value, "_fields", None) or map(str, range(len(value)))
            parts = zip(fields, value, kind, trait, strict=True)
            return {field: self.take(f"{path}.{field}", *part) for field, *part in parts}
        if kind == "constexpr":
            self.constants[path] = _constant(value, f"{self.kernel}: constant {path}")
        elif trait and ["tt.divisibility", 16] in self.backend.parse_attr(trait):
            self.divisible.append(path)
        return kind


def _constant(value: Any, what: str) -> Any:
    value = getattr(value, "value", value)  # unwraps a tl.constexpr
    if isinstance(value, tuple | list):
        return [_constant(item, what) for item in value]
    if not isinstance(value, _CONSTANTS):
        raise StaticError(f"{what} is {value!r}, not a number, a string, None or a tuple of such")
    return value


def _origin(kernel: Any) -> tuple[str, str]:
    """Folder and name to import the kernel's module in an environment with only Triton."""
    module = kernel.fn.__module__.removeprefix(HOST)
    file = Path(inspect.getsourcefile(kernel.fn) or "").resolve()
    return str(file.parents[module.count(".")]), module


def unique(cases: Iterable[tuple[str, Iterable[Launch]]], arch: int) -> dict[str, tuple[Job, list[str]]]:
    """Distinct jobs, keyed by their JSON, with the names of the cases that need them."""
    found: dict[str, tuple[Job, list[str]]] = {}
    for name, launches in cases:
        for launch in launches:
            one = job(launch, arch)
            names = found.setdefault(json.dumps(asdict(one)), (one, []))[1]
            if name not in names:
                names.append(name)
    return found


class _Worker:
    """A compile process; if it dies on a job, it is replaced."""

    def __init__(self, python: str) -> None:
        self.python = python
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.triton = self._start()

    def _start(self) -> str:
        # Interpreted kernels cannot be compiled; Triton reads this variable when a kernel's module is imported.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [self.python, "-m", "bench.static.compile"]
        self.log.truncate(0)
        try:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                text=True, encoding="utf-8",
            )  # fmt: skip
        except OSError as error:
            raise StaticError(f"{self.python}: {error.strerror or error}") from error
        first = self.process.stdout.readline()
        try:
            return json.loads(first)["triton"]
        except ValueError:
            self.process.kill()
            raise StaticError(f"{self.python} cannot compile: {self._last_words()}") from None

    def compile(self, one: Job) -> Result:
        """Facts about the job's kernel, or why there are none."""
        limit = threading.Timer(SECONDS, self.process.kill)
        limit.start()
        try:
            print(json.dumps(asdict(one)), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            limit.cancel()
        if not line:
            reason = f"the compiler died (status {self.process.wait()}): {self._last_words()}"
            self._start()
            return reason
        answer = json.loads(line)
        if "error" in answer:
            return answer["error"]
        return Compiled(Facts(**answer["facts"]), answer["listing"])

    def _last_words(self) -> str:
        self.process.wait()
        self.log.seek(0)
        lines = self.log.read().strip("\0\n ").splitlines()
        return lines[-1] if lines else "it said nothing"

    def stop(self) -> None:
        """Kill the process; it has no state to lose."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def compile_all(jobs: list[Job], python: str, workers: int) -> tuple[str, list[Result]]:
    """Compile jobs in worker processes, with a progress bar on standard error where tqdm is installed.

    Args:
        python: the workers' interpreter; its Triton may be another version.

    Returns:
        The version of the workers' Triton, and a result per job.

    Raises:
        StaticError: a worker does not start.
    """
    started: list[_Worker] = []
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def run(one: Job) -> Result:
        worker = idle.get()
        try:
            return worker.compile(one)
        finally:
            idle.put(worker)

    try:
        for _ in range(max(1, min(workers, len(jobs)))):
            started.append(_Worker(python))
            idle.put(started[-1])
        pool = ThreadPoolExecutor(len(started))
        try:
            return started[0].triton, list(_with_progress(pool.map(run, jobs), len(jobs)))
        finally:
            pool.shutdown(cancel_futures=True)
    finally:
        for worker in started:
            worker.stop()


def _with_progress(results: Iterable[Result], total: int) -> Iterable[Result]:
    try:
        from tqdm import tqdm
    except ImportError:
        return results
    return tqdm(results, total=total, desc="compiling", unit="kernel", disable=None)
