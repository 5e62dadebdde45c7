"""What all benchmarks share: the record of a measurement, its files, arguments and tables.

A record is one flat dictionary, a line of DIR/<bench>.json:

    bench, provider, then what was run: for the losses objective, n, d, dtype
    precision     of the provider's matrix products: "fp32", "tf32", "fp16" or "bf16"; null where it says nothing
    pass          "fwd", "bwd" or "both" of the same calls
    gpu_ms        median time on the device: see timing; null on a CPU
    wall_ms       median time on the wall clock; on CUDA only of "both", eager, which ends with a synchronisation
    peak_bytes    peak memory beyond the inputs; only of "both", null where the call did not come to its end
    tflops        10^12 floating-point operations a second, on what the provider really computes, as it states itself
    tflops_dense  the same on the count of a dense product, one for all providers; the benchmark's header states it
    bound_ms      what the peaks of the machine, measured in the same run, allow for the problem; null: not measured
    device, versions, date
    timing        how gpu_ms was taken: "graph" (replays of a CUDA graph), "events" (an eager call between events), null
    samples_ms    every time that went into the median: gpu_ms where it is given, else wall_ms
    wall_samples_ms  the same of wall_ms where samples_ms is that of gpu_ms, else empty
    reason        null, or why a case has no times
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor

import fastcl
from bench.harness.clocks import Sample
from fastcl.errors import FastclError, shown
from fastcl.io.files import cause, write_atomic
from fastcl.io.outputs import check_folder, named_path

GIB = 2**30
MEMORY_GIB = 12
MEMORY_HELP = f"skip what would need more, or three quarters of the device's memory (default: {MEMORY_GIB}; CUDA: that)"

Record: TypeAlias = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every benchmark takes."""
    add = parser.add_argument
    add("--out", type=named_path, required=True, metavar="DIR",
        help="folder of the results; older ones in it are replaced")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one (the default)")
    add("--repeats", type=int, default=15, metavar="R", help="rounds per case at most (default: %(default)s)")
    add("--seconds", type=float, default=60, metavar="S",
        help="per case and provider: no round begins after it, and a provider is skipped where one call takes longer "
        "(default: %(default)s)")  # fmt: skip


def check_out(args: argparse.Namespace, parser: argparse.ArgumentParser, *inputs: Path) -> None:
    """End the program with a message where --out is no folder for results or one of the folders that are read (for
    --data; they may be absent), or these cannot be read; names that the terminal cannot show are printed escaped from
    here on."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check_folder(args.out, "--out", inputs)
    except FastclError as error:
        parser.error(str(error))
    for folder in inputs:
        try:
            os.scandir(folder).close()
        except FileNotFoundError:
            pass
        except OSError as error:
            parser.error(f"--data: {shown(folder)} cannot be read ({cause(error)})")


def device_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """The device that was asked for; ends the program with a message where there is none."""
    found = torch.cuda.is_available()
    if args.device == "cuda" and not found:
        parser.error("--device cuda: torch finds no CUDA device")
    return torch.device("cuda" if found and args.device != "cpu" else "cpu")


def require_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End the program with a message where an argument, or one of its numbers, is not positive."""
    for name in names:
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if not number > 0:
                parser.error(f"--{name}: must be positive, got {number}")


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
    flops: tuple[float, float] | None = None,
    peak_bytes: int | None = None,
    bound_ms: float | None = None,
    timing: str | None = None,
    reason: str | None = None,
) -> Record:
    """One record; see the module's docstring.

    Args:
        case: what was run, merged into the record.
        machine: as `machine` returns it.
        run: the pass.
        samples: times of the pass; empty where the case did not run.
        flops: floating-point operations of one pass, the provider's own count and the dense one.
    """
    gpu = [s.gpu for s in samples if s.gpu is not None]
    wall = [s.wall for s in samples if s.wall is not None]
    times = gpu or wall
    own, dense = (count / median(times) * 1e-9 for count in flops) if flops and times else (None, None)
    return {
        "bench": bench,
        "provider": provider,
        **case,
        "pass": run,
        "gpu_ms": median(gpu) if gpu else None,
        "wall_ms": median(wall) if wall else None,
        "peak_bytes": peak_bytes,
        "tflops": own,
        "tflops_dense": dense,
        "bound_ms": bound_ms,
        **machine,
        "timing": timing,
        "samples_ms": times,
        "wall_samples_ms": wall if gpu else [],
        "reason": reason,
    }


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
                raise FastclError(
                    f"{name} disagrees with {reference} on the {what}: a difference of norm {distance:.3g} against "
                    f"{size:.3g}, allowed is a relative {tolerance:g}"
                )


def over_memory(floats: float, limit: float) -> str | None:
    """Why so many float32 numbers are too many; None where they are not.

    Args:
        limit: GiB.
    """
    needed = floats * 4 / GIB
    return f"skipped: needs {needed:.3g} GiB, the limit is {limit:.3g} GiB" if needed > limit else None


def shortage(error: Exception) -> str | None:
    """Why a call ended that memory was short for; None for every other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {str(error).splitlines()[0]}"
    if isinstance(error, BrokenProcessPool):
        return "its process was killed, most likely for want of memory"
    return None


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit(asked: float | None, device: torch.device) -> float:
    """GiB that a benchmark may use: what was asked for, else on a CPU MEMORY_GIB; at most three quarters of all."""
    most = 0.75 * total_memory(device) / GIB
    default = most if device.type == "cuda" else MEMORY_GIB
    return min(most, default if asked is None else asked)


def write(folder: Path, bench: str, records: Sequence[Record], markdown: str) -> None:
    """Write <bench>.json, a record a line, and <bench>.md."""
    lines = ",\n".join(json.dumps(r, allow_nan=False) for r in records)
    write_file(folder / f"{bench}.json", f"[\n{lines}\n]\n")
    write_file(folder / f"{bench}.md", markdown)


def write_file(path: Path, text: str) -> None:
    """Write a file whole, a reader never sees half of it; ends the program with a message where that fails."""
    try:
        write_atomic(path, text.encode())
    except FastclError as error:
        raise SystemExit(f"error: {error}") from error


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 2) -> str:
    """A Markdown table; all columns but the first `left` are numbers and stand to the right."""
    rule = ["---" if k < left else "---:" for k in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def milliseconds(times: Sequence[float]) -> str:
    """Median and range, as "12.3 (11.9-14)"."""
    return f"{digits(median(times))} ({digits(min(times))}-{digits(max(times))})"


def duration(r: Record) -> float | None:
    """ms of a record: on the device where that was timed, else on the wall clock; None where nothing was."""
    return r["gpu_ms"] or r["wall_ms"]


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


def exit_status(failed: Iterable[str]) -> int:
    """1 if anything of ours failed, each message on a line of its own, else 0."""
    failed = list(failed)
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    return 1 if failed else 0
