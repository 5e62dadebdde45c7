"""A multiprocessor that runs the same loop in several resident programs, event by event.

It follows what ptxas wrote: stall counts, scoreboards and waits. One of the four schedulers is simulated, see
`pipes.py`: a warp here is one of four that do the same, so its requests to what the four share count four times. The
scheduler keeps to the warp that it issued last as long as that can go on, to the end of a turn, and else takes the
oldest that can. No warp gets far ahead: where one pipe is always busy, others would never get their turn.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Sequence

from bench.static.predict.assumptions import Machine
from bench.static.predict.pipes import SCHEDULERS, WARP, Kind, NotModelled, Op

_STAGGER = 137  # cycles between the starts of programs, so that they do not run in step
_FIXED = 4  # latency of everything that ptxas waits for by counting
_READ = 6  # cycles until an instruction has read its registers, after its pipe took it
_SLACK = 64  # cycles of work for shared memory that may be queued
_AHEAD = 4  # turns by which a warp may be ahead of another
_WARM, _TURNS = 12, 8  # turns before a loop is timed, in which its pipelines fill, and while it is timed


class Warp:
    """A warp and what it waits for; `issuer`: the warp of its program that issues UTCMMA, None: itself."""

    def __init__(self, program: int, start: float, ops: Sequence[Op], issuer: Warp | None = None) -> None:
        self.program, self.ops, self.issuer = program, ops, issuer or self
        self.at, self.position, self.turns = start, 0, 0
        self.next = start
        self.boards = [0.0] * 8  # when each scoreboard is released; the last two are never waited for
        self.copies = [0]  # copies in flight by group; the last group is open
        self.issued = self.blocked = 0
        self.ends: list[float] = []  # of its products that have started
        self.groups: list[int] = []  # last product of each group that it has closed
        self.closed = 0  # groups, its own or the issuer's, whose end it has passed
        self.passed: list[float] = []  # times at which a turn ended


class Multiprocessor:
    """Several programs of some warps, all in the same loop.

    Args:
        ops: a turn of the loop.
        programs: programs that are resident.
        warps: of a program; fewer than four count as four.
    """

    turns = _WARM + _TURNS

    def __init__(self, ops: Sequence[Op], programs: int, warps: int, machine: Machine) -> None:
        self.machine = machine
        self.per_program = max(warps // SCHEDULERS, 1)
        self.warps: list[Warp] = []
        for p in range(programs):
            first = Warp(p, p * _STAGGER, ops)
            self.warps += [first, *(Warp(p, p * _STAGGER, ops, first) for _ in range(1, self.per_program))]
        count = len(self.warps)  # in which order warps are asked, after one of them
        self.order = [[last, *(k for k in range(count) if k != last)] for last in range(count)]
        self.fma = [0.0, 0.0]
        self.alu = self.mufu = self.unit = self.shared = self.l2 = self.tensor = self.hmma = self.tmem = 0.0
        # Cycles of a warp's instruction on one scheduler's share of a pipe. The FMA pipe has two halves.
        share = WARP * SCHEDULERS
        self.per_fma, self.per_alu, self.per_mufu = (
            2 * share / machine.fma, share / machine.alu, share / machine.mufu,
        )  # fmt: skip
        self.waiting: deque[tuple[float, Warp, Op]] = deque()  # products that are issued but not started
        self.events: list[tuple[float, int, Kind, Warp, int, float]] = []
        self.arrived: Counter[tuple[int, int]] = Counter()  # warps at a barrier of a program
        self.serial = 0

    def cycles(self) -> float:
        """Cycles of the multiprocessor for a turn of one program, while all of them run.

        Raises:
            NotModelled: no warp can go on: the code has a wait that the model does not understand.
        """
        self._run(self.turns)
        return 1 / sum(map(self._rate, self.warps[:: self.per_program]))

    @staticmethod
    def _rate(warp: Warp) -> float:
        """Turns of a warp in a cycle."""
        times = warp.passed[_WARM - 1 :]
        return (len(times) - 1) / (times[-1] - times[0])

    def latency(self) -> float:
        """Cycles of one pass, from the start to the last result."""
        self._run(1)
        return max(max(warp.next, *warp.boards[:6]) for warp in self.warps)

    def _run(self, turns: int) -> None:
        t, order, warps = 0.0, self.order[0], self.warps
        while (least := min(warp.turns for warp in warps)) < turns:
            self._happen(t)
            soon = math.inf
            found = -1
            for k in order:
                warp = warps[k]
                if warp.blocked:
                    continue
                ready = warp.at
                if ready <= t:
                    ready = self._ready(warp)
                if ready <= t:
                    found = k
                    break
                soon = min(soon, ready)
            if found >= 0:
                self._issue(warps[found], t)
                order = self.order[found]
                # After a turn those that lag, and others only once they have caught up.
                if not warps[found].position or warps[found].turns > least + _AHEAD:
                    order = sorted(order, key=lambda one: warps[one].turns)
                t += 1
                continue
            if self.events:
                soon = min(soon, self.events[0][0])
            if self.waiting:
                soon = min(soon, self.tensor)
            if soon == math.inf:
                raise NotModelled(f"no warp can go on after {t:.0f} cycles")
            t = max(math.ceil(soon), t + 1)

    def _ready(self, warp: Warp) -> float:
        """When the pipe of a warp's next instruction takes it; infinite if that depends on an event."""
        op = warp.ops[warp.position]
        kind = op.kind
        if kind is Kind.FMA:
            return max(self.fma) if op.amount > 1 else min(self.fma)
        if kind is Kind.ALU:
            return self.alu
        if kind is Kind.FMA_HEAVY:
            return self.fma[0]
        if kind is Kind.MUFU:
            return self.mufu - self.per_mufu
        if kind in (Kind.SHARED, Kind.SHUFFLE, Kind.COPY):
            return max(self.unit, self.shared - _SLACK)
        if kind in (Kind.LOAD, Kind.STORE):
            return self.unit
        if kind in (Kind.WGMMA, Kind.UTCMMA):
            return 0.0 if warp.issued - len(warp.ends) < self.machine.queue else math.inf
        if kind in (Kind.WGMMA_WAIT, Kind.UTCMMA_WAIT):
            by = warp if kind is Kind.WGMMA_WAIT else warp.issuer
            return self._products_done(by, warp.closed - int(op.amount))
        if kind is Kind.TENSOR_MEMORY:
            return self.tmem - _SLACK
        if kind is Kind.COPY_WAIT:
            closed = len(warp.copies) - 1 - int(op.amount)
            return math.inf if any(warp.copies[: max(closed, 0)]) else 0.0
        if kind is Kind.HMMA:
            return self.hmma - 1
        return 0.0

    def _products_done(self, warp: Warp, needed: int) -> float:
        """When the first `needed` groups of a warp are done."""
        if needed <= 0:
            return 0.0
        if needed > len(warp.groups):
            return math.inf
        product = warp.groups[needed - 1]
        return warp.ends[product] + self.machine.tensor_latency if product < len(warp.ends) else math.inf

    def _issue(self, warp: Warp, t: float) -> None:
        op = warp.ops[warp.position]
        written, read = self._take(warp, op, t)
        control = op.control
        boards = warp.boards
        boards[control.write] = max(boards[control.write], written)
        boards[control.read] = max(boards[control.read], read)
        warp.next = t + max(control.stall, 1) + (op.amount if op.kind is Kind.STALL else 0)
        warp.position += 1
        if warp.position == len(warp.ops):
            warp.position = 0
            warp.turns += 1
            warp.passed.append(t)
        wait, at = warp.ops[warp.position].control.wait, warp.next
        for board in range(6):
            if wait >> board & 1 and boards[board] > at:
                at = boards[board]
        warp.at = at

    def _take(self, warp: Warp, op: Op, t: float) -> tuple[float, float]:
        """Put an instruction on its pipe: when its result is there, and when its registers are read."""
        kind = op.kind
        if kind is Kind.FMA and op.amount > 1:
            self.fma = [t + self.per_fma] * 2
        elif kind is Kind.FMA:
            half = 0 if self.fma[0] <= t else 1
            self.fma[half] = t + self.per_fma
        elif kind is Kind.FMA_HEAVY:
            self.fma[0] = t + self.per_fma
        elif kind is Kind.ALU:
            self.alu = t + self.per_alu
        elif kind is Kind.MUFU:
            start = max(t, self.mufu)
            self.mufu = start + self.per_mufu
            return start + self.machine.mufu_latency, start + _READ
        elif kind is Kind.SLOW:
            return t + op.amount, t + op.amount
        elif kind is Kind.HMMA:
            self.hmma = max(t, self.hmma) + op.amount
            return self.hmma + self.machine.tensor_latency / 2, t + _READ
        elif kind is Kind.WGMMA or (kind is Kind.UTCMMA and warp.issuer is warp):
            warp.issued += 1
            self.waiting.append((t, warp, op))
            if op.closes:
                self._close(warp)
        elif kind is Kind.UTCMMA_COMMIT:
            self._close(warp)
        elif kind is Kind.COMMIT:
            warp.copies.append(0)
        elif kind is Kind.BARRIER:
            self._arrive(warp, int(op.operands), int(op.amount), t)
        else:
            return self._move(warp, op, t)
        return t + _FIXED, t + _FIXED

    @staticmethod
    def _close(warp: Warp) -> None:
        """The end of a group of products."""
        warp.closed += 1
        if warp.issued:
            warp.groups.append(warp.issued - 1)

    def _move(self, warp: Warp, op: Op, t: float) -> tuple[float, float]:
        """Put a memory instruction on its pipe."""
        kind, machine = op.kind, self.machine
        if kind in (Kind.SHARED, Kind.SHUFFLE):
            self.unit = t + 2
            self.shared = max(t, self.shared) + SCHEDULERS * op.amount / machine.shared
            latency = machine.shared_latency if kind is Kind.SHARED else machine.shuffle_latency
            return self.shared + latency, self.shared + _READ
        if kind is Kind.TENSOR_MEMORY:
            self.tmem = max(t, self.tmem) + SCHEDULERS * op.amount / machine.tmem
            return self.tmem + machine.tmem_latency, self.tmem
        if kind is Kind.COPY:
            self.unit = t + 2
            self.l2 = max(t, self.l2) + SCHEDULERS * op.amount / machine.l2
            warp.copies[-1] += 1
            self._later(self.l2 + machine.load_latency, Kind.COPY, warp, len(warp.copies) - 1, op.amount)
            return t + _FIXED, t + 16
        if kind in (Kind.LOAD, Kind.STORE):
            came = t
            if op.amount:
                came = self.l2 = max(t, self.l2) + SCHEDULERS * op.amount / machine.l2
            self.unit = max(t + 2, came - machine.load_latency)  # nobody waits for stores, but they cannot pile up
            return (came + machine.load_latency, t + 12) if kind is Kind.LOAD else (t + _FIXED, t + 20)
        return t + _FIXED, t + _FIXED

    def _arrive(self, warp: Warp, barrier: int, needed: int, t: float) -> None:
        warp.blocked = 1 + barrier
        self.arrived[warp.program, barrier] += 1
        if self.arrived[warp.program, barrier] == (needed or self.per_program):
            self.arrived[warp.program, barrier] = 0
            self._later(t + self.machine.barrier, Kind.BARRIER, warp, 1 + barrier, 0)

    def _later(self, time: float, kind: Kind, warp: Warp, number: int, size: float) -> None:
        self.serial += 1
        heapq.heappush(self.events, (time, self.serial, kind, warp, number, size))

    def _arrives(self, time: float, stage: int, size: float) -> None:
        """A piece of a copy by TMA comes from L2."""
        raise NotImplementedError

    def _happen(self, t: float) -> None:
        """Everything that is due: copies reach shared memory, barriers open, products start."""
        while self.events and self.events[0][0] <= t:
            time, _, kind, warp, number, size = heapq.heappop(self.events)
            if kind is Kind.BARRIER:
                for other in self.warps:
                    if other.program == warp.program and other.blocked == number:
                        other.blocked = 0
                        other.at = max(other.at, time)
            elif kind is Kind.FEED:
                self._arrives(time, number, size)
            elif kind is Kind.COPY:  # it has come from L2 and is written now
                self.shared = max(time, self.shared) + SCHEDULERS * size / self.machine.shared
                self._later(self.shared, Kind.COMMIT, warp, number, 0)
            else:
                warp.copies[number] -= 1
        while self.waiting and self.tensor <= t:
            issued, warp, op = self.waiting.popleft()
            start = max(issued, self.tensor)
            self.shared = max(start, self.shared) + op.operands / self.machine.shared
            self.tensor = max(start + op.amount, self.shared)
            warp.ends.append(self.tensor)
