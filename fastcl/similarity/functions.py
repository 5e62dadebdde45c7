"""Pair statistics of two feature matrices held in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.checks import check_positive
from fastcl.errors import FastclError, one_of
from fastcl.similarity.stats import PairStats
from fastcl.similarity.sums.features import checked_pair
from fastcl.similarity.sums.routes import Route, statistics
from fastcl.similarity.sums.rows import KERNELS, Kernel


@torch.inference_mode()
def pair_stats(
    x: Tensor, y: Tensor, kernel: Kernel = "linear", *, bandwidth: float = 1.0, route: Route = "auto"
) -> PairStats:
    """Statistics of the Gram matrices of two representations of the same samples.

    Args:
        x: (n, d_x) features, any floating dtype.
        y: (n, d_y) features of the same samples in the same order.
        kernel: "linear" (K = xx'), "cosine" (rows normalised first; a zero row stays zero), "correlation" (row means
            subtracted, then rows normalised) or "rbf" (exp(-|x_i - x_j|^2 / (2 sigma^2))).
        bandwidth: "rbf" only: each representation's sigma as a multiple of the median distance between its samples
            (at most 2,048 of them, evenly spaced), as in Kornblith et al. 2019.
        route: "features" (O(n d^2), moments of the features), "tiles" (O(n^2 d), tiles of both Gram matrices; the only
            one for "rbf") or "auto", the cheaper one. Neither stores an n x n matrix.

    Returns:
        The `PairStats` whose properties are the measures. Float64 features are computed in float64. Narrower ones are
        multiplied in float32, or by the Triton kernels (for CUDA features) in split half precision, which is equally
        accurate; everything else is float64. Errors relative to the total variance of the features are then about 1e-6
        or less, and a drift is resolved to 1e-3 ||K - mean(K)||_F.

    Raises:
        FastclError: on an unknown kernel or route, shapes that do not match, n = 0, a dtype that is not floating,
            values that are not finite, a bandwidth that is not positive, and for "rbf" a median distance of 0.
    """
    if kernel not in KERNELS:
        raise FastclError(one_of("kernel", KERNELS, kernel))
    check_positive(bandwidth, "bandwidth")
    x, y = checked_pair(x, y)
    return statistics(x, y, kernel, float(bandwidth), route)


def linear_cka(x: Tensor, y: Tensor, debiased: bool = False) -> float:
    """Linear centred kernel alignment of raw features (Kornblith et al. 2019).

    Args:
        x: (n, d_x) features, any floating dtype.
        y: (n, d_y) features of the same samples in the same order.
        debiased: use the unbiased HSIC_1 (Song et al. 2012, Nguyen et al. 2021; n >= 4) instead of HSIC_0, which for
            independent features grows with d/n.

    Returns:
        CKA in [0, 1], or in [-1, 1] if debiased.

    Raises:
        FastclError: as `pair_stats`; if CKA is undefined (constant features); for n < 4 if debiased.
    """
    stats = pair_stats(x, y, "linear")
    return stats.cka_debiased if debiased else stats.cka


def rsa(x: Tensor, y: Tensor) -> float:
    """Representational similarity analysis: Pearson correlation of the cosine dissimilarities over all pairs i < j.

    Args:
        x: (n, d_x) features, any floating dtype, n >= 3.
        y: (n, d_y) features of the same samples in the same order.

    Returns:
        RSA in [-1, 1] (Kriegeskorte et al. 2008, as in arXiv 2510.08852).

    Raises:
        FastclError: as `pair_stats`; if RSA is undefined (n < 3, or all dissimilarities of a model are equal).
    """
    return pair_stats(x, y, "cosine").rsa
