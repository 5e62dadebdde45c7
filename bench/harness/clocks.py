"""Clocks: times of the passes of a call, eagerly and replayed from CUDA graphs; rounds; peak memory of a call."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

PASSES = ("fwd", "bwd", "both")
MIN_ROUNDS = 3  # a median and a spread need that many, however slow the case
_HEAD_START = 1_000_000  # clock cycles, about half a millisecond: that long the device is busy before a replay

Prepare: TypeAlias = Callable[..., tuple[Callable[[], object], Callable[[], object]]]


class Sample(NamedTuple):
    """Times of one pass of one call, in ms; None where the clock does not apply."""

    wall: float | None
    gpu: float | None = None


Timer: TypeAlias = Callable[[], dict[str, Sample]]


class Peak(NamedTuple):
    """Peak memory of a call beyond its inputs, and the duration of this call in seconds."""

    bytes: int
    seconds: float


def time_passes(forward: Callable[[], Tensor], leaf: Tensor) -> dict[str, Sample]:
    """Times of one forward and one backward pass on the device of `leaf`, whose old gradient goes beforehand.

    Args:
        forward: returns a scalar that depends on `leaf`.
        leaf: tensor that requires a gradient.
    """
    leaf.grad = None
    if leaf.device.type == "cuda":
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize(leaf.device)
        began = perf_counter()
        start.record()
        loss = forward()
        middle.record()
        loss.backward()
        end.record()
        torch.cuda.synchronize(leaf.device)
        wall = (perf_counter() - began) * 1e3
        spans = (start.elapsed_time(middle), middle.elapsed_time(end), start.elapsed_time(end))
        return {run: Sample(wall if run == "both" else None, gpu) for run, gpu in zip(PASSES, spans, strict=True)}
    start = perf_counter()
    loss = forward()
    middle = perf_counter()
    loss.backward()
    end = perf_counter()
    spans = (middle - start, end - middle, end - start)
    return {run: Sample(seconds * 1e3) for run, seconds in zip(PASSES, spans, strict=True)}


def time_call(call: Callable[[], object], device: torch.device) -> Sample:
    """Times of one call that has no backward pass: on the wall clock to its end, on CUDA also between events."""
    if device.type != "cuda":
        began = perf_counter()
        call()
        return Sample((perf_counter() - began) * 1e3)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    began = perf_counter()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return Sample((perf_counter() - began) * 1e3, start.elapsed_time(end))


class Graphs:
    """The passes of a call as CUDA graphs, which share one pool of memory: replay `fwd`, then `bwd`; or `both`."""

    def __init__(self, forward: Callable[[], Tensor], leaf: Tensor) -> None:
        """Capture; arguments as `time_passes`, warmed up by the caller.

        Raises:
            Exception: whatever a call that cannot be captured raises; the current stream is as before.
        """
        gc.collect()  # a graph of autograd that a cycle keeps alive would tie the leaf to the stream that made it
        self.fwd, self.bwd, self.both = (torch.cuda.CUDAGraph() for _ in range(3))
        previous = torch.cuda.current_stream(leaf.device)
        stream, pool = torch.cuda.Stream(leaf.device), torch.cuda.graph_pool_handle()
        try:
            stream.wait_stream(previous)
            with torch.cuda.stream(stream):  # libraries set up their workspaces stream by stream
                torch.autograd.grad(forward(), leaf)
            previous.wait_stream(stream)
            with torch.cuda.graph(self.fwd, pool=pool, stream=stream):
                self.loss = forward()
            with torch.cuda.graph(self.bwd, pool=pool, stream=stream):
                (self.grad,) = torch.autograd.grad(self.loss, leaf)
            self.loss = self.loss.detach()  # as above: eager passes would wait for the stream of the capture
            # Its memory is what the two left free: after it, both must be replayed anew before their results are read.
            with torch.cuda.graph(self.both, pool=pool, stream=stream):
                torch.autograd.grad(forward(), leaf)
        finally:
            torch.cuda.set_stream(previous)  # a capture that fails leaves its own stream current

    def result(self) -> tuple[Tensor, Tensor]:
        """Replay forward and backward pass: the loss and the gradient."""
        self.fwd.replay()
        self.bwd.replay()
        return self.loss.clone(), self.grad.clone()

    def time(self) -> dict[str, float]:
        """Milliseconds of a replay of each pass."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(5)]
        # The device waits until all is queued, so that it never waits for this process afterwards.
        torch.cuda._sleep(_HEAD_START)
        events[0].record()
        self.fwd.replay()
        events[1].record()
        self.bwd.replay()
        events[2].record()
        events[3].record()
        self.both.replay()
        events[4].record()
        torch.cuda.synchronize()
        spans = (events[0], events[1]), (events[1], events[2]), (events[3], events[4])
        return {run: start.elapsed_time(end) for run, (start, end) in zip(PASSES, spans, strict=True)}


