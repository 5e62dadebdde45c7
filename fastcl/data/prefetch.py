"""Renders batches ahead of the consumer, in processes or a thread: bounded, ordered, cleaned up with the iterator.

torchvision's operators on small images are mostly Python, which holds the GIL: two threads render no faster than one,
two processes nearly twice as fast. So torchvision's renderer runs in processes. The other renderers have their own
threads or work on the device, and one thread keeps them busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastcl.data.deferred import held
from fastcl.data.plan import ViewParams
from fastcl.data.processes import Processes
from fastcl.data.renderers.choose import Renderer, TorchvisionRenderer

T = TypeVar("T")
Job: TypeAlias = Callable[[int], tuple[np.ndarray, list[ViewParams]]]  # step -> positions, parameters of each view
Rendered: TypeAlias = tuple[np.ndarray, tuple[Tensor, ...]]  # positions, views
_CPU = torch.device("cpu")
_END: Any = object()


def rendered(renderer: Renderer, job: Job, steps: range, workers: int, depth: int) -> Generator[Rendered, None, None]:
    """Yields the positions of each step and their views on the renderer's device.

    Args:
        renderer: torchvision's prefetches in worker processes, any other in one thread.
        job: positions and view parameters of a step.
        steps: rendered in this order.
        workers: number of processes; 0 renders each step on demand.
        depth: steps that each worker may be ahead.
    """
    if not workers:
        for positions, params in map(job, steps):
            yield positions, renderer(positions, params)
        return
    if isinstance(renderer, TorchvisionRenderer):
        results = _in_processes(renderer, job, steps, workers, depth)
    else:
        results = in_thread(_streamed(renderer, job, steps), depth=depth)
    with closing(results):
        yield from results


def in_thread(results: Generator[T, None, None], *, depth: int) -> Generator[T, None, None]:
    """Runs a generator in one background thread, at most depth results ahead.

    When the returned generator ends, the thread finishes its current result and the given generator is closed.

    Raises:
        Exception: whatever the generator raises.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="fastcl-render")
    try:
        with held():  # a pool interrupted while it starts its thread would not wait for that thread
            waiting = deque(pool.submit(next, results, _END) for _ in range(depth))
        while (result := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, results, _END))
            yield result
    finally:
        with held():
            pool.shutdown(cancel_futures=True)
            results.close()


def _in_processes(
    renderer: TorchvisionRenderer, job: Job, steps: range, workers: int, depth: int
) -> Generator[Rendered, None, None]:
    device = renderer.device
    on_host = TorchvisionRenderer(renderer.split, renderer.spec, _CPU)  # no threads: processes share the work

    def render(step: int) -> tuple[np.ndarray, list[np.ndarray]]:
        positions, params = job(step)
        return positions, [view.numpy() for view in on_host(positions, params)]

    with closing(Processes(render, steps, workers=workers, depth=depth)) as arrays:
        results = _as_tensors(arrays, pin=device.type == "cuda")
        if device.type == "cuda":  # pinning copies on the CPU, so it gets its own thread
            results = in_thread(results, depth=1)
        with closing(results):
            for positions, views in results:
                yield positions, tuple(view.to(device, non_blocking=True) for view in views)


def _as_tensors(arrays: Iterator[tuple[np.ndarray, list[np.ndarray]]], pin: bool) -> Generator[Rendered, None, None]:
    for positions, views in arrays:
        tensors = (torch.from_numpy(view) for view in views)
        yield positions, tuple(view.pin_memory() if pin else view for view in tensors)


def _streamed(renderer: Renderer, job: Job, steps: range) -> Generator[Rendered, None, None]:
    """Uses the renderer's `stream`, which works on several batches at once, if it has one."""
    stream = getattr(renderer, "stream", None)
    if stream is None:
        for positions, params in map(job, steps):
            yield positions, renderer(positions, params)
        return
    taken: deque[np.ndarray] = deque()

    def feed() -> Iterator[tuple[np.ndarray, list[ViewParams]]]:
        for positions, params in map(job, steps):
            taken.append(positions)
            yield positions, params

    with closing(stream(feed())) as results:
        for views in results:
            yield taken.popleft(), views
