"""The steps of a recording as straight-line code: a function that repeats them on other tensors.

Where kernels are compiled, a launch starts what Triton compiled when it was recorded, without Triton's look at every
argument, which takes longer than all the rest. It is given addresses, so that memory which launches alone use need not
be tensors. What was compiled follows from which addresses are multiples of 16 bytes: given tensors have to begin,
modulo 16, where the recorded ones did.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fastcl.kernels.common import launch as launching
from fastcl.rowstats.triton.recording import Memory, Name, Operation, Recorder, Rows, Started, Step

_SMALL = 2**20  # bytes of memory that shares an allocation, and so is released last
_APART = 512  # bytes between those that share one
_VARIABLE = re.compile(r"\b(?:at_\w+|made\d+|tuple\d+|scratch)\b")


def function_of(recorder: Recorder, results: tuple[Any, ...]) -> Callable | None:
    """The function of the recorded tensors; None if something cannot be repeated.

    Args:
        results: what it returns, with names in place of tensors.
    """
    steps = recorder.steps
    if steps is None:
        return None
    parameters = [f"none{k}" if name is None else name for k, name in enumerate(recorder.given)]
    launches = [step for step in steps if isinstance(step, Started)]
    is_compiled = launches and all(step.compiled is not None for step in launches)
    source = _Addressed(steps, results) if is_compiled else _Source()
    return source.function(parameters, steps, results)


class _Source:
    """The source of a function of tensors."""

    def __init__(self) -> None:
        self.space: dict[str, Any] = {"torch": torch, "launching": launching, "new": tuple.__new__}
        self.lines: list[str] = []
        self.owners: dict[str, str] = {}  # of the memory at an address
        self.tuples: dict[str, str] = {}  # names of those that hold tensors, by what makes them
        self.constants: dict[int, str] = {}  # names, by id

    def function(self, parameters: Sequence[str], steps: Sequence[Step], results: tuple[Any, ...]) -> Callable:
        self.begin(parameters, steps)
        for step in steps:
            match step:
                case Memory():
                    self.memory(step)
                case Rows():
                    self.rows(step)
                case Operation():
                    self.operation(step)
                case Started():
                    self.launch(step)
        self.lines.append(f"return {self.tuple(results)}")
        source = [f"def replay({', '.join(parameters)}):", *self.released()]
        exec(compile("\n    ".join(source), "<replay>", "exec"), self.space)
        return self.space["replay"]

    def begin(self, parameters: Sequence[str], steps: Sequence[Step]) -> None:
        """Write what comes before the first step."""

    def memory(self, step: Memory) -> None:
        sizes = ", ".join(map(str, step.shape)) or "()"  # numbers are read in two thirds of a tuple's time
        options = f"dtype={self.constant(step.dtype)}, device={self.constant(step.device)}"
        self.lines.append(f"{step.made} = torch.empty({sizes}, {options})")

    def rows(self, step: Rows) -> None:
        # The method takes a third of the operator's time.
        self.lines.append(f"{', '.join(step.made)}, = {self.value(step.of)}.unbind()")

    def operation(self, step: Operation) -> None:
        options = "".join(f", {name}={self.value(value)}" for name, value in step.options.items())
        call = f"{self.constant(step.function)}({', '.join(map(self.value, step.args))}{options})"
        self.lines.append(f"{', '.join(step.made)}{',' * step.several} = {call}")

    def launch(self, step: Started) -> None:
        one = step.launch
        arguments = ", ".join(f"{name!r}: {self.value(value)}" for name, value in one.arguments.items())
        start = f"{self.constant(one.kernel)}, {one.grid}, {one.warps}, {one.stages}"
        self.lines.append(f"launching.start({start}, {{{arguments}}})")

    def value(self, value: Any) -> str:
        """A tensor that the function has, a constant, or a tuple or list of such."""
        if isinstance(value, Name):
            return value
        if not _has_names(value):
            return self.constant(value)
        if isinstance(value, list):
            return f"[{', '.join(map(self.value, value))}]"
        made = self.tuple(value)
        if made not in self.tuples:  # launches share many
            self.tuples[made] = f"tuple{len(self.tuples)}"
            self.lines.append(f"{self.tuples[made]} = {made}")
        return self.tuples[made]

    def tuple(self, value: tuple[Any, ...]) -> str:
        """What makes a tuple of the same type."""
        inside = f"({', '.join(map(self.value, value))},)"
        return inside if type(value) is tuple else f"new({self.constant(type(value))}, {inside})"

    def constant(self, value: Any) -> str:
        """The name of a constant, or a number or None as it is written."""
        if value is None or type(value) in (bool, int):
            return str(value)
        name = self.constants.setdefault(id(value), f"constant{len(self.space)}")
        self.space[name] = value  # which keeps it, and its id
        return name

    def released(self) -> Iterator[str]:
        """The lines, and after the last one that uses a variable the end of it, as in the functions that made it."""
        last: dict[str, int] = {}
        for k, line in enumerate(self.lines):
            for name in map(str, _VARIABLE.findall(line)):
                last[self.owners.get(name, name)] = k
        for k, line in enumerate(self.lines):
            done = ", ".join(
                sorted(name for name, end in last.items() if end == k < len(self.lines) - 1 and name[:5] != "given")
            )
            if line.startswith(f"{done} = torch.empty("):  # which nothing uses
                continue
            yield line
            if done:
                yield f"del {done}"


class _Addressed(_Source):
    """The same where kernels are compiled."""

    def __init__(self, steps: Sequence[Step], results: tuple[Any, ...]) -> None:
        super().__init__()
        # What has to be a tensor: results, and what PyTorch computes with. Of what is launched, addresses do.
        self.tensors = _names([results, *([step.args, step.options] for step in steps if isinstance(step, Operation))])
        self.located = _names([step.launch.arguments for step in steps if isinstance(step, Started)])
        for step in reversed(steps):
            for names in (self.tensors, self.located):
                if isinstance(step, Rows) and names.intersection(step.made):
                    names.add(step.of)
        self.small: dict[Name, int] = {}  # where it begins in the memory that is shared

    def begin(self, parameters: Sequence[str], steps: Sequence[Step]) -> None:
        self.locate([name for name in parameters if isinstance(name, Name)])
        shared = [step for step in steps if isinstance(step, Memory) and self.is_shared(step)]
        end = 0
        for step in shared:
            self.small[step.made], end = end, end + -(-step.size // _APART) * _APART
        if shared:
            scratch = Memory(Name("scratch"), (end,), torch.uint8, shared[0].device)
            super().memory(scratch)
            self.located.add(scratch.made)
            self.locate([scratch.made])
        active = _driver()
        self.lines.append(f"stream = {self.constant(active.get_current_stream)}({active.get_current_device()})")

    def is_shared(self, step: Memory) -> bool:
        return step.made in self.located - self.tensors and step.size <= _SMALL

    def memory(self, step: Memory) -> None:
        if step.made in self.small:
            self.place(step.made, Name("scratch"), self.small[step.made])
        elif step.made in self.tensors | self.located:
            super().memory(step)
            self.locate([step.made])

    def rows(self, step: Rows) -> None:
        if self.tensors.intersection(step.made):
            super().rows(step)
            self.locate(step.made)
        else:
            for k, name in enumerate(step.made):
                if name in self.located:
                    self.place(name, step.of, k * step.size)

    def operation(self, step: Operation) -> None:
        super().operation(step)
        self.locate(step.made)

    def launch(self, step: Started) -> None:
        one = step.launch
        start = self.constant(step.compiled[(*one.grid, 1, 1)[:3]])
        arguments = ", ".join(self.argument(one.arguments[name]) for name in one.kernel.arg_names)
        self.lines.append(f"{start}({arguments}, stream=stream)")

    def locate(self, tensors: Sequence[Name]) -> None:
        """Write the addresses of tensors that launches take."""
        for name in tensors:
            if name in self.located:
                self.owners[f"at_{name}"] = name
                self.lines.append(f"at_{name} = {name}.data_ptr()")

    def place(self, name: Name, of: Name, offset: int) -> None:
        """Write an address within other memory."""
        self.owners[f"at_{name}"] = self.owners[f"at_{of}"]
        self.lines.append(f"at_{name} = at_{of} + {offset}")

    def argument(self, value: Any) -> str:
        """What a launch is given: addresses for tensors."""
        if isinstance(value, Name):
            return f"at_{value}"
        if not _has_names(value):
            return self.constant(value)
        return f"({', '.join(map(self.argument, value))},)"


def _driver() -> Any:
    from triton.runtime import driver

    return driver.active


def _has_names(value: Any) -> bool:
    return bool(_names(value))


def _names(value: Any) -> set[Name]:
    """All names in nested lists, tuples and dictionaries."""
    if isinstance(value, Name):
        return {value}
    if isinstance(value, dict):
        value = list(value.values())
    return set().union(*map(_names, value)) if isinstance(value, (list, tuple)) else set()
