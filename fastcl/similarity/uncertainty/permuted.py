"""Similarities after permutations of the rows of y. What a permutation leaves alone is computed once.

Permuting the samples permutes the rows and columns of L. Row sums, diagonals and totals move along or stay, so of all
the sums behind `PairStats` only <K, L> and the inner products of row sums and diagonals change:

    sum over i != j of <v_i, v_j> <w_o(i), w_o(j)> = ||V' W_o||^2 - sum_i |v_i|^2 |w_o(i)|^2

for centred rows v, w and the order o: O(n d_x d_y) from the features, O(n^2) from both Gram matrices, if they are held.
The neighbours of a permuted representation are its neighbours under other names, and its Procrustes similarity needs
the cross-moment V'W_o alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastcl.rowstats.pair_sums import PairSums
from fastcl.similarity.measures import SIMILARITIES
from fastcl.similarity.neighbours import common_neighbours, neighbour_lists
from fastcl.similarity.rotation import centred, narrowed, nuclear_norm
from fastcl.similarity.stats import PairStats
from fastcl.similarity.sums.rows import Inner, mapped

Permuted: TypeAlias = Callable[[Tensor], list[float]]  # from an order of the rows of y, (n,) int64, to values

_HELD = 4096  # largest n whose two Gram matrices are held: 256 MiB
_PRODUCTS = 100  # as many multiplications of a matrix product take as long as one entry of a permuted Gram matrix


def permuted(x: Tensor, y: Tensor, names: Sequence[str], k: int) -> Permuted:
    """The function that gives some measures, all of one kernel's PairStats or one other measure, after a permutation.

    Args:
        x, y: (n, d) checked features for which the measures are defined.
        names: names of SIMILARITIES.
        k: number of neighbours of mutual k-NN.
    """
    chosen = [SIMILARITIES[name] for name in names]
    kernel, fields = chosen[0].kernel, [measure.field for measure in chosen if measure.field is not None]
    if fields and kernel is not None:
        return _of_kernel(x, y, kernel, fields)
    return _of_neighbours(x, y, k) if names[0] == "mutual_knn" else _of_procrustes(x, y)


class Centred(NamedTuple):
    """The rows v of one model under a kernel, minus their mean mu, float64."""

    rows: Tensor  # (n, d)
    squares: Tensor  # (n,) |v_i|^2
    margins: Tensor  # (n,) <mu, v_i>
    level: Tensor  # () |mu|^2

    @classmethod
    def of(cls, x: Tensor, kernel: Inner) -> Centred:
        """From (n, d) checked features."""
        rows = mapped(x, kernel)
        mean = rows[0] + (rows - rows[0]).mean(0)  # about the first row, so that equal rows give exact zeros
        rows -= mean
        return cls(rows, rows.square().sum(1), rows @ mean, mean @ mean)


def _of_kernel(x: Tensor, y: Tensor, kernel: Inner, fields: Sequence[str]) -> Permuted:
    a, b = Centred.of(x, kernel), Centred.of(y, kernel)
    identity = torch.arange(len(x), dtype=torch.int64, device=x.device)
    cross, selves = _products(a, b), [_products(model, model)(identity) for model in (a, b)]

    def at(order: Tensor) -> list[float]:
        inner = torch.stack([cross(order), *selves])
        squares, margins = (a.squares, b.squares[order]), (a.margins, b.margins[order])
        sums = PairSums.of_centred(inner, squares, margins, (a.level, b.level))
        stats = PairStats.unpacked(len(x), kernel, sums.packed().tolist())
        return [getattr(stats, field) for field in fields]

    return at


def _products(a: Centred, b: Centred) -> Callable[[Tensor], Tensor]:
    """From an order to the sum over i != j of <v_i, v_j> <w_o(i), w_o(j)>."""
    n, width, other = len(a.rows), a.rows.shape[1], b.rows.shape[1]
    if n > _HELD or width * other < _PRODUCTS * n:
        return lambda order: (a.rows.mT @ b.rows[order]).square_().sum() - a.squares @ b.squares[order]
    k, l = (model.rows @ model.rows.mT for model in (a, b))  # noqa: E741
    k.diagonal().zero_()
    return lambda order: k.view(-1) @ l.index_select(0, order).index_select(1, order).view(-1)


def _of_neighbours(x: Tensor, y: Tensor, k: int) -> Permuted:
    first, second = neighbour_lists(x, y, k)

    def at(order: Tensor) -> list[float]:
        # Sample order[i] has become row i, and so have its neighbours.
        renamed = order.argsort()[second[order]]
        return [common_neighbours(first, renamed)[-1].item() / first.numel()]

    return at


def _of_procrustes(x: Tensor, y: Tensor) -> Permuted:
    v, w = (rows / torch.linalg.vector_norm(rows) for rows in (centred(narrowed(x)), centred(narrowed(y))))
    return lambda order: [min(1.0, nuclear_norm(v.mT @ w[order]).item())]


def random_orders(n: int, repeats: int, seed: int) -> Iterator[Tensor]:
    """Random permutations of n samples, (n,) int64 on the CPU, `repeats` of them; the same for the same seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(repeats):
        yield torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu")
