"""Recorded launches of Gluon kernels on the model of `gluon_model.py`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from itertools import product
from types import ModuleType, SimpleNamespace
from typing import Any

import gluon_model as model
import numpy as np
import torch
from gluon_model import Pointer, value
from triton.language import constexpr
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastcl.kernels.common.launch import Launch


def run(launch: Launch, seed: int = 0, edits: Mapping[str, str] | None = None) -> None:
    """Run every program of a launch; its outputs are written in place.

    Args:
        edits: text of the kernel, or of what it calls, to be replaced: faults to be found.

    Raises:
        Fault: the kernel breaks a rule of the hardware.
    """
    left = dict(edits or {})
    kernel = _Source(left).function(launch.kernel.fn)
    assert not left, f"not in the kernel: {list(left)}"
    arguments = {name: _argument(one) for name, one in launch.arguments.items()}
    grid = (*launch.grid, 1, 1)[:3]
    for where in product(*map(range, grid)):
        model.MACHINE[:] = [model.Machine(seed + sum(where))]
        _PLACE[:] = where, grid
        kernel(**arguments)


_PLACE: list[tuple[int, ...]] = []  # of the running program, and the grid


def _argument(one: Any) -> Any:
    if isinstance(one, constexpr):
        return one.value
    if isinstance(one, tuple):
        parts = map(_argument, one)
        return type(one)(*parts) if hasattr(one, "_fields") else tuple(parts)
    if isinstance(one, torch.Tensor):
        return Pointer(one.detach().view(-1).numpy())
    if hasattr(one, "block_shape"):  # a TMA descriptor
        shape, base = one.block_shape, one.base.numpy()
        size = int(np.prod(shape)) * base.itemsize
        return SimpleNamespace(
            base=base,
            block_shape=shape,
            dtype=base.dtype,
            layout=one.layout,
            block_type=SimpleNamespace(nbytes=size, shape=list(shape)),
        )
    return value(one) if isinstance(one, int) and not isinstance(one, bool) else one


class _Source:
    """Functions made from the source of jitted ones, with stand-ins for what they call."""

    def __init__(self, edits: dict[str, str]) -> None:
        self.edits, self.made = edits, dict[Any, Callable]()

    def function(self, raw: Callable) -> Callable:
        """What a jitted function was made from, as one that Python runs."""
        if raw not in self.made:
            text = textwrap.dedent(inspect.getsource(raw))
            text = text[re.search(r"^def ", text, re.MULTILINE).start() :]  # pyright: ignore[reportOptionalMemberAccess]
            text = self._edited(text)
            names = {name: self._stand_in(name, raw.__globals__[name]) for name in _names(raw) & set(raw.__globals__)}
            exec(compile("from __future__ import annotations\n" + text, raw.__name__, "exec"), names)
            self.made[raw] = names[raw.__name__]
        return self.made[raw]

    def _edited(self, text: str) -> str:
        here = [old for old in self.edits if old in text]
        if not here:
            return text
        changes = {old: self.edits.pop(old) for old in here}
        return re.sub("|".join(map(re.escape, changes)), lambda found: changes[found[0]], text)

    def _stand_in(self, name: str, one: Any) -> Any:
        if name in _STAND_INS:
            return _STAND_INS[name]
        if isinstance(one, JITFunction | InterpretedFunction):
            return self.function(one.fn)
        return one.value if isinstance(one, constexpr) else None if isinstance(one, ModuleType) else one


def _names(raw: Callable) -> set[str]:
    return set(raw.__code__.co_names)


def _load(p: Pointer, mask: Any = True, other: Any = 0) -> Any:
    offset, mask = np.broadcast_arrays(p.offset, mask)
    return value(np.where(mask, p.memory[np.where(mask, offset, 0)], other), p.memory.dtype)


def _store(p: Pointer, b: Any, mask: Any = True) -> None:
    offset, b, mask = np.broadcast_arrays(p.offset, b, mask)
    p.memory[offset[mask]] = b[mask]


def _allocate(dtype: Any, shape: list[int], _layout: Any) -> Any:
    staged = len(shape) == 3 or (dtype is np.int64 and len(shape) == 2)
    return model.Memory(shape, dtype) if staged else model.Stage(tuple(shape), dtype)


def _assert(holds: Any) -> None:
    assert holds


def _init(barrier: Any, count: int) -> None:
    barrier.barrier.count = count


_LANGUAGE = SimpleNamespace(
    int64=np.int64, float32=np.float32, float16=np.float16, load=_load, store=_store, static_range=range, range=range,
    static_assert=_assert, NVMMASharedLayout=lambda **_: None, allocate_shared_memory=_allocate,
    warp_specialize=lambda *a: model.MACHINE[0].specialize(*a),
    arange=lambda start, end, layout=None: value(np.arange(start, end)),
    zeros=lambda shape, dtype, layout=None: value(np.zeros(shape), dtype),
    expand_dims=np.expand_dims, exp2=np.exp2, maximum=np.maximum, minimum=np.minimum, where=np.where,
    sum=lambda b, axis: value(np.sum(b, axis)),
    program_id=lambda axis: value(_PLACE[0][axis]), num_programs=lambda axis: value(_PLACE[1][axis]),
    NVMMADistributedLayout=lambda *_: None, SliceLayout=lambda *_: None, DistributedLinearLayout=lambda *_: None,
    convert_layout=lambda b, layout: b, cdiv=lambda n, size: -(-n // size),
)  # fmt: skip
_STAND_INS = {
    "gl": _LANGUAGE, "tl": _LANGUAGE, "warpgroup_mma": model.products, "warpgroup_mma_wait": model.products_done,
    "fence_async_shared": model.fence, "tma": SimpleNamespace(async_copy_global_to_shared=model.copy),
    "mbarrier": SimpleNamespace(
        init=_init, expect=model.arrive, arrive=model.arrive, wait=model.wait, MBarrierLayout=lambda: None
    ),
}  # fmt: skip


def faults_of_a_ring(full: str, empty: str, arrive: str) -> dict[str, tuple[dict[str, str], str]]:
    """Edits that break any kernel that takes its tiles from a ring, and what the model says of each.

    Args:
        full, empty, arrive: the kernel's lines that wait for a copy, wait for a free stage, and release one.
    """
    phase = "(i // RING.STAGES) & 1"  # in common/ring.py
    return {
        "a consumer does not wait for the copy": ({full: "pass"}, "not there yet|in use"),
        "a consumer is a phase ahead": (
            {f"return {phase}": "return (i // RING.STAGES + 1) & 1"},
            "not there yet|deadlock",
        ),
        "the producer does not wait": ({empty: "pass"}, "in use|more arrivals"),
        "the producer begins with the wrong phase": ({f"return ({phase}) ^ 1": f"return {phase}"}, "deadlock"),
        "no stage is released": ({arrive: "pass"}, "deadlock"),
        "a stage is released twice": ({arrive: f"{arrive}; {arrive}"}, "in use|more arrivals|deadlock"),
    }
