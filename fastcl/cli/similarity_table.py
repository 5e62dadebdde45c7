"""All similarities of two feature matrices, as lines for the terminal and as a record for a JSON file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from fastcl.checks import check_count, check_seed
from fastcl.errors import FastclError
from fastcl.similarity import (
    SIMILARITIES,
    BootstrapInterval,
    PairStats,
    PermutationTest,
    bootstrap_intervals,
    mutual_knn,
    pair_stats,
    permutation_tests,
    procrustes,
    spearman_rsa,
)
from fastcl.similarity.measures import NEIGHBOURS

T = TypeVar("T")

BY_RANKS, RANK_LABEL = "rsa_spearman", "RSA, cosine, Spearman"

# name in the JSON file -> label in the table, property of the PairStats of the cosine kernel
_DRIFTS = {
    "drift": ("drift |K - L|, cosine", "drift"),
    "rho": ("rho, relative drift, centred", "rho"),
    "cka_bound": ("  CKA >= (1 - rho) / (1 + rho)", "cka_bound"),
    "cka_bound_tight": ("  CKA >= sqrt(1 - rho^2)", "cka_bound_tight"),
    "r": ("r, relative drift of pairs", "r"),
    "rsa_bound": ("  RSA >= (1 - r) / (1 + r)", "rsa_bound"),
    "rsa_bound_tight": ("  RSA >= sqrt(1 - r^2)", "rsa_bound_tight"),
}


@dataclass(frozen=True)
class Wanted:
    """What a table shows beside the values.

    Attributes:
        spearman: also RSA by ranks, for which all pairs of samples are sorted.
        neighbours: k of mutual k-NN.
        permutations: of the permutation test of each similarity; None: no test.
        bootstrap: replicates of the interval of each similarity; None: no interval.
        seed: of both.
    """

    spearman: bool = False
    neighbours: int = NEIGHBOURS
    permutations: int | None = None
    bootstrap: int | None = None
    seed: int = 0


def wanted_by(args: Any) -> Wanted:
    """From the arguments of `fastcl align`. Raises FastclError for a number that is too small."""
    given = {"neighbours": args.neighbours, "permutations": args.permutations, "bootstrap": args.bootstrap}
    for name, least in (("neighbours", 1), ("permutations", 1), ("bootstrap", 2)):
        if given[name] is not None:
            check_count(given[name], f"--{name}", least)
    check_seed(args.seed, "--seed")
    return Wanted(spearman=args.spearman, seed=args.seed, **given)


class Row(NamedTuple):
    """One line of a table: a value, or why there is none."""

    name: str
    label: str
    value: float | FastclError
    note: str = ""

    def line(self) -> str:
        """The row as text."""
        text = f" {self.value}" if isinstance(self.value, FastclError) else f"{self.value:10.6f}{self.note}"
        return f"  {self.label:30}{text}"


def similarity_table(x: Tensor, y: Tensor, wanted: Wanted) -> tuple[dict[str, Any], list[str]]:
    """The record and the lines of all similarities of checked (n, d) features of the same samples. An undefined one
    has its reason and hides no other."""
    stats = {kernel: _tried(pair_stats, x, y, kernel) for kernel in ("linear", "cosine", "correlation")}
    values = {name: _value(x, y, name, stats, wanted.neighbours) for name in SIMILARITIES}
    defined = [name for name, value in values.items() if not isinstance(value, FastclError)]
    tests, intervals, failed = _doubts(x, y, defined, wanted)
    rows = [
        Row(name, _label(name, wanted), value, _note(intervals.get(name), tests.get(name)))
        for name, value in values.items()
    ]
    turned = values["procrustes"]
    distance = turned if isinstance(turned, FastclError) else 2 - 2 * turned
    rows.append(Row("procrustes_distance", "Procrustes distance", distance))
    for name, (label, field) in _DRIFTS.items():
        rows.append(Row(name, label, _property(stats["cosine"], field)))
    rows += _by_ranks(x, y) if wanted.spearman else []
    shown = [row for row in rows if row.label]  # the others are for the record
    record: dict[str, Any] = {
        "samples": len(x),
        "neighbours": wanted.neighbours,
        "measures": {row.name: None if isinstance(row.value, FastclError) else row.value for row in rows},
        "undefined": {row.name: str(row.value) for row in shown if isinstance(row.value, FastclError)},
    }
    if wanted.permutations is not None:
        record["permutations"] = {name: _of_test(test) for name, test in tests.items()}
    if wanted.bootstrap is not None:
        record["bootstrap"] = {name: _of_interval(interval) for name, interval in intervals.items()}
    return record, [*_legend(wanted), *(row.line() for row in shown), *failed]


def _tried(measure: Callable[..., T], *given: Any) -> T | FastclError:
    try:
        return measure(*given)
    except FastclError as error:
        return error


def _property(stats: PairStats | FastclError, field: str) -> float | FastclError:
    return stats if isinstance(stats, FastclError) else _tried(getattr, stats, field)


def _value(
    x: Tensor, y: Tensor, name: str, stats: Mapping[str, PairStats | FastclError], k: int
) -> float | FastclError:
    measure = SIMILARITIES[name]
    if measure.field is not None:
        return _property(stats[str(measure.kernel)], measure.field)
    found = _tried(mutual_knn, x, y, k) if name == "mutual_knn" else _tried(procrustes, x, y)
    return found if isinstance(found, FastclError) else float(found)


def _label(name: str, wanted: Wanted) -> str:
    label = SIMILARITIES[name].label
    return f"{label}, k={wanted.neighbours}" if name == "mutual_knn" else label


def _by_ranks(x: Tensor, y: Tensor) -> Iterator[Row]:
    found = _tried(spearman_rsa, x, y)
    if isinstance(found, FastclError):
        value, error, note = found, found, ""
    else:
        value, error = found.value, found.error
        note = " (exact)" if found.bins is None else f" (within {error:.1e}: {found.bins:,} bins)"
    yield Row(BY_RANKS, RANK_LABEL, value, note)
    yield Row(f"{BY_RANKS}_error", "", error)


def _doubts(
    x: Tensor, y: Tensor, names: Sequence[str], wanted: Wanted
) -> tuple[dict[str, PermutationTest], dict[str, BootstrapInterval], list[str]]:
    """The tests and the intervals that are asked for, and lines that say which similarities have none, and why."""
    given = {"seed": wanted.seed, "k": wanted.neighbours, "progress": True}
    tests: dict[str, PermutationTest] = {}
    intervals: dict[str, BootstrapInterval] = {}
    failed: dict[str, list[str]] = {}
    if wanted.permutations is not None:
        tests = permutation_tests(x, y, names, repeats=wanted.permutations, **given)
    if wanted.bootstrap is not None:
        repeats = wanted.bootstrap
        together = _tried(lambda: bootstrap_intervals(x, y, names, repeats=repeats, **given))
        if not isinstance(together, FastclError):
            return tests, together, []
        for name in names:  # a half of the samples may be constant for one kernel alone
            found = _tried(lambda one=name: bootstrap_intervals(x, y, [one], repeats=repeats, **given))
            if isinstance(found, FastclError):
                failed.setdefault(str(found), []).append(_label(name, wanted))
            else:
                intervals |= found
    return tests, intervals, [f"  no interval of {', '.join(names)}: {why}" for why, names in failed.items()]


def _note(interval: BootstrapInterval | None, test: PermutationTest | None) -> str:
    shown = f"  [{interval.low:9.6f}, {interval.high:9.6f}]" if interval else ""
    return shown + (f"  p = {test.p_value:.3g} (by chance {test.null_mean:.4f})" if test else "")


def _legend(wanted: Wanted) -> list[str]:
    parts = []
    if wanted.bootstrap is not None:
        parts.append(f"95 % intervals from {wanted.bootstrap:,} halves of the samples")
    if wanted.permutations is not None:
        parts.append(f"p-values and means by chance from {wanted.permutations:,} permutations")
    return [f"  {'; '.join(parts)}; seed {wanted.seed}"] if parts else []


def _of_test(test: PermutationTest) -> dict[str, Any]:
    quantiles = {f"{share:g}": value for share, value in test.null_quantiles.items()}
    return {
        "p_value": test.p_value, "null_mean": test.null_mean, "null_quantiles": quantiles, "repeats": test.repeats,
        "seed": test.seed,
    }  # fmt: skip


def _of_interval(interval: BootstrapInterval) -> dict[str, Any]:
    return {key: value for key, value in asdict(interval).items() if key not in ("measure", "value")}
