"""`python -m bench.gpu.tune --predict`: rows of the launch table chosen by predicted times, without a GPU."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from bench.gpu.tune import Row, axes_of, replaced, write
from bench.harness.command import Parser, pattern
from bench.harness.records import digits
from bench.static.all_cases import cases
from bench.static.compile import obstacle
from bench.static.jobs import Compiled, StaticError, unique
from bench.static.predict.assumptions import MACHINES
from bench.static.predict.calibration import ARCH
from bench.static.predict.calls import Loss, losses
from bench.static.predict.launches import Kernel
from bench.static.predict.losses import Model, Predicted, Recorded
from bench.static.report import findings
from fastcl.kernels.common import launch

FIELDS = ("block_r", "block_s", "block_d", "warps", "stages")
_TILE = (16, 32, 64, 128)  # divisors of the blocks to which working copies are padded
LEGAL = {"block_r": _TILE, "block_s": _TILE, "block_d": (*_TILE, 256), "warps": (1, 2, 4, 8, 16), "stages": range(1, 9)}
KERNELS = {
    "forward": ("fwd", "forward_kernel"), "forward_plain": ("fwd", "forward_kernel"),
    "forward_masked": ("fwd", "forward_kernel"), "forward_joint": ("fwd", "forward_kernel"),
    "backward": ("bwd", "backward_kernel"), "backward_joint": ("bwd", "backward_kernel"),
    "backward_masked": ("bwd", "backward_kernel"), "backward_online": ("bwd", "backward_kernel"),
    "weights": ("bwd", "pair_weights_kernel"), "weights_peers": ("bwd", "pair_weights_kernel"),
    "product": ("bwd", "product_kernel"),
}  # fmt: skip
_LOSSES = {"none": "ntxent fp16", "peers": "supcon fp16", "all": "ntxent fp32"}
_ACCUMULATORS = 192  # registers of a thread that sums and accumulators may take: beyond, everything spills
_DESCRIPTION = """\
Predict the time of losses for every legal tile, number of warps and number of stages of a row of the launch table, and
print the candidates in order. Candidates that spill or have another finding of `bench.static` are left out. --write
puts the fastest one into the table that passes for every launch of the row.
"""


def main(argv: Sequence[str]) -> int:
    """Search; return the exit status (0 done, 1 no candidate passes, 2 it could not run)."""
    args = _arguments(argv)
    try:
        if reason := obstacle():
            raise StaticError(reason)
        row = row_of(args.kernel, args.arch, args.mode, args.width, args.losses)
        search = Search(row, args.width, Model(args.arch, sys.executable, args.workers), args.losses)
        return search.run(axes_to_try(row, args.axes), args.write)
    except StaticError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def row_of(kernel: str, arch: int, mode: str, width: int, losses: Sequence[Loss]) -> Row:
    """The row of the table that losses of so many columns take.

    Raises:
        StaticError: there is none, or not the same for all of them.
    """
    rows = [row for row in launch._rows() if (row["kernel"], row["arch"], row["mode"]) == (kernel, f"sm_{arch}", mode)]
    rows = [row for row in rows if row.get("min_d", 0) <= width <= (row["max_d"] or width)]
    taken = [next((row for row in rows if loss.rows <= (row["max_n"] or loss.rows)), None) for loss in losses]
    if taken[0] is None:
        raise StaticError(f"the table has no row {kernel} {mode} for {width} columns")
    if any(row is not taken[0] for row in taken):
        raise StaticError(f"{losses[0].name} and others take different rows {kernel} {mode}: choose fewer losses")
    return taken[0]


def axes_to_try(row: Row, given: dict[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """The values to try for the fields of a row: those given, else all of `axes_of`.

    Raises:
        StaticError: launches cannot take one of them.
    """
    axes: dict[str, Sequence[int]] = {"block_d": (row["block_d"],), **axes_of(row)}
    for name, values in given.items():
        legal = LEGAL[name]
        if name == "block_d" and row["kernel"] != "product":  # a tile has whole rows, or divides wide copies
            legal = _TILE[:-1] if "block_d" in axes_of(row) else axes[name]
        if wrong := [value for value in values if value not in legal]:
            raise StaticError(
                f"{_option(name)} {' '.join(map(str, wrong))}: must be of {' '.join(map(str, legal))} in this row"
            )
        axes[name] = values
    return axes


def candidates(row: Row, width: int, axes: dict[str, Sequence[int]]) -> Iterator[Row]:
    """All values of a row's fields, its own among them; without those that could only spill."""
    own = tuple(row[name] for name in FIELDS)
    for values in dict.fromkeys([own, *itertools.product(*(axes[name] for name in FIELDS))]):
        config: Row = dict(zip(FIELDS, values, strict=True))
        if values == own or registers(row["kernel"], config, width) <= _ACCUMULATORS:
            yield config


