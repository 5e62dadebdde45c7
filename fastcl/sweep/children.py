"""Runs the cells of a sweep, each as a process of its own: a crash or a kill of one ends no other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fastcl import interrupts
from fastcl.errors import shown
from fastcl.io.files import cause
from fastcl.sweep.sweep_folder import CELLS, CONFIGS, LOGS
from fastcl.train.run_folder.records import HeldElsewhere, locked

_POLL = 0.1  # seconds between looks at the processes
_TAIL = 1 << 14  # bytes at the end of a log in which its last line is looked for


@dataclass(frozen=True)
class Job:
    """A run to be made.

    Attributes:
        name: of its cell.
        epochs: of the run.
        steps: of an epoch.
    """

    name: str
    epochs: int
    steps: int


@dataclass
class _Child:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    start: int  # bytes of the log before this process


def run_jobs(
    out: Path, jobs: Sequence[Job], slots: Sequence[Mapping[str, str]], done: Callable[[Job, str | None], None]
) -> None:
    """Run all jobs, as many at a time as there are slots; returns when all have ended.

    A run that another process is still training, as one does whose sweep was killed, is waited for.

    Args:
        out: the folder of the sweep, which holds a config for each job.
        jobs: the jobs, in order.
        slots: environment variables of the processes in each slot.
        done: called with each job that has ended and its error, or None if it succeeded.
    """
    waiting = list(jobs)
    running: dict[int, _Child] = {}
    try:
        with closing(_Progress(out, jobs)) as progress:
            while waiting or running:
                for slot in sorted(set(range(len(slots))) - set(running)):
                    job = next((job for job in waiting if not _is_held(out / CELLS / job.name)), None)
                    if job is None:
                        break
                    waiting.remove(job)
                    try:
                        running[slot] = _begin(out, job, slots[slot])
                    except OSError as error:
                        done(job, f"could not be started: {cause(error)}")
                progress.show([child.job for child in running.values()])
                time.sleep(_POLL)
                for slot, child in list(running.items()):
                    if child.process.poll() is not None:
                        del running[slot]
                        interrupts.ended(child.process)
                        progress.ended(child.job)
                        done(child.job, _error(child))
    finally:
        for child in running.values():
            interrupts.ended(child.process)
            child.process.wait()


def slots_for(jobs: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Environment variables of each of `jobs` slots.

    The threads (OMP_NUM_THREADS, or the cores of this process) are divided among them; a single job keeps its
    environment. Several GPUs are given out one to a job, in turn.

    Args:
        jobs: number of slots.
        gpus: names of the GPUs as CUDA_VISIBLE_DEVICES takes them.
    """
    if jobs == 1:
        return [{}]
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() and int(given) > 0 else len(os.sched_getaffinity(0))
    slots = [{"OMP_NUM_THREADS": str(max(1, threads // jobs))} for _ in range(jobs)]
    if len(gpus) > 1:
        for k, slot in enumerate(slots):
            slot["CUDA_VISIBLE_DEVICES"] = gpus[k % len(gpus)]
    return slots


def command(out: Path, name: str) -> list[str]:
    """The command that trains the run of a cell."""
    config, folder = out / CONFIGS / f"{name}.toml", out / CELLS / name
    return [sys.executable, "-m", "fastcl", "train", str(config), "--out", str(folder)]


def _begin(out: Path, job: Job, variables: Mapping[str, str]) -> _Child:
    log = out / LOGS / f"{job.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        start = file.tell()
        process = interrupts.started(
            lambda: subprocess.Popen(
                command(out, job.name), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **variables}, start_new_session=True,
            )
        )  # fmt: skip
    return _Child(job, process, log, start)


def _is_held(folder: Path) -> bool:
    """Whether a process is training in a folder."""
    if not folder.is_dir():
        return False
    try:
        with locked(folder):
            return False
    except HeldElsewhere:
        return True


def _error(child: _Child) -> str | None:
    """What an ended process died of; None if it succeeded."""
    status = child.process.returncode
    if status == 0:
        return None
    names = {one.value: one.name for one in signal.Signals}
    how = f"status {status}" if status > 0 else f"killed by {names.get(-status, f'signal {-status}')}"
    with open(child.log, "rb") as file:
        file.seek(max(child.start, child.log.stat().st_size - _TAIL))
        lines = file.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{how}, {shown(last)}" if last and status > 0 else how


class _Progress:
    """One line on a terminal: cells that have ended, what is running, and the time that is left by the steps done."""

    def __init__(self, out: Path, jobs: Sequence[Job]) -> None:
        self._out, self._jobs = out, jobs
        self._gone: set[str] = set()
        self._steps = {job.name: self._trained(job) for job in jobs}
        total = sum(job.epochs * job.steps for job in jobs)
        self._bar = tqdm(
            total=total, initial=sum(self._steps.values()), unit="step", disable=None,
            ncols=shutil.get_terminal_size().columns,  # tqdm itself assumes 0 if the terminal gives no size
            bar_format="{percentage:3.0f}% [{elapsed}<{remaining}] {desc}",
        )  # fmt: skip

    def show(self, running: Sequence[Job]) -> None:
        """Draw the line anew."""
        if self._bar.disable:
            return
        for job in running:
            self._steps[job.name] = self._trained(job)
        text = "waiting for a run that another process trains"
        if running:
            job = running[0]
            epoch = min(job.epochs, self._steps[job.name] // job.steps + 1)
            more = f", and {len(running) - 1} more" if len(running) > 1 else ""
            text = f"{job.name}: epoch {epoch} of {job.epochs}{more}"
        self._bar.set_description_str(f"{len(self._gone)} of {len(self._jobs)} runs; {text}", refresh=False)
        self._bar.n = sum(self._steps.values())
        self._bar.refresh()

    def ended(self, job: Job) -> None:
        """Count a run that has ended, whether it succeeded or not, as done."""
        self._gone.add(job.name)
        self._steps[job.name] = job.epochs * job.steps

    def close(self) -> None:
        """End the line."""
        self._bar.close()

    def _trained(self, job: Job) -> int:
        """Steps of the epochs that a run has finished."""
        try:
            lines = (self._out / CELLS / job.name / "timing.jsonl").read_bytes().count(b"\n")
        except OSError:
            lines = 0
        return min(lines, job.epochs) * job.steps


def visible_gpus() -> Iterator[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given is not None else map(str, range(torch.cuda.device_count()))
    yield from list(names)[: torch.cuda.device_count()]
