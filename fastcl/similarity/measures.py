"""The similarities by name, in one table: for `fastcl align`, permutation tests and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastcl.errors import FastclError, brief, suggest
from fastcl.similarity.functions import pair_stats
from fastcl.similarity.neighbours import mutual_knn
from fastcl.similarity.rotation import procrustes
from fastcl.similarity.sums.rows import INNER, Inner

NEIGHBOURS = 10  # of mutual k-NN, unless a caller says otherwise


@dataclass(frozen=True)
class Measure:
    """One similarity of two representations; larger is more similar.

    Attributes:
        label: its name in a table.
        kernel: of the Gram matrices that it compares; None: it compares features.
        field: the property of `PairStats` that it is; None: a function of the features.
        lowest: its smallest possible value; the largest is 1.
    """

    label: str
    kernel: Inner | None = None
    field: str | None = None
    lowest: float = 0.0


SIMILARITIES = {
    "cka_linear": Measure("linear CKA, biased", "linear", "cka"),
    "cka_linear_debiased": Measure("linear CKA, debiased", "linear", "cka_debiased", -1.0),
    "cka_cosine": Measure("cosine CKA, biased", "cosine", "cka"),
    "cka_cosine_debiased": Measure("cosine CKA, debiased", "cosine", "cka_debiased", -1.0),
    "rsa_cosine": Measure("RSA, cosine, Pearson", "cosine", "rsa", -1.0),
    "rsa_correlation": Measure("RSA, correlation, Pearson", "correlation", "rsa", -1.0),
    "mutual_knn": Measure("mutual k-NN, cosine"),
    "procrustes": Measure("Procrustes similarity"),
}


def check_measures(names: Iterable[object]) -> None:
    """Raise FastclError unless each is a name of SIMILARITIES."""
    for name in names:
        if not isinstance(name, str) or name not in SIMILARITIES:
            raise FastclError(f"measure: unknown name {brief(name)}{suggest(str(name), SIMILARITIES)}")


def grouped(names: Iterable[str]) -> list[tuple[Inner | None, list[str]]]:
    """Names whose measures are properties of one `PairStats`, with its kernel; any other by itself, with None."""
    found: dict[str, tuple[Inner | None, list[str]]] = {}
    for name in names:
        kernel = None if SIMILARITIES[name].field is None else SIMILARITIES[name].kernel
        found.setdefault(kernel or name, (kernel, []))[1].append(name)
    return list(found.values())


def similarity(x: Tensor, y: Tensor, measure: str, *, k: int = NEIGHBOURS) -> float:
    """A similarity of two representations by its name.

    Args:
        x: (n, d_x) features, any floating dtype.
        y: (n, d_y) features of the same samples in the same order.
        measure: a name of `SIMILARITIES`.
        k: number of neighbours of "mutual_knn".

    Raises:
        FastclError: an unknown name, and as the function that computes it: `pair_stats`, `mutual_knn` or `procrustes`.
    """
    return similarities(x, y, (measure,), k=k)[measure]


def similarities(x: Tensor, y: Tensor, measures: Sequence[str], *, k: int = NEIGHBOURS) -> dict[str, float]:
    """`similarity` by several names; those of one kernel come from one `PairStats`."""
    check_measures(measures)
    chosen = {name: SIMILARITIES[name] for name in measures}
    kernels = [measure.kernel for measure in chosen.values()]
    stats = {kernel: pair_stats(x, y, kernel) for kernel in INNER if kernel in kernels}
    found = {}
    for name, measure in chosen.items():
        if measure.field is not None and measure.kernel is not None:
            found[name] = getattr(stats[measure.kernel], measure.field)
        else:
            found[name] = mutual_knn(x, y, k) if name == "mutual_knn" else float(procrustes(x, y))
    return found
