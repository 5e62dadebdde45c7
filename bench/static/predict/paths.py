"""Ways through a kernel's machine code: a turn of a loop, and what runs before, between and after loops."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

from bench.static.sass import TENSOR, Block, Instruction, loops

Loop = frozenset[int]  # numbers of blocks
_PRODUCT = tuple(TENSOR.values())

_SELECTS = ("FSEL", "SEL", "ISETP", "LOP3", "PLOP3")  # loops over masked tiles or padded blocks have many of them


def has_product(code: Sequence[Instruction]) -> bool:
    """Whether tensor-core instructions are among the instructions."""
    return any(pattern.match(one.opcode) for one in code for pattern in _PRODUCT)


class Paths:
    """The blocks and the loops of a kernel."""

    def __init__(self, code: list[Block]) -> None:
        self.code = code
        self.loops = sorted(loops(code), key=min)
        self.everything = frozenset(range(len(code)))

    def instructions(self, numbers: Loop) -> list[Instruction]:
        """All instructions of some blocks."""
        return [one for k in sorted(numbers) for one in self.code[k].code]

    def selects(self, body: Loop) -> int:
        """Instructions of some blocks that compare or select."""
        return sum(one.opcode.startswith(_SELECTS) for one in self.instructions(body))

    def outer(self) -> list[Loop]:
        """The outermost loops that hold products, in the order of their addresses."""
        found = [body for body in self.loops if has_product(self.instructions(body))]
        return [body for body in found if not any(body < other for other in found)]

    def inner(self, body: Loop) -> list[Loop]:
        """The loops within a loop, or within the whole kernel, that hold products and no such loop themselves."""
        found = [other for other in self.loops if other < body and has_product(self.instructions(other))]
        return [other for other in found if not any(another < other for another in found)]

    def walk(self, body: Loop, turns: Mapping[Loop, int]) -> list[Instruction]:
        """One turn of a loop in the order of addresses; conditional jumps forward are not taken.

        Args:
            turns: how often loops within it run; others run once.
        """
        first = {max(loop): min(loop) for loop in turns}
        left = {min(loop): count - 1 for loop, count in turns.items()}
        order = sorted(body)
        found: list[Instruction] = []
        at = 0
        while at < len(order):
            number = order[at]
            block = self.code[number]
            found += block.code
            at += 1
            if left.get(first.get(number, -1), 0) > 0:
                left[first[number]] -= 1
                at = order.index(first[number])
            elif block.code and not block.code[-1].falls_through:
                forward = [k for k in block.following if k > number and k in body]
                if forward:
                    at = order.index(forward[0])
                elif body == self.everything and block.following:
                    continue  # back to the start of a loop that is counted: go on behind it
                else:
                    break
        return found

    def shortest(self, body: Loop) -> list[Instruction]:
        """The shortest turn of a loop without loops in it."""
        ways: dict[int, list[Instruction]] = {}
        for number in sorted(body, reverse=True):
            block = self.code[number]
            rests = [[]] if min(body) in block.following else [ways[k] for k in block.following if k in ways]
            if rests:
                ways[number] = block.code + min(rests, key=len)
        return ways[min(body)]

    def whole(self, turns: int) -> list[Instruction]:
        """The kernel from its start to its first exit, each of its loops `turns` times."""
        innermost = [one for one in self.loops if not any(other < one for other in self.loops)]
        return self.walk(self.everything, dict.fromkeys(innermost, turns))

    def through(self, required: Sequence[Callable[[int], bool]], repeated: Sequence[Loop] = ()) -> list[int]:
        """Blocks of the shortest way from the entry to an exit through one block of each requirement, in order.

        Args:
            required: tests of block numbers.
            repeated: loops whose blocks cost nothing, since they are accounted for apart.

        Raises:
            ValueError: there is no such way.
        """
        free = frozenset().union(*repeated)

        def met(number: int, count: int) -> int:
            return count + 1 if count < len(required) and required[count](number) else count

        heap: list[tuple[int, int, int, tuple[int, ...]]] = [(0, 0, met(0, 0), (0,))]
        seen: set[tuple[int, int]] = set()
        while heap:
            cost, number, count, path = heapq.heappop(heap)
            if (number, count) in seen:
                continue
            seen.add((number, count))
            block = self.code[number]
            # A loop after which nothing comes exits from within.
            ends = block.code if number in free else () if block.following else block.code[-1:]
            if count == len(required) and any(one.opcode.startswith("EXIT") for one in ends):
                return list(path)
            for k in block.following:
                step = 0 if k in free else len(self.code[k].code)
                heapq.heappush(heap, (cost + step + 1, k, met(k, count), (*path, k)))
        raise ValueError("no way from the entry to an exit passes the loops")
