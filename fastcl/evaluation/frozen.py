"""The features that probes are fitted on and tested on, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.errors import FastclError, brief, type_of
from fastcl.metrics.geometry import labelled_features


@dataclass(frozen=True, eq=False)
class FrozenFeatures:
    """Features of two splits, float64 on one device.

    Attributes:
        train: (n, d) training features.
        train_labels: (n,) int64 as given.
        index: (n,) int64 class of each training row, in [0, C).
        test: (m, d) test features.
        test_labels: (m,) int64 as given.
        test_index: (m,) int64 class of each test row; -1 if no training row has its label.
        labels: (C,) int64, the labels of the training rows, ascending.
        unseen: labels of test rows that no training row has, ascending.
        ids: (n,) int64 on the CPU, distinct: which samples the training rows are.
    """

    train: Tensor
    train_labels: Tensor
    index: Tensor
    test: Tensor
    test_labels: Tensor
    test_index: Tensor
    labels: Tensor
    unseen: tuple[int, ...]
    ids: Tensor


def frozen_features(
    train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor, ids: Tensor | None = None
) -> FrozenFeatures:
    """Check the features of two splits.

    Args:
        train_features: (n, d), any floating dtype; everything is computed in float64 on their device.
        train_labels: (n,) integers of any values, at least two different ones.
        features: (m, d) features of the test split.
        labels: (m,) integers; a label that no training row has is allowed, and counts as wrong in every probe.
        ids: (n,) distinct integers that name the training samples, so that seeded draws are the same samples in any
            order of the rows. None: the numbers of the rows.

    Raises:
        FastclError: empty splits, features that are not finite, labels that do not match the rows, widths that differ,
            a single class, ids that repeat.
    """
    train, train_labels = labelled_features(train_features, train_labels, "train_")
    test, labels = (value.to(train.device) for value in labelled_features(features, labels))
    train_labels, labels = train_labels.long(), labels.long()
    if train.shape[1] != test.shape[1]:
        raise FastclError(
            f"features and train_features must have the same width, got {test.shape[1]} and {train.shape[1]}"
        )
    known, index = torch.unique(train_labels, return_inverse=True)
    if len(known) < 2:
        raise FastclError(f"a probe needs at least 2 classes, but train_labels are all {known.item()}")
    place = torch.searchsorted(known, labels).clamp_max(len(known) - 1)
    test_index = torch.where(known[place] == labels, place, -1)
    unseen = tuple(labels[test_index < 0].unique().tolist())
    ids = _checked_ids(ids, len(train))
    return FrozenFeatures(train, train_labels, index, test, labels, test_index, known, unseen, ids)


def _checked_ids(ids: Tensor | None, rows: int) -> Tensor:
    if ids is None:
        return torch.arange(rows, dtype=torch.int64, device="cpu")
    if not isinstance(ids, Tensor):
        raise FastclError(f"ids must be a tensor, got {type_of(ids)}")
    if ids.is_floating_point() or ids.is_complex() or ids.shape != (rows,):
        raise FastclError(
            f"ids must be integers of shape ({rows},), one per training row, got shape {tuple(ids.shape)} of "
            f"{ids.dtype}"
        )
    ids = ids.to("cpu", torch.int64)
    distinct, counts = ids.unique(return_counts=True)
    if len(distinct) < rows:
        raise FastclError(f"ids must be distinct, but {distinct[counts > 1][0].item()} is there more than once")
    return ids


def check_counts(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Positive integers in ascending order, each once. Raises FastclError for anything else, or for none."""
    if not isinstance(values, Sequence):
        raise FastclError(f"{name} must be a list of positive integers, got {brief(values)}")
    wrong = [value for value in values if type(value) is not int or value < 1]
    if wrong or not values:
        raise FastclError(f"{name} must be positive integers, got {brief(wrong[0] if wrong else tuple(values))}")
    return tuple(sorted(set(values)))


def accuracy(predicted: Tensor, index: Tensor) -> float:
    """Fraction of rows whose predicted class is theirs. A class of -1 is never predicted."""
    return (predicted == index).double().mean().item()
