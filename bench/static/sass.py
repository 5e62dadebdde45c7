"""Analysis of a kernel's machine code, as printed by nvdisasm: instructions, loops, tensor-core use, WGMMA in flight.

WGMMA (HGMMA and its variants, sm_90) run asynchronously. `gsb0` on an instruction closes a group of them and
WARPGROUP.DEPBAR.LE gsb0, n waits until at most n groups are running. ptxas can get two things wrong:

    serialised  it waits between instructions that add to the same accumulator, so that nothing overlaps
    hazard      it writes to registers that hold the first operand of a WGMMA which may still read them
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

WGMMA = re.compile(r"[BHIQ]GMMA\b")
TENSOR = {
    "HGMMA": WGMMA,
    "HMMA": re.compile(r"(?:[BDHIQ]|OM)MMA\b"),
    "UTCMMA": re.compile(r"UTC[A-Z]?MMA\b"),
}
_A_REGISTERS = 4  # registers of a WGMMA's first operand, per thread, for all types
# Opcodes without a result register: they only read their first operand, or have none.
_NO_RESULT = re.compile(
    r"ST|RED[G.]|RED$|BAR|BRA|BRX|CALL|RET|EXIT|SYNCS|WARP|NANOSLEEP|CCTL|R2P|R2B|FCHK|JM|DEPBAR|\w*SETP|\w*SETP2"
)
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\d\s+|@!?U?PT\s+)?([A-Z][\w.]*)\s*([^;&?]*)")
_HIGH = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/\s*$")  # the second half of the encoding, on a line of its own
_CONTROL_BIT = 41  # of that half
_LABEL = re.compile(r"\s*(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_REGISTER = re.compile(r"R(\d+)\b")
_PREDICATE = re.compile(r"!?U?P(?:\d|T)\b")
_SECTION = re.compile(r"\s*\.section\s+\.text\.")


class Control(NamedTuple):
    """What ptxas tells the scheduler about an instruction.

    Attributes:
        stall: cycles until the warp may issue its next instruction.
        write: scoreboard (0 to 5) that is released when the result is there; 7: none.
        read: scoreboard that is released when the operands are read; 7: none.
        wait: bit mask of scoreboards to wait for.
    """

    stall: int = 1
    write: int = 7
    read: int = 7
    wait: int = 0


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: str
    predicate: str  # "" or a predicate such as "@!P0"
    opcode: str
    operands: tuple[str, ...]
    control: Control = Control()  # the default where the listing has no encodings (nvdisasm without -hex)

    @property
    def target(self) -> str | None:
        """The label it jumps to, or None."""
        if not self.opcode.startswith(("BRA", "JMP", "CALL.REL")):  # on sm_80 loops are left by predicated calls
            return None
        found = _TARGET.search(", ".join(self.operands))
        return found[1] if found else None

    @property
    def falls_through(self) -> bool:
        """Whether execution may continue with the next instruction."""
        if self.opcode.startswith(("EXIT", "RET", "BRX", "JMX")):
            return bool(self.predicate)
        if self.target is None:
            return True
        # BRA.DIV and BRA.CONV depend on the warp, BRA.U on an operand.
        return bool(self.predicate) or len(self.operands) > 1 or self.opcode not in ("BRA", "BRA.U", "JMP")

    def writes(self) -> range:
        """Numbers of the general registers it writes."""
        if _NO_RESULT.match(self.opcode):
            return range(0)
        operands = [operand for operand in self.operands if not _PREDICATE.fullmatch(operand)]
        found = _REGISTER.match(operands[0]) if operands else None
        if not found:
            return range(0)
        return range(int(found[1]), int(found[1]) + self._width())

    def _width(self) -> int:
        if self.opcode.startswith(("LDSM", "MOVM")):
            matrices = re.search(r"\.([24])\b", self.opcode)
            return int(matrices[1]) if matrices else 1
        if TENSOR["HMMA"].match(self.opcode):
            return 4
        if found := re.search(r"\.(64|128)\b", self.opcode):
            return int(found[1]) // 32
        return 2 if ".WIDE" in self.opcode or self.opcode in ("CS2R", "DADD", "DMUL", "DFMA") else 1


@dataclass
class Block:
    """A basic block: instructions without jumps into or out of their middle, and the blocks that may follow."""

    code: list[Instruction]
    label: str | None
    following: list[int]


def blocks(text: str) -> list[Block]:
    """Control flow graph of all functions in nvdisasm's output; calls are assumed to return."""
    found: list[Block] = []
    starts = True  # the next instruction begins a block
    for line in text.splitlines():
        if label := _LABEL.match(line):
            found.append(Block([], label[1], []))
            starts = False
        elif _SECTION.match(line):
            starts = True
        elif match := _LINE.match(line):
            if starts:
                found.append(Block([], None, []))
            operands = tuple(part.strip().removesuffix(".reuse") for part in match[4].split(",") if part.strip())
            one = Instruction(match[1], (match[2] or "").strip(), match[3], operands)
            found[-1].code.append(one)
            starts = one.target is not None or not one.falls_through
        elif (match := _HIGH.match(line)) and found and found[-1].code:
            found[-1].code[-1] = replace(found[-1].code[-1], control=_control(int(match[1], 16)))
    at = {block.label: k for k, block in enumerate(found) if block.label}
    for k, block in enumerate(found):
        last = block.code[-1] if block.code else None
        if last and last.target in at:
            block.following.append(at[last.target])
        if (last is None or last.falls_through) and k + 1 < len(found):
            block.following.append(k + 1)
    return found


