"""Timing of eager passes and of CUDA graph replays, interleaved rounds of measurements, and peak memory of a call."""

from __future__ import annotations

import gc
import multiprocessing
import random
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

PASSES = ("fwd", "bwd", "both")
QUICK = 10.0  # ms
MIN_ROUNDS = 3  # needed for a median and a spread, however slow the case
_HEAD_START = 1_000_000  # clock cycles, about half a millisecond, that the device waits before a replay

Prepare: TypeAlias = Callable[..., tuple[Callable[[], object], Callable[[], object]]]


class Sample(NamedTuple):
    """Times of one pass of one call in ms, `cores`: of all processor cores together; None if a clock does not apply."""

    wall: float | None
    gpu: float | None = None
    cores: float | None = None

    @property
    def ms(self) -> float:
        """The time on the device if it was taken, else the wall-clock time."""
        return self.gpu or self.wall or 0.0


Timer: TypeAlias = Callable[[], dict[str, Sample]]


class Peak(NamedTuple):
    """Peak memory of a call beyond its inputs, None if it was not measured, and its duration in seconds."""

    bytes: int | None = None
    seconds: float = 0.0


class Laps:
    """Marks in time: of the host, and on CUDA also of the device's stream."""

    def __init__(self, device: torch.device, marks: int) -> None:
        self.cuda, self.walls = device.type == "cuda", []
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(marks if self.cuda else 0)]
        if self.cuda:
            torch.cuda.synchronize(device)

    def mark(self) -> None:
        """Mark this time."""
        self.walls.append(perf_counter())
        if self.cuda:
            self.events[len(self.walls) - 1].record()

    def stop(self) -> None:
        """Mark the time at which the device is done."""
        if self.cuda:
            self.events[-1].record()
            torch.cuda.synchronize()
        self.walls.append(perf_counter())

    def span(self, first: int, last: int, wall: bool = True) -> Sample:
        """The times between two marks; `wall`: whether the host's means anything on CUDA."""
        gpu = self.events[first].elapsed_time(self.events[last]) if self.cuda else None
        return Sample(1e3 * (self.walls[last] - self.walls[first]) if wall or not self.cuda else None, gpu)


def time_passes(forward: Callable[[], Tensor], leaf: Tensor) -> dict[str, Sample]:
    """Times of one forward and one backward pass on the device of `leaf`; clears its gradient first.

    Args:
        forward: returns a scalar that depends on `leaf`.
        leaf: tensor that requires a gradient.
    """
    leaf.grad = None
    laps = Laps(leaf.device, 3)
    laps.mark()
    loss = forward()
    laps.mark()
    loss.backward()
    laps.stop()
    return {"fwd": laps.span(0, 1, wall=False), "bwd": laps.span(1, 2, wall=False), "both": laps.span(0, 2)}


def time_call(call: Callable[[], object], device: torch.device) -> Sample:
    """Times of one call without a backward pass: wall clock until it has finished, on CUDA also between events."""
    laps = Laps(device, 2)
    laps.mark()
    call()
    laps.stop()
    return laps.span(0, 1)


class Graphs:
    """The passes of a call as CUDA graphs with a shared memory pool: replay `fwd`, then `bwd`; or `both`."""

    def __init__(self, forward: Callable[[], Tensor], leaf: Tensor) -> None:
        """Capture the passes; arguments as in `time_passes`, warmed up by the caller.

        Raises:
            Exception: any error of a call that cannot be captured; the current stream is restored.
        """
        gc.collect()  # an autograd graph kept alive by a reference cycle ties the leaf to the stream that created it
        self.fwd, self.bwd, self.both = (torch.cuda.CUDAGraph() for _ in range(3))
        previous = torch.cuda.current_stream(leaf.device)
        stream, pool = torch.cuda.Stream(leaf.device), torch.cuda.graph_pool_handle()
        try:
            stream.wait_stream(previous)
            with torch.cuda.stream(stream):  # libraries create their workspaces per stream
                torch.autograd.grad(forward(), leaf)
            previous.wait_stream(stream)
            with torch.cuda.graph(self.fwd, pool=pool, stream=stream):
                self.loss = forward()
            with torch.cuda.graph(self.bwd, pool=pool, stream=stream):
                (self.grad,) = torch.autograd.grad(self.loss, leaf)
            self.loss = self.loss.detach()  # as above: eager passes would wait for the capture stream
            # It reuses memory of the other two: after a replay of it, replay them again before reading their results.
            with torch.cuda.graph(self.both, pool=pool, stream=stream):
                torch.autograd.grad(forward(), leaf)
        finally:
            torch.cuda.set_stream(previous)  # a failed capture leaves its own stream current

    def result(self) -> tuple[Tensor, Tensor]:
        """Replay the forward and backward pass; return the loss and the gradient."""
        self.fwd.replay()
        self.bwd.replay()
        return self.loss.clone(), self.grad.clone()

    def time(self, forward: Callable[[], Tensor], leaf: Tensor) -> dict[str, Sample]:
        """Times of a replay of each pass in ms, and the wall-clock time of an eager call."""
        eager, laps = time_passes(forward, leaf), Laps(leaf.device, 5)
        # Keep the device busy until everything is queued, so that it never waits for this process.
        torch.cuda._sleep(_HEAD_START)
        laps.mark()
        self.fwd.replay()
        laps.mark()
        self.bwd.replay()
        laps.mark()
        laps.mark()
        self.both.replay()
        laps.stop()
        spans = {"fwd": (0, 1), "bwd": (1, 2), "both": (3, 4)}
        return {run: Sample(eager[run].wall, laps.span(*marks).gpu) for run, marks in spans.items()}


