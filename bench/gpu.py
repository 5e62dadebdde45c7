"""Everything that needs a GPU, with one command: tests, ceilings, repeatability, benchmarks, sanitizers."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter

import torch

from bench.records import machine, table

ROOT = Path(__file__).resolve().parents[1]
GRACE = 15  # seconds that a step has to end itself after an interrupt: the benchmarks write what they have

_DESCRIPTION = """\
Everything that needs a GPU, in parts that take 8 minutes each at most:

  kernels     the GPU tests, the ceilings of the card, bench.losses
  statistics  bench.similarity, bench.data, bench.training
  proofs      the same bits in two runs, of DALI's and Triton's views whatever the batch, compute-sanitizer

Each step has its own time limit; needs torch, triton, numpy and pytest, and uses what else is installed. The real
images are read from FASTCL_DATA. DIR/gpu.json and DIR/gpu.md list the steps and are rewritten after each; DIR/NAME.log
is what a step printed, DIR/NAME/ what it measured. A step that fails does not keep the next from running; the exit
status is 1 if any failed or ran out of time.
"""
PARTS = ("kernels", "statistics", "proofs")
PART_MINUTES = 8.0

OURS = ("fastcl fp16", "fastcl fp32")
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
TORCH = (*OURS, "plain PyTorch", "plain PyTorch bf16", "chunked bf16")


@dataclass(frozen=True)
class Step:
    """A command of this interpreter or of a tool, its limit in seconds, and what it adds to the environment."""

    name: str
    command: tuple[str, ...]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    tool: str | None = None  # a program that must be found, and then comes first


@dataclass
class Outcome:
    """What became of a step: "ok", "failed", "timed out" or "not run"."""

    step: str
    command: str
    status: str
    reason: str | None
    exit_code: int | None
    seconds: float
    limit: float


def plan(out: Path, part: str, rehearse: bool) -> list[Step]:
    """The steps of a part, in order: what later ones rest on comes first, what is slow and least needed last."""
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    cards = (Step(name, (query, "--format=csv"), 10, tool="nvidia-smi") for name in ("card", "card afterwards"))
    before, after = (replace(step, name=f"{step.name}, {part}") for step in cards)
    steps = {"kernels": _kernels, "statistics": _statistics, "proofs": _proofs}[part](out, rehearse)
    # The interpreter is slow.
    return [before, *(replace(step, limit=5 * step.limit) if rehearse else step for step in steps), after]


def _kernels(out: Path, rehearse: bool) -> list[Step]:
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10")
    # In a rehearsal the tests marked gpu skip themselves, and their tiny doubles run in their place.
    tests = ("tests/test_gpu.py",) if rehearse else ("-m", "gpu", *gpu_tests())
    return [
        Step("ceilings", ("-m", "bench.ceilings", "--out", str(out / "ceilings"), "--repeats", "10"), 40),
        Step("tests", (*pytest, *tests), 120),
        *_losses(out, rehearse),
    ]


def _statistics(out: Path, rehearse: bool) -> list[Step]:
    return [_similarity(out, rehearse), _training(out, rehearse), _data(out, rehearse)]


def _proofs(out: Path, rehearse: bool) -> list[Step]:
    scale = "tiny" if rehearse else "small"
    workload = ("-m", "bench.workload", "--scale", scale)
    # A caching allocator would hide accesses that leave their tensor but not its block.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    repeat = ("-m", "bench.repeat", "--scale", "tiny" if rehearse else "full", "--out", str(out / "repeat"))
    sanitizers = [
        Step(tool, ("--tool", tool, "--error-exitcode", "9", sys.executable, *workload), 120, uncached,
             tool="compute-sanitizer")
        for tool in ("memcheck", "racecheck")
    ]  # fmt: skip
    decoder = ("-m", "bench.decoder", "--out", str(out / "decoder"), *(("--tiny",) if rehearse else ()))
    views = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_triton_views.py")
    steps = Step("workload", workload, 70), Step("repeat", repeat, 60), Step("decoder", decoder, 35)
    return [*steps, Step("views", views, 55), *sanitizers]


def gpu_tests() -> list[str]:
    """The files that hold a test marked gpu; others may import what is not there."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{path.name}" for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]


