"""What an objective is, in words that ranks compare."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from hashlib import blake2b
from types import CodeType, FunctionType, MethodType

import torch
from torch import Tensor

from fastcl.losses.objectives import OBJECTIVES, Objective
from fastcl.rowstats.api import RowStats

_NAMES = {objective.code: name for name, objective in OBJECTIVES.items()}


def described(loss: Callable[[RowStats], Tensor]) -> str:
    """A row of the table by its name or data; a callable of the caller's own by its name and a digest of its code; one
    that fastcl makes, such as `fastcl.with_margin`, also by its parameters.

    What else a callable holds may be this rank's own, such as its number, and is not looked into. Compiled code looks
    into no callable.
    """
    data = ""
    if isinstance(loss, Objective):
        data = f"({loss.denominator}, {loss.positives}, inside={loss.inside})"
        if type(loss) is Objective:  # a subclass may compute something else
            return _NAMES.get(loss.code, f"Objective{data}")
    if torch.compiler.is_compiling():
        return "a callable in compiled code"
    while isinstance(loss, partial):
        loss = loss.func
    if isinstance(loss, MethodType):
        loss = loss.__func__
    if not isinstance(loss, FunctionType):
        return f"{type(loss).__qualname__}{data}, code {_code_of(type(loss))}"
    if loss.__module__.startswith("fastcl."):
        cells = zip(loss.__code__.co_freevars, loss.__closure__ or (), strict=True)
        data = f"({', '.join(f'{name}={_told(cell.cell_contents)}' for name, cell in cells)})"
    return f"{loss.__qualname__}{data}, code {_digest(loss.__code__)}"


def _told(parameter: object) -> str:
    """A parameter of one of fastcl's own callables: an objective or a number."""
    if isinstance(parameter, Tensor):
        return str(float(parameter.detach())) if parameter.device.type == "cpu" else "a tensor"
    return described(parameter) if isinstance(parameter, Objective) else str(float(parameter))  # pyright: ignore


def _code_of(kind: type) -> str:
    """Digests of the code that an object of this type runs when it is called."""
    functions = (getattr(kind, name, None) for name in ("__call__", "forward"))
    return " ".join(_digest(one.__code__) for one in functions if isinstance(one, FunctionType))


@lru_cache(256)
def _digest(code: CodeType) -> str:
    """Of what the code does, not of where it stands."""
    text = f"{code.co_code.hex()} {code.co_names} {[_constant(one) for one in code.co_consts]}"
    return blake2b(text.encode(errors="backslashreplace"), digest_size=4).hexdigest()


def _constant(value: object) -> str:
    if isinstance(value, CodeType):
        return _digest(value)
    if isinstance(value, frozenset):  # in an order of this process
        return str(sorted(map(_constant, value)))
    return f"({', '.join(map(_constant, value))})" if isinstance(value, tuple) else repr(value)
