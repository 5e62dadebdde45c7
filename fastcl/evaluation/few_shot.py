"""Few-shot probes: classifiers fitted on a few training rows of each class, over repeated seeded draws."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import get_args

import torch
from scipy.stats import t as student
from torch import Tensor

from fastcl.checks import check_seed
from fastcl.errors import FastclError, brief
from fastcl.evaluation.draws import shot_rows
from fastcl.evaluation.findings import Classifier, FewShotProbe, Spread
from fastcl.evaluation.frozen import FrozenFeatures, accuracy, check_counts, frozen_features
from fastcl.evaluation.logistic import fit_logistic
from fastcl.metrics import ncc_accuracy

log = logging.getLogger("fastcl")
SHOTS = (1, 5, 10, 20, 50, 100)
REPEATS = 5
CONFIDENCE = 0.95


def few_shot_probe(
    train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor, *, ids: Tensor | None = None,
    shots: Sequence[int] | None = None, repeats: int = REPEATS, seed: int = 0,
) -> tuple[FewShotProbe, ...]:  # fmt: skip
    """Accuracy of two classifiers that see m training rows of each class: the nearest class centre, and logistic
    regression.

    Each repeat draws its rows by (seed, repeat, sample id): every model gets the same samples, and those of fewer shots
    are among those of more. The regression has the penalty 1 / rows (scikit-learn's default, C = 1, for three classes
    and more): a few shots leave none to choose it on. It standardises by the drawn rows.

    Args:
        train_features, train_labels, features, labels, ids: as for `frozen_features`; float64 on the device of
            `train_features`.
        shots: values of m; None: those of 1, 5, 10, 20, 50 and 100 that every class has.
        repeats: draws per m.
        seed: of the draws, in [0, 2**32).

    Returns:
        Per classifier ("ncc", then "linear") and m, ascending. The interval tells how much the draw of the rows
        matters; it covers neither other test sets nor other trainings.

    Raises:
        FastclError: as `frozen_features` does; m that is not positive, or more than a class has rows; no repeats.
    """
    check_seed(seed)
    check_repeats(repeats)
    data = frozen_features(train_features, train_labels, features, labels, ids)
    wanted = shot_counts(shots, data.train_labels)
    return tuple(
        _few_shot(data, classifier, m, [shot_rows(data, m, seed, repeat) for repeat in range(repeats)])
        for classifier in get_args(Classifier)
        for m in wanted
    )


def check_repeats(repeats: int) -> None:
    """Raise FastclError unless there is at least one repeat."""
    if type(repeats) is not int or repeats < 1:
        raise FastclError(f"repeats must be a positive integer, got {brief(repeats)}")


def shot_counts(shots: Sequence[int] | None, train_labels: Tensor) -> tuple[int, ...]:
    """`shots` in ascending order, or those of SHOTS that every class has. Raises FastclError as `few_shot_probe` does.

    Args:
        shots: values of m, or None.
        train_labels: (n,) integers.
    """
    names, sizes = torch.unique(train_labels, return_counts=True)
    least = int(sizes.min())
    wanted = check_counts("shots", shots) if shots is not None else tuple(m for m in SHOTS if m <= least)
    if wanted[-1] > least:
        raise FastclError(
            f"shots must be at most {least}, the number of training rows of class {names[sizes.argmin()].item()}, "
            f"got {wanted[-1]}"
        )
    return wanted


def spread(values: Sequence[float]) -> Spread:
    """The mean of repeats and its confidence interval by Student's t."""
    n, interval = len(values), None
    if n > 1:
        quantile = float(student.ppf((1 + CONFIDENCE) / 2, n - 1))
        interval = quantile * stdev(values) / math.sqrt(n)
    return Spread(fmean(values), interval, tuple(values))


def _few_shot(data: FrozenFeatures, classifier: Classifier, shots: int, draws: Sequence[Tensor]) -> FewShotProbe:
    measure = _ncc if classifier == "ncc" else _linear
    found = [measure(data, drawn) for drawn in draws]
    failed = sum(not converged for _, _, converged in found)
    if failed:
        log.warning("few-shot linear probe: %d of %d fits with %d shots did not converge", failed, len(draws), shots)
    on_train = [train for train, _, _ in found if train is not None]  # the number of drawn rows is that of any repeat
    return FewShotProbe(
        classifier, shots, spread(on_train) if on_train else None, spread([test for _, test, _ in found]), not failed
    )


def _ncc(data: FrozenFeatures, drawn: Tensor) -> tuple[float | None, float, bool]:
    """Accuracy on the rest of the training rows and on the test rows, and whether the fit converged."""
    x, index, rest = data.train[drawn], data.index[drawn], ~drawn
    train = ncc_accuracy(x, index, data.train[rest], data.index[rest]) if rest.any() else None
    return train, ncc_accuracy(x, index, data.test, data.test_index), True


def _linear(data: FrozenFeatures, drawn: Tensor) -> tuple[float | None, float, bool]:
    x, index, rest = data.train[drawn], data.index[drawn], ~drawn
    fit = fit_logistic(x, index, len(data.labels), penalty=1 / len(x))
    train = accuracy(fit.predict(data.train[rest]), data.index[rest]) if rest.any() else None
    return train, accuracy(fit.predict(data.test), data.test_index), fit.converged
