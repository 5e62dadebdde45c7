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
from fastcl.rowstats.hidden import Hidden, Layout, Place
from fastcl.rowstats.triton.recording import Memory, Name, Operation, Recorder, Rows, Started, Step

_SMALL = 2**20  # bytes of memory that shares an allocation, and so is released last
_APART = 512  # bytes between those that share one
_HIDDEN = Name("hidden")  # the memory of hidden results
_GIVEN = Name("given")  # the same in a backward pass
_VARIABLE = re.compile(r"\b(?:at_\w+|made\d+|tuple\d+|scratch|hidden)\b")


def function_of(
    recorder: Recorder, results: tuple[Any, ...], hidden: tuple[Any, ...] = (), given: Layout | None = None
) -> Callable | None:
    """The function of the recorded tensors, which returns results and hidden results; None if something cannot be
    repeated.

    Args:
        results, hidden: what it returns, with names in place of tensors.
        given: of the last tensors, which the function takes as one memory.
    """
    steps = recorder.steps
    if steps is None:
        return None
    parameters = [f"none{k}" if name is None else name for k, name in enumerate(recorder.given)]
    launches = [step for step in steps if isinstance(step, Started)]
    is_compiled = launches and all(step.compiled is not None for step in launches)
    source = _Addressed(steps, results, hidden) if is_compiled else _Source()
    return source.function(parameters, steps, results, hidden, given)


class _Source:
    """The source of a function of tensors."""

    def __init__(self) -> None:
        self.space: dict[str, Any] = {"torch": torch, "launching": launching, "new": tuple.__new__}
        self.lines: list[str] = []
        self.owners: dict[str, str] = {}  # of the memory at an address
        self.tuples: dict[str, str] = {}  # names of those that hold tensors, by what makes them
        self.constants: dict[int, str] = {}  # names, by id

    def function(
        self, parameters: Sequence[str], steps: Sequence[Step], results: tuple[Any, ...], hidden: tuple[Any, ...],
        given: Layout | None,
    ) -> Callable:  # fmt: skip
        places = () if given is None else given.places
        alone = len(parameters) - len(places)
        self.begin(parameters[:alone])
        if places:
            self.within(dict(zip(parameters[alone:], places, strict=True)))
            parameters = [*parameters[:alone], _GIVEN]
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
        self.lines.append(f"return {self.tuple(results)}, {self.hidden(hidden)}")
        source = [f"def replay({', '.join(parameters)}):", *self.released()]
        exec(compile("\n    ".join(source), "<replay>", "exec"), self.space)
        return self.space["replay"]

    def begin(self, parameters: Sequence[str]) -> None:
        """Write what comes before the first step."""

    def within(self, places: dict[str, Place | None]) -> None:
        """Write what makes given tensors of the memory that holds them."""
        for name, place in places.items():
            if place is not None:
                self.lines.append(f"{name} = {self.constant(place.tensor)}({_GIVEN})")

    def hidden(self, names: tuple[Any, ...]) -> str:
        """What makes the hidden results."""
        return self.tuple(names)

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
        inside = f"({', '.join(map(self.value, value))}{',' * bool(value)})"
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

    def __init__(self, steps: Sequence[Step], results: tuple[Any, ...], hidden: tuple[Any, ...]) -> None:
        super().__init__()
        # What has to be a tensor: results, and what PyTorch computes with. Of what is launched, addresses do.
        operations = [[step.args, step.options] for step in steps if isinstance(step, Operation)]
        self.tensors = _with_memory(_names([results, *operations]), steps)
        self.located = _with_memory(_names([one.launch.arguments for one in steps if isinstance(one, Started)]), steps)
        self.made = {step.made: step for step in steps if isinstance(step, Memory)}
        self.saved = [name for name in hidden if name is not None]
        if len(set(self.saved)) < len(self.saved) or not self.made.keys() - self.tensors >= set(self.saved):
            self.saved.clear()
            self.tensors = _with_memory(self.tensors | _names(hidden), steps)
        self.shared: dict[Name, tuple[Name, int]] = {}  # the memory that holds it, and where it begins

    def begin(self, parameters: Sequence[str]) -> None:
        self.locate([name for name in parameters if isinstance(name, Name)])
        apart = self.located - self.tensors - set(self.saved)
        self.share(Name("scratch"), [name for name, one in self.made.items() if name in apart and one.size <= _SMALL])
        self.share(_HIDDEN, self.saved)
        active = _driver()
        self.lines.append(f"stream = {self.constant(active.get_current_stream)}({active.get_current_device()})")

    def share(self, memory: Name, names: Sequence[Name]) -> None:
        """Write one allocation in place of several."""
        end = 0
        for name in names:
            self.shared[name], end = (memory, end), end + -(-self.made[name].size // _APART) * _APART
        if names:
            self.located.add(memory)
            super().memory(Memory(memory, (end,), torch.uint8, self.made[names[0]].device))
            self.locate([memory])

    def within(self, places: dict[str, Place | None]) -> None:
        self.located.add(_GIVEN)
        self.locate([_GIVEN])
        super().within({name: place for name, place in places.items() if name in self.tensors})
        for name, place in places.items():
            if place is not None and name in self.located:
                self.place(Name(name), _GIVEN, place.offset)

    def hidden(self, names: tuple[Any, ...]) -> str:
        if not self.saved:
            return super().hidden(names)
        steps = [self.made.get(name) for name in names]
        layout = Layout([one and Place(self.shared[one.made][1], one.size, one.shape, one.dtype) for one in steps])
        return f"new({self.constant(Hidden)}, ({_HIDDEN}, {self.constant(layout)}))"

    def memory(self, step: Memory) -> None:
        if step.made in self.shared:
            self.place(step.made, *self.shared[step.made])
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


def _with_memory(names: set[Name], steps: Sequence[Step]) -> set[Name]:
    """The names, and those of the memory of rows among them."""
    for step in reversed(steps):
        if isinstance(step, Rows) and names.intersection(step.made):
            names.add(step.of)
    return names


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
