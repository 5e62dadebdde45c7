"""The claims of arXiv 2510.08852 that the sweeps can answer, each with the differences that answer it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from bench.reproduction.claims import Claim, Finding
from bench.reproduction.experiments import EXPERIMENTS, FAMILIES
from bench.reproduction.rows import Row, having
from fastcl.errors import FastclError
from fastcl.report.run import RESEEDED

MEASURES = {"cka": "CKA", "rsa": "RSA"}  # of the claims; the weight gap has one of its own
FALL = 0.05  # of CKA, below which it stays high
LAST, FIRST = -1, 1  # evaluation; that at 0, of the initial weights, tells nothing


def by_seed(rows: Sequence[Row], pair: tuple[str, str], measure: str, at: int = LAST) -> dict[int, float]:
    """A measure of a pair of models by seed, at one of its evaluations.

    Raises:
        FastclError: it is undefined there, or the seeds were not evaluated at the same epochs.
    """
    found: dict[int, dict[int, float | None]] = {}
    for row in having(rows, model=pair[0], other=pair[1]):
        found.setdefault(row.seed, {})[row.epoch] = getattr(row, measure)
    if len({tuple(sorted(values)) for values in found.values()}) > 1:
        raise FastclError(f"{rows[0].experiment}: the seeds of {' and '.join(pair)} were evaluated at different epochs")
    ends = {seed: values[sorted(values)[at]] for seed, values in sorted(found.items())}
    if undefined := [seed for seed, value in ends.items() if value is None]:
        raise FastclError(
            f"{rows[0].experiment}: {measure} of {' and '.join(pair)} is undefined for seed {undefined[0]}"
        )
    return {seed: value for seed, value in ends.items() if value is not None}


def _paired(
    rows: tuple[Sequence[Row], Sequence[Row]], pairs: tuple[tuple[str, str], tuple[str, str]], measure: str,
    at: tuple[int, int] = (LAST, LAST),
) -> tuple[tuple[float, float], ...]:  # fmt: skip
    """What is compared, by seed: a measure in some rows of a pair of models, and in others of another."""
    first, second = (by_seed(*one) for one in zip(rows, pairs, (measure, measure), at, strict=True))
    if first.keys() != second.keys():
        seeds = f"{sorted(first)} and {sorted(second)}"
        raise FastclError(
            f"{rows[0][0].experiment}: {measure} of {pairs[0][1]} and {pairs[1][1]} has the seeds {seeds}"
        )
    return tuple((first[seed], second[seed]) for seed in first)


def _differences(values: Iterable[tuple[float, float]]) -> tuple[float, ...]:
    return tuple(a - b for a, b in values)


def _beyond(values: Iterable[tuple[float, float]], floor: Iterable[tuple[float, float]]) -> tuple[float, ...]:
    """By seed, how much larger one difference is than another."""
    return _differences(zip(_differences(values), _differences(floor), strict=True))


def _sweeps(rows: Sequence[Row], *others: str) -> Iterator[tuple[str, str, tuple[str, str], list[Row]]]:
    """(name, family, its pair, rows) of the sweeps whose reference is compared with all these models."""
    for experiment in EXPERIMENTS:
        mine = having(rows, experiment=experiment.name)
        known = {row.other for row in mine}
        for family, pair in FAMILIES.items():
            if set(others) <= known and pair[1] in known and pair[0] == experiment.models[0]:
                yield experiment.name, family, pair, mine


def _closer(rows: Sequence[Row], other: str) -> list[Finding]:
    """NSCL less another model; the control is a rerun less that model."""
    found = []
    for name, family, pair, mine in _sweeps(rows, "supcon", "ce", RESEEDED):
        that, rerun = (pair[0], other), (pair[0], RESEEDED)
        for measure in MEASURES:
            values = _paired((mine, mine), (pair, that), measure)
            control = None if other == RESEEDED else _differences(_paired((mine, mine), (rerun, that), measure))
            found.append(Finding(name, family, measure, values, control))
    return found


def _trend(rows: Sequence[Row], key: str, kind: str, *, falls: bool = False, rule: str = "") -> list[Finding]:
    """The end of a swept key where alignment is to be highest less the other one; the control is that difference less
    the rerun's.

    Args:
        rows: all of them.
        key: a field of Row.
        kind: how the names of the sweeps end.
        falls: whether alignment is to fall with the key.
        rule: of the learning rate.
    """
    found = []
    for experiment in EXPERIMENTS:
        mine = having(rows, experiment=experiment.name, rule=rule)
        values = sorted({getattr(row, key) for row in mine})
        if not experiment.name.endswith(f"-{kind}") or len(values) < 2:
            continue
        low, high = (having(mine, **{key: value}) for value in (values[0], values[-1]))
        ends = (low, high) if falls else (high, low)
        rerun = (experiment.models[0], RESEEDED)
        for family, pair in FAMILIES.items():
            if set(pair) <= set(experiment.models):
                for measure in MEASURES:
                    both = _paired(ends, (pair, pair), measure)
                    control = _beyond(both, _paired(ends, (rerun, rerun), measure))
                    found.append(Finding(experiment.name, family, measure, both, control))
    return found


def _parting(rows: Sequence[Row]) -> list[Finding]:
    """The weight gap at the last evaluation less that at the first one after training began; the control is that
    difference less the rerun's."""
    found = []
    for name, family, pair, mine in _sweeps(rows, "supcon", "ce", RESEEDED):
        rerun = (pair[0], RESEEDED)
        values, floor = (_paired((mine, mine), (p, p), "weight_gap", (LAST, FIRST)) for p in (pair, rerun))
        found.append(Finding(name, family, "weight_gap", values, _beyond(values, floor)))
    return found


