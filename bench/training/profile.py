"""What a training step is made of: times on the wall clock, then the shares of its parts by torch.profiler."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.harness.records import Record
from fastcl.config.settings import Config
from fastcl.data import Batch
from fastcl.train import Lockstep
from fastcl.train.models import learning_rate
from fastcl.train.step import BACKWARD, ENCODERS, LOSSES, METRICS, OPTIMIZERS, step_twins

WARM_UP, PROFILED = 2, 2  # steps
TWIN = "fastcl::twin"
SHARES = ("encoders", "losses", "metrics", "optimisers")


def measure(config: Config, folder: Path, device: torch.device, repeats: int) -> Record:
    """Time and profile steps of a run that is never finished.

    Args:
        folder: of the run; new.
        repeats: timed steps.

    Returns:
        step_seconds, waiting_seconds: per timed step, in all and for its batch.
        steps_per_epoch, twins: of the run.
        shares: by SHARES, of the profiled steps without their views: of the device's time, on a CPU of the wall clock.
        twin_share: of them the forward pass of twin_stats; None where no operator of that name ran.
        peak_bytes: of the device's memory; None on a CPU.
    """
    run = Lockstep(config, folder)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, waiting = [], []
    with closing(_batches(run)) as batches:
        for k in range(WARM_UP + repeats):
            began = perf_counter()
            batch = next(batches)
            ready = perf_counter()
            _step(run, k, batch)
            if k >= WARM_UP:
                seconds.append(perf_counter() - began)
                waiting.append(ready - began)
        ahead = [next(batches) for _ in range(PROFILED)]
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning: Profiler clears events")  # of cycles, of which there is one
            with profile(activities=activities) as found:
                for k, batch in enumerate(ahead):
                    _step(run, k, batch)
    shares, twin = shares_of(found.key_averages(), device.type == "cuda")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "step_seconds": seconds, "waiting_seconds": waiting, "steps_per_epoch": len(run.loader),
        "twins": len(run.twins), "shares": shares, "twin_share": twin, "peak_bytes": peak,
        "images_per_second": config.train.batch_size / median(seconds),
    }  # fmt: skip


def shares_of(events: Sequence[Any], on_device: bool) -> tuple[dict[str, float | None], float | None]:
    """Shares of a step's parts, and of the forward pass of twin_stats; None where the profile holds no time.

    The backward passes of the losses are told from those of the encoders by fastcl's operators: the autograd thread of
    a GPU works outside the spans of the step.

    Args:
        events: `key_averages()` of a profile.
        on_device: whether device time counts, else the CPU's.
    """
    hosts = [e for e in events if e.device_type == DeviceType.CPU]
    times = {e.key: e.device_time_total if on_device else e.cpu_time_total for e in hosts}
    spans = [times[name] for name in (ENCODERS, LOSSES, METRICS, OPTIMIZERS)]
    if on_device:  # each kernel once: a span on the device is an event there too
        kernels = (e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation)
        total = sum(e.self_device_time_total for e in kernels)
        backward = total - sum(spans)
    else:
        backward = times[BACKWARD]
        total = sum(spans) + backward
    backward_of_losses = sum(t for key, t in times.items() if key.startswith("fastcl::") and key.endswith("_backward"))
    parts = (spans[0] + backward - backward_of_losses, spans[1] + backward_of_losses, *spans[2:])
    if not total:
        return dict.fromkeys(SHARES), None
    twin = times[TWIN] / total if TWIN in times else None
    return {name: part / total for name, part in zip(SHARES, parts, strict=True)}, twin


def _batches(run: Lockstep) -> Iterator[Batch]:
    for epoch in itertools.count():
        with closing(run.loader.batches(epoch)) as batches:
            yield from batches


def _step(run: Lockstep, k: int, batch: Batch) -> None:
    train = run.config.train
    step_twins(
        run.twins, batch.views[:2], batch.views[2:] or None, batch.labels, temperature=train.temperature,
        lr=learning_rate(run.config, k, len(run.loader)), seed=train.seed << 32 | k,
    )  # fmt: skip
