"""What an objective is, in words that are equal on two ranks only if it is the same on both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from types import CodeType, FunctionType, MethodType

import torch
from torch import Tensor

from fastcl.losses.objectives import OBJECTIVES, Objective
from fastcl.rowstats.api import RowStats

_NAMES = {objective.code: name for name, objective in OBJECTIVES.items()}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_DEEPEST = 6  # callables in callables, below which names have to do
_SHOWN = 120  # characters of parameters that an error shows


def described(loss: Callable[[RowStats], Tensor]) -> str:
    """A row of the table by its name or data; a callable of the caller's own by its name, its parameters (defaults,
    what it encloses, arguments of a partial, fields of a dataclass) and a digest of these and of its code.

    Of tensors only single numbers on the CPU are read. What other objects hold is not: it may be this rank's own.
    Compiled code does not look into callables.
    """
    if isinstance(loss, Objective) and type(loss) is Objective:  # a subclass may compute something else
        data = f"Objective({loss.denominator}, {loss.positives}, inside={loss.inside})"
        return _NAMES.get(loss.code, data)
    if torch.compiler.is_compiling():
        return "a callable in compiled code"
    numbers = [(name, _spelled(value)) for name, value in _parameters(loss) if isinstance(value, (*_PLAIN, Tensor))]
    shown = ", ".join(f"{name}={value}" for name, value in numbers)[:_SHOWN]
    return f"{_name(loss)}({shown}), digest {_digest(_spelled(loss))}"


def _spelled(value: object, depth: int = 0) -> str:
    """A value with all that is known to be the same on ranks that run the same program."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return repr(value.detach().item()) if value.numel() == 1 and value.device.type == "cpu" else "a tensor"
    if depth > _DEEPEST:
        return _name(value)
    if isinstance(value, tuple | list):
        return f"({', '.join(_spelled(one, depth + 1) for one in value)})"
    parameters = [f"{name}={_spelled(one, depth + 1)}" for name, one in _parameters(value)]
    return f"{_name(value)}({', '.join(parameters)}) {_codes(value)}"


def _name(value: object) -> str:
    return getattr(value, "__qualname__", type(value).__qualname__)


def _parameters(value: object) -> Iterator[tuple[str, object]]:
    """What a callable computes with besides its arguments."""
    if isinstance(value, partial):
        yield "function", value.func
        yield from ((str(k), one) for k, one in enumerate(value.args))
        yield from sorted(value.keywords.items())
    elif isinstance(value, MethodType):
        yield "self", value.__self__
        yield "function", value.__func__
    elif isinstance(value, FunctionType):
        code, defaults = value.__code__, value.__defaults__ or ()
        yield from zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True)
        yield from sorted((value.__kwdefaults__ or {}).items())
        for name, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
            yield name, cell.cell_contents
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))


def _codes(value: object) -> str:
    """Digests of the code that a function or an object runs when it is called."""
    functions = [value] if isinstance(value, FunctionType) else _of_type(value)
    return " ".join(_code_digest(one.__code__) for one in functions)


def _of_type(value: object) -> list[FunctionType]:
    found = (getattr(type(value), name, None) for name in ("__call__", "forward"))
    return [one for one in found if isinstance(one, FunctionType)]


@lru_cache(256)
def _code_digest(code: CodeType) -> str:
    """Of what the code does, not of where it stands."""
    constants = [_constant(one) for one in code.co_consts]
    return _digest(f"{code.co_code.hex()} {code.co_names} {constants}")


def _constant(value: object) -> str:
    if isinstance(value, CodeType):
        return _code_digest(value)
    if isinstance(value, frozenset):  # in an order of this process
        return str(sorted(map(_constant, value)))
    return f"({', '.join(map(_constant, value))})" if isinstance(value, tuple) else repr(value)


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="backslashreplace"), digest_size=4).hexdigest()
