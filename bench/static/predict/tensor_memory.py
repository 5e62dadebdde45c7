"""sm_100: products into tensor memory, and the barriers that tell that they are done.

One warp issues the products of a program (UTCHMMA), which the tensor cores take in order. It closes a group of them by
a commit (UTCBAR), which completes a barrier in shared memory; all warps poll that barrier (SYNCS.PHASECHK) before they
read or overwrite what the products use. The machine code says by addresses which commit a wait is for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from bench.static.sass import TENSOR, Block, Instruction

_COMMIT, _WAIT = "UTCBAR", "SYNCS.PHASECHK"
_UNIFORM = re.compile(r"UR\d+|UP\d")
_ALWAYS = re.compile(r"!?UPT")
_CHANGED = ("-", "~", "!")  # signs before an operand
_ADDRESS = re.compile(r"\[(UR\d+|URZ)(?:\+(0x[0-9a-f]+))?\]")
_DESCRIPTOR = re.compile(r"idesc\[(UR\d+)\]")
_IMMEDIATE = re.compile(r"-?0x[0-9a-f]+|-?\d+")
_LANES = 128  # rows that the tensor cores multiply at a time; a product of fewer takes as long


class Shape(NamedTuple):
    """A product: rows and columns of the result."""

    m: int
    n: int
    k: int = 16


class Value(NamedTuple):
    """What a uniform register or predicate holds: a number for what is not known of it, plus a constant."""

    name: int | str = ""
    plus: int = 0


def settled(code: list[Block]) -> list[Block]:
    """The code as the warp that issues products runs it if no barrier makes it wait.

    Jumps over the products, which the other warps take, and the code that repeats a wait are left out. The operand of a
    product that describes it has the description in place of the register that holds it. Code without products into
    tensor memory is returned as it is.
    """
    if not any(_is_product(one) for block in code for one in block.code):
        return code
    # A block that repeats a wait, and the one behind it, which jumps back.
    repeats = {k for k, block in enumerate(code) if k in block.following and block.code[0].opcode.startswith(_WAIT)}
    left_out = repeats | {k + 1 for k in repeats}
    found = []
    for k, block in enumerate(code):
        following = [other for other in block.following if not {k, other} & left_out]
        behind = set(code[k + 1].following) if k + 1 in following and any(map(_is_product, code[k + 1].code)) else None
        if behind and len(following) == 2 and behind < {*following}:
            following = [k + 1]
        found.append(replace(block, code=_described(block.code), following=following))
    return found


def shape(one: Instruction) -> Shape | None:
    """The product that an instruction of `settled` code is; None if its description is not known.

    The rows are 32 bytes along the summed dimension. Bits of the description (PTX ISA, instruction descriptor): 7 to 9
    the type of the first operand, 17 to 22 the columns by 8, 24 to 28 the rows by 16.
    """
    texts = [text[6:-1] for text in one.operands if text.startswith("idesc[0x")]
    if one.opcode != "UTCHMMA" or not texts:
        return None
    bits = int(texts[0], 16)
    return Shape(16 * (bits >> 24 & 31), 8 * (bits >> 17 & 63)) if bits >> 7 & 7 < 2 else None


def read(one: Instruction, product: Shape) -> int:
    """Bytes that a product reads from shared memory: both operands, or the second one, if the first is in tensor
    memory."""
    rows = product.n + (product.m if one.operands[0].startswith("gdesc") else 0)
    return rows * product.k * 2


def cost(product: Shape) -> int:
    """Operations that would take as long on full tensor cores."""
    return 2 * _LANES * product.n * product.k


def awaited(code: Sequence[Instruction]) -> dict[int, int]:
    """The waits of a loop: at which place, and how many of the commits before it need not have completed.

    A wait is for the latest commit to the same address, in this turn or in the one before; if there is none, for all.
    """
    values, commits, found = _Values(), list[Value](), dict[int, int]()
    for _ in range(2):
        for k, one in enumerate(code):
            if one.opcode == _COMMIT:
                commits.append(values.address(one.operands[0]))
            elif one.opcode.startswith(_WAIT):
                mine = values.address(one.operands[1])
                found[k] = next((n for n, other in enumerate(reversed(commits)) if other == mine), 0)
            else:
                values.follow(one)
    return found


def _is_product(one: Instruction) -> bool:
    return bool(TENSOR["UTCMMA"].match(one.opcode))


def _described(code: Sequence[Instruction]) -> list[Instruction]:
    held: dict[str, str] = {}
    found = []
    for one in code:
        if one.opcode == "UMOV":
            held[one.operands[0]] = one.operands[1]
        elif _is_product(one):
            operands = tuple(_DESCRIPTOR.sub(lambda at: f"idesc[{held.get(at[1], at[1])}]", o) for o in one.operands)
            one = replace(one, operands=operands)
        found.append(one)
    return found


class _Values:
    """What uniform registers and predicates hold: the same for the same operation on the same values."""

    def __init__(self) -> None:
        self.held: dict[str, Value] = {}
        self.names: dict[object, int] = {}

    def address(self, text: str) -> Value:
        """The address that an operand stands for."""
        match = _ADDRESS.fullmatch(text)
        if not match:
            return Value(text)
        base = self._value(match[1])
        return Value(base.name, base.plus + int(match[2] or "0", 16))

    def follow(self, one: Instruction) -> None:
        """Note what an instruction writes: a copy, a sum with constants, or something of its own."""
        operands = [text for text in one.operands if not _ALWAYS.fullmatch(text)]
        if not operands or not _UNIFORM.fullmatch(operands[0]):
            return
        target, *rest = operands
        parts = [self._value(text) for text in rest]
        named = [part.name for part in parts if part.name]
        plain = not one.predicate and not any(text.startswith(_CHANGED) for text in rest)
        if plain and (one.opcode == "UMOV" or (one.opcode == "UIADD3" and len(named) == 1)):
            self.held[target] = Value(named[0] if named else "", sum(part.plus for part in parts))
            return
        before = self._value(target) if one.predicate else None
        key = one.opcode, one.predicate, before, *parts, *(text[:1] for text in rest)
        self.held[target] = Value(self.names.setdefault(key, len(self.names) + 1))

    def _value(self, text: str) -> Value:
        if text == "URZ":
            return Value()
        if _IMMEDIATE.fullmatch(text):
            return Value(plus=int(text, 0))
        text = text.lstrip("".join(_CHANGED))
        return self.held.get(text, Value(text))
