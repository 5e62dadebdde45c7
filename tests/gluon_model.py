"""Warp-specialised Gluon kernels run on the CPU, one step of one partition after the other in a random order.

Triton's interpreter does not run Gluon. Here the source of a kernel, and of all that it calls, runs with stand-ins for
`gl`, `tma`, `mbarrier` and WGMMA. Barriers count arrivals and bytes and complete phases as the hardware's do. Copies
arrive late, and products read their operands late. What a card would do silently is a `Fault`: a deadlock, a copy into
a stage that is being read, a product of a stage whose copy has not arrived, a result used before its wait, a store that
no fence made visible to a product.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


class Fault(Exception):
    """The kernel breaks a rule of the hardware."""


class _Stopped(Exception):
    """Another partition has failed."""


class Value(np.ndarray):
    """A tensor in registers."""

    def to(self, dtype: Any) -> Value:
        """The same numbers in another type."""
        return value(self, dtype)

    @property
    def type(self) -> Any:
        """Without a layout."""
        return SimpleNamespace(layout=None)


def value(x: Any, dtype: Any = None) -> Value:
    """Numbers as a tensor in registers."""
    return np.asarray(x, dtype).view(Value)


class Pointer:
    """Pointers into a tensor on the CPU."""

    def __init__(self, memory: np.ndarray, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + np.asarray(more))

    @property
    def dtype(self) -> Any:
        """The type of what it points to."""
        return SimpleNamespace(element_ty=self.memory.dtype)


class Stage:
    """A block of shared memory: one stage of an allocation."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.content = np.full(shape, np.nan if dtype != np.int64 else 0, dtype)
        self.barrier = Barrier()
        self.there = False  # something was written, and can be seen by products
        self.copying = False
        self.readers = 0  # products that may still read it

    def permute(self, order: list[int]) -> Any:
        """The transposed block."""
        assert order == [1, 0]
        return SimpleNamespace(stage=self, read=lambda: self.content.T)

    @property
    def stage(self) -> Stage:
        """The block itself, as of `permute`."""
        return self

    def read(self) -> np.ndarray:
        """Its content."""
        return self.content

    def store(self, b: Value) -> None:
        """Write registers."""
        MACHINE[0].pause()
        if self.readers or self.copying:
            raise Fault("a store to shared memory that is in use")
        self.content[...] = b
        self.there = False
        _me().written.append(self)


class Memory:
    """An allocation of several stages."""

    def __init__(self, shape: list[int], dtype: Any) -> None:
        self.dtype = dtype
        self.stages = [Stage(tuple(shape[1:]), dtype) for _ in range(shape[0])]

    def index(self, i: Any) -> Stage:
        """Stage i."""
        return self.stages[int(i)]


class Barrier:
    """An mbarrier: a phase ends when `count` threads have arrived and all expected bytes are there."""

    def __init__(self) -> None:
        self.count = self.arrived = self.bytes = self.phase = 0

    def arrive(self, count: int, size: int = 0) -> None:
        """Arrive and expect `size` more bytes."""
        self.arrived += count
        self.bytes += size
        if self.arrived > self.count:
            raise Fault("more arrivals at a barrier than it counts")
        self.settle()

    def settle(self) -> None:
        """End the phase if it is complete."""
        if self.arrived == self.count and not self.bytes:
            self.arrived, self.phase = 0, self.phase + 1


class Product:
    """A WGMMA that has been issued; its result is there after a wait."""

    def __init__(self, a: Any, b: Any, acc: Any, use_acc: bool) -> None:
        self.parts, self.acc, self.use_acc, self.result = (a, b), acc, use_acc, None
        for part in self.parts:
            if not part.stage.there:
                raise Fault("a product of a stage whose content is not there yet")
            part.stage.readers += 1

    def finish(self) -> None:
        """Read the operands and compute."""
        a, b = (np.asarray(part.read(), np.float32) for part in self.parts)
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc
        self.result = value(a @ b + (acc if self.use_acc else 0), np.float32)
        for part in self.parts:
            part.stage.readers -= 1


