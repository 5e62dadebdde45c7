"""The predicted time of one launch: its machine code on a multiprocessor, its programs over all of them."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bench.static import sass
from bench.static.jobs import Compiled
from bench.static.predict import schedule, specialised
from bench.static.predict.assumptions import Machine
from bench.static.predict.multiprocessor import Multiprocessor
from bench.static.predict.paths import Loop, Paths, has_product
from bench.static.predict.pipes import NotModelled, Op, by_pipe, decode, flops
from bench.static.predict.tensor_memory import settled
from bench.static.predict.work import Tiles, Work
from bench.static.report import occupancy
from bench.static.sass import Instruction

OUTSIDE = ("clock", "start", "dram", "gap", "torch", "roof", "roof_mufu")  # no loop depends on them


@dataclass(frozen=True)
class Timing:
    """A tile on a multiprocessor.

    Attributes:
        cycles: of the multiprocessor for a tile, with 1, 2, ... resident programs.
        pipes: cycles for which a tile keeps each pipe busy.
        surplus: operations of tensor cores over what the tile needs.
    """

    cycles: tuple[float, ...]
    pipes: dict[str, float]
    surplus: float = 1.0


@dataclass(frozen=True)
class Prediction:
    """A launch.

    Attributes:
        ms: with the gap to the launch before it.
        pipes: cycles for which each pipe of the mean multiprocessor is busy; "memory" is that of the card.
        cycles: of the whole launch, without the gap.
        programs: resident on a multiprocessor at a time.
    """

    ms: float
    pipes: dict[str, float]
    cycles: float
    programs: int
    surplus: float

    @property
    def binding(self) -> str:
        """The pipe that is busy longest; "latency" if even that one is idle half of the time."""
        busy, name = max(((busy, name) for name, busy in self.pipes.items()), default=(0.0, ""))
        return name if busy >= self.cycles / 2 else "latency"


class Kernel:
    """A compiled kernel under the model.

    Raises:
        NotModelled: its code is not understood.
    """

    def __init__(self, compiled: Compiled, arch: int, machine: Machine) -> None:
        self.facts, self.machine = compiled.facts, machine
        self.inside = machine.changed(dict.fromkeys(OUTSIDE, 1.0))
        self.paths = paths_of(compiled.listing)
        self.tiles: dict[Tiles, Timing] = {}
        self.beyond: dict[tuple[bool, ...], float] = {}  # `_fixed` by the kinds of tiles that a program has
        self.resident = occupancy(compiled.facts, arch)
        if not self.resident:
            raise NotModelled("no program fits on a multiprocessor")

    def tile(self, tile: Tiles, loop: bool, kinds: tuple[str, ...]) -> Timing:
        """The timing of a tile; kinds: all that the kernel has loops for."""
        if tile not in self.tiles and tile.feed:
            cycles, pipes, surplus = specialised.timing(self.paths, tile.feed, tile.flops, self.inside)
            self.tiles[tile] = Timing((cycles,), pipes, surplus)
        elif tile not in self.tiles:
            code = self.turn(self.bodies(kinds)[kinds.index(tile.kind)], tile.flops) if loop else self.straight(tile)
            self.tiles[tile] = self.timing(code, tile.flops)
        return self.tiles[tile]

    def timing(self, code: Sequence[Instruction], needed: float = 0.0) -> Timing:
        """Cycles of some code that runs again and again in every resident program."""
        ops, warps = tuple(decode(code, self.machine)), self.facts.warps
        first, last = (_cycles(ops, count, warps, self.inside) for count in (1, self.resident))
        # Between one and all residents: as if they hid each other's latency until a pipe is busy.
        between = (max(first / count, last) for count in range(2, self.resident))
        cycles = (first, *between, last) if self.resident > 1 else (last,)
        surplus = flops(ops, warps) / needed if needed else 1.0
        return Timing(cycles, by_pipe(ops, warps, self.machine), surplus)

    def turn(self, body: Loop, needed: float) -> list[Instruction]:
        """A tile in a loop over tiles. Loops over columns within it turn until it has the operations it needs; a loop
        in which they were flattened turns as often, and its way is long only once a tile."""
        inner = self.paths.inner(body)
        once = self.paths.walk(body, dict.fromkeys(inner, 1))
        if inner:
            return self.paths.walk(body, dict.fromkeys(inner, self._turns(once, inner, needed)))
        turns = round(needed / flops(decode(once, self.machine), self.facts.warps))
        return self.paths.shortest(body) * (turns - 1) + once if turns > 1 else once

    def _turns(self, once: Sequence[Instruction], inner: Sequence[Loop], needed: float) -> int:
        warps = self.facts.warps
        each = sum(flops(decode(self.paths.instructions(loop), self.machine), warps) for loop in inner)
        return 1 + max(0, round((needed - flops(decode(once, self.machine), warps)) / each))

    def straight(self, tile: Tiles) -> list[Instruction]:
        """A program that has one tile and no loop over tiles: the shortest way with a product, or another."""
        paths, loops = self.paths, self.paths.loops
        with_product = {k for k, block in enumerate(paths.code) if has_product(block.code)}
        try:
            path = paths.through([with_product.__contains__])
            if tile.kind == "masked":
                path = paths.through([(with_product - set(path)).__contains__])
        except ValueError as error:
            raise NotModelled(str(error)) from error
        inner = [loop for loop in loops if has_product(paths.instructions(loop)) and loop & set(path)]
        code = [one for k in path for one in paths.code[k].code]
        turns = self._turns(code, inner, tile.flops) if inner else 1
        again = {max(loop & set(path)): paths.instructions(loop) * (turns - 1) for loop in inner}
        return [one for k in path for one in (*paths.code[k].code, *again.get(k, ()))]

    def bodies(self, kinds: tuple[str, ...]) -> list[Loop]:
        """The loop of each kind of tiles."""
        loops = self.paths.outer()
        if len(loops) < len(kinds):
            raise NotModelled(f"{len(loops)} loops with products for tiles {', '.join(kinds)}")
        if "low" in kinds:
            return loops[: len(kinds)]
        fewest, most = min(loops, key=self.paths.selects), max(loops, key=self.paths.selects)
        return [most if kind == "masked" else fewest for kind in kinds]

    def fixed(self, bodies: Sequence[Loop]) -> float:
        """Cycles of a program outside its loops over tiles, from its start to its end."""
        try:
            path = self.paths.through([body.__contains__ for body in sorted(bodies, key=min)], self.paths.outer())
        except ValueError as error:
            raise NotModelled(str(error)) from error
        inside = frozenset().union(*self.paths.outer())
        code = [one for k in path if k not in inside for one in self.paths.code[k].code]
        return self.latency(code)

    def latency(self, code: Sequence[Instruction]) -> float:
        """Cycles from the start to the end of a program that runs alone and takes this way."""
        alone = Multiprocessor(decode(code, self.machine), 1, self.facts.warps, self.machine)
        return self.machine.start + alone.latency()


@lru_cache(maxsize=512)
def paths_of(listing: str) -> Paths:
    """The code of a listing."""
    return Paths(settled(sass.blocks(gzip.decompress(Path(listing).read_bytes()).decode())))


@lru_cache(maxsize=4096)  # launches often differ in nothing that their loops show
def _cycles(ops: tuple[Op, ...], programs: int, warps: int, machine: Machine) -> float:
    return Multiprocessor(ops, programs, warps, machine).cycles()


def predict(kernel: Kernel, work: Work, memory: int) -> Prediction:
    """The time of a launch.

    Args:
        memory: bytes that it reads or writes at least.
    """
    machine = kernel.machine
    count = round(machine.multiprocessors)
    if work.skipped:
        per, least = (0.0,) * kernel.resident, machine.start + machine.load_latency
        cycles, pipes, surplus = schedule.uniform((work.uniform or (0, ()))[0], 0.0, per, least, count), {}, 1.0
    else:
        cycles, pipes, surplus = _tiles(kernel, work) if work.tiles else _rows(kernel, work)
        pipes["memory"] = memory / machine.dram * machine.clock * 1e-3
        cycles = max(cycles, pipes["memory"])
    return Prediction(cycles / machine.clock * 1e-6 + machine.gap * 1e-3, pipes, cycles, kernel.resident, surplus)


def _rows(kernel: Kernel, work: Work) -> tuple[float, dict[str, float], float]:
    """Programs that run through their code once; of two sides, through that of one, which stands for both."""
    programs = work.uniform[0] if work.uniform else 0
    code = kernel.paths.whole(work.turns)
    pipes = by_pipe(decode(code, kernel.machine), kernel.facts.warps, kernel.machine)
    latency, busiest = kernel.latency(code), max(pipes.values())
    # Residents hide each other's latency, but a round is never shorter than one program alone.
    per = [max(busiest, latency / count) for count in range(1, kernel.resident + 1)]
    count = round(kernel.machine.multiprocessors)
    cycles = schedule.uniform(programs, 1.0, per, 0.0, count)
    return cycles, {name: busy * programs / count for name, busy in pipes.items()}, 1.0


def _tiles(kernel: Kernel, work: Work) -> tuple[float, dict[str, float], float]:
    """Programs that work through tiles."""
    count = round(kernel.machine.multiprocessors)
    programs, each = work.uniform or (1, None)
    rows = [each] if each else work.programs
    used = [k for k in range(len(work.tiles)) if any(row[k] for row in rows)] or [0]
    tiles = [work.tiles[k] for k in used]
    timings = [kernel.tile(tile, work.loop, tuple(one.kind for one in work.tiles)) for tile in tiles]
    fixed = [_fixed(kernel, work, tiles, tuple(row[k] > 0 for k in used)) for row in rows]
    first = timings[0]
    weights = [timing.cycles[-1] / first.cycles[-1] for timing in timings]
    amounts = [sum(row[k] * weight for k, weight in zip(used, weights, strict=True)) for row in rows]
    if each:
        cycles = schedule.uniform(programs, amounts[0], first.cycles, fixed[0], count)
    else:
        cycles = schedule.finish(amounts, first.cycles, fixed, count)
    totals = [programs * sum(row[k] for row in rows) for k in used]
    pipes = {
        name: sum(timing.pipes[name] * total for timing, total in zip(timings, totals, strict=True)) / count
        for name in first.pipes
    }
    return cycles, pipes, first.surplus


def _fixed(kernel: Kernel, work: Work, tiles: Sequence[Tiles], taken: tuple[bool, ...]) -> float:
    """Cycles beyond its tiles of a program that has those of the kinds `taken` of `tiles`."""
    if tiles[0].feed:
        return specialised.fixed(kernel.paths, tiles[0].feed, kernel.machine)
    if not work.loop:
        return kernel.machine.start
    if taken not in kernel.beyond:
        bodies = kernel.bodies(tuple(one.kind for one in tiles))
        wanted = [body for body, one in zip(bodies, taken, strict=True) if one] or bodies
        kernel.beyond[taken] = kernel.fixed(wanted)
    return kernel.beyond[taken]
