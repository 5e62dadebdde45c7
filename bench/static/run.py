"""The static gate: every launch of the table, compiled ahead of time for every architecture."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

from bench.harness.command import Parser, pattern
from bench.harness.records import write_file
from bench.static import known, report
from bench.static.compile import Facts, Job, obstacle
from bench.static.jobs import StaticError, compile_all, unique
from fastcl.io.outputs import check_folder, check_output, named_path
from fastcl.kernels.common.launch import ARCHITECTURES, Launch

CASES = "bench.static.all_cases:cases"

# Maps an architecture to the names and launches of its cases.
Cases: TypeAlias = Callable[[int], Iterable[tuple[str, Iterable[Launch]]]]

_DESCRIPTION = """\
Compile every launch of the table ahead of time, no GPU needed, and look at the machine code: registers, spills, shared
memory against the architecture's limit, programs that a multiprocessor holds, tensor-core instructions, exponentials
per element of a tile, WGMMA that wait for each other, registers that are written while a WGMMA may read them.
"""

_EPILOG = f"""\
findings, each of which makes the exit status 1:
{"".join(f"  {name:<15}{meaning}{chr(10)}" for name, meaning in report.FINDINGS.items())}
Triton 3.5 or newer is needed. The launches are recorded here, with this interpreter's Triton; another one compiles them
with --triton-python or --newest. Compiled kernels are kept in Triton's cache (TRITON_CACHE_DIR), so a second run is
short.

--predict predicts the times of whole losses from their compiled code instead; python -m bench.static --predict --help.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the gate; return the exit status (0 clean, 1 findings, 2 it could not run, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    if "--predict" in argv:
        from bench.static.predict.run import main as predict

        return predict([one for one in argv if one != "--predict"])
    args = _arguments(argv)
    try:
        python = newest(args.newest) if args.newest else args.triton_python
        chosen = known.GATED if args.gate else ((args.arch, args.only.pattern),)
        jobs = find(load_cases(args.cases), chosen)
        facts, triton = (changed if args.gate else compiled)([job for job, _ in jobs], python, args.workers)
    except StaticError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; kernels compiled so far are in Triton's cache", file=sys.stderr)
        return 130
    records = [report.record(job, names, one, triton) for (job, names), one in zip(jobs, facts, strict=True)]
    text = report.report(records, triton, args.only.pattern)
    if args.accept:
        known.save(triton, [job for job, _ in jobs], facts, text)
    if args.json:
        write_file(args.json, json.dumps(records, indent=1) + "\n")
    if args.out:
        write_file(args.out / f"{triton}.md", text)
    print(text, end="")
    return 1 if any(r["findings"] for r in records) else 0


def find(cases: Cases, chosen: Iterable[tuple[Iterable[int], str]]) -> list[tuple[Job, list[str]]]:
    """All different launches of cases, with the names of the cases that need them.

    Args:
        chosen: architectures, and a pattern that must be found in the name of a case.

    Raises:
        StaticError: Triton is too old here, or no case has a launch.
    """
    if reason := obstacle():
        raise StaticError(reason)
    jobs = []
    for architectures, only in chosen:
        for arch in architectures:
            jobs += unique((case for case in cases(arch) if re.search(only, case[0])), arch).values()
    if not jobs:
        raise StaticError("no case has a launch to compile")
    return jobs


def compiled(jobs: list[Job], python: str, workers: int) -> tuple[list[Facts | str], str]:
    """Facts about each job, or why there are none, and the version of the workers' Triton."""
    triton, results = compile_all(jobs, python, workers)
    return [result if isinstance(result, str) else result.facts for result in results], triton


def changed(jobs: list[Job], python: str, workers: int) -> tuple[list[Facts | str], str]:
    """The same; only jobs without committed facts are compiled."""
    import triton

    found: dict[str, Facts | str] = dict(known.load(triton.__version__))
    keys = [known.key(job, triton.__version__) for job in jobs]
    if missing := {name: job for name, job in zip(keys, jobs, strict=True) if name not in found}:
        print(f"{len(missing)} of {len(jobs)} launches differ from those committed", file=sys.stderr)
        found |= dict(zip(missing, compiled(list(missing.values()), python, workers)[0], strict=True))
    return [found[name] for name in keys], triton.__version__


def load_cases(name: str) -> Cases:
    """The function that `module:function` names.

    Raises:
        StaticError: there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise StaticError(f"--cases {name}: {error}") from error


def newest(folder: Path) -> str:
    """The interpreter of a virtual environment with only the newest Triton, which is created if missing.

    Raises:
        StaticError: it cannot be created.
    """
    python = Path(os.path.abspath(folder)) / "bin" / "python"
    print(f"The newest Triton goes to {folder}.", file=sys.stderr)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", "triton"]
    try:
        if not python.exists():
            venv.create(folder, with_pip=True)
        done = subprocess.run(install, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        raise StaticError(f"--newest {folder}: {error}") from error
    if done.returncode:
        raise StaticError(f"--newest {folder}: pip could not install triton, see above")
    return str(python)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("static", (_DESCRIPTION, _EPILOG), "workers")
    names = [f"sm_{sm}" for sm in ARCHITECTURES]
    add = parser.add_argument
    add("--arch", nargs="+", choices=names, default=names, metavar="SM", help=f"of {' '.join(names)} (default: all)")
    add("--only", type=pattern, default=pattern(""), metavar="REGEX", help="only the cases with this in their names")
    add("--gate", action="store_true",
        help="the launches that the tests hold; compile only what has changed since --accept")  # fmt: skip
    add("--accept", action="store_true", help="with --gate: commit what was found to bench/results/static/")
    add("--json", type=named_path, metavar="FILE", help="write the records, one per compiled launch")
    add("--out", type=named_path, metavar="DIR", help="write the report to DIR/<version of Triton>.md")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--triton-python", default=sys.executable, metavar="PATH",
        help="compile with the Triton of another interpreter, which needs nothing else")  # fmt: skip
    where.add_argument("--newest", type=named_path, metavar="DIR",
        help="compile with the newest Triton, installed by pip into a virtual environment in DIR")  # fmt: skip
    add("--cases", default=CASES, metavar="MODULE:FUNCTION",
        help="what lists the launches of an architecture (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    _check(args, parser)
    args.triton_python = os.path.abspath(shutil.which(args.triton_python) or "")
    args.arch = [int(name.removeprefix("sm_")) for name in dict.fromkeys(args.arch)]
    return args


def _check(args: argparse.Namespace, parser: Parser) -> None:
    """End the program with a message if an argument cannot be used."""
    with parser.refusing():
        if args.json:
            check_output(args.json, "--json")
        if args.out:
            check_folder(args.out, "--out")
    options = ("arch", "only", "triton_python", "newest", "cases")
    other = [name for name in options if getattr(args, name) != parser.get_default(name)]
    if args.gate and other:
        parser.error(f"--gate has launches and a compiler of its own, so --{other[0].replace('_', '-')} has no effect")
    if args.accept and not args.gate:
        parser.error("--accept is for --gate")
    parser.compiling()
    if not shutil.which(args.triton_python):
        parser.error(f"--triton-python: {args.triton_python} is no program")
