"""What ranks compare of an objective: data of the table, code of a callable of the caller's own."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl.losses.sameness import described


def scaled(stats: fastcl.RowStats, by: float = 2.0, *, kind: str = "a") -> Tensor:
    return stats.lse_other * by if kind in {"a", "b", "c", "d"} else stats.lse_other


def added(stats: fastcl.RowStats) -> Tensor:
    return torch.add(stats.lse_other, 1)


def subtracted(stats: fastcl.RowStats) -> Tensor:
    return torch.sub(stats.lse_other, 1)


subtracted.__code__ = subtracted.__code__.replace(co_name="added", co_qualname="added")


class Own(fastcl.Objective):
    pass


def enclosing(weight: object) -> Callable[[fastcl.RowStats], Tensor]:
    def objective(stats: fastcl.RowStats) -> Tensor:
        return stats.lse_other * weight

    return objective


def named_alike(power: int) -> Callable[[fastcl.RowStats], Tensor]:
    """Two functions of one name that differ in a constant of an inner function."""
    if power == 1:

        def objective(stats: fastcl.RowStats) -> Tensor:
            return sum((lambda row: row * 1)(row) for row in stats.lse_other)

    else:

        def objective(stats: fastcl.RowStats) -> Tensor:
            return sum((lambda row: row * 2)(row) for row in stats.lse_other)

    return objective


@dataclass
class Weighted:
    weight: float

    def __call__(self, stats: fastcl.RowStats) -> Tensor:
        return stats.lse_other * self.weight

    def method(self, stats: fastcl.RowStats) -> Tensor:
        return stats.lse_other + self.weight


class Module(nn.Module):
    def forward(self, stats: fastcl.RowStats) -> Tensor:
        return stats.lse_other


def other_forward() -> type[nn.Module]:
    class Module(nn.Module):
        def forward(self, stats: fastcl.RowStats) -> Tensor:
            return -stats.lse_other

    Module.__qualname__ = "Module"
    return Module


A, B = fastcl.Objective(("other",), ("view",)), fastcl.Objective(("other",), ("peer",))
# How an objective is made, two values that are the same to it, and one that is not.
PAIRS: dict[str, tuple[Callable, object, object, object]] = {
    "table": (lambda name: fastcl.OBJECTIVES.get(name, A), "nscl", "the same data", "dcl"),
    "data": (lambda inside: fastcl.Objective(("view", "other"), ("peer",), inside), True, True, False),
    "margin's objective": (partial(fastcl.with_margin, margin=0.1), "nscl", A, B),
    "partial": (lambda power: partial(named_alike(power)), 1, 1, 2),
    "name": (lambda other: enclosing(1.0) if other else scaled, False, False, True),
    "subclass": (lambda inside: Own(("view", "other"), ("peer",), inside), True, True, False),
    "another class": (lambda kind: kind(("view", "other"), ("peer",), True), Own, Own, fastcl.Objective),
    "names in the code": (lambda minus: subtracted if minus else added, False, False, True),
    "code": (named_alike, 1, 1, 2),
    "method": (lambda other: Weighted(1.0).method if other else Weighted(1.0), False, False, True),
    "a name that a decorator gave": (
        lambda minus: torch.no_grad()(subtracted if minus else scaled),
        False,
        False,
        True,
    ),
    "module": (lambda other: other_forward()() if other else Module(), False, False, True),
}


def unset() -> Callable[[fastcl.RowStats], Tensor]:
    """An objective that encloses a name without a value."""

    def objective(stats: fastcl.RowStats) -> Tensor:
        return stats.lse_other * later

    if objective is None:
        later = 1.0
    return objective


def test_what_may_be_a_ranks_own_is_not_looked_into() -> None:
    own = (0, 1, 1.0, torch.ones(3), torch.tensor(1.0), object(), {1: 2})
    assert len({described(enclosing(value)) for value in own}) == 1
    assert len({described(partial(scaled, by=value)) for value in own}) == 1
    assert described(Weighted(1.0)) == described(Weighted(2.0)) and described(unset()) == described(unset())


@pytest.mark.parametrize("name", PAIRS)
def test_equal_words_stand_for_equal_objectives(name: str) -> None:
    make, one, same, other = PAIRS[name]
    assert described(make(one)) == described(make(same)) != described(make(other))


def test_words_name_the_objective_and_what_it_encloses() -> None:
    assert described(fastcl.OBJECTIVES["supcon"]) == "supcon"
    assert described(fastcl.with_margin("ntxent", 0.25)) == "with_margin(ntxent)"


def test_words_are_those_of_any_process() -> None:
    """Sets have another order there, and running a function changes how it is held."""
    assert scaled(fastcl.RowStats(*[torch.ones(2)] * 9)).tolist() == [2, 2]
    code = "import test_sameness as t; print(t.described(t.scaled))"
    changed = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=changed, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == described(scaled)