def _control(half: int) -> Control:
    word = half >> _CONTROL_BIT
    return Control(word & 15, (word >> 5) & 7, (word >> 8) & 7, (word >> 11) & 63)


def count(code: list[Block], opcode: re.Pattern[str] | str) -> int:
    """Number of instructions whose opcode starts with a pattern."""
    pattern = re.compile(opcode)
    return sum(bool(pattern.match(one.opcode)) for block in code for one in block.code)


def register_operands(code: list[Block]) -> int:
    """Number of WGMMA whose first operand is in registers."""
    return sum(bool(WGMMA.match(one.opcode) and _first_operand(one)) for block in code for one in block.code)


def _first_operand(wgmma: Instruction) -> re.Match[str] | None:
    return _REGISTER.match(wgmma.operands[1])


def loops(code: list[Block]) -> list[frozenset[int]]:
    """Natural loops as sets of block numbers; loops with the same header are merged."""
    before: list[set[int]] = [set() for _ in code]
    for k, block in enumerate(code):
        for following in block.following:
            before[following].add(k)
    above = _dominators(before, _entries(code))
    found: dict[int, set[int]] = {}
    for k, block in enumerate(code):
        for head in block.following:
            if head not in above[k]:
                continue
            body, left = found.setdefault(head, {head}), [k]
            while left:
                one = left.pop()
                if one not in body:
                    body.add(one)
                    left += before[one]
    return [frozenset(body) for body in found.values()]


def _entries(code: list[Block]) -> list[int]:
    """The first block, and those that only jumps to a computed address lead to, or none."""
    found, reached = list[int](), set[int]()
    for k in range(len(code)):
        found += [k] if k not in reached else []
        left = [k]
        while left:
            if (one := left.pop()) not in reached:
                reached.add(one)
                left += code[one].following
    return found


def _dominators(before: list[set[int]], entries: list[int]) -> list[set[int]]:
    """The dominators of each block: the blocks on every path from an entry to it, including itself."""
    everything = set(range(len(before)))
    above = [everything] * len(before)
    for k in entries:
        above[k] = {k}
    changed = True
    while changed:
        changed = False
        for k in everything - set(entries):
            ways = [above[previous] for previous in before[k]]
            new = {k} | set.intersection(*ways) if ways else {k}
            if new != above[k]:
                above[k], changed = new, True
    return above


