"""Offline tuner: times tile sizes with real losses and writes the launch table of the contrastive kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeAlias

import torch

from bench.harness.clocks import Timer, first_line, interleave, timer_of
from bench.harness.command import Parser
from bench.harness.records import agree, digits, json_lines, write_file
from bench.losses.providers import TOLERANCES, fused, passes
from fastcl.io.outputs import check_output, named_path
from fastcl.kernels.common import launch
from fastcl.rowstats.triton.replay import forget

Row: TypeAlias = dict[str, Any]

# Values tried for each field, one field at a time, starting from the current row; `tune_predicted` tries them all. Rows
# of the working copies come in blocks of 128, which every tile must divide. Columns at a time are a choice where rows
# are processed in pieces, and must divide 64, of which wide copies are multiples; the product's may exceed the rows.
AXES = {"block_r": (32, 64, 128), "block_s": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3, 4)}
WIDE_AXES = AXES | {"block_d": (32, 64)}
PRODUCT_AXES = AXES | {"block_s": (32, 64), "block_d": (64, 128, 256)}
# (half precision, objective) by mode: "none" and "peers" are half precision, "all" has float32 accuracy.
LOSSES = {"none": (True, "ntxent"), "peers": (True, "supcon"), "all": (False, "ntxent")}
# The pass in which each kernel is timed. Kernels for logits of any range rarely run, and those for two models run in no
# loss: their rows are not tuned.
KERNELS = {"forward": "fwd", "backward": "bwd", "weights": "bwd", "product": "bwd"}

_DESCRIPTION = """\
Time candidates for the rows of the launch table that belong to this machine's architecture, each through a forward and
backward pass of a real loss, and write the table with the winners. A candidate that does not compile, or whose loss or
gradient differs, is dropped; one wins that is faster than the present row by more than the spread of the times. The
table is written anew after every row, so that a run that is stopped keeps what it has. --predict chooses a row by
predicted times instead, without a GPU; python -m bench.gpu.tune --predict --help.
"""


@dataclass(frozen=True)
class Plan:
    """Device, sizes, candidates and limits of a tuning run."""

    device: torch.device
    n: int
    wide: int  # width for table rows without a maximum, and the largest width tried
    axes: Callable[[Row], dict[str, tuple[int, ...]]]
    repeats: int
    seconds: float


def rows_of(table: list[Row], sm: int) -> list[Row]:
    """The rows to tune for an architecture."""
    return [row for row in table if row["arch"] == f"sm_{sm}" and row["kernel"] in KERNELS]


def axes_of(row: Row) -> dict[str, tuple[int, ...]]:
    """The values that are tried for a row, by its fields."""
    if row["kernel"] == "product":
        return PRODUCT_AXES
    return WIDE_AXES if row["kernel"].startswith("weights") or not row["max_d"] else AXES


def beats(candidate: list[float], present: list[float]) -> bool:
    """Whether the median time is shorter by more than the larger of the two interquartile ranges."""
    spread = max(upper - lower for lower, _, upper in (quantiles(times, n=4) for times in (candidate, present)))
    return median(present) - median(candidate) > spread


def choose_anew() -> None:
    """Forget what was chosen from the table, because it has changed."""
    launch.config.cache_clear()
    forget()


@contextmanager
def replaced(row: Row, config: Row) -> Iterator[None]:
    """Use another launch config instead of the row's within the block."""
    previous = dict(row)
    row.update(config)
    choose_anew()
    try:
        yield
    finally:
        row.clear()  # of fields too that only the other config has
        row.update(previous)
        choose_anew()


