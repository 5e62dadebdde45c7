"""The claims of arXiv 2510.08852 that the sweeps can answer, each with the differences that answer it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from bench.reproduction.claims import Claim, Finding
from bench.reproduction.experiments import EXPERIMENTS, FAMILIES
from bench.reproduction.rows import Row
from fastcl.report.run import RESEEDED

MEASURES = {"cka": "CKA", "rsa": "RSA"}  # of the claims; the weight gap has one of its own
FALL = 0.05  # of CKA, below which it stays high
LAST, FIRST = -1, 1  # evaluation; that at 0, of the initial weights, tells nothing


def by_seed(rows: Sequence[Row], pair: tuple[str, str], measure: str, at: int = LAST) -> dict[int, float]:
    """A measure of a pair of models by seed, at one of its evaluations."""
    found: dict[int, dict[int, float]] = {}
    for row in rows:
        if (row.model, row.other) == pair and (value := getattr(row, measure)) is not None:
            found.setdefault(row.seed, {})[row.epoch] = value
    return {seed: values[sorted(values)[at]] for seed, values in sorted(found.items())}


def _paired(
    rows: tuple[Sequence[Row], Sequence[Row]], pairs: tuple[tuple[str, str], tuple[str, str]], measure: str,
    at: tuple[int, int] = (LAST, LAST),
) -> tuple[tuple[float, float], ...]:  # fmt: skip
    """What is compared, by seed: a measure in some rows of a pair of models, and in others of another."""
    first, second = (by_seed(*one) for one in zip(rows, pairs, (measure, measure), at, strict=True))
    return tuple((first[seed], second[seed]) for seed in first if seed in second)


def _differences(values: tuple[tuple[float, float], ...]) -> tuple[float, ...]:
    return tuple(a - b for a, b in values)


def _sweeps(rows: Sequence[Row], *others: str) -> Iterator[tuple[str, str, tuple[str, str], list[Row]]]:
    """(name, family, its pair, rows) of the sweeps whose reference is compared with all these models."""
    for experiment in EXPERIMENTS:
        mine = [row for row in rows if row.experiment == experiment.name]
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
        mine = [row for row in rows if row.experiment == experiment.name and row.rule == rule]
        values = sorted({getattr(row, key) for row in mine})
        if not experiment.name.endswith(f"-{kind}") or len(values) < 2:
            continue
        low, high = ([row for row in mine if getattr(row, key) == value] for value in (values[0], values[-1]))
        ends = (low, high) if falls else (high, low)
        rerun = (experiment.models[0], RESEEDED)
        for family, pair in FAMILIES.items():
            if set(pair) <= set(experiment.models):
                for measure in MEASURES:
                    both = _paired(ends, (pair, pair), measure)
                    floor = _differences(_paired(ends, (rerun, rerun), measure))
                    control = tuple(a - b for a, b in zip(_differences(both), floor, strict=True))
                    found.append(Finding(experiment.name, family, measure, both, control))
    return found


def _drift(rows: Sequence[Row], measure: str, allowed: float = 0.0) -> list[Finding]:
    """The last evaluation less the first one after training began; `allowed` is a fall that does not count."""
    found = []
    for name, family, pair, mine in _sweeps(rows, "supcon", "ce"):
        values = _paired((mine, mine), (pair, pair), measure, (LAST, FIRST))
        found.append(Finding(name, family, measure, tuple((last, first - allowed) for last, first in values)))
    return found


_MOST, _FEWEST, _RERUN = "most classes", "fewest classes", "the difference less that of a rerun"
CLAIMS = (
    Claim(
        "close", "CL and NSCL stay aligned: NSCL is closer to CL than a rerun of CL on other views.", "Fig. 2", "NSCL",
        "rerun", "",
        partial(_closer, other=RESEEDED),
    ),
    Claim(
        "nearer than SCL", "NSCL stays nearer to CL than SCL (SupCon) does.", "Fig. 2", "NSCL", "SCL", "rerun less SCL",
        partial(_closer, other="supcon"),
    ),
    Claim(
        "nearer than CE", "NSCL stays nearer to CL than cross-entropy does.", "Fig. 2", "NSCL", "CE", "rerun less CE",
        partial(_closer, other="ce"),
    ),
    Claim(
        "classes", "CL and NSCL are the more alike the more classes there are.", "Fig. 3", _MOST, _FEWEST, _RERUN,
        partial(_trend, key="classes", kind="classes"),
    ),
    Claim(
        "temperature", "CL and NSCL are the more alike the higher the temperature is.", "Fig. 4", "highest temperature",
        "lowest temperature", _RERUN, partial(_trend, key="temperature", kind="temperature"),
    ),
    Claim(
        "batch", "With a learning rate that grows with the batch, CL and NSCL are the less alike the larger it is.",
        "Fig. 5", "smallest batch", "largest batch", _RERUN,
        partial(_trend, key="batch", kind="batch", falls=True, rule="linear"),
    ),
    Claim(
        "weights apart", "The weights of CL and NSCL move apart all along.", "Fig. 6", "last evaluation",
        "first evaluation", "", partial(_drift, measure="weight_gap"),
    ),
    Claim(
        "representations alike", f"Meanwhile their representations stay alike: CKA falls by less than {FALL}.",
        "Fig. 6", "last evaluation", f"first evaluation less {FALL}", "", partial(_drift, measure="cka", allowed=FALL),
    ),
)  # fmt: skip
