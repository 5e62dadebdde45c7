"""The timetable of a GPU run: each step with its command and its share of the time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10")


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
    yield Step("tests", (*_PYTEST, *_in_processes(), *tests), 75)
    yield from _loss_tables(out, rehearse)
    yield Step("repeat", ("-m", "bench.gpu.repeat", "--scale", full, "--out", str(out / "repeat")), 40)
    # A caching allocator would hide accesses outside a tensor but inside its block.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # racecheck reuses the kernels that memcheck compiled. PyTorch probes CUDA for optional features: ignore API errors.
    for tool, seconds, options in (("memcheck", 45, ("--report-api-errors", "no")), ("racecheck", 30, ())):
        watched = ("--tool", tool, "--error-exitcode", "9", *options, sys.executable, "-m", "bench.gpu.workload")
        yield Step(tool, (*watched, "--scale", small), seconds, uncached, tool="compute-sanitizer")


def _in_processes() -> tuple[str, ...]:
    """Options for parallel tests if pytest-xdist is installed, since compiling kernels takes most of the time."""
    return ("-n", "8") if find_spec("xdist") else ()


def _loss_tables(out: Path, rehearse: bool) -> Iterator[Step]:
    """The benchmark in pieces, so that a failing one does not stop the others, with sizes that fit the time."""
    together = ("ntxent", "nscl", "supcon", "clip", "ntxent+supcon")  # targets compare them within one run
    pieces = (  # name, share, objectives, rows, widths, providers, seconds per case and provider
        ("losses", 55, ("ntxent",), (512, 4096, 16384, 65536), (128,), (*TORCH, *LIBRARIES), 1),
        ("losses-widths", 35, ("ntxent",), (65536,), (256, 512, 1024), (*TORCH, "Inf-CL"), 1),
        ("losses-compiled", 50, ("ntxent",), (65536,), (128, 256, 512), (*OURS[:1], *COMPILED), 1),
        ("losses-labels", 35, together, (65536,), (128,), (*TORCH, "Inf-CL", "cut-cross-entropy"), 1),
        ("losses-small", 20, ("ntxent", "nscl"), (512,), (64, 256), (*TORCH, "lightly", "authors' formulation"), 1),
        ("losses-large", 45, ("ntxent",), (1048576,), (512,), OURS[:1], 15),
    )
    for name, share, objectives, rows, widths, providers, seconds in pieces:
        rows, widths = ((64, 128), (16,)) if rehearse else (rows, widths)
        command = ["-m", "bench.losses", "--out", str(out / name), "--objectives", *objectives]
        command += ["--n", *map(str, rows), "--d", *map(str, widths)]
        command += ["--seconds", "60" if rehearse else str(seconds)]
        command += ["--repeats", "3" if rehearse or len(providers) == 1 else "30"]
        command += ["--providers", *providers]
        yield Step(name, tuple(command), share)


def _similarity(out: Path, rehearse: bool) -> Iterator[Step]:
    """bench.similarity in pieces: the target first, then nearby sizes, slow cases, and two models in one pass."""
    pair = ("1000x512", "10000x512", "50000x512", "100000x512", "10000x2048")
    pieces = (  # name, share, sections, sizes, providers, seconds per case and provider
        ("similarity", 80, ("models",), (), ACCUMULATED, 5),
        ("similarity-pair", 60, ("pair",), pair, (*ACCUMULATED, *PAIRWISE), 2),
        ("similarity-stream", 25, ("stream",), (), ACCUMULATED, 5),
        ("similarity-peers", 35, ("pair",), ("10000x512",), (*ACCUMULATED[:1], *PEERS), 10),
        ("similarity-twins", 50, ("twins",), (), (), 2),
    )
    for name, share, sections, sizes, providers, seconds in pieces:
        command = ["-m", "bench.similarity", "--out", str(out / name), "--sections", *sections, "--repeats", "3"]
        command += ["--providers", *providers] if providers else []
        command += ["--tiny"] if rehearse else ["--seconds", str(seconds)]
        command += ["--sizes", *sizes] if sizes and not rehearse else []
        yield Step(name, tuple(command), share)


def _training(out: Path, rehearse: bool) -> Iterator[Step]:
    def bench(module: str, seconds: float, tiny: tuple[str, ...], *full: str) -> Step:
        name = module.split(".")[-1]
        command = ("-m", module, "--out", str(out / name))
        return Step(name, (*command, *(("--tiny", *tiny) if rehearse else full)), seconds)

    yield bench("bench.data", 90, ("--sections", "views", "--repeats", "2"), "--sections", "views", "--seconds", "5",
                "--repeats", "3", "--providers", *DATA)  # fmt: skip
    yield bench("bench.data.decoder", 25, ())
    yield Step("views", (*_PYTEST, *_in_processes(), "tests/data/test_triton_views.py"), 45)
    # Last, since the runs take as many epochs as fit their time.
    yield bench("bench.training", 295, ("--repeats", "2"), "--seconds", "40")