def tune(row: Row, plan: Plan) -> Row:
    """Try every value of every axis in turn, starting from the best config so far; return the winning fields."""
    half, objective = LOSSES[row["mode"]]
    d = min(row["max_d"] or plan.wide, plan.wide)
    z = torch.randn(plan.n, d, generator=torch.Generator().manual_seed(0)).to(plan.device).requires_grad_()
    labels = torch.arange(plan.n // 2, device=plan.device) % 2  # large classes: half of the tiles hold peers
    loss, which, tolerance = partial(fused, half), KERNELS[row["kernel"]], TOLERANCES["fp16" if half else "fp32"]

    def prepared(config: Row) -> tuple[Timer, dict[str, torch.Tensor]]:
        with replaced(row, config):
            result = dict(zip(("loss", "gradient"), passes(loss, z, labels, objective), strict=True))
            timer, _ = timer_of(partial(loss, z, labels, objective), z, capture=True)

        def timed() -> dict:
            with replaced(row, config):
                return timer()

        return timed, result

    best = {key: row[key] for key in WIDE_AXES}
    timer, wanted = prepared(best)
    for axis, value in ((axis, value) for axis, values in plan.axes(row).items() for value in values):
        config = best | {axis: value}
        if config == best:
            continue
        try:
            other, found = prepared(config)
            agree({"present": wanted, "candidate": found}, tolerance)
            times = interleave({"present": timer, "candidate": other}, plan.repeats, plan.seconds)
        except Exception as error:  # compilers report limits with many exception types
            print(f"  {axis}={value}: dropped: {first_line(error)}", flush=True)
            continue
        present, candidate = ([s.ms for s in times[name][which]] for name in ("present", "candidate"))
        won = beats(candidate, present)
        text = f"{digits(median(candidate))} ms against {digits(median(present))} ms"
        print(f"  {axis}={value}: {text}{', kept' if won else ''}", flush=True)
        if won:
            best, timer = config, other
    return best


def write(table: list[Row], path: Path) -> None:
    """Write the table, one row per line."""
    write_file(path, json_lines(table))


def main(argv: list[str] | None = None) -> int:
    """Tune and write the table; return the exit status (0 done, 1 a row fails, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    if "--predict" in argv:
        from bench.gpu.tune_predicted import main as predicted

        return predicted([one for one in argv if one != "--predict"])
    parser = Parser("gpu.tune", [_DESCRIPTION])
    parser.add_argument("--out", type=named_path, metavar="FILE", help="where the table goes (default: where it is)")
    parser.add_argument("--rehearse", action="store_true",
        help="two rows and a candidate for each, tiny, on the CPU under Triton's interpreter; needs --out")  # fmt: skip
    args = parser.parse_args(argv)
    out = args.out or launch.TABLE
    with parser.refusing():
        check_output(out, "--out")
    if args.rehearse and args.out is None:
        parser.error("--rehearse: its times mean nothing and must not replace the table; give --out")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --rehearse runs without one")
    if args.rehearse and os.environ.get("TRITON_INTERPRET") != "1":  # Triton read it at import, so start again
        command = [sys.executable, "-m", "bench.gpu.tune", *argv]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    table = launch._rows()  # the same row objects that launches read
    if args.rehearse:
        plan = Plan(torch.device("cpu"), 64, 16, lambda row: {"block_s": (32,)}, 3, 1)
        rows = rows_of(table, launch.architecture(None))
        rows = [row for row in rows if row["mode"] == "none" and row["max_d"] == 64]
    else:
        plan = Plan(torch.device("cuda"), 16384, 512, axes_of, 15, 2)
        rows = rows_of(table, launch.architecture(torch.cuda.get_device_capability()))
    try:
        return tune_all(rows, table, plan, out)
    except KeyboardInterrupt:
        print("interrupted; the table holds the rows that were finished", file=sys.stderr)
        return 130


def tune_all(rows: list[Row], table: list[Row], plan: Plan, out: Path) -> int:
    """Tune rows of the table, writing it after each; return 1 if a present row fails, else 0."""
    changed = failed = 0
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        try:
            best = tune(row, plan)
        except Exception as error:  # go on with the other rows
            print(f"  the present row fails: {first_line(error)}", file=sys.stderr, flush=True)
            failed += 1
            continue
        changed += any(row[key] != value for key, value in best.items())
        row.update(best)
        choose_anew()
        write(table, out)
    written = f"; the table is in {out}" if failed < len(rows) else ""
    print(f"{changed} of {len(rows)} rows changed, {failed} fail{written}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
