"""Everything that needs a GPU, with one command: tests, ceilings, benchmarks, repeatability, sanitizers."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import TextIO

import torch

from bench.gpu import predicted
from bench.gpu.plan import PART_MINUTES, PARTS, REHEARSAL_MINUTES, Step, plan
from bench.harness.command import ROOT, Command, positive
from bench.harness.markdown import machine_line
from bench.harness.records import machine, table, write_file

GRACE = 15  # seconds for a step to exit after an interrupt, so that benchmarks can write their results

_DESCRIPTION = f"""\
What needs a GPU, planned to take under {PART_MINUTES:g} minutes a part:

  losses      the GPU tests (values and gradients against float64), the card's ceilings, the kernels by hand beside
              those in Triton and whether to switch them on, bench.losses with its peers, the same bits in two runs, two
              processes and a CUDA graph, compute-sanitizer's memcheck and racecheck
  similarity  bench.similarity: four models at once, pairs, streams, other libraries, twin_stats
  training    bench.data, DALI's decoder, the views of the Triton renderer, bench.training

Every step has its place in a timetable and is interrupted when that is over; what a step leaves of its time goes to the
next ones. Needs torch, triton, numpy and pytest, and uses what else is installed. The real images are read from
FASTCL_DATA. DIR/gpu.json and DIR/gpu.md list the steps and are rewritten after each; DIR/NAME.log is what a step
printed, DIR/NAME/ what it measured. Losses that `bench.static --predict` predicts stand beside their predictions, in
DIR/gpu.md and on the screen. A step that fails does not keep the next from running; the exit status is 1 if any
failed or ran out of time. `python -m bench.readme` makes the tables of the documentation from DIR = bench/results/gpu.
"""


@dataclass
class Outcome:
    """The outcome of a step; its status is "ok", "failed", "timed out", "interrupted" or "not run"."""

    step: str
    command: str
    status: str
    reason: str | None
    exit_code: int | None
    seconds: float
    limit: float


def find_tool(name: str) -> str | None:
    """Path of a program: on PATH, or in bin or compute-sanitizer of CUDA_HOME (default: /usr/local/cuda)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = [os.path.join(home, part) for part in ("bin", "compute-sanitizer")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def run_step(step: Step, out: Path, limit: float, environment: dict[str, str]) -> Outcome:
    """Run a step to its end or its time limit.

    Args:
        limit: seconds.
        environment: environment variables of all steps.
    """
    tool = find_tool(step.tool) if step.tool else sys.executable
    parts = ("python" if part == sys.executable else part for part in step.command)
    shown = _without_paths(shlex.join((step.tool or "python", *parts)), out)
    if tool is None:
        reason = f"{step.tool} is neither on PATH nor under CUDA_HOME"
        return Outcome(step.name, shown, "not run", reason, None, 0, limit)
    if limit <= 0:
        return Outcome(step.name, shown, "timed out", "no time was left", None, 0, limit)
    began, variables = perf_counter(), environment | step.environment
    with _new_log(out / f"{step.name}.log") as log:
        process = subprocess.Popen((tool, *step.command), cwd=ROOT, env=variables, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            code = process.wait(limit)
            status, reason = ("failed", f"exit status {code}") if code else ("ok", None)
        except subprocess.TimeoutExpired:
            code, status, reason = _stop(process), "timed out", f"more than {limit:.0f} s"
        except KeyboardInterrupt:
            code, status, reason = _stop(process), "interrupted", None
    return Outcome(step.name, shown, status, reason, code, round(perf_counter() - began, 1), limit)


def _new_log(path: Path) -> TextIO:
    """A new empty log file. An old one is removed first, so that the output never follows a link of that name."""
    try:
        path.unlink(missing_ok=True)
        return path.open("x", encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"error: {path} cannot be written ({error.strerror})") from error


def _stop(process: subprocess.Popen) -> int:
    """Interrupt a step and its child processes; kill them after the grace period or at a second interrupt."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:  # includes the signal: a second interrupt may arrive there
            os.killpg(process.pid, sign)
            return process.wait(GRACE)
        except ProcessLookupError:
            break
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue
    return process.wait()


def report(outcomes: Sequence[Outcome], facts: dict, out: Path) -> None:
    """Write gpu.json and gpu.md."""
    rows = [(o.step, o.status, f"{o.seconds:.0f}", o.reason or "", f"`{o.command}`") for o in outcomes]
    text = f"# GPU run\n\n{machine_line(facts)}\n\n"
    text += table(("step", "status", "seconds", "reason", "command"), rows)
    for o in outcomes:
        log = out / f"{o.step}.log"
        if o.status in ("failed", "timed out", "interrupted") and log.exists():
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
            text += f"\n## {o.step}\n\n```\n" + _without_paths("\n".join(tail), out) + "\n```\n"
    text += predicted.section(out)
    write_file(out / "gpu.json", json.dumps({**facts, "steps": [asdict(o) for o in outcomes]}, indent=1) + "\n")
    write_file(out / "gpu.md", text + "\n")


def _without_paths(text: str, out: Path) -> str:
    """Replace paths of this machine, so that the text is the same wherever the run was."""
    for path, name in ((str(out), "DIR"), (sys.prefix, "PREFIX"), (str(ROOT), ".")):
        text = text.replace(path, name)
    return text


def _run_part(steps: Sequence[Step], out: Path, minutes: float, environment: dict[str, str]) -> Iterator[Outcome]:
    """Run steps by the timetable of their shares, scaled to `minutes`; print a line for each."""
    ends = accumulate(minutes / PART_MINUTES * step.seconds for step in steps)
    began = perf_counter()
    for step, end in zip(steps, ends, strict=True):
        print(f"{step.name} ...", end=" ", flush=True)
        outcome = run_step(step, out, end - (perf_counter() - began), environment)
        print(f"{outcome.status}, {outcome.seconds:.0f} s{f': {outcome.reason}' if outcome.reason else ''}", flush=True)
        yield outcome


def main(argv: list[str] | None = None) -> int:
    """Run the parts; return the exit status (0 all steps that ran are ok, 1 one failed, 130 interrupted)."""
    parser = Command("gpu", [_DESCRIPTION])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:1], metavar="PART",
        help=f"of {', '.join(PARTS)}, in the order given (default: {PARTS[0]})")  # fmt: skip
    parser.add_argument("--minutes", type=positive, metavar="M", help=f"stretch the timetables by M / {PART_MINUTES:g} "
        f"(default: {PART_MINUTES:g}; a rehearsal: {REHEARSAL_MINUTES:g})")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true",
        help="the same steps, tiny, on the CPU under Triton's interpreter")  # fmt: skip
    args = parser.parse(argv)
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --rehearse runs without one")
    out, minutes = args.out.resolve(), args.minutes or (REHEARSAL_MINUTES if args.rehearse else PART_MINUTES)
    out.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if args.rehearse else {}
    facts = machine(torch.device("cpu" if args.rehearse else "cuda"))
    began, outcomes = perf_counter(), []
    report(outcomes, facts, out)  # replaces the report of an older run
    try:
        for part in dict.fromkeys(args.parts):
            for outcome in _run_part(plan(out, part, args.rehearse), out, minutes, environment):
                outcomes.append(outcome)
                report(outcomes, facts, out)
                if outcome.status == "interrupted":
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        print("interrupted; the files hold the steps up to this one", file=sys.stderr)
        return 130
    print(predicted.section(out), end="")
    print(f"{perf_counter() - began:.0f} s; results are in {args.out}")
    return int(any(o.status in ("failed", "timed out") for o in outcomes))
