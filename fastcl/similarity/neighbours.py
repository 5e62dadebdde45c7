"""Mutual nearest neighbours: the share of a sample's k nearest neighbours that two representations agree on.

    mutual k-NN = mean over samples i of |N_x(i) ∩ N_y(i)| / k

where N_x(i) are the k samples j != i with the largest K_ij (Huh et al. 2024, "The Platonic Representation Hypothesis").
Unrelated representations agree on k / (n - 1) of them on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from fastcl.dispatch import choose_torch
from fastcl.errors import FastclError, brief, one_of
from fastcl.similarity.sums.entries import Entries
from fastcl.similarity.sums.features import checked_pair
from fastcl.similarity.sums.rows import INNER, Inner

_BLOCK = 1 << 21  # entries in one block of rows of a Gram matrix
_MEASURE = "mutual k-NN"


@overload
def mutual_knn(x: Tensor, y: Tensor, k: int = 10, kernel: Inner = "cosine") -> float: ...
@overload
def mutual_knn(x: Tensor, y: Tensor, k: Sequence[int], kernel: Inner = "cosine") -> dict[int, float]: ...


@torch.inference_mode()
def mutual_knn(x: Tensor, y: Tensor, k: int | Sequence[int] = 10, kernel: Inner = "cosine") -> float | dict[int, float]:
    """The share of its k nearest neighbours that a sample has in common in two representations, averaged over samples.

    O(n^2 d) time in blocks of rows, in float64; no n x n matrix is stored, but k numbers for each sample and model.

    Ties: similarities are rounded to multiples of 2^-44 (for "linear": times the median |row|^2), so that values which
    differ only by rounding are ties, and of tied samples those that come first in x count as nearer, in both
    representations.

    Args:
        x: (n, d_x) features, any floating dtype, n > k.
        y: (n, d_y) features of the same samples in the same order.
        k: number of neighbours, or several such numbers, which cost one pass together.
        kernel: what orders the neighbours: "cosine", "correlation" (cosine after subtracting row means) or "linear".

    Returns:
        The mean share in [0, 1]; for several k a dict from each of them to its share.

    Raises:
        FastclError: on an unknown kernel, shapes that do not match, a dtype that is not floating, values that are not
            finite or too large, k that is not an integer in [1, n - 1], or if all similarities of a model are equal.
    """
    if kernel not in INNER:
        raise FastclError(one_of("kernel", INNER, kernel))
    x, y = checked_pair(x, y)
    choose_torch()
    asked = list(k) if isinstance(k, Sequence) else [k]
    _check_neighbours(asked, len(x))
    counts = common_neighbours(*neighbour_lists(x, y, max(asked), kernel)).tolist()
    found = {each: counts[each - 1] / (len(x) * each) for each in asked}
    return found if isinstance(k, Sequence) else found[k]


def neighbour_lists(x: Tensor, y: Tensor, k: int, kernel: Inner = "cosine") -> tuple[Tensor, Tensor]:
    """(n, k) int64 twice: the nearest neighbours of each sample in both representations, nearest first.

    Args:
        x, y: (n, d) checked features, n > k.

    Raises:
        FastclError: similarities that are too large, or that are all equal in one of them.
    """
    return _nearest(Entries(x, kernel, "x", "first"), k), _nearest(Entries(y, kernel, "y", "second"), k)


def _check_neighbours(asked: Sequence[object], n: int) -> None:
    """Raise FastclError unless there is at least one k and each is an integer in [1, n - 1]."""
    if not asked:
        raise FastclError("k is empty: give at least one number of neighbours")
    for k in asked:
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < n:
            raise FastclError(f"k must be an integer in [1, {n - 1}] (there are {n} samples), got {brief(k)}")


def _nearest(entries: Entries, k: int) -> Tensor:
    rows, n = entries.rows, len(entries.rows)
    found = torch.empty(n, k, dtype=torch.int64, device=rows.device)
    ends = []
    step = max(1, _BLOCK // n)
    for start in range(0, n, step):
        block = entries.rounded(rows[start : start + step] @ rows.mT)
        itself = block.diagonal(start)
        itself.fill_(torch.inf)
        smallest = block.amin()
        itself.fill_(-torch.inf)
        ends.append(torch.stack([smallest, block.amax()]))
        found[start : start + step] = _largest(block, k)
    smallest, largest = torch.stack(ends).T
    entries.check_spread(_MEASURE, smallest.min(), largest.max())
    return found


def _largest(block: Tensor, k: int) -> Tensor:
    """(b, k) columns of the largest values of each row; of equal ones the first."""
    values, found = block.topk(min(k + 1, block.shape[1]))
    tied = (values[:, 1:] == values[:, :-1]).any(1)  # topk takes any of them
    found = found[:, :k]
    if tied.any():
        found[tied] = block[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return found


def common_neighbours(first: Tensor, second: Tensor) -> Tensor:
    """(k,) int64: how many neighbours two (n, k) lists share, over all samples, if they are cut to 1, ..., k."""
    n, k = first.shape
    place = torch.arange(n * k, dtype=torch.int64, device=first.device) % k
    # One number for a sample and its neighbour.
    starts = torch.arange(0, n * n, n, dtype=torch.int64, device=first.device)[:, None]
    wanted = (first + starts).flatten()
    known, order = (second + starts).flatten().sort()
    at = torch.searchsorted(known, wanted).clamp_max_(n * k - 1)
    later = torch.maximum(place, place[order[at]])[known[at] == wanted]  # both lists must be long enough
    return torch.bincount(later, minlength=k).cumsum(0)
