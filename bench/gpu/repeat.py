"""Repeatability: equal bits in two runs, two processes and a CUDA graph, and equal numbers under torch.compile."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from bench.gpu.workload import SCALES, Case, cases
from bench.harness.clocks import Graphs, first_line
from bench.harness.command import Command
from bench.harness.records import table, write

Result: TypeAlias = tuple[Tensor, Tensor]  # a loss and a gradient
TOLERANCE = 1e-6  # relative; torch.compile sums the row losses in another order

_DESCRIPTION = """\
Loss and gradient of every kind of kernel, computed again: in this process, in another one, in a captured CUDA graph
(bit for bit), and under torch.compile (to 1e-6). Exit status 1 where one differs.
"""


def digest(result: Result) -> str:
    """A hash of the bits of a result."""
    made = hashlib.sha256()
    for found in result:
        made.update(found.contiguous().cpu().numpy().tobytes())
    return made.hexdigest()


def checks(case: Case, expected: str | None) -> Iterator[tuple[str, bool | None, str]]:
    """Name, outcome (None: not run) and detail of each check of a case.

    Args:
        expected: the digest from another process, or None.
    """
    first = case.run()
    yield "two runs", digest(first) == digest(case.run()), ""
    yield "two processes", None if expected is None else digest(first) == expected, "" if expected else "no digest"
    cuda = case.z.device.type == "cuda"
    yield "CUDA graph", *(_tried(_graph, case, first) if cuda else (None, "needs CUDA"))
    if "fp16" in case.name:  # torch.compile sees the same operator at every precision
        yield "torch.compile", *_tried(_compiled, case, first)


def _tried(check: Callable[[Case, Result], tuple[bool, str]], case: Case, first: Result) -> tuple[bool, str]:
    try:
        return check(case, first)
    except Exception as error:  # go on with the other cases
        if case.z.device.type == "cuda":
            torch.cuda.synchronize()
        return False, first_line(error)


def _graph(case: Case, first: Result) -> tuple[bool, str]:
    graphs = Graphs(case.forward, case.z)
    graphs.result()
    return digest(graphs.result()) == digest(first), ""


def _compiled(case: Case, first: Result) -> tuple[bool, str]:
    # On a CPU Inductor would spend seconds compiling C++; the traced graph is the same.
    backend = "inductor" if case.z.device.type == "cuda" else "aot_eager"
    torch.compiler.reset()
    loss = torch.compile(case.forward, fullgraph=True, backend=backend)()
    found = loss.detach(), torch.autograd.grad(loss, case.z)[0]
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, first, strict=True)]
    return max(errors) <= TOLERANCE, f"loss {errors[0]:.1e}, gradient {errors[1]:.1e}"


def main(argv: list[str] | None = None) -> int:
    """Run all checks and write the results; return 1 if one fails."""
    parser = Command("gpu.repeat", (_DESCRIPTION, "Without --out it prints digests alone."), out=None)
    parser.add_argument("--scale", choices=SCALES, required=True, help="sizes; tiny is for the interpreter")
    args = parser.parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.out is None:
        print(json.dumps({case.name: digest(case.run()) for case in cases(args.scale, device)}))
        return 0
    command = [sys.executable, "-m", "bench.gpu.repeat", "--scale", args.scale]
    other = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if other.returncode:
        print(other.stderr, file=sys.stderr)
    expected = {} if other.returncode else json.loads(other.stdout.splitlines()[-1])
    found, rows = [], []
    for case in cases(args.scale, device):
        for what, passed, detail in checks(case, expected.get(case.name)):
            found.append({"bench": "repeat", "case": case.name, "check": what, "passed": passed, "detail": detail})
            rows.append((case.name, what, "not run" if passed is None else "same" if passed else "FAILED", detail))
            print("{}: {}: {} {}".format(*rows[-1]), flush=True)
        write(args.out, "repeat", found, f"# The same again\n\n{table(('case', 'check', 'outcome', 'detail'), rows)}")
    return int(other.returncode != 0 or any(r["passed"] is False for r in found))


if __name__ == "__main__":
    sys.exit(main())
