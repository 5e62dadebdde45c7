"""What an objective is, in words that ranks compare."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from hashlib import blake2b
from types import CodeType, FunctionType, MethodType

from torch import Tensor

from fastcl.dispatch import constant_while_compiling
from fastcl.losses.explicit import Margin
from fastcl.losses.objectives import OBJECTIVES, Objective
from fastcl.rowstats.api import RowStats

_NAMES = {objective.code: name for name, objective in OBJECTIVES.items()}


def described(loss: Callable[[RowStats], Tensor]) -> str:
    """A row of the table by its name or data, one with a margin by that row; a callable of the caller's own by its name
    and a digest of its code. What else a callable holds may be this rank's own, such as its number, and is not looked
    into."""
    data = ""
    if isinstance(loss, Margin):
        return f"with_margin({described(loss.objective)})"
    if isinstance(loss, Objective):
        data = f"({loss.denominator}, {loss.positives}, inside={loss.inside})"
        if type(loss) is Objective:  # a subclass may compute something else
            return _NAMES.get(loss.code, f"Objective{data}")
    while isinstance(loss, partial):
        loss = loss.func
    if isinstance(loss, MethodType):
        loss = loss.__func__
    if isinstance(loss, FunctionType):
        return _of_code(loss.__name__, loss.__code__)
    return f"{_of_type(type(loss))}{data}"


@constant_while_compiling
def _of_code(name: str, code: CodeType) -> str:
    """The name of a function, which a decorator may have given to its own, and a digest of its code."""
    place = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has no such name
    return f"{place if place.endswith(name) else f'{name} in {place}'}, code {_digest(code)}"


@constant_while_compiling
def _of_type(kind: type) -> str:
    """The name of a type, and digests of the code that its objects run when they are called."""
    functions = (getattr(kind, name, None) for name in ("__call__", "forward"))
    codes = [_digest(one.__code__) for one in functions if isinstance(one, FunctionType)]
    return f"{kind.__qualname__}, code {' '.join(codes)}"


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
