"""What the probes find, as values that go into JSON and come back from it."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from fastcl.errors import FastclError, brief

Vote: typing.TypeAlias = Literal["majority", "weighted"]
Classifier: typing.TypeAlias = Literal["ncc", "linear"]


@dataclass(frozen=True)
class NCCProbe:
    """Accuracy of the nearest class centre (`fastcl.metrics.ncc_accuracy`).

    Attributes:
        train: on the training rows, which made the centres.
        test: on the test rows.
    """

    train: float
    test: float


@dataclass(frozen=True)
class LinearProbe:
    """Accuracy of a multinomial logistic regression, and how it was fitted.

    Attributes:
        train: accuracy on the training rows, all of which it was refitted on.
        test: accuracy on the test rows.
        penalty: the L2 penalty, that of `sweep` with the best accuracy; of equally good ones the strongest.
        sweep: per penalty, strongest first, the accuracy on the held-out part of the training rows after a fit on the
            rest; empty if there was no choice.
        converged: whether all fits reached the tolerance of the gradient.
        steps: L-BFGS steps of the last fit.
        gradient: largest entry of its last gradient.
    """

    train: float
    test: float
    penalty: float
    sweep: tuple[tuple[float, float], ...]
    converged: bool
    steps: int
    gradient: float


@dataclass(frozen=True)
class KNNProbe:
    """Accuracy of the k nearest neighbours by cosine similarity.

    Attributes:
        k: number of neighbours.
        vote: "majority", or "weighted" by exp(similarity / temperature).
        train: on the training rows, each without itself (leave-one-out).
        test: on the test rows.
    """

    k: int
    vote: Vote
    train: float
    test: float


@dataclass(frozen=True)
class Spread:
    """A mean over repeats.

    Attributes:
        mean: the mean of `values`.
        interval: half the width of the 95 % confidence interval of the mean, by Student's t over the repeats; None for
            a single repeat.
        values: one of each repeat.
    """

    mean: float
    interval: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class FewShotProbe:
    """Accuracy of a classifier fitted on a few training rows of each class, over repeated draws.

    Attributes:
        classifier: "ncc" or "linear".
        shots: rows drawn of each class.
        train: on the training rows that were not drawn; None if all were.
        test: on the test rows.
        converged: whether all fits converged; true for "ncc".
    """

    classifier: Classifier
    shots: int
    train: Spread | None
    test: Spread
    converged: bool


@dataclass(frozen=True)
class Evaluation:
    """What the probes found for one model's features. A probe that was not run is None or empty.

    Attributes:
        train_rows, test_rows, width: shapes of the features.
        classes: number of classes of the training rows.
        unseen: labels of test rows that no training row has.
        unseen_rows: number of these test rows; every probe counts them as wrong.
        linear, ncc, knn, few_shot: the probes.
    """

    train_rows: int
    test_rows: int
    width: int
    classes: int
    unseen: tuple[int, ...]
    unseen_rows: int
    linear: LinearProbe | None = None
    ncc: NCCProbe | None = None
    knn: tuple[KNNProbe, ...] = ()
    few_shot: tuple[FewShotProbe, ...] = ()


def evaluation_to_json(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as a tree for `json.dumps`."""
    return dataclasses.asdict(evaluation)


def evaluation_from_json(tree: object, where: str) -> Evaluation:
    """The inverse of `evaluation_to_json`, also after a trip through a file.

    Args:
        tree: parsed JSON.
        where: its name in messages.

    Raises:
        FastclError: something is missing or of another type; names it.
    """
    return _parsed(Evaluation, tree, where)


def _parsed(kind: Any, value: Any, where: str) -> Any:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else _parsed(options[0], value, where)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = options[:1] * len(value) if options[-1] is Ellipsis else options
        if len(kinds) == len(value):
            return tuple(_parsed(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        values = {name: _parsed(hint, value.get(name), f"{where}.{name}") for name, hint in hints.items()}
        return typing.cast(Any, kind)(**values)
    elif origin is Literal and value in options:
        return value
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif type(value) is kind:
        return value
    raise FastclError(f"{where} is not what an evaluation holds, got {brief(value)}")