def _staying(rows: Sequence[Row]) -> list[Finding]:
    """CKA at the last evaluation less that at the first one after training began, less a fall that does not count."""
    found = []
    for name, family, pair, mine in _sweeps(rows, "supcon", "ce"):
        values = _paired((mine, mine), (pair, pair), "cka", (LAST, FIRST))
        found.append(Finding(name, family, "cka", tuple((last, first - FALL) for last, first in values)))
    return found


_MOST, _FEWEST, _RERUN = "most classes", "fewest classes", "the difference less that of a rerun"
CLAIMS = (
    Claim(
        "close", "NSCL ends closer to CL than a rerun of CL on other views does.", "Fig. 2, our question", "NSCL",
        "rerun", "", partial(_closer, other=RESEEDED),
    ),
    Claim(
        "nearer than SCL", "NSCL ends nearer to CL than SCL (SupCon) does.", "Fig. 2", "NSCL", "SCL", "rerun less SCL",
        partial(_closer, other="supcon"),
    ),
    Claim(
        "nearer than CE", "NSCL ends nearer to CL than cross-entropy does.", "Fig. 2", "NSCL", "CE", "rerun less CE",
        partial(_closer, other="ce"),
    ),
    Claim(
        "classes", "The more classes, the more alike CL and NSCL are.", "Fig. 3", _MOST, _FEWEST, _RERUN,
        partial(_trend, key="classes", kind="classes"),
    ),
    Claim(
        "temperature", "The higher the temperature, the more alike CL and NSCL are.", "Fig. 4", "highest temperature",
        "lowest temperature", _RERUN, partial(_trend, key="temperature", kind="temperature"),
    ),
    Claim(
        "batch", "If the learning rate grows with the batch size, larger batches make CL and NSCL less alike.",
        "Fig. 5", "smallest batch", "largest batch", _RERUN,
        partial(_trend, key="batch", kind="batch", falls=True, rule="linear"),
    ),
    Claim(
        "weights apart", "The weights of CL and NSCL go on moving apart.", "Fig. 6", "last evaluation",
        "first evaluation", _RERUN, _parting,
    ),
    Claim(
        "representations alike", f"Meanwhile their representations stay alike: CKA falls by less than {FALL}.",
        "Fig. 6, our limit", "last evaluation", f"first evaluation less {FALL}", "", _staying,
    ),
)  # fmt: skip
