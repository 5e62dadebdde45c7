"""What host code does, step by step: operations of PyTorch and launches, with names in place of tensors."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcl.kernels.common import launch as launching

# Besides tuples of these and of tensors, arguments of operations and launches may be nothing else.
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_aten = torch.ops.aten


class Unknown(LookupError):
    """A value that a function cannot repeat."""


class Name(str):
    """In place of a tensor."""


@dataclass(frozen=True)
class Memory:
    """Contiguous memory that is allocated."""

    made: Name
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        """In bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Operation:
    """Another operation of PyTorch."""

    function: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    made: tuple[Name, ...]
    several: bool  # results, which is also said of a list of one


@dataclass(frozen=True)
class Rows:
    """Views of the rows of contiguous memory, `size` bytes each."""

    of: Name
    made: tuple[Name, ...]
    size: int


@dataclass(frozen=True)
class Started:
    """A launch, and what Triton compiled for it; None in the interpreter."""

    launch: launching.Launch
    compiled: Any


Step: TypeAlias = Memory | Operation | Rows | Started


class Recorder(TorchDispatchMode):
    """Lists the steps of a block that runs within it and within `launching.recorded_by(recorder.launch)`.

    Attributes:
        given: a name for each tensor that the block is given, or None.
        steps: None once something came that cannot be repeated.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self._names: dict[int, tuple[weakref.ref[Tensor], Name]] = {}  # by id, which another tensor may have later
        self._count = 0
        self.given = [None if t is None else self._named(t, "given") for t in tensors]
        self.steps: list[Step] | None = []
        self._is_launching = False

    def launch(self, one: launching.Launch) -> None:
        """Start a launch, and note it."""
        self._is_launching = True  # what the interpreter of kernels computes is not the host's
        compiled = launching.start(one.kernel, one.grid, one.warps, one.stages, one.arguments)
        self._is_launching = False
        if self.steps is not None:
            try:
                arguments = {name: self.seen(value) for name, value in one.arguments.items()}
                self.steps.append(Started(replace(one, arguments=arguments), compiled))
            except Unknown:
                self.steps = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.steps is not None and not self._is_launching:
            try:
                self._operation(func, args, kwargs or {}, result)
            except Unknown:
                self.steps = None
        return result

    def _operation(self, func: Any, args: Sequence[Any], options: dict[str, Any], result: Any) -> None:
        assert self.steps is not None
        several = isinstance(result, (list, tuple))
        made = result if several else [result]
        if not made or not all(isinstance(t, Tensor) for t in made):  # perhaps the host has seen a value on the device
            raise Unknown
        if func is _aten.detach.default:  # PyTorch detaches what it has just allocated
            self._names[id(result)] = weakref.ref(result), self.seen(args[0])
        elif func in (_aten.empty.memory_format, _aten.new_empty.default) and result.is_contiguous():
            self.steps.append(Memory(self._named(result), tuple(result.shape), result.dtype, result.device))
        elif func is _aten.unbind.int and len(args) == 1 and args[0].is_contiguous():
            of = self.seen(args[0])
            self.steps.append(Rows(of, tuple(map(self._named, made)), made[0].nbytes))
        else:
            seen = self.seen(tuple(args)), {name: self.seen(value) for name, value in options.items()}
            self.steps.append(Operation(func, *seen, tuple(map(self._named, made)), several))

    def _named(self, tensor: Tensor, prefix: str = "made") -> Name:
        """The name of a tensor, old or new."""
        if (name := self._known(tensor)) is None:
            name, self._count = Name(f"{prefix}{self._count}"), self._count + 1
            self._names[id(tensor)] = weakref.ref(tensor), name
        return name

    def _known(self, tensor: Tensor) -> Name | None:
        reference, name = self._names.get(id(tensor), (None, None))
        return name if reference is not None and reference() is tensor else None

    def seen(self, value: Any) -> Any:
        """A value with names in place of the tensors in it; raises `Unknown` unless the rest are constants."""
        if isinstance(value, Tensor):
            if (name := self._known(value)) is None:
                raise Unknown
            return name
        if isinstance(value, (list, tuple)):
            found = [self.seen(one) for one in value]
            return found if isinstance(value, list) else tuple.__new__(type(value), found)
        if isinstance(value, _CONSTANTS) or type(value).__name__ == "constexpr":  # Triton is not imported here
            return value
        raise Unknown
