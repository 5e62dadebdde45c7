"""The timetable of a GPU run: each step with its command and its share of the time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.harness.command import ROOT

PARTS = ("losses", "similarity", "training")
PART_MINUTES = 8.0  # on a GPU; a rehearsal, on a CPU under Triton's interpreter, has REHEARSAL_MINUTES
REHEARSAL_MINUTES = 20.0

OURS = ("fastcl fp16", "fastcl fp32")
TORCH = (*OURS, "plain PyTorch", "plain PyTorch bf16", "chunked bf16")
COMPILED = ("torch.compile bf16", "flex_attention bf16")  # each compiles for seconds at every size
LIBRARIES = ("Inf-CL", "lightly", "pytorch-metric-learning", "authors' formulation")
ACCUMULATED = ("fastcl PairAccumulator", "X'Y fp32", "X'Y tf32", "dense Gram tf32", "drawing the features alone")
PAIRWISE = (
    "fastcl linear", "fastcl linear (tiles)", "fastcl cosine", "fastcl rbf", "dense Gram fp32",
    "dense Gram fp32 (linear)", "dense Gram fp32 (rbf)", "dense Gram tf32 (linear)", "dense Gram tf32 (cosine)",
)  # fmt: skip
PEERS = ("torch-cka", "ckatorch", "rsatoolbox", "authors' formulation")
DATA = (
    "fastcl torchvision", "fastcl dali", "fastcl triton", "torchvision v2, Pillow, workers", "DALI, operator seeds",
    "kornia", "drawing the plan alone", "decoding alone, DALI",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Arguments for this interpreter or for `tool`, seconds at PART_MINUTES, and extra environment variables."""

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    tool: str | None = None


def plan(out: Path, part: str, rehearse: bool) -> list[Step]:
    """The steps of a part, in order: prerequisites first, slow and least important steps last."""
    steps = {"losses": _losses, "similarity": _similarity, "training": _training}[part](out, rehearse)
    return [_card(f"card, {part}"), *steps, _card(f"card afterwards, {part}")]


def gpu_tests() -> list[str]:
    """The files with a test marked gpu; others may import packages that are missing."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path.relative_to(ROOT).as_posix() for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]


def _card(name: str) -> Step:
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    return Step(name, (query, "--format=csv"), 2, tool="nvidia-smi")


def _losses(out: Path, rehearse: bool) -> Iterator[Step]:
    # In a rehearsal the tests marked gpu skip themselves; tiny versions run instead.
    tests = ("tests/rowstats/test_gpu.py",) if rehearse else ("-m", "gpu", *gpu_tests())
    full, small = ("tiny", "tiny") if rehearse else ("full", "small")
    yield Step("ceilings", ("-m", "bench.harness.ceilings", "--out", str(out / "ceilings"), "--repeats", "10"), 25)
    yield Step("tests", (*_pytest(), *tests), 70)
    yield Step("by hand", ("-m", "bench.gpu.by_hand", "--out", str(out / "by_hand")), 20)
    for name, share, objectives, rows, widths, providers, seconds in _LOSSES:
        rows, widths = ((64, 128), (16,)) if rehearse else (rows, widths)
        yield _bench("losses", out / name, share, {
            "objectives": objectives, "n": rows, "d": widths, "seconds": 60 if rehearse else seconds,
            "repeats": 3 if rehearse or len(providers) == 1 else 30, "providers": providers,
        })  # fmt: skip
    yield Step("repeat", ("-m", "bench.gpu.repeat", "--scale", full, "--out", str(out / "repeat")), 40)
    # A caching allocator would hide accesses outside a tensor but inside its block.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # racecheck reuses the kernels that memcheck compiled. PyTorch probes CUDA for optional features: ignore API errors.
    for tool, seconds, options in (("memcheck", 45, ("--report-api-errors", "no")), ("racecheck", 30, ())):
        watched = ("--tool", tool, "--error-exitcode", "9", *options, sys.executable, "-m", "bench.gpu.workload")
        yield Step(tool, (*watched, "--scale", small), seconds, uncached, tool="compute-sanitizer")


def _pytest() -> tuple[str, ...]:
    """pytest in parallel if pytest-xdist is installed, since compiling kernels takes most of the time."""
    parallel = ("-n", "8") if find_spec("xdist") else ()
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10", *parallel)


def _bench(module: str, out: Path, seconds: float, options: dict[str, Any]) -> Step:
    """A benchmark with options: values of many, one, or True for none; empty ones are left out."""
    command = ["-m", f"bench.{module}", "--out", str(out)]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        command += [f"--{name}", *map(str, values)] if values or value is True else []
    return Step(out.name, tuple(command), seconds)


# The benchmark of the losses in pieces, so that a failing one does not stop the others, with sizes that fit the time:
# name, share, objectives, rows, widths, providers, seconds per case and provider.
_TOGETHER = ("ntxent", "nscl", "supcon", "clip", "ntxent+supcon")  # targets compare them within one run
_LOSSES = (
    ("losses", 50, ("ntxent",), (512, 4096, 16384, 65536), (128,), (*TORCH, *LIBRARIES), 1),
    ("losses-widths", 35, ("ntxent",), (65536,), (256, 512, 1024), (*TORCH, "Inf-CL"), 1),
    ("losses-compiled", 46, ("ntxent",), (65536,), (128, 256, 512), (*OURS[:1], *COMPILED), 1),
    ("losses-labels", 35, _TOGETHER, (65536,), (128,), (*TORCH, "Inf-CL", "cut-cross-entropy"), 1),
    ("losses-small", 20, ("ntxent", "nscl"), (512,), (64, 256), (*TORCH, "lightly", "authors' formulation"), 1),
    ("losses-large", 45, ("ntxent",), (1048576,), (512,), OURS[:1], 15),
)
# The same of the similarities: the target first, then nearby sizes, slow cases, and two models in one pass:
# name, share, section, sizes, providers, seconds per case and provider.
_PAIR = ("1000x512", "10000x512", "50000x512", "100000x512", "10000x2048")
_SIMILARITY = (
    ("similarity", 80, "models", (), ACCUMULATED, 5),
    ("similarity-pair", 60, "pair", _PAIR, (*ACCUMULATED, *PAIRWISE), 2),
    ("similarity-stream", 25, "stream", (), ACCUMULATED, 5),
    ("similarity-peers", 35, "pair", ("10000x512",), (*ACCUMULATED[:1], *PEERS), 10),
    ("similarity-twins", 50, "twins", (), (), 2),
)


def _similarity(out: Path, rehearse: bool) -> Iterator[Step]:
    for name, share, section, sizes, providers, seconds in _SIMILARITY:
        scale = {"tiny": True} if rehearse else {"seconds": seconds, "sizes": sizes}
        options = {"sections": section, "repeats": 3, "providers": providers}
        yield _bench("similarity", out / name, share, options | scale)


def _training(out: Path, rehearse: bool) -> Iterator[Step]:
    tiny = {"tiny": True, "repeats": 2}
    data = tiny if rehearse else {"seconds": 5, "repeats": 3, "providers": DATA}
    yield _bench("data", out / "data", 90, {"sections": "views"} | data)
    yield _bench("data.decoder", out / "decoder", 25, {"tiny": True} if rehearse else {})
    yield Step("views", (*_pytest(), "tests/data/test_triton_views.py"), 45)
    # Last, since the runs take as many epochs as fit their time.
    yield _bench("training", out / "training", 295, tiny if rehearse else {"seconds": 40})
