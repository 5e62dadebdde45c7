"""What ranks compare of an objective: data of the table, code and parameters of a callable of the caller's own."""

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


def enclosing(weight: float | Tensor | tuple[float, ...]) -> Callable[[fastcl.RowStats], Tensor]:
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
    "enclosed number": (enclosing, 0.1, 0.1, 0.2),
    "enclosed tensor": (enclosing, torch.tensor(0.1), torch.tensor(0.1), torch.tensor(0.2)),
    "enclosed numbers": (enclosing, (0.1, 0.2), (0.1, 0.2), (0.2, 0.1)),
    "margin": (partial(fastcl.with_margin, "ntxent"), 0.1, 0.1, 0.2),
    "margin's objective": (partial(fastcl.with_margin, margin=0.1), "nscl", A, B),
    "partial": (lambda by: partial(scaled, by=by), 3.0, 3.0, 2.0),
    "code": (named_alike, 1, 1, 2),
    "dataclass": (Weighted, 1.0, 1.0, 2.0),
    "method": (lambda weight: Weighted(weight).method, 1.0, 1.0, 2.0),
    "module": (lambda other: other_forward()() if other else Module(), False, False, True),
    "rows of a rank": (enclosing, torch.ones(3), torch.zeros(4), torch.tensor(0.0)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equal_words_stand_for_equal_objectives(name: str) -> None:
    make, one, same, other = PAIRS[name]
    assert described(make(one)) == described(make(same)) != described(make(other))


def test_words_name_the_objective_and_what_it_encloses() -> None:
    assert described(fastcl.OBJECTIVES["supcon"]) == "supcon"
    assert described(fastcl.with_margin("ntxent", 0.25)).startswith("with_margin.<locals>.losses(margin=0.25), digest ")


def test_words_are_those_of_any_process() -> None:
    """Sets have another order there, and running a function changes how it is held."""
    assert scaled(fastcl.RowStats(*[torch.ones(2)] * 9)).tolist() == [2, 2]
    code = "import test_sameness as t; print(t.described(t.partial(t.scaled, by=3.0)))"
    changed = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=changed, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == described(partial(scaled, by=3.0))
