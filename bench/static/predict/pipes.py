"""What each instruction asks of a multiprocessor: its pipe, and how much of it.

Warps come in fours, one on each of the four schedulers of a multiprocessor, and the four do the same at about the same
time. So one scheduler is modelled; what its warps ask of shared memory, L2 and tensor cores counts four times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import cache
from typing import NamedTuple

from bench.static.predict import tensor_memory
from bench.static.predict.assumptions import Machine
from bench.static.sass import Control, Instruction

WARP = 32  # threads
SCHEDULERS = 4
WARPGROUP = 4  # warps


class NotModelled(Exception):
    """The code has an instruction that the model does not know."""


class Kind(Enum):
    """What an instruction does; most kinds are a pipe."""

    FREE = auto()  # only an issue slot
    FMA = auto()
    FMA_HEAVY = auto()  # integer multiply-add: one half of the FMA pipe
    ALU = auto()
    MUFU = auto()
    SHARED = auto()
    SHUFFLE = auto()
    COPY = auto()  # from global to shared memory, asynchronous
    COMMIT = auto()
    COPY_WAIT = auto()
    WGMMA = auto()
    WGMMA_WAIT = auto()
    UTCMMA = auto()  # issued by one warp of a program
    UTCMMA_COMMIT = auto()
    UTCMMA_WAIT = auto()
    TENSOR_MEMORY = auto()  # between tensor memory and registers
    HMMA = auto()
    BARRIER = auto()
    LOAD = auto()
    STORE = auto()
    SLOW = auto()  # variable latency without a pipe that matters
    STALL = auto()
    # Of warp-specialised kernels: consumers wait for a stage and release it, a producer waits for that and fills it.
    FULL_WAIT = auto()
    RELEASE = auto()
    EMPTY_WAIT = auto()
    FEED = auto()


class Op(NamedTuple):
    """An instruction, decoded.

    Attributes:
        amount: bytes of shared memory, tensor memory or a copy, cycles of a product, latency, the groups that a wait
            leaves, or the passes through half of the FMA pipe.
        operands: bytes that a product reads from shared memory; the number of a barrier.
        closes: whether a WGMMA closes a group.
        flops: of all four warps; of a UTCMMA those of the program.
    """

    kind: Kind
    control: Control
    amount: float = 0
    operands: float = 0
    closes: bool = False
    flops: float = 0


_SIZES = {".256": 32, ".128": 16, ".64": 8}  # of a thread


def _moved(one: Instruction) -> float:
    """Bytes of a warp."""
    return WARP * next((size for bits, size in _SIZES.items() if bits in one.opcode), 4)


def _matrices(one: Instruction) -> float:
    return 128 * (4 if one.opcode.endswith(".4") else 2 if one.opcode.endswith(".2") else 1)


def _columns(one: Instruction) -> float:
    """Bytes of a warp: a register of each thread for a column."""
    return 4 * WARP * int(one.opcode.rpartition(".x")[2])


def _last(one: Instruction) -> float:
    """The last operand."""
    return int(one.operands[-1], 0)


_WGMMA = re.compile(r"[BHIQ]GMMA\.(\d+)x(\d+)x(\d+)")
_HMMA = re.compile(r"HMMA\.(?:16816|1688)\b")
_UNKNOWN = re.compile(r"UTMA|SYNCS\.(?!EXCH|CCTL)|UTC(?!BAR$|ATOMSWS)|[LS]DT(?!M\.)|UBLKCP|QMMA|OMMA|DMMA|IMMA|BMMA")
# The beginning of the opcode, the kind, and the amount or what tells it; the first row that fits.
_ROWS: tuple[tuple[str, Kind, float | Callable[[Instruction], float]], ...] = (
    (r"LDGDEPBAR", Kind.COMMIT, 0),
    (r"LDSM|STSM", Kind.SHARED, _matrices),
    (r"LDGSTS", Kind.COPY, _moved),
    (r"LDTM|STTM", Kind.TENSOR_MEMORY, _columns),
    (r"UTCBAR", Kind.UTCMMA_COMMIT, 0),
    (r"SYNCS", Kind.FREE, 0),
    (r"LDS|STS|ATOMS", Kind.SHARED, _moved),
    (r"SHFL", Kind.SHUFFLE, 4 * WARP),
    (r"LDG.*\.(?:128|256)", Kind.LOAD, _moved),
    (r"LDG|LD\.E|ATOMG|ATOM\.|LDL", Kind.LOAD, 0),  # numbers of rows, which many threads share and L1 has
    (r"STG.*\.(?:128|256)", Kind.STORE, _moved),
    (r"STG|RED|ST\.E|STL", Kind.STORE, 0),
    (r"WARPGROUP\.DEPBAR", Kind.WGMMA_WAIT, _last),
    (r"LDC", Kind.SLOW, 30),
    (r"S2R|S2UR|R2UR|CS2R", Kind.SLOW, 20),
    (r"MEMBAR", Kind.STALL, 30),
    (r"FENCE", Kind.STALL, 12),
    (r"FFMA2|FADD2|FMUL2", Kind.FMA, 2),  # two float32 operations of a thread
    (r"FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2|FSWZADD", Kind.FMA, 1),
    (r"IMAD", Kind.FMA_HEAVY, 0),
    (r"MUFU|F2I|I2F|F2F\.|FRND|POPC|FLO|DADD|DMUL|DFMA|DSETP", Kind.MUFU, 0),
    (r"WARPGROUP|WARPSYNC|BSSY|BSYNC|NOP|BRA|JMP|EXIT|RET|CALL|YIELD|ELECT|ERRBAR|CCTL", Kind.FREE, 0),
    (r"USETMAXREG|DEPBAR|U|VOTE|BREAK|BMOV", Kind.FREE, 0),
    (r"", Kind.ALU, 0),
)


def decode(code: Sequence[Instruction], machine: Machine) -> list[Op]:
    """The instructions as the multiprocessor sees them.

    Raises:
        NotModelled: one of them is unknown.
    """
    waits = tensor_memory.awaited(code)
    ops = [
        Op(Kind.UTCMMA_WAIT, one.control, waits[k]) if k in waits else _decode(one, machine)
        for k, one in enumerate(code)
    ]
    if any(op.flops for op in ops):
        return ops
    # What kernels without products move is counted as the card's memory; their threads share much of it.
    return [op._replace(amount=0) if op.kind in (Kind.LOAD, Kind.STORE) else op for op in ops]


def _decode(one: Instruction, machine: Machine) -> Op:
    opcode, control = one.opcode, one.control
    if one.predicate == "@!PT" or (opcode.startswith("LDGSTS") and one.operands[-1] == "!PT"):
        return Op(Kind.FREE, control)
    if product := _product(one, machine):
        return product
    if _UNKNOWN.match(opcode):
        raise NotModelled(f"{one.address} {opcode}")
    if opcode.startswith("DEPBAR") and one.operands[:1] == ("SB0",) and len(one.operands) == 2:
        return Op(Kind.COPY_WAIT, control, _last(one))
    if opcode.startswith("BAR.SYNC"):
        return _barrier(one)
    kind, amount = _row(opcode)
    return Op(kind, control, amount(one) if callable(amount) else amount)


@cache
def _row(opcode: str) -> tuple[Kind, float | Callable[[Instruction], float]]:
    return next((kind, amount) for start, kind, amount in _ROWS if re.match(start, opcode))


def _barrier(one: Instruction) -> Op:
    """Its amount is the number of warps of one scheduler that must arrive, 0 for all; `operands` is its number."""
    numbers = [int(text, 0) if text.startswith("0x") else 0 for text in (*one.operands, "", "")]
    return Op(Kind.BARRIER, one.control, numbers[1] // (WARP * SCHEDULERS), numbers[0])


def _product(one: Instruction, machine: Machine) -> Op | None:
    if found := _WGMMA.match(one.opcode):
        m, n, k = map(int, found.groups())
        size = 4 if "TF32" in one.opcode else 1 if one.opcode[0] in "QI" else 2
        in_registers = re.match(r"R\d+", one.operands[1])
        read = (0 if in_registers else m * k * size) + n * k * size
        flops = 2 * m * n * k
        return Op(Kind.WGMMA, one.control, flops * size / 2 / machine.tensor, read, "gsb0" in one.operands, flops)
    if product := tensor_memory.shape(one):
        cycles = tensor_memory.cost(product) / machine.tensor
        flops = 2 * product.m * product.n * product.k
        return Op(Kind.UTCMMA, one.control, cycles, tensor_memory.read(one, product), flops=flops)
    if one.opcode.startswith("HMMA"):
        found = _HMMA.match(one.opcode)
        if not found:
            raise NotModelled(f"{one.address} {one.opcode}")
        flops = 2 * 16 * 8 * (8 if "1688" in one.opcode else 16)
        return Op(Kind.HMMA, one.control, flops * SCHEDULERS / machine.hmma, flops=flops * SCHEDULERS)
    return None


def by_pipe(ops: Sequence[Op], warps: int, machine: Machine) -> dict[str, float]:
    """Cycles for which one pass of a program's warps through the code keeps each pipe busy."""
    share = warps / SCHEDULERS

    def total(*kinds: Kind) -> float:
        return sum(op.amount for op in ops if op.kind in kinds)

    def number(*kinds: Kind) -> int:
        return sum(op.kind in kinds for op in ops)

    def rate(per_cycle: float) -> float:
        return share * WARP * SCHEDULERS / per_cycle

    def operands(product: Kind) -> float:
        return sum(op.operands for op in ops if op.kind is product)

    moved = share * (operands(Kind.WGMMA) + total(Kind.SHARED, Kind.SHUFFLE, Kind.COPY) * SCHEDULERS)
    found = {
        "tensor": share * total(Kind.WGMMA, Kind.HMMA) + total(Kind.UTCMMA),
        "shared": (moved + operands(Kind.UTCMMA)) / machine.shared,
        "mufu": rate(machine.mufu) * number(Kind.MUFU),
        "fma": rate(machine.fma) * (total(Kind.FMA) + number(Kind.FMA_HEAVY)),
        "alu": rate(machine.alu) * number(Kind.ALU),
        "issue": share * len(ops),
        "l2": share * total(Kind.COPY, Kind.LOAD, Kind.STORE) * SCHEDULERS / machine.l2,
    }
    if machine.tmem:
        found["tmem"] = share * total(Kind.TENSOR_MEMORY) * SCHEDULERS / machine.tmem
    return found


def flops(ops: Sequence[Op], warps: int) -> float:
    """Operations of tensor cores in one pass of a program's warps."""
    every = max(warps / SCHEDULERS, 1)
    return sum(op.flops * (1 if op.kind is Kind.UTCMMA else every) for op in ops)
