"""How far the softmax weights of CL and NSCL can differ on one batch (Lemma 4 and Corollary 3 of arXiv 2510.08852).

An anchor's CL softmax p runs over all other samples of the batch, its NSCL softmax q over those of other classes. Let m
be the weight that p gives to the anchor's own class. Then q = p / (1 - m) on the others, and

    ||p - q||_1 = 2 m,    m / (1 - m) <= x = e^{2 / tau} n_same / n_other        (similarities in [-1, 1])

so that ||p - q||_1 <= 2 x / (1 + x) < 2. The paper bounds it by 2 x, and x by class frequencies:

    Delta = 2 e^{2 / tau} (pi_max + eps) / (1 - pi_max - eps),    eps = sqrt(log(T B / delta) / (2 B))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastcl.theory.logarithms import log
from fastcl.theory.ranges import check_count, check_range, check_temperature, checked_counts


def sampling_error(steps: int, batch_size: int, delta: float = 0.01) -> float:
    """eps = sqrt(log(T B / delta) / (2 B)). With probability 1 - delta no class exceeds its frequency by more than eps
    in any of the T B anchors' batches (Hoeffding and a union bound; Theorem 1, arXiv 2510.08852).

    B counts samples drawn independently or without replacement, each once however many views it has: the views of a
    sample share its class, and an eps with two anchors per sample would be too small.

    Raises:
        FastclError: steps or batch_size below 1, delta outside (0, 1).
    """
    check_count("steps", steps, 1)
    check_count("batch_size", batch_size, 1)
    check_range("delta", delta, 0.0, 1.0)
    return math.sqrt((math.log(steps) + math.log(batch_size) - math.log(delta)) / (2 * batch_size))


def softmax_gap_bound(class_counts: Sequence[int], temperature: float) -> float:
    """2 x / (1 + x), the largest ||p - q||_1 of an anchor's CL and NSCL softmax on a batch with known classes.

    Twice `fastcl.same_class_mass` of the batch is never more. Any number of views gives the same bound.

    Args:
        class_counts: samples of each class in the batch; zeros are ignored.
        temperature: tau, above 1e-30.

    Returns:
        A number in [0, 2]. 2 is vacuous: any two distributions are that close. It is reached where e^{2 / tau} is more
        than float64 resolves, or where one class fills the batch and no q exists.

    Raises:
        FastclError: counts that are not integers >= 0 or sum to less than 2, or a temperature out of range.
    """
    check_temperature(temperature)
    counts = checked_counts(class_counts)
    odds = log_odds(max(counts) - 1, sum(counts) - max(counts), temperature)
    return 2 / (1 + math.exp(-odds))


def log_odds(same: float, other: float, temperature: float) -> float:
    """log x = 2 / tau + log(same / other): same-class candidates at similarity 1, others at -1. inf without others."""
    if same <= 0:
        return -math.inf
    return 2 / temperature + log(same) - log(other) if other > 0 else math.inf


def log_printed_gap(temperature: float, largest_class: float, epsilon: float) -> float:
    """log Delta as printed; inf if its condition pi_max + eps < 1 does not hold."""
    share = largest_class + epsilon
    if share >= 1:
        return math.inf
    return math.log(2) + 2 / temperature + math.log(share) - math.log1p(-share)
