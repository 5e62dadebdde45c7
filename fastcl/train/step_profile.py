"""Where the time of a training step goes: a Chrome trace of a few steps, and the shares of their parts."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from fastcl.errors import FastclError, shown
from fastcl.train.run_folder.records import write_atomic
from fastcl.train.step import BACKWARD, ENCODERS, LOSSES, METRICS, OPTIMIZERS, WAITING

log = logging.getLogger("fastcl")
WARM_UP, PROFILED = 3, 4  # steps
_SPANS = {"forward": ENCODERS, "loss": LOSSES, "backward": BACKWARD, "optimiser": OPTIMIZERS, "metrics": METRICS}
PARTS = tuple(_SPANS)


class StepProfile:
    """Profiles PROFILED steps of an epoch after WARM_UP others, fewer of a short epoch, and writes into the run's
    folder `profile/trace.json.gz` and `profile/shares.txt`. Changes nothing else of the run.

    The device is waited for after each of these steps, so that waiting for a batch is not hidden behind the work of the
    step before.

    Args:
        out: the folder of the run.
        device: of the networks.
        length: steps of the epoch.
        title: what is profiled, in words.
    """

    def __init__(self, out: Path, device: torch.device, length: int, title: str) -> None:
        self._folder, self._device, self._title = out / "profile", device, title
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes lines of its own to standard error
        first = min(WARM_UP, length // 2)
        count = min(PROFILED, length - first)
        self._steps = range(first, first + count)
        cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
        self._began = 0.0

    @contextmanager
    def step(self, k: int) -> Iterator[None]:
        """The epoch's k-th step, with the wait for its batch."""
        if k not in self._steps:
            yield
            return
        if k == self._steps[0]:
            self._wait()
            self._profile.start()
            self._began = time.perf_counter()
        try:
            with in_one_thread():
                yield
        except BaseException:
            self._stop()
            raise
        self._wait()
        if k == self._steps[-1]:
            seconds = time.perf_counter() - self._began
            self._stop()
            try:
                self._write(seconds)
            except FastclError as error:  # the run itself is sound
                log.warning("profile: %s", error)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _stop(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning: Profiler clears events")  # of each cycle; there is only one
            self._profile.stop()

    def _write(self, seconds: float) -> None:
        events = self._profile.key_averages()
        text = f"{self._title}: {len(self._steps)} steps after {self._steps[0]} others\n\n"
        text += table(shares(events, self._device.type == "cuda", seconds), seconds / len(self._steps))
        with tempfile.TemporaryDirectory() as scratch:
            trace = Path(scratch) / "trace.json.gz"
            self._profile.export_chrome_trace(str(trace))
            write_atomic(self._folder / trace.name, trace.read_bytes())
        write_atomic(self._folder / "shares.txt", text.encode())
        log.info("%s\nprofile: %s", text, shown(self._folder))


def in_one_thread() -> AbstractContextManager[None]:
    """Backward passes to a GPU run in the calling thread, within its spans, rather than in a thread of their own. Their
    order is the same."""
    return torch.autograd.set_multithreading_enabled(False)


def part_times(events: Sequence[Any], on_device: bool) -> dict[str, float]:
    """Microseconds of each of PARTS.

    Args:
        events: `key_averages()` of a profile of steps that ran `in_one_thread`.
        on_device: of the kernels that a part launched; otherwise on the clock.
    """
    hosts = {e.key: e for e in events if e.device_type == DeviceType.CPU}
    return {part: _time(hosts.get(span), on_device) for part, span in _SPANS.items()}


def shares(events: Sequence[Any], on_device: bool, seconds: float) -> dict[str, float]:
    """Shares of `seconds` on the clock: waiting for batches, then PARTS, then all else, such as a GPU without work.

    Args:
        events, on_device: as for `part_times`.
    """
    waiting = next((e for e in events if e.key == WAITING and e.device_type == DeviceType.CPU), None)
    times = {"data wait": _time(waiting, False), **part_times(events, on_device)}
    found = {part: 1e-6 * time / seconds for part, time in times.items()}
    return found | {"other": max(0.0, 1 - sum(found.values()))}


def table(found: dict[str, float], seconds: float) -> str:
    """The result of `shares` as lines of text, for steps of so many seconds."""
    rows = [*found.items(), ("step", 1.0)]
    return "".join(f"{part:10} {1e3 * share * seconds:10.2f} ms {share:7.1%}\n" for part, share in rows)


def _time(event: Any, on_device: bool) -> float:
    if event is None:
        return 0.0
    return event.device_time_total if on_device else event.cpu_time_total
