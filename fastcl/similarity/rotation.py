"""Orthogonal Procrustes: how much of one representation a rotation of the other one explains.

With X and Y centred over the samples and divided by their Frobenius norms, the best orthogonal map leaves

    min_Q ||X - YQ||^2 = 2 - 2 ||X'Y||_*        (the nuclear norm: the sum of the singular values)

(Schoenemann 1966). Ding et al. 2021 ("Grounding Representation Similarity with Statistical Testing") use this distance
between networks; its angle arccos ||X'Y||_* is the shape metric of Williams et al. 2021. Only the d_x x d_y
cross-moment enters, so one pass over the samples suffices, and widths may differ (the narrower features are padded with
zeros).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.dispatch import backend, choose_torch
from fastcl.similarity.sums.extended import cross_moment
from fastcl.similarity.sums.features import checked_pair
from fastcl.similarity.sums.forms import ratio
from fastcl.similarity.sums.routes import statistics_of, stream_of


@dataclass(frozen=True)
class ProcrustesResult:
    """How two representations agree up to a rotation, a shift and a scale.

    Attributes:
        similarity: ||X'Y||_* of the normalised features, in [0, 1]; 1 if one is a rotation of the other.
    """

    similarity: float

    @property
    def distance(self) -> float:
        """2 - 2 similarity, in [0, 2]: the squared distance that the best rotation leaves (Ding et al. 2021)."""
        return 2 - 2 * self.similarity

    @property
    def angle(self) -> float:
        """arccos(similarity) in radians, in [0, pi/2]: a metric, with a triangle inequality (Williams et al. 2021)."""
        return math.acos(self.similarity)

    def __float__(self) -> float:
        return self.similarity


@torch.inference_mode()
def procrustes(x: Tensor, y: Tensor) -> ProcrustesResult:
    """Orthogonal Procrustes similarity and distance of two representations of the same samples.

    All in float64, in O(n d_x d_y) time and one singular value decomposition of a matrix of at most n rows and columns.
    Like the biased CKA, the similarity of unrelated features is not 0: it grows with d / n.

    Args:
        x: (n, d_x) features, any floating dtype.
        y: (n, d_y) features of the same samples in the same order; d_y may differ from d_x.

    Returns:
        The similarity with the distance and the angle that follow from it.

    Raises:
        FastclError: on shapes that do not match, n = 0, a dtype that is not floating, values that are not finite,
            and, as for `linear_cka`, if a representation is constant over the samples.
    """
    x, y = checked_pair(x, y)
    with backend("chunked"):  # no Triton kernel multiplies float64
        stream = stream_of(narrowed(x), narrowed(y), "linear", torch.float64)
    choose_torch()
    statistics_of(stream, len(x)).centred_squares("Procrustes similarity")
    offsets = [stream.moments(k, k)[:-3, -1] / len(x) for k in (0, 1)]
    xx, xy, yy = (cross_moment(stream.moments(i, j), offsets[i], offsets[j]) for i, j in ((0, 0), (0, 1), (1, 1)))
    same = torch.equal(xx, xy) and torch.equal(xy, yy)  # a product with itself has its trace as nuclear norm
    nuclear = xy.trace() if same else nuclear_norm(xy)
    return ProcrustesResult(ratio(nuclear.item(), xx.trace().item(), yy.trace().item()))


def narrowed(x: Tensor) -> Tensor:
    """x, or if it has more columns than rows, (n, n) float64 features with the inner products of the centred rows."""
    return x if len(x) >= x.shape[1] else torch.linalg.qr(centred(x).mT, mode="r").R.mT


def centred(x: Tensor) -> Tensor:
    """(n, d) float64 rows minus their mean, taken about the first row, so that constant features vanish exactly."""
    rows = x.double()
    rows = rows - rows[0]
    return rows - rows.mean(0)


def nuclear_norm(x: Tensor) -> Tensor:
    """() sum of the singular values of a matrix."""
    return torch.linalg.svdvals(x).sum()
