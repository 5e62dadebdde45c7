"""Multinomial logistic regression with an L2 penalty, by full-batch L-BFGS on the device of the features.

With C classes and n rows x_i of class y_i, standardised, it minimises

    1/n sum_i -log softmax(W x_i + b)[y_i]  +  penalty / 2 |W|^2

in float64; b is not penalised. scikit-learn's `LogisticRegression` has the same minimum with C = 1 / (penalty n) for
three classes and more. For two, where it has one weight vector instead of two, C = 2 / (penalty n).

A fit has converged when no entry of the gradient exceeds 1e-6, nor a hundredth of the penalty: since the penalty curves
the objective by that much, a gradient g leaves W within |g| / penalty of the minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STEPS = 1000
_ABSOLUTE, _RELATIVE = 1e-6, 1e-2  # tolerances of the gradient; the second is relative to the penalty
_HISTORY, _KEPT = 100, 1 << 28  # pairs of vectors that L-BFGS keeps, and most numbers in all of them


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted classifier.

    Attributes:
        size: (d,) largest entry of each column of the rows it was fitted on, by which all rows are divided first; at
            least 1 for a column that was constant there.
        centre, deviation: (d,) mean and standard deviation of those rows then. A constant column has an infinite
            one: it is left out.
        weights: (C, d + 1), of which the last column is b.
        converged: whether the gradient is within the tolerance.
        steps: L-BFGS steps, at most MAX_STEPS.
        gradient: its largest entry.
    """

    size: Tensor
    centre: Tensor
    deviation: Tensor
    weights: Tensor
    converged: bool
    steps: int
    gradient: float

    def predict(self, features: Tensor) -> Tensor:
        """(m,) int64 classes of (m, d) features; of equal scores the lowest."""
        x = (features / self.size - self.centre) / self.deviation
        return (x @ self.weights[:, :-1].mT + self.weights[:, -1]).argmax(dim=1)


def standardisation(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(d,) size, mean and standard deviation of (n, d) float64 features, as `Fit` has them: with features divided by
    their size, neither differences nor squares leave float64's range."""
    least, most = features.aminmax(dim=0)
    constant = most == least
    size = torch.maximum(most, -least).clamp_min(torch.finfo(torch.float64).tiny)
    size = torch.where(constant, size.clamp_min(1.0), size)  # of a column of zeros, other rows may have any entry
    deviation, centre = torch.std_mean(features / size, dim=0, correction=0)
    return size, centre, deviation.masked_fill(constant, torch.inf)


@torch.no_grad()
def fit_logistic(features: Tensor, index: Tensor, classes: int, penalty: float, start: Tensor | None = None) -> Fit:
    """Fit the classifier.

    Args:
        features: (n, d) float64.
        index: (n,) int64 classes in [0, classes).
        classes: C.
        penalty: positive.
        start: (C, d + 1) weights to begin with, such as those of another penalty; None: zeros.
    """
    size, centre, deviation = standardisation(features)
    x = (features / size - centre) / deviation
    n, d = x.shape
    rows = torch.arange(n, dtype=torch.int64, device=x.device)
    weights = x.new_zeros(classes, d + 1) if start is None else start.clone()
    weights.grad = torch.zeros_like(weights)

    def loss() -> Tensor:
        """The objective over the penalty, since torch's L-BFGS skips pairs of vectors whose product is below 1e-10,
        which the objective's own may be; its gradient goes into weights.grad."""
        w, b = weights[:, :-1], weights[:, -1]
        log_softmax = torch.log_softmax(x @ w.mT + b, dim=1)
        residual = log_softmax.exp()
        residual[rows, index] -= 1
        residual /= n * penalty
        gradient = weights.grad
        assert gradient is not None
        torch.addmm(w, residual.mT, x, out=gradient[:, :-1])
        torch.sum(residual, dim=0, out=gradient[:, -1])
        return -log_softmax[rows, index].mean() / penalty + w.square().sum() / 2

    history = max(2, min(_HISTORY, _KEPT // (2 * weights.numel())))
    tolerance = min(_ABSOLUTE, _RELATIVE * penalty)
    lbfgs = torch.optim.LBFGS(
        [weights], max_iter=MAX_STEPS, max_eval=25 * MAX_STEPS, tolerance_grad=tolerance / penalty,
        tolerance_change=0.0, history_size=history, line_search_fn="strong_wolfe",
    )  # fmt: skip
    lbfgs.step(loss)  # pyright: ignore[reportArgumentType]  # returns a tensor, as its own type would have a float
    loss()
    largest = penalty * weights.grad.abs().max().item()
    steps = lbfgs.state[weights].get("n_iter", 0)
    return Fit(size, centre, deviation, weights.detach(), largest <= tolerance, steps, largest)
