"""Class geometry of features: class-distance normalised variance (CDNV) and its directional form.

With mu_c the mean and v_c = E|x - mu_c|^2 the population variance of class c (Galanti et al. 2022; the normalisation
of arXiv 2510.08852), over C classes:

    CDNV              mean over i < j  of  (v_i + v_j) / 2 / |mu_i - mu_j|^2
    directional CDNV  mean over i != j of  E_{x in i} ((x - mu_i) . u_ij)^2 / |mu_i - mu_j|^2,
                      u_ij = (mu_j - mu_i) / |mu_j - mu_i|

Both are invariant to shifts, rotations and scaling of the features. Rows are centred before squaring.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcl.errors import FastclError, type_of

# Two means closer than this fraction of their norm may differ by rounding alone.
_ROUNDING = 256 * sys.float_info.epsilon


@dataclass(frozen=True)
class Classes:
    """n rows grouped by their integer labels."""

    labels: Tensor  # (C,) distinct labels, ascending
    index: Tensor  # (n,) class of each row, in [0, C)
    order: Tensor  # (n,) rows sorted by class
    starts: Tensor  # (C,) start of each class in `order`

    def mean(self, rows: Tensor) -> Tensor:
        """(C, k) class means of (n, k) rows, summed in row order on every device (no atomics)."""
        return F.embedding_bag(self.order, rows, self.starts, mode="mean")


def group_by_class(labels: Tensor) -> Classes:
    """Group rows by (n,) integer labels, which may have any values."""
    distinct, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    return Classes(distinct, index, torch.argsort(index, stable=True), counts.cumsum(0) - counts)


def labelled_features(features: Tensor, labels: Tensor, prefix: str = "") -> tuple[Tensor, Tensor]:
    """Validate; returns float64 features, and labels on the same device. `prefix` goes before the names in messages.

    Raises:
        FastclError: unless features are (n, d) floating and finite, labels (n,) integers, n >= 1 and d >= 1.
    """
    for name, value in (("features", features), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise FastclError(f"{prefix}{name} must be a tensor, got {type_of(value)}")
    if not features.is_floating_point() or features.ndim != 2 or 0 in features.shape:
        raise FastclError(
            f"{prefix}features must be a non-empty (n, d) floating-point tensor, got shape {tuple(features.shape)} "
            f"of {features.dtype}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.shape != features.shape[:1]:
        raise FastclError(
            f"{prefix}labels must be integers of shape ({len(features)},), one per row of {prefix}features, "
            f"got shape {tuple(labels.shape)} of {labels.dtype}"
        )
    x = features.double()
    finite = x.isfinite().all(dim=1)
    if not finite.all():
        raise FastclError(f"{prefix}features are not finite: first in row {int(finite.logical_not().nonzero()[0])}")
    return x, labels.to(x.device)


def _around_means(features: Tensor, labels: Tensor) -> tuple[Classes, Tensor, Tensor, Tensor]:
    """Classes, (n, d) rows minus class means, (C, d) means, and (C, C) squared distances with an infinite diagonal.

    The features are scaled by their largest entry, which prevents overflow and changes neither CDNV.
    """
    x, labels = labelled_features(features, labels)
    classes = group_by_class(labels)
    if len(classes.labels) < 2:
        raise FastclError(f"CDNV needs at least 2 classes, got only labels {classes.labels.tolist()}")
    x = x / x.abs().amax().clamp_min(sys.float_info.min)
    means = classes.mean(x)
    # Differences, not |a|^2 + |b|^2 - 2ab, which would cancel for close means far from the origin.
    distances = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").square_()
    distances.fill_diagonal_(torch.inf)
    sizes = means.square().sum(dim=1)
    same = (distances <= _ROUNDING**2 * (sizes[:, None] + sizes)).nonzero().tolist()
    if same:
        first, second = (classes.labels[i].item() for i in same[0])
        raise FastclError(
            f"CDNV is undefined: classes {first} and {second} have the same mean ({len(same) // 2} such pairs)"
        )
    return classes, x - means[classes.index], means, distances


@torch.inference_mode()
def cdnv(features: Tensor, labels: Tensor) -> float:
    """Class-distance normalised variance, averaged over pairs of classes (Galanti et al. 2022).

    Args:
        features: (n, d), any floating dtype; computed in float64 in O(n d + C^2 d).
        labels: (n,) integers of any values; absent classes do not count.

    Returns:
        CDNV >= 0; 0 if every class is a single point.

    Raises:
        FastclError: for fewer than two classes, class means that coincide, shapes that do not match, or features that
            are not finite.
    """
    classes, centred, _, distances = _around_means(features, labels)
    variances = classes.mean(centred.square().sum(dim=1, keepdim=True))  # (C, 1)
    # By symmetry, averaging (v_i + v_j) / 2 over i != j is the same as averaging v_i.
    return _pair_mean(variances / distances)


@torch.inference_mode()
def directional_cdnv(features: Tensor, labels: Tensor) -> float:
    """CDNV with only the variance along the line between the two class means (arXiv 2510.08852).

    Args:
        features: (n, d), any floating dtype; computed in float64 in O(n C d) with (n, C) scratch memory.
        labels: (n,) integers of any values; absent classes do not count.

    Returns:
        Directional CDNV, between 0 and the CDNV.

    Raises:
        FastclError: as for `cdnv`.
    """
    classes, centred, means, distances = _around_means(features, labels)
    along = centred @ (means - means.mean(dim=0)).mT  # (n, C): (x - mu_i) . mu_j
    along = along - along.gather(1, classes.index[:, None])  # (x - mu_i) . (mu_j - mu_i)
    return _pair_mean(classes.mean(along.square()) / distances / distances)


def _pair_mean(values: Tensor) -> float:
    """Mean over i != j of a (C, C) matrix with zero diagonal."""
    return (values.sum() / (len(values) * (len(values) - 1))).item()