def registers(kernel: str, config: Row, width: int) -> float:
    """Registers of a thread for float32 sums and accumulators."""
    r, s, d = (config[name] for name in FIELDS[:3])
    kernel = kernel.split("_")[0]
    elements = {"forward": 2 * r * s, "weights": r * s, "product": r * d, "backward": r * s + r * width}[kernel]
    return elements / (32 * config["warps"])


class Search:
    """Candidates for a row.

    Args:
        row: a row that launches read.
        losses: the losses whose predicted times are added up.
    """

    def __init__(self, row: Row, width: int, model: Model, losses: Sequence[Loss]) -> None:
        self.row, self.width, self.model, self.losses = row, width, model, losses
        self.run_of, self.kernel = KERNELS[row["kernel"]]
        self.timed: dict[str, Kernel] = {}

    def run(self, axes: dict[str, Sequence[int]], keep: bool) -> int:
        """Print the candidates in order; write the best one if asked to. Returns the exit status."""
        own = {name: self.row[name] for name in (*FIELDS, "programs") if name in self.row}
        first = self._tried(candidates(self.row, self.width, axes))
        # What is compiled says how many programs fit, and that how the work is divided among them.
        counted = [self._counted(config, found) for config, reason, found in first if not reason]
        ranked = self._tried([own, *(config for config in counted if config != own)])
        dropped = [one for one in (*first, *ranked) if one[1]]
        ranked = [(sum(one.ms(self.run_of) for one in found), config, found) for config, no, found in ranked if not no]
        ranked.sort(key=lambda one: one[0])
        for ms, config, found in ranked:
            print(f"{digits(ms)} ms  {describe(config)}  {self._kernels(found)}{'  (the table)' * (config == own)}")
        for config, reason, _ in dropped:
            print(f"dropped  {describe(config)}  {reason}")
        for _, config, _ in ranked:
            if reason := self.everywhere(config):
                print(f"not for every launch: {describe(config)}: {reason}")
                continue
            print(f"best: {describe(config)}")
            if keep:
                self.row.update(config)
                launch.config.cache_clear()
                write(launch._rows(), launch.TABLE)
            return 0
        return 1

    def _tried(self, configs: Iterable[Row]) -> list[tuple[Row, str, list[Predicted]]]:
        """Each candidate with why it is dropped, or with its times."""
        recorded = [(config, self._record(config)) for config in configs]
        self.model.compile()
        return [(config, *self._predict(one)) for config, one in recorded]

    def _counted(self, config: Row, found: Sequence[Predicted]) -> Row:
        """A candidate with the programs that a multiprocessor holds of it, if its launches follow from them."""
        return config | {"programs": self._longest(found)[2]} if divided(self.row) else config

    def _record(self, config: Row) -> list[Recorded]:
        with replaced(self.row, config):
            found = [self.model.recorded(loss) for loss in self.losses]
        return [replace(one, steps=[step for step in one.steps if step.run == self.run_of]) for one in found]

    def _predict(self, recorded: list[Recorded]) -> tuple[str, list[Predicted]]:
        """Why a candidate is dropped, or its times."""
        keys = {step.key for one in recorded for step in one.steps if step.name == self.kernel}
        if reason := self._wrong(keys):
            return reason, []
        try:
            return "", [self.model.one(one, MACHINES[self.model.arch], self.timed) for one in recorded]
        except StaticError as error:
            return str(error), []

    def _wrong(self, keys: set[str]) -> str:
        found = {}
        for key in keys:
            result = self.model.results[key]
            facts = result.facts if isinstance(result, Compiled) else result
            found |= {one.name: one.detail for one in findings(self.model.jobs[key], facts)}
        return "; ".join(f"{name}: {detail}"[:100] for name, detail in found.items())

    def everywhere(self, config: Row) -> str:
        """What is wrong with a launch of any case of `bench.static` that has this row, or is another than by the
        present one; empty if nothing is."""
        jobs = []
        for one in (config, config | {"stages": config["stages"] + 1}, {}):  # the second tells which have the row
            with replaced(self.row, one):
                jobs.append(
                    {self.model.add(job) for job, _ in unique(cases(self.model.arch), self.model.arch).values()}
                )
        mine, others, present = jobs
        for key in (others | present) - mine:
            self.model.jobs.pop(key)
        self.model.compile()
        return self._wrong((mine - others) | (mine - present))

    def _longest(self, found: Sequence[Predicted]) -> tuple[float, int, int, str]:
        """Of the longest launches of the row's kernel: time, registers, programs on a multiprocessor, what binds."""
        parts = []
        for one in found:
            for step, count, prediction in one.launches:
                if step.name == self.kernel:
                    compiled = self.model.results[step.key]
                    assert not isinstance(compiled, str)  # it has been predicted
                    used = compiled.facts.registers
                    parts.append((prediction.ms * count, used, prediction.programs, prediction.binding))
        return max(parts)

    def _kernels(self, found: Sequence[Predicted]) -> str:
        ms, used, programs, binding = self._longest(found)
        return f"{used} registers, {programs} programs/SM, held by {binding}, its longest launches {digits(ms)} ms"


