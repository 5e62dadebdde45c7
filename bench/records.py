"""What all benchmarks share: the record of a measurement, its files, arguments, clocks, and the peak memory of a call.

A record is one flat dictionary, a line of DIR/<bench>.json:

    bench, provider, then what was run: for the losses objective, n, d, dtype
    pass          "fwd", "bwd" or "both" of the same calls
    gpu_ms        median time between CUDA events; null on a CPU
    wall_ms       median time on the wall clock; on CUDA only of "both", which ends with a synchronisation
    peak_bytes    peak memory beyond the inputs; only of "both", null where the call did not come to its end
    tflops        10^12 floating-point operations a second, on the count that the benchmark's header states
    bound_ms      what the machine's measured peaks allow; null: not measured
    device, versions, date
    samples_ms    every time that went into the median: gpu_ms where it is given, else wall_ms
    reason        null, or why a case has no times
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

import fastcl

GIB = 2**30
PASSES = ("fwd", "bwd", "both")
MIN_ROUNDS = 3  # a median and a spread need that many, however slow the case

Record: TypeAlias = dict[str, Any]
Prepare: TypeAlias = Callable[..., tuple[Callable[[], object], Callable[[], object]]]


class Sample(NamedTuple):
    """Times of one pass of one call, in ms; None where the clock does not apply."""

    wall: float | None
    gpu: float | None = None


class Peak(NamedTuple):
    """Peak memory of a call beyond its inputs, and the duration of this first call in its process, in seconds."""

    bytes: int
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every benchmark takes."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results; older ones in it are replaced")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one (the default)")
    add("--repeats", type=int, default=15, metavar="R", help="rounds per case at most (default: %(default)s)")
    add("--seconds", type=float, default=60, metavar="S",
        help="per case and provider: no round begins after it, and a provider is skipped where one call takes longer "
        "(default: %(default)s)")  # fmt: skip


def device_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """The device that was asked for; ends the program with a message where there is none."""
    found = torch.cuda.is_available()
    if args.device == "cuda" and not found:
        parser.error("--device cuda: torch finds no CUDA device")
    return torch.device("cuda" if found and args.device != "cpu" else "cpu")


def machine(device: torch.device) -> Record:
    """The fields device, versions and date of all records of a run."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "fastcl": fastcl.__version__}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions["cuda"] = torch.version.cuda
    else:
        name = f"{_cpu_model()}, threads: {torch.get_num_threads()} of {os.cpu_count()}"
    return {"device": name, "versions": versions, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def record(
    bench: str,
    provider: str,
    case: Record,
    machine: Record,
    run: str = "both",
    samples: Sequence[Sample] = (),
    flops: float | None = None,
    peak_bytes: int | None = None,
    reason: str | None = None,
) -> Record:
    """One record; see the module's docstring.

    Args:
        case: what was run, merged into the record.
        machine: as `machine` returns it.
        run: the pass.
        samples: times of the pass; empty where the case did not run.
        flops: floating-point operations of one pass, for tflops.
    """
    gpu = [s.gpu for s in samples if s.gpu is not None]
    wall = [s.wall for s in samples if s.wall is not None]
    times = gpu or wall
    return {
        "bench": bench,
        "provider": provider,
        **case,
        "pass": run,
        "gpu_ms": median(gpu) if gpu else None,
        "wall_ms": median(wall) if wall else None,
        "peak_bytes": peak_bytes,
        "tflops": flops / median(times) * 1e-9 if flops and times else None,
        "bound_ms": None,
        **machine,
        "samples_ms": times,
        "reason": reason,
    }


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


def interleave(
    timers: dict[str, Callable[[], dict[str, Sample]]], repeats: int, seconds: float
) -> dict[str, dict[str, list[Sample]]]:
    """Samples of every provider, taken in rounds in which each runs once: a drift of the machine hits all alike.

    Args:
        timers: by provider, a call that times all passes once; warmed up by the caller.
        repeats: rounds at most.
        seconds: time per provider after which no round begins, `MIN_ROUNDS` excepted.

    Returns:
        By provider and pass, one sample a round.
    """
    names = list(timers)
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
    """Peak memory of a call in a fresh process: torch's allocator on CUDA, else the resident set's high-water mark.

    Args:
        prepare: a module-level function of device and args that builds the inputs and returns a warm-up and the call.
            The warm-up loads code and must be tiny: a high-water mark never falls, and on a CPU it counts from there.
        device: "cpu" or "cuda".
        args: whatever else `prepare` takes, picklable.

    Raises:
        BrokenProcessPool: the process was killed, as the system does when memory runs out.
        Exception: whatever the call raised.
    """
    # Forked from a server that never ran anything large: a process that is forked and executed inherits the high-water
    # mark of its parent on Linux, and would hide its own below it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
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


def agree(results: dict[str, dict[str, Tensor]], tolerance: float) -> None:
    """Compare what the providers computed, each with the first.

    Args:
        results: by provider and by what it is, tensors of one shape.
        tolerance: allowed error relative to the first provider's tensor, in Euclidean norm.

    Raises:
        FastclError: two differ by more, or are not finite.
    """
    reference, wanted = next(iter(results.items()))
    for name, found in results.items():
        for what, want in wanted.items():
            size, distance = want.norm().item(), (found[what] - want).norm().item()
            if not distance <= tolerance * size:  # NaN is not
                raise fastcl.FastclError(
                    f"{name} disagrees with {reference} on the {what}: a difference of norm {distance:.3g} against "
                    f"{size:.3g}, allowed is a relative {tolerance:g}"
                )


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def write(folder: Path, bench: str, records: Sequence[Record], markdown: str) -> None:
    """Write <bench>.json, a record a line, and <bench>.md. A reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(r, allow_nan=False) for r in records)
    for name, text in ((f"{bench}.json", f"[\n{lines}\n]\n"), (f"{bench}.md", markdown)):
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first two are numbers and stand to the right."""
    rule = ["---" if k < 2 else "---:" for k in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def milliseconds(times: Sequence[float]) -> str:
    """Median and range, as "12.3 (11.9-14)"."""
    return f"{digits(median(times))} ({digits(min(times))}-{digits(max(times))})"


def digits(value: float) -> str:
    """Three significant digits, without an exponent for large numbers."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