def timer_of(forward: Callable[[], Tensor], leaf: Tensor, capture: bool) -> tuple[Timer, str | None]:
    """A timer of all passes, and its method on the device: "graph" or "events"; None on a CPU.

    Args:
        capture: whether to try CUDA graphs; a call that cannot be captured is timed between events.
    """
    eager = partial(time_passes, forward, leaf)
    if leaf.device.type != "cuda":
        return eager, None
    if not capture:
        return eager, "events"
    try:
        graphs = Graphs(forward, leaf)
        if not torch.allclose(graphs.result()[0], forward().detach(), rtol=1e-2):
            raise RuntimeError("its replay gives another loss")
        return partial(graphs.time, forward, leaf), "graph"
    except Exception as error:  # any library may do something that cannot be captured, with its own error
        print(f"  no CUDA graph: {first_line(error)}", flush=True)
        torch.cuda.synchronize()
        return eager, "events"


def first_line(error: BaseException) -> str:
    """An exception's name and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".removesuffix(": ")


def interleave(
    timers: dict[str, Timer], repeats: int, seconds: float, warm_up: float = 0
) -> dict[str, dict[str, list[Sample]]]:
    """Samples of every provider, in rounds in which each runs once, so that a drift of the machine affects all alike.

    Each round has a random order, the same in every run. On a CPU a call that is shorter than `QUICK` is repeated for
    that long, and the last one counts, as in a loop of its own: the first finds the caches as the provider before has
    left them, and its time would depend on who that was.

    Args:
        timers: by provider, a call that times all passes once; warmed up by the caller.
        repeats: maximum number of rounds.
        seconds: time per provider after which no round starts, except for the first `MIN_ROUNDS`.
        warm_up: seconds of untimed rounds first, for clocks that rise under load.

    Returns:
        By provider and pass, one sample per round.
    """
    names, order = list(timers), random.Random(0)
    began = perf_counter()
    while perf_counter() - began < warm_up:
        for name in names:
            timers[name]()
    found: dict[str, dict[str, list[Sample]]] = {name: {} for name in names}
    began = perf_counter()
    for k in range(repeats):
        if k >= MIN_ROUNDS and perf_counter() - began > seconds * len(names):
            break
        order.shuffle(names)
        for name in names:
            samples, before = timers[name](), perf_counter()
            while _is_quick(samples) and 1e3 * (perf_counter() - before) < QUICK:
                samples = timers[name]()
            for run, sample in samples.items():
                found[name].setdefault(run, []).append(sample)
    return found


def _is_quick(samples: dict[str, Sample]) -> bool:
    """Whether all passes are short and were timed on a CPU."""
    return all(s.gpu is None and s.ms < QUICK for s in samples.values())


def measure_peak(prepare: Prepare, device: str, *args: Any) -> Peak:
    """Peak memory of a call: of torch's allocator on CUDA, else the resident set's high-water mark in a fresh process.

    Args:
        prepare: a module-level function of device and args that builds the inputs and returns a warm-up and the call.
            The warm-up loads code and must be tiny on a CPU: a high-water mark never falls and is the baseline.
        device: "cpu" or "cuda".
        args: further picklable arguments of `prepare`.

    Raises:
        BrokenProcessPool: the process was killed, as the system does when memory runs out.
        Exception: any error of the call.
    """
    if torch.device(device).type == "cuda":
        return _peak_here(prepare, device, *args)
    # Fork from a server that has imported the common modules and never ran anything large: on Linux a process inherits
    # the high-water mark of its parent, even through exec, and a large one would hide its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fastcl"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_here, prepare, device, *args).result()


def _peak_here(prepare: Prepare, device: str, *args: Any) -> Peak:
    cuda = torch.device(device).type == "cuda"
    wait = torch.cuda.synchronize if cuda else bool
    warm_up, call = prepare(device, *args)
    warm_up()
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before, began = _high_water(cuda), perf_counter()
    call()
    wait()
    return Peak(_high_water(cuda) - before, perf_counter() - began)


def _high_water(cuda: bool) -> int:
    # ru_maxrss is in KiB on Linux.
    return torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
