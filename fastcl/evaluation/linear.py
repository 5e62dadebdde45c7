"""The linear probe: logistic regression on frozen features, with the penalty chosen on held-out training rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from torch import Tensor

from fastcl.checks import check_seed
from fastcl.errors import FastclError, brief
from fastcl.evaluation.draws import held_out_rows
from fastcl.evaluation.findings import LinearProbe
from fastcl.evaluation.frozen import FrozenFeatures, accuracy, frozen_features
from fastcl.evaluation.logistic import Fit, fit_logistic

log = logging.getLogger("fastcl")
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
HELD_OUT = 0.2


def linear_probe(
    train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor, *, ids: Tensor | None = None,
    penalties: Sequence[float] = PENALTIES, held_out: float = HELD_OUT, seed: int = 0,
) -> LinearProbe:  # fmt: skip
    """Accuracy of a multinomial logistic regression (`fastcl.evaluation.logistic`) on frozen features.

    Each penalty is tried by a fit on a part of the training rows and its accuracy on the rest, the held-out part. The
    best one (of equally good ones the strongest) is used for a fit on all training rows. Test rows choose nothing.
    Features are standardised by the mean and standard deviation of the rows of each fit, so that a penalty means the
    same whatever their scale. A fit that has not converged is warned about, and said in the result.

    Args:
        train_features, train_labels, features, labels, ids: as for `frozen_features`; float64 on the device of
            `train_features`.
        penalties: L2 penalties to choose from. With a single one there is no choice, and nothing is held out.
        held_out: fraction of each class that is held out for the choice; see `held_out_rows`.
        seed: of the draw of the held-out part, in [0, 2**32).

    Raises:
        FastclError: as `frozen_features` does; penalties that are not positive; no class with two rows to choose on.
    """
    check_seed(seed)
    wanted = _checked_penalties(penalties)
    data = frozen_features(train_features, train_labels, features, labels, ids)
    classes, sweep, fits = len(data.labels), [], []
    if len(wanted) > 1:
        out = held_out_rows(data, held_out, seed)
        rest, index = data.train[~out], data.index[~out]
        for penalty in wanted:  # from the strongest on, each from the weights of the one before
            start = fits[-1].weights if fits else None
            fits.append(fit_logistic(rest, index, classes, penalty, start))
            sweep.append((penalty, accuracy(fits[-1].predict(data.train[out]), data.index[out])))
    best = max(range(len(sweep)), key=lambda at: sweep[at][1], default=0)  # of equals the first, which is strongest
    start = fits[best].weights if fits else None
    fits.append(fit_logistic(data.train, data.index, classes, wanted[best], start))
    _warn(fits, [*wanted, wanted[best]] if sweep else wanted)
    return _result(data, fits, wanted[best], tuple(sweep))


def _result(
    data: FrozenFeatures, fits: Sequence[Fit], penalty: float, sweep: tuple[tuple[float, float], ...]
) -> LinearProbe:
    last = fits[-1]
    return LinearProbe(
        train=accuracy(last.predict(data.train), data.index),
        test=accuracy(last.predict(data.test), data.test_index),
        penalty=penalty,
        sweep=sweep,
        converged=all(fit.converged for fit in fits),
        steps=last.steps,
        gradient=last.gradient,
    )


def _checked_penalties(penalties: Sequence[float]) -> tuple[float, ...]:
    """Distinct penalties, strongest first."""
    if not isinstance(penalties, Sequence):
        raise FastclError(f"penalties must be a list of positive numbers, got {brief(penalties)}")
    for value in penalties:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise FastclError(f"penalties must be positive numbers, got {brief(value)}")
    if not penalties:
        raise FastclError("penalties is empty: give at least one")
    return tuple(sorted({float(value) for value in penalties}, reverse=True))


def _warn(fits: Sequence[Fit], penalties: Sequence[float]) -> None:
    for fit, penalty in zip(fits, penalties, strict=True):
        if not fit.converged:
            log.warning(
                "linear probe: with penalty %g the gradient is still %.1e after %d steps",
                penalty,
                fit.gradient,
                fit.steps,
            )