def _losses(out: Path, rehearse: bool) -> list[Step]:
    """The benchmark in parts, so that one that fails leaves the others; sizes by what a few minutes allow."""
    fewer, together = (*OURS, "chunked bf16", "Inf-CL", "plain PyTorch"), ("nscl", "supcon", "clip", "ntxent+supcon")
    parts = (  # name, seconds, objectives, rows, widths, providers, seconds a case and provider
        ("losses", 90, ("ntxent",), (512, 4096, 16384, 65536), (128,), (), 1),
        ("losses-widths", 60, ("ntxent",), (65536,), (256, 512, 1024), (*TORCH, "flex_attention bf16", "Inf-CL"), 1),
        ("losses-labels", 50, together, (65536,), (128,), fewer, 1),
        ("losses-small", 30, ("ntxent", "nscl"), (512,), (64, 256), (*TORCH, "lightly", "authors' formulation"), 1),
        ("losses-large", 60, ("ntxent",), (262144, 1048576), (512,), ("fastcl fp16",), 15),
    )
    steps = []
    for name, limit, objectives, rows, widths, providers, seconds in parts:
        rows, widths = ((64,), (16,)) if rehearse else (rows, widths)
        command = ["-m", "bench.losses", "--out", str(out / name), "--objectives", *objectives]
        command += ["--n", *map(str, rows), "--d", *map(str, widths)]
        command += ["--seconds", "60" if rehearse else str(seconds)]
        command += ["--repeats", "3" if rehearse or len(providers) == 1 else "30"]
        command += ["--providers", *providers] if providers else []
        steps.append(Step(name, tuple(command), limit))
    return steps


def _similarity(out: Path, rehearse: bool) -> Step:
    """The pair statistics: their targets, the sizes around them, and what can run beside them in the time."""
    command = ["-m", "bench.similarity", "--out", str(out / "similarity")]
    if rehearse:
        return Step("similarity", (*command, "--tiny", "--repeats", "3"), 90)
    command += ["--sections", "models", "pair", "stream", "twins"]  # in this order
    command += ["--sizes", "1000x512", "10000x512", "50000x512", "100000x512", "10000x2048", "1000000x128"]
    command += ["--seconds", "2", "--repeats", "5", "--providers", *SIMILARITY]
    return Step("similarity", tuple(command), 120)


def _training(out: Path, rehearse: bool) -> Step:
    """The trainer: what a step is made of, two real runs, bfloat16 against float32."""
    command = ("-m", "bench.training", "--out", str(out / "training"))
    if rehearse:
        return Step("training", (*command, "--tiny", "--repeats", "2"), 60)
    return Step("training", (*command, "--seconds", "60"), 250)


def _data(out: Path, rehearse: bool) -> Step:
    """Decoding and two views: the targets and what bounds them."""
    command = ("-m", "bench.data", "--out", str(out / "data"), "--sections", "views")
    if rehearse:
        return Step("data", (*command, "--tiny", "--repeats", "2"), 60)
    sizes = ("--sizes", "32", "96", "224", "--seconds", "2", "--repeats", "5")
    return Step("data", (*command, *sizes, "--providers", *DATA), 85)


