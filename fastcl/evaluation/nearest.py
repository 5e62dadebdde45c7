"""Nearest neighbours by cosine similarity, several k in one pass, in tiles: no n x m matrix is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastcl.checks import check_positive
from fastcl.errors import FastclError
from fastcl.evaluation.findings import KNNProbe, Vote
from fastcl.evaluation.frozen import FrozenFeatures, check_counts, frozen_features

NEIGHBOURS = (1, 5, 20)
TEMPERATURE = 0.07  # of Wu et al. 2018, as usual since
TILE = (1024, 16384)  # queries, training rows


@torch.inference_mode()
def knn_probe(
    train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor, *,
    k: Sequence[int] | None = None, temperature: float = TEMPERATURE,
) -> tuple[KNNProbe, ...]:  # fmt: skip
    """Accuracy of the k nearest training rows by cosine similarity, for every k and both votes.

    "majority": each neighbour has one vote. "weighted": exp(similarity / temperature) votes (Wu et al. 2018). Ties of
    votes go to the lowest label; which of equally similar rows are neighbours is not defined. A row of zeros has
    similarity 0 to all. Training rows are classified without themselves.

    Args:
        train_features, train_labels, features, labels: as for `frozen_features`; float64 on the device of
            `train_features`.
        k: numbers of neighbours; None: those of 1, 5 and 20 that there are.
        temperature: of the weighted vote.

    Returns:
        Per k, ascending, the majority and the weighted vote.

    Raises:
        FastclError: as `frozen_features` does; a k that is not positive, or more than a training row has neighbours; a
            temperature that is not positive.
    """
    check_positive(temperature, "temperature")
    data = frozen_features(train_features, train_labels, features, labels)
    wanted = neighbour_counts(k, len(data.train))
    train, test = _unit_rows(data.train), _unit_rows(data.test)
    on_train = _accuracies(data, train, train, data.index, wanted, temperature, leave_out=True)
    on_test = _accuracies(data, train, test, data.test_index, wanted, temperature, leave_out=False)
    return tuple(KNNProbe(*key, train=on_train[key], test=on_test[key]) for key in on_train)


def neighbour_counts(k: Sequence[int] | None, rows: int) -> tuple[int, ...]:
    """`k` in ascending order; for None, those of NEIGHBOURS that a training row has. Raises FastclError as `knn_probe`
    does."""
    most = rows - 1
    wanted = check_counts("k", k) if k is not None else tuple(n for n in NEIGHBOURS if n <= most)
    if wanted[-1] > most:
        raise FastclError(
            f"k must be at most {most}, as many neighbours as one of {rows} training rows has, got {wanted[-1]}"
        )
    return wanted


def _accuracies(
    data: FrozenFeatures, train: Tensor, queries: Tensor, index: Tensor, k: tuple[int, ...], temperature: float, *,
    leave_out: bool,
) -> dict[tuple[int, Vote], float]:  # fmt: skip
    """Per k and vote. `leave_out`: the queries are the training rows."""
    right: dict[tuple[int, Vote], int] = {(n, vote): 0 for n in k for vote in get_args(Vote)}
    for begin in range(0, len(queries), TILE[0]):
        part = queries[begin : begin + TILE[0]]
        similarity, rows = _neighbours(train, part, k[-1], begin if leave_out else None)
        classes = data.index[rows]
        relative = (similarity - similarity[:, :1]) / temperature  # to the nearest, so that votes do not all vanish
        weights: dict[Vote, Tensor] = {"majority": torch.ones_like(relative), "weighted": relative.exp()}
        for vote in weights:
            votes, counted = similarity.new_zeros(len(part), len(data.labels)), 0
            for n in k:
                votes.scatter_add_(1, classes[:, counted:n], weights[vote][:, counted:n])
                counted = n
                right[n, vote] += int((votes.argmax(dim=1) == index[begin : begin + len(part)]).sum())
    return {key: count / len(queries) for key, count in right.items()}


def _unit_rows(x: Tensor) -> Tensor:
    """Rows of norm 1; zeros stay zeros. Scaled first, so that squares neither over- nor underflow."""
    largest = x.abs().amax(dim=1, keepdim=True)
    return normalize(x / largest.masked_fill(largest == 0, 1.0))


def _neighbours(train: Tensor, queries: Tensor, count: int, first: int | None) -> tuple[Tensor, Tensor]:
    """(q, count) similarities, descending, and the training rows they belong to. If `first` is given, the queries are
    the training rows from there on, which are not their own neighbours."""
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for begin in range(0, len(train), TILE[1]):
        similarity = queries @ train[begin : begin + TILE[1]].mT
        if first is not None:
            similarity.diagonal(first - begin).fill_(-torch.inf)  # empty where this tile has none of them
        found, at = similarity.topk(min(count, similarity.shape[1]), dim=1)
        best, rows = torch.cat([best, found], dim=1), torch.cat([rows, at + begin], dim=1)
        best, at = best.topk(min(count, best.shape[1]), dim=1)
        rows = rows.gather(1, at)
    return best, rows
