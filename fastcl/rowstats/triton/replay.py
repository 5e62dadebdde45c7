"""Host code of small calls, run once and replayed: what it allocated and launched, as straight-line code.

Between a call of an operator and its last launch lie hundreds of lines of Python, which decide the same for every call
of the same shapes and options. For few rows they take longer than the GPU. So the second such call is recorded, every
operation of PyTorch and every launch in order, and written as a function that repeats them on the tensors of later
calls. A recording holds no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcl.kernels.common.launch import Launch, forced_architecture, is_recording, launch, recording

Results = tuple[Tensor | None, ...]
Host = Callable[..., Results]

aten = torch.ops.aten
MOST_ROWS = 16384  # of a tensor that is replayed; with more, the host is ahead of the device
MOST_CALLS = 256  # that are remembered
# Besides tuples of these and of tensors, arguments of operations and launches may be nothing else.
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)

# By call: the function that repeats it; the host function if none can; None if it was seen once.
_calls: dict[Any, Any] = {}
_NEW = object()


def run(host: Host, args: Sequence[Any]) -> Results:
    """The host function's results; replayed from the third call with tensors of the same shapes and equal other
    arguments on.

    Args:
        host: takes tensors, lists of them, and values with a hash. What it does may follow from shapes, strides, dtypes
            and these values, but not from what the tensors hold. The first tensor's device is the current one.
    """
    tensors: list[Tensor] = []
    key = host, forced_architecture(), *_key(args, tensors)
    with torch.cuda.device_of(tensors[0]):
        if len(tensors[0]) > MOST_ROWS or is_recording():
            return host(*args)
        known = _calls.get(key, _NEW)
        if known is _NEW:
            if len(_calls) >= MOST_CALLS:
                _calls.clear()
            _calls[key] = None
        if known is _NEW or known is host:
            return host(*args)
        with torch._C._AutoDispatchBelowAutograd():  # autograd would put other tensors in the place of views
            if known is not None:
                return known(*tensors)
            results, _calls[key] = _recorded(host, args, tensors)
            return results


def forget() -> None:
    """Forget all recordings, because launches are chosen in another way from now on."""
    _calls.clear()


def _key(args: Iterable[Any], tensors: list[Tensor]) -> tuple[Any, ...]:
    """What a call is recognised by; its tensors are appended to `tensors`."""
    key: list[Any] = []
    for value in args:
        if isinstance(value, Tensor):
            tensors.append(value)
            key.append((value.shape, value.stride(), value.dtype, value.device))
        else:
            key.append(_key(value, tensors) if type(value) in (list, tuple) else value)
    return tuple(key)


class _Operation(NamedTuple):
    function: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    result: Any


class _Watch(TorchDispatchMode):
    """Lists what PyTorch computes, but not what the interpreter of kernels does."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self.launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.launching:
            self.steps.append(_Operation(func, args, kwargs or {}, result))
        return result

    @contextmanager
    def launch(self) -> Iterator[None]:
        """Around a launch."""
        self.launching = True
        yield
        self.launching = False


def _recorded(host: Host, args: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[Results, Host]:
    """The results of a call, and the function that repeats it; the host function if that is impossible."""
    with _Watch() as watch, recording(watch.launch) as watch.steps:
        results = host(*args)
    if len(set(map(id, tensors))) < len(tensors):  # the recording could not tell them apart
        return results, host
    try:
        return results, _Writer(tensors).function(watch.steps, results)
    except LookupError:
        return results, host


class _Writer:
    """Writes a recording as the source of a function. Raises LookupError for a value that it cannot repeat."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.names = {id(t): f"given{k}" for k, t in enumerate(tensors)}  # of tensors, and of tuples that hold some
        self.space: dict[str, Any] = {"torch": torch, "launch": launch, "new": tuple.__new__}
        self.lines = [f"def replay({', '.join(self.names.values())}):"]

    def function(self, steps: Sequence[Any], results: Results) -> Host:
        for step in steps:
            if isinstance(step, Launch):
                options = "".join(f", {name}={self.value(value)}" for name, value in step.arguments.items())
                given = self.constant(step.kernel), self.value(step.grid), str(step.warps), str(step.stages)
                self.lines.append(f"launch({', '.join(given)}{options})")
            else:
                self.operation(step)
        self.lines.append(f"return {self.value(results)}")
        exec("\n    ".join(_released(self.lines)), self.space)
        return self.space["replay"]

    def operation(self, step: _Operation) -> None:
        """An allocation, or anything else that PyTorch computes."""
        several = isinstance(step.result, (list, tuple))
        made = step.result if several else [step.result]
        if not all(isinstance(t, Tensor) for t in made):  # the host has seen a value on the device
            raise LookupError(step.function)
        if step.function is aten.detach.default:  # without autograd it is the same tensor
            self.names[id(step.result)] = self.value(step.args[0])
            return
        if step.function in (aten.empty.memory_format, aten.new_empty.default):
            (t,) = made
            call = f"torch.empty({tuple(t.shape)}, dtype={self.value(t.dtype)}, device={self.value(t.device)})"
        elif step.function is aten.unbind.int:
            call = f"{self.value(step.args[0])}.unbind({', '.join(map(str, step.args[1:]))})"
        else:
            options = "".join(f", {name}={self.value(value)}" for name, value in step.options.items())
            call = f"{self.constant(step.function)}({', '.join(map(self.value, step.args))}{options})"
        self.lines.append(f"{', '.join(map(self.named, made))}{',' * several} = {call}")

    def value(self, value: Any) -> str:
        """An argument: a tensor that the function has, a constant, or a tuple or list of arguments."""
        if isinstance(value, Tensor) or id(value) in self.names:
            return self.names[id(value)]
        if not isinstance(value, (list, tuple)):
            if isinstance(value, _CONSTANTS) or type(value).__name__ == "constexpr":
                return self.constant(value)
            raise LookupError(type(value))
        inside = [self.value(one) for one in value]
        if all(name.startswith("constant") for name in inside):
            return self.constant(value)
        if type(value) is list:
            return f"[{', '.join(inside)}]"
        text = f"({', '.join(inside)},)"
        if type(value) is not tuple:  # several launches take the same one
            self.lines.append(f"{self.named(value)} = new({self.constant(type(value))}, {text})")
            return self.names[id(value)]
        return text

    def named(self, value: Any) -> str:
        return self.names.setdefault(id(value), f"made{len(self.names)}")

    def constant(self, value: Any) -> str:
        name = f"constant{len(self.space)}"
        self.space[name] = value
        return name


def _released(lines: Sequence[str]) -> Iterator[str]:
    """The lines, and after the last one that uses a value the end of it, as in the functions that made it."""
    last = {name: k for k, line in enumerate(lines) for name in re.findall(r"\bmade\d+\b", line)}
    for k, line in enumerate(lines):
        yield line
        if done := [name for name, end in last.items() if end == k and not line.startswith("return")]:
            yield f"del {', '.join(done)}"
