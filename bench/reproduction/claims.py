"""Claims as differences that are to be positive, and what the seeds say of them.

A difference is taken between two models or two settings of the same seed, so there is one for each seed. A second one,
its control, asks whether it is more than noise: the noise floor is the reseeded twin, which is the reference trained on
other views. Both come with 95 % confidence intervals of their means over the seeds (Student's t).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import NamedTuple

from bench.reproduction.rows import Row
from fastcl.errors import FastclError
from fastcl.evaluation.few_shot import spread

YES, NOISE, OPEN, NO = "yes", "within the noise", "open", "no"
HOLDS, PARTLY, NOT, UNSHOWN = "holds", "holds partly", "does not hold", "is not shown"


class Interval(NamedTuple):
    """Attributes:
    mean: over the seeds.
    spread: standard deviation over the seeds.
    half: half the width of the confidence interval of the mean.
    """

    mean: float
    spread: float
    half: float

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies on one side of zero, else 0."""
        return (self.mean > self.half) - (self.mean < -self.half)


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values, and how sure it is by Student's t. Raises FastclError for less than two."""
    if len(values) < 2:
        raise FastclError(f"a spread over the seeds needs two seeds or more, got {len(values)}")
    found = spread(values)
    return Interval(found.mean, stdev(values), found.interval or 0.0)


@dataclass(frozen=True)
class Finding:
    """One difference in one sweep.

    Attributes:
        experiment: name of the sweep.
        family: the objectives, a key of FAMILIES.
        measure: a field of Row.
        values: (the first, the second) for each seed; their difference is to be positive.
        control: for each seed a difference that is positive where the first one is more than noise; None: there is no
            such question.
    """

    experiment: str
    family: str
    measure: str
    values: tuple[tuple[float, float], ...]
    control: tuple[float, ...] | None = None

    @property
    def difference(self) -> Interval:
        """First less second."""
        return interval([a - b for a, b in self.values])

    @property
    def answer(self) -> str:
        """YES, NOISE (positive, but not surely more than noise), OPEN (the seeds differ too much to tell) or NO."""
        if (sign := self.difference.sign) < 1:
            return NO if sign else OPEN
        return YES if self.control is None or interval(self.control).sign > 0 else NOISE


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        name: a word for it.
        text: what is claimed, as a sentence.
        figure: of the paper.
        first, second: what the values of a finding are.
        control: what its control is; "" for none.
        find: the findings.
    """

    name: str
    text: str
    figure: str
    first: str
    second: str
    control: str
    find: Callable[[Sequence[Row]], list[Finding]]


def verdict(answers: list[str]) -> str:
    """HOLDS if every answer is YES, PARTLY if a third are: of a dozen intervals one may miss by chance. Else NOT if any
    is NO, and UNSHOWN if none is."""
    if set(answers) == {YES}:
        return HOLDS
    if 3 * answers.count(YES) >= len(answers):
        return PARTLY
    return NOT if NO in answers else UNSHOWN
