"""Computes Theorem 2 of arXiv 2510.08852: how far the weights of two networks can diverge under CL and NSCL.

Plain SGD from the same weights on the same batches and augmentations. Each batch loss is beta-smooth in the weights w,
and every similarity has ||grad_w s_ij|| <= G. The two losses' gradients at the same weights differ by at most
G Delta / tau (an anchor's softmaxes differ by Delta in L1 norm), so that

    ||w_{t+1}^CL - w_{t+1}^NSCL|| <= (1 + beta eta_t) ||w_t^CL - w_t^NSCL|| + eta_t G Delta / tau
    ||w_T^CL - w_T^NSCL||         <= G Delta / (beta tau) (e^{beta sum eta_t} - 1)

What is public of the theorem is its form, G e^{2 / tau} / (beta tau C) (e^{beta sum eta_t} - 1) up to a constant, in
the authors' summary. The two lines above are derived from the same assumptions; the paper's own constant, its
definition of G and its Appendix D, which ties the descent of weights to that of similarities, are not reproduced here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastcl.theory.drift_bound import DriftBound
from fastcl.theory.logarithms import LN10, log_drifts, log_expm1, log_smooth
from fastcl.theory.ranges import LARGEST, SMALLEST, check_range, check_temperature, checked_rates
from fastcl.theory.softmax_gap import log_printed_gap, sampling_error


@dataclass(frozen=True)
class ParameterBound(DriftBound):
    """The bounds of `parameter_divergence_bound`: those of `DriftBound` on ||w_t^CL - w_t^NSCL||.

    Attributes:
        log10_summary: G e^{2 / tau} pi_max / (beta tau) (e^{beta sum eta_t} - 1), the form in the authors' summary with
            1 / C = pi_max. It holds up to a constant only: with the constant 1 it is no bound (docs/theory.md).
    """

    log10_summary: float


def parameter_divergence_bound(
    learning_rates: Sequence[float],
    batch_size: int,
    temperature: float,
    largest_class: float,
    smoothness: float,
    similarity_gradient: float,
    delta: float = 0.01,
    largest: float | None = None,
) -> ParameterBound:
    """Bounds on the distance of the weights after each step of plain SGD (Theorem 2, arXiv 2510.08852; see the module).

    It does not cover momentum, weight decay, LARS or AdamW. It is an upper bound: that it grows exponentially does not
    say that the weights do.

    Args:
        learning_rates: T numbers in [0, 1e30].
        batch_size: B, the number of samples in a batch.
        temperature: tau, above 1e-30.
        largest_class: pi_max in (0, 1], frequency of the most frequent class.
        smoothness: beta, a Lipschitz constant of the batch loss's gradient in w, for CL or for NSCL; 1e-30 to 1e30.
        similarity_gradient: G, a bound on ||grad_w s_ij|| over all pairs of rows, weights and batches; 1e-30 to 1e30.
        delta: in (0, 1), probability with which the bound may fail.
        largest: a bound on the distance known otherwise, for example ||w^CL|| + ||w^NSCL||; for `vacuous_from`.

    Raises:
        FastclError: a value out of range, or no learning rates.
    """
    check_temperature(temperature)
    check_range("largest_class", largest_class, 0.0, 1.0, includes="high")
    check_range("smoothness", smoothness, SMALLEST, LARGEST, includes="both")
    check_range("similarity_gradient", similarity_gradient, SMALLEST, LARGEST, includes="both")
    if largest is not None:
        check_range("largest", largest, 0.0, math.inf)
    rates = checked_rates(learning_rates)
    epsilon = sampling_error(len(rates), batch_size, delta)
    gap = log_printed_gap(temperature, largest_class, epsilon)
    per_rate = math.log(similarity_gradient) - math.log(temperature)  # log of G / tau
    recurrence = log_drifts(rates, log_smooth(math.log(smoothness)), per_rate + min(gap, math.log(2)))
    growth = log_expm1(smoothness * math.fsum(rates)) - math.log(smoothness)
    summary = growth + per_rate + 2 / temperature + math.log(largest_class)
    return ParameterBound(
        epsilon=epsilon,
        log10_gap=gap / LN10,
        log10_recurrence=tuple(value / LN10 for value in recurrence),
        log10_printed=-math.inf if growth == -math.inf else (growth + per_rate + gap) / LN10,
        log10_largest=math.inf if largest is None else math.log10(largest),
        log10_summary=summary / LN10,
    )