def describe(config: Row) -> str:
    """The fields of a row as the table orders them, and for how many programs a multiprocessor its work is divided."""
    return ",".join(str(config[name]) for name in FIELDS) + (f" x {config['programs']}" if "programs" in config else "")


def divided(row: Row) -> bool:
    """Whether the number of programs that a multiprocessor holds of a row says how its work is divided: launches of
    masked tiles alone take as many programs as the plain ones."""
    if row["kernel"] == "product":
        return True
    return not row["kernel"].startswith("weights") and not row["kernel"].endswith("_masked") and row["mode"] != "peers"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("gpu.tune --predict", [_DESCRIPTION], "workers")
    add = parser.add_argument
    add("kernel", choices=sorted(KERNELS))
    add("mode", choices=sorted(_LOSSES), help="which tiles use split half precision")
    add("width", type=int, help="columns of the rows; beyond 256 the row for any width is searched")
    add("--arch", default=f"sm_{ARCH}", choices=[f"sm_{arch}" for arch in MACHINES], help="(default: %(default)s)")
    add("--losses", type=pattern, metavar="REGEX",
        help="losses by name whose times are added (default: one of 65,536 rows)")  # fmt: skip
    add("--write", action="store_true", help="put the best candidate into the table")
    for name in FIELDS:
        add(_option(name), type=int, nargs="+", metavar="N", help="values to try (default: all)")
    args = parser.parse_args(argv)
    name = args.losses or pattern(f"^{_LOSSES[args.mode]} n=65,536 d={args.width}$")
    args.losses = [loss for loss in losses() if name.search(loss.name)]
    if not args.losses:
        parser.error(f"no loss has {name.pattern!r} in its name; --losses chooses others")
    parser.compiling()
    args.axes = {name: values for name in FIELDS if (values := getattr(args, name)) is not None}
    args.arch = int(args.arch.removeprefix("sm_"))
    return args
