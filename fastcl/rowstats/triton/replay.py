"""Host code of small calls, recorded once and replayed: what it allocates and launches, as straight-line code.

Between a call of an operator and its last launch lie hundreds of lines of Python, which decide the same for every call
of the same shapes and options. For few rows they take longer than the GPU. So one of these calls is recorded: every
operation of PyTorch and every launch, in order, becomes a line of a function that repeats them on the tensors of later
calls. A recording holds no tensor.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcl.kernels.common import launch as launching

Results = tuple[Tensor | None, ...]
Host = Callable[..., Results]

MOST_ROWS = 16384  # of the first tensor; with more, the host is ahead of the device
MOST_CALLS = 256  # that are remembered
BEFORE = 7  # calls before the one that is recorded, which takes as long as so many
# Besides tuples of these and of tensors, arguments of operations and launches may be nothing else.
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_aten = torch.ops.aten

_seen: dict[Any, int] = {}  # how often, for calls without a recording
_recordings: dict[Any, Host | None] = {}  # None: it cannot be repeated


def run(
    host: Host, tensors: Sequence[Any], options: tuple[Hashable, ...], saved: Sequence[Tensor | None] = (),
    after: Host | None = None,
) -> tuple[Results, Host | None]:  # fmt: skip
    """The results of a host function, which is replayed once it has often been called with tensors of the same shapes
    and equal options; and the recording that was replayed, or None.

    Args:
        host: takes the tensors, the first of which is no None, then the saved ones and the options. What it does may
            follow from shapes, strides, dtypes and options, but not from what the tensors hold. The first tensor's
            device becomes the current one.
        saved: results of another host function for these tensors, so that strides and dtypes need no look.
        after: the recording that gave the saved tensors, which then need no look at all.
    """
    first = tensors[0]
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(first):
            return run(host, tensors, options, saved, after)
    if first.shape[0] > MOST_ROWS or launching.is_recording():
        return host(*tensors, *saved, *options), None
    facts = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    key = shortcut = host, options, launching.forced_architecture(), after, *facts
    found = _recordings.get(key)
    if found is None and saved:
        key = *key[:3], *[None if t is None else t.shape for t in saved], *facts
        found = _recordings.get(key)
        if found is not None and after is not None:
            _remember(shortcut, found)
    if found is not None:
        return found(*tensors, *saved), found
    if key not in _recordings and _is_due(key) and _are_different([*tensors, *saved]):
        return _record(key, host, [*tensors, *saved], options), None
    return host(*tensors, *saved, *options), None


def forget() -> None:
    """Forget all recordings, because launches are chosen in another way from now on."""
    _seen.clear()
    _recordings.clear()


def _is_due(key: Any) -> bool:
    """Whether the call has been seen often enough to be recorded."""
    if len(_seen) >= MOST_CALLS:
        _seen.clear()
    _seen[key] = _seen.get(key, 0) + 1
    return _seen[key] > BEFORE


def _are_different(tensors: Sequence[Tensor | None]) -> bool:
    """Whether no two arguments are one tensor, which a recording would take for either."""
    given = [id(t) for t in tensors if t is not None]
    return len(set(given)) == len(given)


def _record(key: Any, host: Host, tensors: Sequence[Tensor | None], options: tuple[Hashable, ...]) -> Results:
    writer = _Writer(tensors)
    with writer, launching.recorded_by(writer.launch):
        results = host(*tensors, *options)
    _remember(key, writer.function(results))
    _seen.pop(key, None)
    return results


def _remember(key: Any, found: Host | None) -> None:
    if len(_recordings) >= MOST_CALLS:
        _recordings.clear()
    _recordings[key] = found


class _Unknown(LookupError):
    """A value that a function cannot repeat."""


class _Writer(TorchDispatchMode):
    """Writes what PyTorch computes and what is launched within a block as the source of a function."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.names: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # by id, which another tensor may have later
        self.count = 0
        self.space: dict[str, Any] = {"torch": torch, "launching": launching, "new": tuple.__new__}
        self.constants: dict[int, str] = {}  # names, by id
        self.tuples: dict[str, str] = {}  # names of those that hold tensors, by what makes them
        given = [f"none{k}" if t is None else self.named(t, "given") for k, t in enumerate(tensors)]
        self.lines = [f"def replay({', '.join(given)}):"]
        self.is_possible, self.is_launching = True, False

    def function(self, results: Results) -> Host | None:
        """The function; None if something cannot be repeated."""
        try:
            self.lines.append(f"return {self.value(results)}")
        except _Unknown:
            self.is_possible = False
        if not self.is_possible:
            return None
        exec(compile("\n    ".join(_released(self.lines)), "<replay>", "exec"), self.space)
        return self.space["replay"]

    def launch(self, one: launching.Launch) -> None:
        """Write a launch, and start it."""
        if self.is_possible:
            try:
                options = ", ".join(f"{name!r}: {self.value(value)}" for name, value in one.arguments.items())
                given = f"{self.constant(one.kernel)}, {one.grid}, {one.warps}, {one.stages}"
                self.lines.append(f"launching.start({given}, {{{options}}})")
            except _Unknown:
                self.is_possible = False
        self.is_launching = True  # what the interpreter of kernels computes is not the host's
        launching.start(one.kernel, one.grid, one.warps, one.stages, one.arguments)
        self.is_launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.is_possible and not self.is_launching:
            try:
                self.operation(func, args, kwargs or {}, result)
            except _Unknown:
                self.is_possible = False
        return result

    def operation(self, func: Any, args: Sequence[Any], options: dict[str, Any], result: Any) -> None:
        """Write an allocation, or anything else that PyTorch computes."""
        several = isinstance(result, (list, tuple))
        made = result if several else [result]
        if not made or not all(isinstance(t, Tensor) for t in made):  # perhaps the host has seen a value on the device
            raise _Unknown
        if func is _aten.detach.default:  # PyTorch detaches what it has just allocated
            self.names[id(result)] = weakref.ref(result), self.value(args[0])
            return
        if func in (_aten.empty.memory_format, _aten.new_empty.default) and result.is_contiguous():
            sizes = ", ".join(map(str, result.shape)) or "()"  # numbers are read in two thirds of a tuple's time
            call = f"torch.empty({sizes}, dtype={self.value(result.dtype)}, device={self.value(result.device)})"
        elif func is _aten.unbind.int:  # the method takes a third of the operator's time
            call = f"{self.value(args[0])}.unbind({', '.join(map(str, args[1:]))})"
        else:
            named = "".join(f", {name}={self.value(value)}" for name, value in options.items())
            call = f"{self.constant(func)}({', '.join(map(self.value, args))}{named})"
        self.lines.append(f"{', '.join(map(self.named, made))}{',' * several} = {call}")

    def named(self, tensor: Tensor, prefix: str = "made") -> str:
        """The name of a tensor, old or new."""
        if (name := self.known(tensor)) is None:
            name, self.count = f"{prefix}{self.count}", self.count + 1
            self.names[id(tensor)] = weakref.ref(tensor), name
        return name

    def known(self, tensor: Tensor) -> str | None:
        reference, name = self.names.get(id(tensor), (None, None))
        return name if reference is not None and reference() is tensor else None

    def value(self, value: Any) -> str:
        """An argument: a tensor that the function has, a constant, or a tuple or list of arguments."""
        if isinstance(value, Tensor):
            if (name := self.known(value)) is None:
                raise _Unknown
            return name
        if not _has_tensors(value):
            return self.constant(value)
        inside = ", ".join(map(self.value, value))
        if isinstance(value, list):
            return f"[{inside}]"
        made = f"({inside},)" if type(value) is tuple else f"new({self.constant(type(value))}, ({inside},))"
        if made not in self.tuples:  # launches share many
            self.tuples[made], self.count = f"made{self.count}", self.count + 1
            self.lines.append(f"{self.tuples[made]} = {made}")
        return self.tuples[made]

    def constant(self, value: Any) -> str:
        """The name of a constant, or a number or None as it is written."""
        if value is None or type(value) in (bool, int):
            return str(value)
        name = self.constants.setdefault(id(value), f"constant{len(self.space)}")
        self.space[name] = value  # which keeps it, and its id
        return name


def _has_tensors(value: Any) -> bool:
    """Whether an argument is or holds a tensor; raises `_Unknown` unless the rest are constants."""
    if isinstance(value, (list, tuple)):
        return any([_has_tensors(one) for one in value])  # all of them are looked at
    if isinstance(value, _CONSTANTS) or type(value).__name__ == "constexpr":  # a name: Triton is not imported here
        return False
    if isinstance(value, Tensor):
        return True
    raise _Unknown


def _released(lines: Sequence[str]) -> Iterator[str]:
    """The lines, and after the last one that uses a tensor the end of it, as in the functions that made it."""
    last = {name: k for k, line in enumerate(lines) for name in re.findall(r"\bmade\d+\b", line)}
    for k, line in enumerate(lines):
        done = ", ".join(name for name, end in last.items() if end == k and k < len(lines) - 1)
        if line.startswith(f"{done} = torch.empty("):  # which nothing uses
            continue
        yield line
        if done:
            yield f"del {done}"
