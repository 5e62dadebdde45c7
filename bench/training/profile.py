"""The parts of a training step: wall-clock times, then the shares of the parts by torch.profiler."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from bench.harness.records import Record
from fastcl.config.settings import Config
from fastcl.data import Batch
from fastcl.train import Lockstep
from fastcl.train.models import learning_rate
from fastcl.train.step import Measured, fetch, step_twins
from fastcl.train.step_profile import in_one_thread, part_times

WARM_UP, PROFILED = 2, 2  # steps
TWIN = "fastcl::twin"
SHARES = ("encoders", "losses", "metrics", "optimisers")


def measure(config: Config, folder: Path, device: torch.device, repeats: int) -> Record:
    """Time and profile steps of a run that is never finished.

    Args:
        folder: new folder of the run.
        repeats: number of timed steps.

    Returns:
        step_seconds, waiting_seconds: per timed step, the total time and the wait for its batch.
        steps_per_epoch, twins: steps per epoch and number of models of the run.
        shares: by SHARES, the shares of profiled steps without views in device time, on a CPU in wall-clock time.
        twin_share: the share of twin_stats' forward pass; None if its operator did not run.
        peak_bytes: peak device memory; None on a CPU.
        images_per_second: of the median step.
    """
    run, cuda = Lockstep(config, folder), device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds, waiting = [], []
    with closing(endless(run)) as batches:
        for k in range(WARM_UP + repeats):
            began = perf_counter()
            batch = next(batches)
            ready = perf_counter()
            fetch([take(run, k, batch)])  # which waits for the step
            if k >= WARM_UP:
                seconds.append(perf_counter() - began)
                waiting.append(ready - began)
        ahead = [next(batches) for _ in range(PROFILED)]
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning: Profiler clears events")  # of each cycle; there is only one
            with in_one_thread(), profile(activities=activities) as found:
                for k, batch in enumerate(ahead):
                    fetch([take(run, k, batch)])  # which waits for the step
    shares, twin = shares_of(found.key_averages(), cuda)
    return {
        "step_seconds": seconds, "waiting_seconds": waiting, "steps_per_epoch": len(run.loader),
        "twins": len(run.twins), "shares": shares, "twin_share": twin,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "images_per_second": config.train.batch_size / median(seconds),
    }  # fmt: skip


def shares_of(events: Sequence[Any], on_device: bool) -> tuple[dict[str, float | None], float | None]:
    """Shares of a step's parts, and of the forward pass of twin_stats; None if the profile has no times.

    fastcl's operators separate the backward passes of the losses from those of the encoders.

    Args:
        events: `key_averages()` of a profile.
        on_device: use device time instead of CPU time.
    """
    operators = {e.key: e.device_time_total if on_device else e.cpu_time_total
                 for e in events if e.device_type == DeviceType.CPU and e.key.startswith("fastcl::")}  # fmt: skip
    times = part_times(events, on_device)
    backward_of_losses = sum(time for key, time in operators.items() if key.endswith("_backward"))
    encoders = times["forward"] + times["backward"] - backward_of_losses
    parts = (encoders, times["loss"] + backward_of_losses, times["metrics"], times["optimiser"])
    total = sum(parts)
    if not total:
        return dict.fromkeys(SHARES), None
    twin = operators[TWIN] / total if TWIN in operators else None
    return {name: part / total for name, part in zip(SHARES, parts, strict=True)}, twin


def endless(run: Lockstep) -> Generator[Batch, None, None]:
    """The batches of a run, epoch after epoch."""
    for epoch in itertools.count():
        with closing(run.loader.batches(epoch)) as batches:
            yield from batches


def take(run: Lockstep, k: int, batch: Batch) -> Measured:
    """Take the k-th step of a run."""
    train = run.config.train
    return step_twins(
        run.twins, batch.views[:2], batch.views[2:] or None, batch.labels, temperature=train.temperature,
        lr=learning_rate(run.config, k, len(run.loader)), seed=train.seed << 32 | k,
    )  # fmt: skip
