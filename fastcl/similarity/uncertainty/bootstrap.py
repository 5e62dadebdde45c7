"""Intervals of similarities by half-samples: how far could a similarity have come out with other samples?

The usual bootstrap draws n samples with replacement. A similarity compares samples in pairs, and a sample drawn twice
makes pairs of equal samples: perfectly similar in both representations, and nearest neighbours of each other. They are
a third of all that is drawn, and pull CKA, RSA and k-NN upwards. So replicates are drawn without replacement here: m =
floor(n / 2) of the samples, each at most once, and every measure is computed on them as it is on all.

**Their spread is that of n samples.** A mean over m of n samples varies as s^2 / m (1 - m / n), which for m = n / 2 is
s^2 / n. For any function of samples without order, Hoeffding (1948) bounds the variance of its average over all
half-samples by m / n times its own; so the variance left between the half-samples of one data set is, on average, at
least half of its own at m samples. It is never below the variance at n samples, if that falls at least as fast as 1 /
n. Intervals are therefore about right where a similarity is nearly linear in the samples, and too wide otherwise: near
independence, where a permutation test says more, and for k-NN.

**Their mean is not that of n samples**, since the biased measures grow with d / m. So the deviations from the mean of
the replicates are put around the value of all samples: the interval is about the value of the measure at n samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.checks import check_count, check_seed
from fastcl.dispatch import choose_torch
from fastcl.errors import FastclError, brief
from fastcl.similarity.measures import NEIGHBOURS, SIMILARITIES, grouped, similarities, similarity
from fastcl.similarity.progress import counted
from fastcl.similarity.sums.features import checked_pair
from fastcl.similarity.uncertainty.halves import half_stats
from fastcl.similarity.uncertainty.permuted import random_orders

_FEWEST = 8  # samples: half of them are the four that a debiased measure needs


@dataclass(frozen=True)
class BootstrapInterval:
    """A similarity with an interval.

    Attributes:
        measure: its name.
        value: the similarity of all samples.
        low, high: the interval, within the range of the measure.
        level: its nominal coverage, such as 0.95.
        standard_error: the standard deviation of the replicates.
        replicate_mean: the mean of the replicates, each of half of the samples; for a biased measure it is above
            `value`.
        repeats: number of replicates.
        seed: of the replicates.
    """

    measure: str
    value: float
    low: float
    high: float
    level: float
    standard_error: float
    replicate_mean: float
    repeats: int
    seed: int


def bootstrap_interval(
    x: Tensor,
    y: Tensor,
    measure: str = "cka_linear_debiased",
    *,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    k: int = NEIGHBOURS,
    progress: bool = False,
) -> BootstrapInterval:
    """The interval of a similarity from random halves of the samples, drawn without replacement.

    The module `fastcl.similarity.uncertainty.bootstrap` explains why not with replacement. CKA and RSA of all
    replicates come from one pass over tiles of both Gram matrices, O(n^2 (d + repeats)), or from the features of each
    replicate if that is less; k-NN and Procrustes are computed for each replicate.

    Args:
        x: (n, d_x) features, any floating dtype, n >= 8.
        y: (n, d_y) features of the same samples in the same order.
        measure: a name of `fastcl.similarity.SIMILARITIES`.
        repeats: number of replicates; the ends are quantiles of them.
        level: nominal coverage in (0, 1).
        seed: the same seed gives the same halves, for every measure and on every device.
        k: number of neighbours of "mutual_knn", in all samples and in each half.
        progress: show a tqdm bar if standard error is a terminal.

    Raises:
        FastclError: an unknown measure, n < 8, repeats < 2, a level outside (0, 1), a seed that is not an integer
            in [0, 2**32), and where the measure itself raises, for all samples or for a half (named).
    """
    several = bootstrap_intervals(x, y, (measure,), repeats=repeats, level=level, seed=seed, k=k, progress=progress)
    return several[measure]


@torch.inference_mode()
def bootstrap_intervals(
    x: Tensor,
    y: Tensor,
    measures: Sequence[str],
    *,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    k: int = NEIGHBOURS,
    progress: bool = False,
) -> dict[str, BootstrapInterval]:
    """`bootstrap_interval` of several measures, by name, from the same halves; those of one kernel share the work."""
    check_count(repeats, "repeats", 2)
    check_seed(seed)
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise FastclError(f"level must be a number in (0, 1), got {brief(level)}")
    x, y = checked_pair(x, y)
    n = len(x)
    if n < _FEWEST:
        raise FastclError(f"a bootstrap interval needs n >= {_FEWEST} samples, got n={n}")
    values = similarities(x, y, measures, k=k)
    choose_torch()
    found: dict[str, list[float]] = {name: [] for name in values}
    for kernel, names in grouped(values):
        halves = half_samples(n, repeats, seed)
        about = f"bootstrap, {names[0] if kernel is None else f'{kernel} kernel'}"
        several = halves if kernel is None else half_stats(x, y, kernel, halves)
        for at, each in enumerate(counted(several, repeats, about, progress)):
            with _naming(at, repeats):
                for name in names:
                    if isinstance(each, Tensor):
                        half = each.to(x.device)
                        found[name].append(similarity(x[half], y[half], name, k=k))
                    else:
                        found[name].append(getattr(each, str(SIMILARITIES[name].field)))
    return {name: _interval(name, value, found[name], level, seed, n) for name, value in values.items()}


def half_samples(n: int, repeats: int, seed: int) -> Iterator[Tensor]:
    """Random samples, (n // 2,) int64 on the CPU, `repeats` times; each without repetition, in ascending order."""
    return (order[: n // 2].sort().values for order in random_orders(n, repeats, seed))


@contextmanager
def _naming(at: int, repeats: int) -> Iterator[None]:
    try:
        yield
    except FastclError as error:
        raise FastclError(f"half-sample {at} of {repeats}: {error}") from error


def _interval(
    name: str, value: float, replicates: Sequence[float], level: float, seed: int, n: int
) -> BootstrapInterval:
    found = torch.tensor(replicates, dtype=torch.float64, device="cpu")
    m = n // 2
    # s^2 / m (1 - m / n), the variance of a mean of m of n samples, becomes s^2 / n: 1 unless n is odd.
    apart = (found - found.mean()) * math.sqrt(m / (n - m))
    low, high = apart.quantile(apart.new_tensor([(1 - level) / 2, (1 + level) / 2])).tolist()
    lowest = SIMILARITIES[name].lowest
    ends = [min(1.0, max(lowest, value + end)) for end in (low, high)]
    spread, mean = apart.std().item(), found.mean().item()
    return BootstrapInterval(name, value, ends[0], ends[1], level, spread, mean, len(replicates), seed)
