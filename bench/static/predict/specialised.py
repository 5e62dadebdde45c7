"""Warp-specialised kernels: one warp copies tiles into a ring of stages by TMA, consumers of one warpgroup take them.

The consumers' loops are read from the machine code, each its own. The producer's is so short that only its copies
count; they keep the order of the ring, stage by stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.static.predict.assumptions import Machine
from bench.static.predict.multiprocessor import Multiprocessor, Warp
from bench.static.predict.paths import Loop, Paths
from bench.static.predict.pipes import WARPGROUP, Kind, NotModelled, Op, by_pipe, decode, flops
from bench.static.sass import Control, Instruction, count

if TYPE_CHECKING:
    from bench.static.predict.work import Feed

_PIECE = 1024  # bytes of a copy that are written to shared memory at once
_SYNCS = (
    ("SYNCS.PHASECHK", Kind.FULL_WAIT), ("SYNCS.ARRIVE", Kind.RELEASE), ("SYNCS.EXCH", Kind.FREE),
)  # fmt: skip
_WAIT = r"SYNCS\.PHASECHK"


class Specialised(Multiprocessor):
    """A program of consumers, each in its loop, and a producer.

    Args:
        loops: operations of a turn of each consumer.
    """

    def __init__(self, loops: Sequence[Sequence[Op]], feed: Feed, machine: Machine) -> None:
        producer = [Op(Kind.EMPTY_WAIT, Control(10)), Op(Kind.FEED, Control(10), feed.size)] * feed.steps
        super().__init__((), 1, WARPGROUP * (len(loops) + 1), machine)
        for warp, ops in zip(self.warps, (*loops, producer), strict=True):
            warp.ops = ops
        self.feed = feed
        self.places = {id(warp): k for k, warp in enumerate(self.warps)}
        self.filled = [0] * feed.stages  # copies that have arrived, by stage
        self.released = [0] * feed.stages  # times that a consumer has released it
        self.begun = [0] * len(self.warps)  # turns of the ring for which a warp has waited
        self.ended = [0] * len(self.warps)  # turns whose stage it has filled or released

    def cycles(self) -> float:
        """Cycles of the multiprocessor for a tile."""
        self._run(self.turns)
        rates = [self._rate(warp) for warp in self.warps[:-1]]
        return 1 / (sum(rates) / (len(rates) if self.feed.together else 1))

    def _turn(self, warp: Warp, turns: Sequence[int]) -> int:
        """The turn of the ring of a warp that has `turns` behind it."""
        place = self.places[id(warp)]
        if warp is self.warps[-1] or self.feed.together:
            return turns[place]
        return place + turns[place] * (len(self.warps) - 1)

    def _ready(self, warp: Warp) -> float:
        kind, (again, stage) = warp.ops[warp.position].kind, divmod(self._turn(warp, self.begun), self.feed.stages)
        if kind is Kind.FULL_WAIT:
            copied = not self.feed.leads or warp is not self.warps[0] or self.ended[-1] > self._due()
            return 0.0 if self.filled[stage] > again and copied else math.inf
        if kind is Kind.EMPTY_WAIT:
            if self.feed.leads and self.begun[-1] > self._due():
                return math.inf
            needed = (len(self.warps) - 1 if self.feed.together else 1) * again
            return 0.0 if self.released[stage] >= needed else math.inf
        return super()._ready(warp)

    def _due(self) -> int:
        """The last copy that the first consumer, if it is the one that copies, makes before it goes on."""
        first = self.warps[0]
        waits = first.ops[first.position].kind is Kind.FULL_WAIT
        return self.begun[0] + self.feed.stages - (1 if waits else 2)

    def _take(self, warp: Warp, op: Op, t: float) -> tuple[float, float]:
        place = self.places[id(warp)]
        stage = self._turn(warp, self.ended) % self.feed.stages
        if op.kind in (Kind.FULL_WAIT, Kind.EMPTY_WAIT):
            self.begun[place] += 1
            return t, t
        self.ended[place] += op.kind in (Kind.RELEASE, Kind.FEED)
        if op.kind is Kind.RELEASE:
            self.released[stage] += 1
        elif op.kind is Kind.FEED:
            pieces = max(1, round(op.amount / _PIECE))
            size = op.amount / pieces
            for left in reversed(range(pieces)):  # with the last one the stage is full
                self.l2 = max(t, self.l2) + size / self.machine.l2
                self._later(self.l2 + self.machine.load_latency, Kind.FEED, warp, -1 if left else stage, size)
        else:
            return super()._take(warp, op, t)
        return t, t

    def _arrives(self, time: float, stage: int, size: float) -> None:
        self.shared = max(time, self.shared) + size / self.machine.shared
        if stage >= 0:
            self.filled[stage] += 1


def decoded(code: Sequence[Instruction], machine: Machine) -> list[Op]:
    """As `decode`, with the instructions on barriers of the ring."""
    found: list[Op] = []
    for one in code:
        kinds = [kind for opcode, kind in _SYNCS if one.opcode.startswith(opcode)]
        found += [Op(kinds[0], one.control)] if kinds else decode([one], machine)
    return found


def consumers(paths: Paths, number: int) -> list[Loop]:
    """The loop of each consumer over whole tiles, without the code that repeats a wait."""
    loops = [body for body in paths.loops if _has(paths, body, r"HGMMA") and _has(paths, body, r"MUFU\.EX2")]
    inner = [body for body in loops if not any(other < body for other in loops)]
    if not inner or len(inner) % number:
        raise NotModelled(f"{len(inner)} loops with products for {number} consumers")
    each = len(inner) // number  # over whole blocks and over padded ones
    found = [min(inner[k : k + each], key=paths.selects) for k in range(0, len(inner), each)]
    return [_straight(paths, body) for body in found]


def _has(paths: Paths, body: Loop, opcode: str) -> bool:
    return bool(count([paths.code[k] for k in body], opcode))


def _straight(paths: Paths, body: Loop) -> Loop:
    last = max(k for k in body if min(body) in paths.code[k].following)
    return frozenset(k for k in body if k <= last)


def _tile(paths: Paths, body: Loop, feed: Feed) -> list[Instruction]:
    """A tile of a consumer. A loop over columns within it turns until it has taken all its copies."""
    inner = [
        loop for loop in (_straight(paths, one) for one in paths.loops if _has(paths, one, r"HGMMA")) if loop < body
    ]
    if not inner:
        return paths.walk(body, {})
    waits = [count([paths.code[k] for k in loop], _WAIT) for loop in inner]
    if len(inner) != 1 or feed.steps % waits[0]:
        raise NotModelled(f"loops with {waits} waits for {feed.steps} copies")
    return paths.walk(body, {inner[0]: feed.steps // waits[0]})


def timing(paths: Paths, feed: Feed, needed: float, machine: Machine) -> tuple[float, dict[str, float], float]:
    """Cycles of a tile, cycles for which it keeps each pipe busy, operations over those needed."""
    bodies = consumers(paths, feed.consumers)
    if feed.leads:  # the first consumer's copies are those of the producer: without them it is as the others
        bodies = [bodies[-1]] * len(bodies)
    loops = [decoded(_tile(paths, body, feed), machine) for body in bodies]
    share = 1 if feed.together else 1 / len(loops)  # of a turn of all consumers
    busy = [by_pipe(ops, WARPGROUP, machine) for ops in loops]
    pipes = {name: share * sum(one[name] for one in busy) for name in busy[0]}
    pipes["shared"] += feed.steps * feed.size / machine.shared
    pipes["l2"] += feed.steps * feed.size / machine.l2
    surplus = share * sum(flops(ops, WARPGROUP) for ops in loops) / needed
    return Specialised(loops, feed, machine).cycles(), pipes, surplus


def fixed(paths: Paths, feed: Feed, machine: Machine) -> float:
    """Cycles of the first consumer outside its loop: until the first tile has come, and from the last on."""
    body = consumers(paths, feed.consumers)[-1 if feed.leads else 0]
    path = paths.through([body.__contains__], paths.loops)
    code = [one for k in path if k not in body for one in paths.code[k].code]
    waits = (one for one in decoded(code, machine) if one.kind not in (Kind.FULL_WAIT, Kind.RELEASE))
    alone = Multiprocessor(list(waits), 1, WARPGROUP, machine)
    return machine.start + machine.load_latency + feed.size / machine.l2 + alone.latency()