def find_tool(name: str) -> str | None:
    """A program on PATH, or in CUDA_HOME's folders for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [os.path.join(home, part) for part in ("bin", "compute-sanitizer")] if home else []
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def run_step(step: Step, out: Path, left: float, environment: dict[str, str]) -> Outcome:
    """Run a step to its end or its limit.

    Args:
        left: seconds that the whole run still has.
        environment: of all steps.
    """
    tool = find_tool(step.tool) if step.tool else sys.executable
    parts = ("python" if part == sys.executable else part for part in step.command)
    shown = _without_paths(shlex.join((step.tool or "python", *parts)), out)
    limit = min(step.limit, left)
    if tool is None:
        reason = f"{step.tool} is neither on PATH nor under CUDA_HOME"
        return Outcome(step.name, shown, "not run", reason, None, 0, limit)
    if limit <= 0:
        return Outcome(step.name, shown, "not run", "the time was spent", None, 0, limit)
    began = perf_counter()
    with (out / f"{step.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            (tool, *step.command), cwd=ROOT, env=environment | step.environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code, status, reason = process.wait(limit), "ok", None
        except subprocess.TimeoutExpired:
            code, status, reason = _stop(process), "timed out", f"more than {limit:.0f} s"
        except KeyboardInterrupt:
            _stop(process)
            raise
    if status == "ok" and code != 0:
        status, reason = "failed", f"exit status {code}"
    return Outcome(step.name, shown, status, reason, code, round(perf_counter() - began, 1), limit)


def _stop(process: subprocess.Popen) -> int:
    """Interrupt a step with all that it started, and kill what is left after the grace."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            return process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    return process.wait()


def report(outcomes: Sequence[Outcome], facts: dict, out: Path) -> None:
    """Write gpu.json and gpu.md."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rows = [(o.step, o.status, f"{o.seconds:.0f}", o.reason or "", f"`{o.command}`") for o in outcomes]
    text = f"# GPU run\n\n{facts['device']}; {versions}; {facts['date']}\n\n"
    text += table(("step", "status", "seconds", "reason", "command"), rows)
    for o in outcomes:
        log = out / f"{o.step}.log"
        if o.status in ("failed", "timed out") and log.exists():
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
            text += f"\n## {o.step}\n\n```\n" + _without_paths("\n".join(tail), out) + "\n```\n"
    steps = json.dumps({**facts, "steps": [asdict(o) for o in outcomes]}, indent=1)
    for name, content in (("gpu.json", steps), ("gpu.md", text)):
        part = out / f"{name}.part"
        part.write_text(content + "\n", encoding="utf-8")
        part.replace(out / name)


def _without_paths(text: str, out: Path) -> str:
    """Text that reads the same wherever the run was."""
    for path, name in ((str(out), "DIR"), (sys.prefix, "PREFIX"), (str(ROOT), ".")):
        text = text.replace(path, name)
    return text


def main(argv: list[str] | None = None) -> int:
    """Run all steps; returns the exit status (0 all that ran are ok, 1 one failed, 130 interrupted)."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of logs and results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
        help=f"default: {' '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--minutes", type=float, metavar="M",
        help=f"no step begins after that, and none runs beyond it (default: {PART_MINUTES:g} a part; a rehearsal: 40)")
    parser.add_argument("--rehearse", action="store_true",
        help="the same steps, tiny, on the CPU under Triton's interpreter")  # fmt: skip
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --rehearse runs without one")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if args.rehearse:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment.pop("TRITON_INTERPRET", None)
    minutes = args.minutes or (40 if args.rehearse else PART_MINUTES * len(args.parts))
    facts = machine(torch.device("cpu" if args.rehearse else "cuda"))
    began, outcomes = perf_counter(), []
    try:
        for step in (step for part in args.parts for step in plan(out, part, args.rehearse)):
            print(f"{step.name} ...", end=" ", flush=True)
            outcomes.append(run_step(step, out, 60 * minutes - (perf_counter() - began), environment))
            last = outcomes[-1]
            print(f"{last.status}, {last.seconds:.0f} s{f': {last.reason}' if last.reason else ''}", flush=True)
            report(outcomes, facts, out)
    except KeyboardInterrupt:
        print("interrupted; the files hold the steps that were finished", file=sys.stderr)
        return 130
    print(f"{perf_counter() - began:.0f} s; results are in {args.out}")
    return int(any(o.status in ("failed", "timed out") for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