class Partition(threading.Thread):
    """Warps that run one function; it goes on when the machine says so."""

    def __init__(self, machine: Machine, function: Callable, arguments: tuple) -> None:
        super().__init__(daemon=True)
        self.machine, self.function, self.arguments = machine, function, arguments
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.products: list[Product] = []
        self.written: list[Stage] = []  # since its last fence
        self.done = False

    def run(self) -> None:
        """The function, to its end or its first fault."""
        self.turn.acquire()
        try:
            if not self.machine.fault:
                self.function(*self.arguments)
        except _Stopped:
            pass
        except Exception as error:
            self.machine.fault = self.machine.fault or error
        self.done = True
        self.machine.back.release()


class Machine:
    """One program: its partitions, and the copies that are on their way."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.haste = self.random.choice((0.5, 0.1, 0.02))  # of copies
        self.back = threading.Semaphore(0)
        self.fault: Exception | None = None
        self.copies: list[Callable[[], None]] = []

    def specialize(self, functions: list[tuple[Callable, tuple]], *_: Any) -> None:
        """Run partitions until all have ended."""
        partitions = [Partition(self, *one) for one in functions]
        for one in partitions:
            one.start()
        while left := [one for one in partitions if not one.done]:
            able = [one for one in left if self.fault or one.ready()]
            if not able and not self.copies:
                self.fault = Fault(f"deadlock: {len(left)} of {len(partitions)} partitions wait forever")
                able = left
            if self.copies and not self.fault and (not able or self.random.random() < self.haste):
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            one = self.random.choice(able)
            one.turn.release()
            self.back.acquire()
        if self.fault:
            raise self.fault

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on, at least until `ready`."""
        me = threading.current_thread()
        if not isinstance(me, Partition):
            return
        me.ready = ready
        self.back.release()
        me.turn.acquire()
        if self.fault:
            raise _Stopped


MACHINE: list[Machine] = []  # the one that runs


def _me() -> Any:
    return threading.current_thread()


def copy(source: Any, at: list[Any], barrier: Any, into: Any) -> None:
    """TMA: a block from row and column `at` on, with zeros beyond the last ones, at any time from now on."""
    MACHINE[0].pause()
    stage = _one(into)
    if stage.readers or stage.copying:
        raise Fault("a copy into a stage that is in use")
    stage.copying, stage.there = True, False
    stage.content[...] = np.nan
    rows = np.zeros(source.block_shape, source.base.dtype)
    found = source.base[tuple(slice(int(first), int(first) + side) for first, side in zip(at, rows.shape, strict=True))]
    rows[: found.shape[0], : found.shape[1]] = found
    assert rows.shape == stage.content.shape

    def arrive() -> None:
        stage.content[...] = rows
        stage.copying, stage.there = False, True
        mine = _one(barrier).barrier
        mine.bytes -= rows.nbytes
        mine.settle()

    MACHINE[0].copies.append(arrive)


def _one(memory: Any) -> Stage:
    return memory if isinstance(memory, Stage) else memory.stages[0]


def arrive(barrier: Any, size: int = 0, *, count: int = 1) -> None:
    """Arrive at a barrier, and expect `size` bytes."""
    MACHINE[0].pause()
    _one(barrier).barrier.arrive(count, size)


def wait(barrier: Any, phase: Any) -> None:
    """Wait until the phase of this parity has ended."""
    mine, parity = _one(barrier).barrier, int(phase)
    MACHINE[0].pause(lambda: mine.phase % 2 != parity)


def products(a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = True) -> Product:
    """Issue a WGMMA."""
    assert is_async
    MACHINE[0].pause()
    one = Product(a, b, acc, use_acc)
    _me().products.append(one)
    return one


def products_done(left: int, deps: list[Any]) -> Any:
    """Wait until at most `left` products run; the results of `deps`."""
    MACHINE[0].pause()
    products = _me().products
    while len(products) > left:
        products.pop(0).finish()
    results = [one.result if isinstance(one, Product) else one for one in deps]
    if any(one is None for one in results):
        raise Fault("a wait returns a product that is not done")
    return results[0] if len(results) == 1 else tuple(results)


def fence() -> None:
    """Make this partition's stores to shared memory visible to products."""
    for stage in _me().written:
        stage.there = True
    _me().written.clear()