def replayed(graphs: Graphs, forward: Callable[[], Tensor], leaf: Tensor) -> dict[str, Sample]:
    """Times as `time_passes`: those of the device from replays, that of the wall clock from an eager call."""
    eager = time_passes(forward, leaf)
    return {run: Sample(eager[run].wall, gpu) for run, gpu in graphs.time().items()}


def timer_of(forward: Callable[[], Tensor], leaf: Tensor, capture: bool) -> tuple[Timer, str | None]:
    """A timer of all passes, and how it times the device: "graph", "events"; None on a CPU.

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
        return partial(replayed, graphs, forward, leaf), "graph"
    except Exception as error:  # the reason differs from library to library: any call may do what a graph cannot hold
        print(f"  no CUDA graph: {first_line(error)}", flush=True)
        torch.cuda.synchronize()
        return eager, "events"


def first_line(error: BaseException) -> str:
    """An exception's name and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".removesuffix(": ")


def interleave(
    timers: dict[str, Timer], repeats: int, seconds: float, warm_up: float = 0
) -> dict[str, dict[str, list[Sample]]]:
    """Samples of every provider, taken in rounds in which each runs once: a drift of the machine hits all alike.

    Args:
        timers: by provider, a call that times all passes once; warmed up by the caller.
        repeats: rounds at most.
        seconds: time per provider after which no round begins, `MIN_ROUNDS` excepted.
        warm_up: seconds of rounds beforehand whose times are dropped, for clocks that rise under load.

    Returns:
        By provider and pass, one sample a round.
    """
    names = list(timers)
    began = perf_counter()
    while perf_counter() - began < warm_up:
        for name in names:
            timers[name]()
    found: dict[str, dict[str, list[Sample]]] = {name: {} for name in names}
    began = perf_counter()
    for k in range(repeats):
        if k >= MIN_ROUNDS and perf_counter() - began > seconds * len(names):
            break
        first = k % len(names)  # nobody always follows the same neighbour
        for name in names[first:] + names[:first]:
            for run, sample in timers[name]().items():
                found[name].setdefault(run, []).append(sample)
    return found


def measure_peak(prepare: Prepare, device: str, *args: Any) -> Peak:
    """Peak memory of a call: of torch's allocator on CUDA, else the resident set's high-water mark in a fresh process.

    Args:
        prepare: a module-level function of device and args that builds the inputs and returns a warm-up and the call.
            The warm-up loads code and must be tiny on a CPU: a high-water mark never falls, and counts from there.
        device: "cpu" or "cuda".
        args: whatever else `prepare` takes, picklable.

    Raises:
        BrokenProcessPool: the process was killed, as the system does when memory runs out.
        Exception: whatever the call raised.
    """
    if torch.device(device).type == "cuda":
        return _peak_here(prepare, device, *args)
    # Forked from a server that has imported what all need and never ran anything large: a process that is forked and
    # executed inherits the high-water mark of its parent on Linux, and would hide its own below it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fastcl"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_here, prepare, device, *args).result()


def _peak_here(prepare: Prepare, device: str, *args: Any) -> Peak:
    cuda = torch.device(device).type == "cuda"
    warm_up, call = prepare(device, *args)
    warm_up()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, began = _high_water(cuda), perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return Peak(_high_water(cuda) - before, perf_counter() - began)


def _high_water(cuda: bool) -> int:
    if cuda:
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