def exponentials_in_a_loop(code: list[Block]) -> int | None:
    """Largest number of MUFU.EX2 in the body of an innermost loop that has any; None if there is no such loop."""
    numbers = [count([block], r"MUFU\.EX2\b") for block in code]
    hot = [body for body in loops(code) if any(numbers[k] for k in body)]
    inner = [body for body in hot if not any(other < body for other in hot)]
    return max((sum(numbers[k] for k in body) for body in inner), default=None)


def broken_chains(code: list[Block]) -> tuple[int, int]:
    """Pairs of consecutive WGMMA on one accumulator within a block: (those with a full wait in between, all)."""
    broken = pairs = 0
    for block in code:
        accumulator, waited = None, False
        for one in block.code:
            if WGMMA.match(one.opcode):
                if accumulator == one.operands[0] and accumulator in one.operands[1:]:
                    pairs += 1
                    broken += waited
                accumulator, waited = one.operands[0], False
            elif one.opcode.startswith("WARPGROUP.DEPBAR"):
                waited = waited or _pending(one) == 0
    return broken, pairs


# Groups of WGMMA that may be running, oldest first; the last is still open. A WGMMA is (first A register, address).
_Groups = tuple[frozenset[tuple[int, str]], ...]
_NOTHING: _Groups = (frozenset(),)
_MOST_GROUPS = 16  # beyond this the two oldest are merged, so that the analysis of a loop without waits terminates


def hazards(code: list[Block]) -> list[str]:
    """Writes to a register that a WGMMA in flight may still read, on any path through the code, including loops."""
    found: dict[str, str] = {}
    seen: set[tuple[int, _Groups]] = set()
    left = [(k, _NOTHING) for k in _entries(code)]
    while left:
        at = left.pop()
        if at in seen:
            continue
        seen.add(at)
        groups = at[1]
        for one in code[at[0]].code:
            groups = _step(one, groups, found)
        left += [(k, groups) for k in code[at[0]].following]
    return [found[address] for address in sorted(found)]


def early_releases(code: list[Block]) -> list[str]:
    """Arrivals at a barrier behind WGMMA of their block, before all warps have waited for these and met."""
    found = []
    for block in code:
        left = 0  # of two steps: the wait, the meeting
        for one in block.code:
            if WGMMA.match(one.opcode):
                left = 2
            elif left and one.opcode.startswith(("BAR.SYNC", "WARPGROUP.DEPBAR")[left - 1]):
                left -= left == 1 or not _pending(one)
            elif one.opcode.startswith("SYNCS.ARRIVE") and left:
                found.append(f"{one.address} {one.opcode} releases what a WGMMA may still read")
    return found


def _step(one: Instruction, groups: _Groups, found: dict[str, str]) -> _Groups:
    if WGMMA.match(one.opcode):
        if first := _first_operand(one):
            groups = (*groups[:-1], groups[-1] | {(int(first[1]), one.address)})
        if "gsb0" not in one.operands:
            return groups
        # Keep groups without register operands too, since waits count groups.
        if len(groups) == _MOST_GROUPS:
            groups = (groups[0] | groups[1], *groups[2:])
        return (*groups, frozenset())
    if one.opcode.startswith("WARPGROUP.DEPBAR"):
        return groups[max(len(groups) - 1 - _pending(one), 0) :]
    for first, address in _in_flight(groups):
        if set(one.writes()) & set(range(first, first + _A_REGISTERS)):
            text = f"{one.address} {one.opcode} {one.operands[0]} writes an operand of the WGMMA at {address}"
            found.setdefault(one.address, text)
    return groups


def _in_flight(groups: _Groups) -> Iterator[tuple[int, str]]:
    for group in groups:
        yield from group


def _pending(wait: Instruction) -> int:
    return int(wait.operands[-1], 0)
