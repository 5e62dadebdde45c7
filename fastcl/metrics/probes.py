"""Probes: accuracy of simple classifiers on frozen features."""

import torch
from torch import Tensor

from fastcl.errors import FastclError
from fastcl.metrics.geometry import group_by_class, labelled_features


@torch.inference_mode()
def ncc_accuracy(train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor) -> float:
    """Accuracy of the nearest-class-centre classifier (Galanti et al. 2022; NCCC in arXiv 2510.08852).

    The centres are the class means of the training features. Each sample is assigned to the nearest centre in Euclidean
    distance; ties go to the lowest label.

    Args:
        train_features: (n, d), any floating dtype; computed in float64 on their device.
        train_labels: (n,) integers of any values.
        features: (m, d) features to classify; may be the training features.
        labels: (m,) integers. A class absent from `train_labels` has no centre, so its samples count as wrong.

    Returns:
        Fraction of the m samples classified correctly, in [0, 1].

    Raises:
        FastclError: for empty inputs, shapes that do not match, or features that are not finite.
    """
    train, train_labels = labelled_features(train_features, train_labels, "train_")
    x, labels = (value.to(train.device) for value in labelled_features(features, labels))
    if x.shape[1] != train.shape[1]:
        raise FastclError(
            f"features and train_features must have the same width, got {x.shape[1]} and {train.shape[1]}"
        )
    scale = torch.maximum(train.abs().amax(), x.abs().amax()).clamp_min(torch.finfo(torch.float64).tiny)
    classes = group_by_class(train_labels)
    centres = classes.mean(train / scale)
    # |x - c|^2 without |x|^2, relative to the mean of the centres: a common offset would cost precision.
    origin = centres.mean(dim=0)
    centres = centres - origin
    scores = (x / scale - origin) @ centres.mT - centres.square().sum(dim=1) / 2  # (m, C), larger is nearer
    predicted = classes.labels[scores.argmax(dim=1)]
    return (predicted == labels).double().mean().item()
