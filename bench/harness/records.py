"""The record of a measurement, its files, and the ways a number or a reason is written.

A record is one flat dictionary, a line of DIR/<bench>.json:

    bench, provider, then the case: for the losses objective, n, d, dtype
    precision     of the provider's matrix products: "fp32", "tf32", "fp16" or "bf16"; null if it has no meaning
    pass          "fwd", "bwd" or "both" of the same calls
    gpu_ms        median time on the device, see timing; null on a CPU
    wall_ms       median wall-clock time; on CUDA only for "both", an eager call up to its synchronisation
    peak_bytes    peak memory beyond the inputs; only for "both", null if the call did not finish
    tflops        10^12 floating-point operations per second, by the provider's own count of what it really computes
    tflops_dense  the same with the operations of a dense product, equal for all providers; see the benchmark's header
    bound_ms      lower bound from the machine's peak rates, measured in the same run; null: not measured
    device, versions, date
    timing        method of gpu_ms: "graph" (replays of a CUDA graph), "events" (an eager call between events) or null
    samples_ms    all times behind the median: those of gpu_ms if given, else of wall_ms
    wall_samples_ms  the times of wall_ms if samples_ms holds those of gpu_ms, else empty
    reason        null, or why a case has no times
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
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
from fastcl.errors import FastclError
from fastcl.io.files import write_atomic

GIB = 2**30
MEMORY_GIB = 12

Record: TypeAlias = dict[str, Any]


def machine(device: torch.device, packages: Iterable[str] = ()) -> Record:
    """The fields device, versions and date, shared by all records of a run; versions also of installed `packages`."""
    installed = {"python": platform.python_version(), "torch": torch.__version__, "fastcl": fastcl.__version__}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        installed["cuda"] = str(torch.version.cuda)
    else:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = f"{next(models, platform.machine())}, threads: {torch.get_num_threads()} of {os.cpu_count()}"
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"device": name, "versions": installed | versions(packages), "date": date}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of packages, as far as they are installed: the records of a provider say where its package is not."""
    found = {}
    for package in dict.fromkeys(packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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
        case: fields of the case, merged into the record.
        machine: the result of `machine`.
        run: the pass.
        samples: times of the pass; empty if the case did not run.
        flops: floating-point operations of one pass: the provider's own count and the dense one.
    """
    gpu = [s.gpu for s in samples if s.gpu is not None]
    wall = [s.wall for s in samples if s.wall is not None]
    times = gpu or wall
    own, dense = (count / median(times) * 1e-9 for count in flops) if flops and times else (None, None)
    return {
        "bench": bench, "provider": provider, **case, "pass": run,
        "gpu_ms": median(gpu) if gpu else None, "wall_ms": median(wall) if wall else None, "peak_bytes": peak_bytes,
        "tflops": own, "tflops_dense": dense, "bound_ms": bound_ms, **machine,
        "timing": timing, "samples_ms": times, "wall_samples_ms": wall if gpu else [], "reason": reason,
    }  # fmt: skip


def agree(results: dict[str, dict[str, Tensor]], tolerance: float) -> None:
    """Compare the results of all providers with those of the first.

    Args:
        results: tensors by provider and name of the quantity; shapes agree between providers.
        tolerance: allowed error relative to the first provider's tensor, in Euclidean norm.

    Raises:
        FastclError: two differ by more, or are not finite.
    """
    reference, wanted = next(iter(results.items()))
    for name, found in results.items():
        for what, want in wanted.items():
            size, distance = want.norm().item(), (found[what] - want).norm().item()
            if not distance <= tolerance * size:  # also true for NaN
                raise FastclError(
                    f"{name} disagrees with {reference} on the {what}: a difference of norm {distance:.3g} against "
                    f"{size:.3g}, allowed is a relative {tolerance:g}"
                )


def over_memory(floats: float, limit: float) -> str | None:
    """Reason to skip a case that needs more float32 values than the limit in GiB allows, or None."""
    needed = floats * 4 / GIB
    return f"skipped: needs {needed:.3g} GiB, the limit is {limit:.3g} GiB" if needed > limit else None


def shortage(error: Exception) -> str | None:
    """The reason if a call failed for lack of memory; None for every other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {str(error).splitlines()[0]}"
    killed = isinstance(error, BrokenProcessPool)
    return "its process was killed, most likely for want of memory" if killed else None


def total_memory(device: torch.device) -> int:
    """Total memory of the device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit(asked: float | None, device: torch.device) -> float:
    """GiB that a benchmark may use: `asked`, else MEMORY_GIB on a CPU; at most three quarters of the total."""
    most = 0.75 * total_memory(device) / GIB
    default = most if device.type == "cuda" else MEMORY_GIB
    return min(most, default if asked is None else asked)


def grouped(records: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """The records by their values of some keys, in order of appearance."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        found.setdefault(tuple(r.get(key) for key in keys), []).append(r)
    return found


def having(records: Iterable[Record], **values: object) -> list[Record]:
    """The records that have these values."""
    return [r for r in records if values.items() <= r.items()]


def read(*files: Path) -> list[Record]:
    """All records of the files that exist."""
    return [r for file in files if file.is_file() for r in json.loads(file.read_text(encoding="utf-8"))]


def json_lines(records: Iterable[Record]) -> str:
    """Records as JSON, one per line."""
    lines = ",\n".join(json.dumps(r, allow_nan=False) for r in records)
    return f"[\n{lines}\n]\n"


def write(folder: Path, bench: str, records: Sequence[Record], markdown: str) -> None:
    """Write <bench>.json, one record per line, and <bench>.md."""
    write_file(folder / f"{bench}.json", json_lines(records))
    write_file(folder / f"{bench}.md", markdown)


def write_file(path: Path, text: str) -> None:
    """Write a file atomically; exits with a message on failure."""
    try:
        write_atomic(path, text.encode())
    except FastclError as error:
        raise SystemExit(f"error: {error}") from error


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 2) -> str:
    """A Markdown table; all columns but the first `left` hold numbers and are right-aligned."""
    rule = ["---" if k < left else "---:" for k in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def milliseconds(times: Sequence[float]) -> str:
    """Median and range, as "12.3 (11.9-14)"."""
    return f"{digits(median(times))} ({digits(min(times))}-{digits(max(times))})"


def duration(r: Record) -> float:
    """Time of a timed record in ms: on the device if timed there, else wall clock."""
    return r["gpu_ms"] or r["wall_ms"]


def digits(value: float) -> str:
    """Three significant digits, without an exponent for large numbers."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
