"""The timetable of a run on a GPU: every step with its command and its share of the time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("losses", "models")
PART_MINUTES = 8.0  # of a card; a rehearsal, on a CPU under Triton's interpreter, has REHEARSAL_MINUTES
REHEARSAL_MINUTES = 20.0

OURS = ("fastcl fp16", "fastcl fp32")
TORCH = (*OURS, "plain PyTorch", "plain PyTorch bf16", "chunked bf16")
SIMILARITY = (
    "fastcl PairAccumulator", "fastcl linear", "fastcl linear (tiles)", "fastcl cosine", "fastcl rbf", "X'Y fp32",
    "X'Y tf32", "dense Gram fp32", "dense Gram fp32 (linear)", "dense Gram fp32 (rbf)", "dense Gram tf32",
    "dense Gram tf32 (linear)", "dense Gram tf32 (cosine)", "torch-cka", "ckatorch", "rsatoolbox",
    "authors' formulation", "drawing the features alone",
)  # fmt: skip
DATA = (
    "fastcl torchvision", "fastcl dali", "fastcl triton", "torchvision v2, Pillow, workers", "DALI, operator seeds",
    "kornia", "drawing the plan alone", "decoding alone, DALI",
)  # fmt: skip
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10")


@dataclass(frozen=True)
class Step:
    """A command of this interpreter or of a tool, its share of the time, and what it adds to the environment.

    `tool`: a program that must be found, and then comes first.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    tool: str | None = None


def plan(out: Path, part: str, rehearse: bool) -> list[Step]:
    """The steps of a part, in order: what later ones rest on comes first, what is slow and least needed last."""
    steps = {"losses": _losses, "models": _models}[part](out, rehearse)
    return [_card(f"card, {part}"), *steps, _card(f"card afterwards, {part}")]


def gpu_tests() -> list[str]:
    """The files that hold a test marked gpu; others may import what is not there."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{path.name}" for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]


def _card(name: str) -> Step:
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    return Step(name, (query, "--format=csv"), 2, tool="nvidia-smi")


def _losses(out: Path, rehearse: bool) -> Iterator[Step]:
    # In a rehearsal the tests marked gpu skip themselves, and their tiny doubles run in their place.
    tests = ("tests/test_gpu.py",) if rehearse else ("-m", "gpu", *gpu_tests())
    tiny, full, small = ("tiny",) * 3 if rehearse else ("tiny", "full", "small")
    yield Step("ceilings", ("-m", "bench.ceilings", "--out", str(out / "ceilings"), "--repeats", "10"), 25)
    yield Step("tests", (*_PYTEST, *tests), 90)
    yield from _loss_tables(out, rehearse)
    repeat = ("-m", "bench.repeat", "--scale", full, "--out", str(out / "repeat"))
    yield Step("repeat", repeat, 40)
    workload = ("-m", "bench.workload", "--scale", small)
    yield Step("workload", workload, 30)  # compiles what the sanitizers then find compiled
    # A caching allocator would hide accesses that leave their tensor but not its block.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck"):
        watched = ("--tool", tool, "--error-exitcode", "9", sys.executable, *workload)
        yield Step(tool, watched, 30, uncached, tool="compute-sanitizer")


def _loss_tables(out: Path, rehearse: bool) -> Iterator[Step]:
    """The benchmark in pieces, so that one that fails leaves the others; sizes by what the time allows."""
    fewer, together = (*OURS, "chunked bf16", "Inf-CL", "plain PyTorch"), ("nscl", "supcon", "clip", "ntxent+supcon")
    pieces = (  # name, share, objectives, rows, widths, providers, seconds a case and provider
        ("losses", 65, ("ntxent",), (512, 4096, 16384, 65536), (128,), (), 1),
        ("losses-widths", 50, ("ntxent",), (65536,), (256, 512, 1024), (*TORCH, "flex_attention bf16", "Inf-CL"), 1),
        ("losses-labels", 40, together, (65536,), (128,), fewer, 1),
        ("losses-small", 25, ("ntxent", "nscl"), (512,), (64, 256), (*TORCH, "lightly", "authors' formulation"), 1),
        ("losses-large", 36, ("ntxent",), (262144, 1048576), (512,), ("fastcl fp16",), 15),
    )
    for name, share, objectives, rows, widths, providers, seconds in pieces:
        rows, widths = ((64, 128), (16,)) if rehearse else (rows, widths)
        command = ["-m", "bench.losses", "--out", str(out / name), "--objectives", *objectives]
        command += ["--n", *map(str, rows), "--d", *map(str, widths)]
        command += ["--seconds", "60" if rehearse else str(seconds)]
        command += ["--repeats", "3" if rehearse or len(providers) == 1 else "30"]
        command += ["--providers", *providers] if providers else []
        yield Step(name, tuple(command), share)


def _models(out: Path, rehearse: bool) -> Iterator[Step]:
    def bench(name: str, seconds: float, tiny: tuple[str, ...], *full: str) -> Step:
        command = ("-m", f"bench.{name}", "--out", str(out / name))
        return Step(name, (*command, *(("--tiny", *tiny) if rehearse else full)), seconds)

    sizes = ("1000x512", "10000x512", "50000x512", "100000x512", "10000x2048", "1000000x128")
    # The pair statistics: their targets, the sizes around them, and what can run beside them in the time.
    yield bench("similarity", 100, ("--repeats", "3"), "--sections", "models", "pair", "stream", "twins", "--sizes",
                *sizes, "--seconds", "2", "--repeats", "5", "--providers", *SIMILARITY)  # fmt: skip
    yield bench("data", 70, ("--sections", "views", "--repeats", "2"), "--sections", "views", "--seconds", "2",
                "--repeats", "5", "--providers", *DATA)  # fmt: skip
    yield bench("decoder", 25, ())
    yield Step("views", (*_PYTEST, "tests/test_triton_views.py"), 45)
    # Last: the runs take as many epochs as their time allows.
    yield bench("training", 220, ("--repeats", "2"), "--seconds", "50")
