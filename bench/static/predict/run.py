"""`python -m bench.static --predict`: predicted times of whole losses, held against the committed ones."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.harness.command import Parser, pattern
from bench.harness.records import Record, json_lines, read, write_file
from bench.static.compile import obstacle
from bench.static.jobs import StaticError
from bench.static.known import RESULTS
from bench.static.predict import report
from bench.static.predict.assumptions import CARDS, MACHINES, Machine
from bench.static.predict.calibration import ARCH, Comparison, compare
from bench.static.predict.calls import BETWEEN, Loss, losses
from bench.static.predict.losses import Model, Predicted
from fastcl.io.outputs import check_output, named_path

_WHOLE = (ARCH, 100)  # architectures with all losses among the committed predictions
_WEAK = [Loss("ntxent", 65536, d, precision) for precision in ("fp16", "fp32") for d in (64, 128, 256, 512)]
_WEAK_BY_HAND = [loss for loss in losses() if loss.by_hand and loss.n == 65536]
_DESCRIPTION = f"""\
Predict the times of whole losses from their compiled code, without a GPU. The exit status is 1 if a kernel or a loss is
predicted to be more than {report.TOLERANCE:.0%} slower than committed in bench/results/static/, until --accept.
"""


def main(argv: Sequence[str]) -> int:
    """Run the model; return the exit status (0 no slower than committed, 1 slower, 2 it could not run)."""
    args = _arguments(argv)
    machine = MACHINES[args.arch]
    try:
        if reason := obstacle():
            raise StaticError(reason)
        only = args.only or default(args.arch)
        wanted = [loss for loss in losses(args.arch) if only.search(loss.name)]
        if not wanted:
            raise StaticError(f"--only: no loss has {only.pattern!r} in its name, such as {next(losses()).name!r}")
        model = Model(args.arch, sys.executable, args.workers)
        found = model.predict(model.record(wanted), machine)
        compared = compare(args.arch, sys.executable, args.workers)
        weak = _sensitivity(model, machine, args.arch) if args.sensitivity else None
    except StaticError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = report.records(found, args.arch, model.triton)
    text = report.markdown(rows, compared, weak)
    print(text, end="")
    if args.json:
        write_file(args.json, json_lines(rows))
    return _judge(rows, text, compared, args.accept, whole=args.only is None)


def default(arch: int) -> re.Pattern[str]:
    """The losses whose predictions are committed for an architecture, by their names."""
    return pattern("" if arch in _WHOLE else f"^ntxent | d=({'|'.join(map(str, BETWEEN))})$")


def committed(arch: int) -> list[Record]:
    """The committed predictions for an architecture; empty if there are none."""
    return read(_path(arch, "json"))


def _path(arch: int, suffix: str) -> Path:
    return RESULTS / f"predicted-sm_{arch}.{suffix}"


def _judge(
    rows: Sequence[Record], text: str, compared: Sequence[Comparison], accept: bool, whole: bool
) -> int:  # fmt: skip
    """Compare with what is committed, or commit; `whole`: the records are of all that are. Returns the exit status."""
    arch = int(rows[0]["arch"].removeprefix("sm_"))
    before = committed(arch)
    failed = [
        f"{one.figure.name}: predicted {one.predicted:.0f} TFLOP/s, out of range" for one in compared if not one.holds
    ]
    if accept:
        merged = {report.key(row): row for row in ([] if whole else before)} | {report.key(row): row for row in rows}
        write_file(_path(arch, "json"), json_lines(merged.values()))
        if whole:
            write_file(_path(arch, "md"), text)
        else:
            print("--accept: of the losses chosen; the table is left as it is", file=sys.stderr)
    else:
        failed += report.slower(rows, before)
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


def _sensitivity(model: Model, machine: Machine, arch: int) -> str:
    """Predictions with each weak assumption changed."""
    recorded = model.record([*_WEAK, *(_WEAK_BY_HAND if arch == ARCH else [])])
    changed: dict[str, list[Predicted]] = {}
    for row in CARDS[arch].table:
        for value in row.weak:
            name = f"{row.name} {value:g} {row.unit}".strip()
            changed[name] = model.predict(recorded, machine.changed({row.name: value}))
            print(f"with {name}: done", file=sys.stderr)
    return report.sensitivity(model.predict(recorded, machine), changed)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("static --predict", [_DESCRIPTION], "workers")
    add = parser.add_argument
    names = [f"sm_{arch}" for arch in sorted(MACHINES)]
    add("--arch", default=f"sm_{ARCH}", choices=names, help="(default: %(default)s)")
    add("--only", type=pattern, metavar="REGEX",
        help=f"only the losses with this in their names, such as '^{next(losses()).name}$' (default: all of "
             f"{' and '.join(f'sm_{arch}' for arch in _WHOLE)}, of others NT-Xent, and {BETWEEN[0]} and {BETWEEN[1]} "
             "columns)")  # fmt: skip
    add("--json", type=named_path, metavar="FILE", help="write the records: losses by pass, and their kernels")
    add("--sensitivity", action="store_true", help="also with each weak assumption changed (minutes)")
    add("--accept", action="store_true", help="commit these predictions: rewrite the files in bench/results/static/")
    args = parser.parse_args(argv)
    with parser.refusing():
        if args.json:
            check_output(args.json, "--json")
    parser.compiling()
    args.arch = int(args.arch.removeprefix("sm_"))
    return args
