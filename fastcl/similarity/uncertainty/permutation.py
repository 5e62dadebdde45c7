"""Permutation tests: could representations that have nothing in common be as similar as these?

The rows of y are permuted, so that row k of x and of y are different samples. Under the hypothesis that the two are
independent, all permutations are equally likely, and with R random ones

    p = (1 + number of permutations whose similarity is at least the observed) / (1 + R)

is a valid p-value at any n (Phipson and Smyth 2010); it is never below 1 / (1 + R).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.checks import check_count, check_seed
from fastcl.dispatch import choose_torch
from fastcl.similarity.measures import NEIGHBOURS, grouped, similarities
from fastcl.similarity.progress import counted
from fastcl.similarity.sums.features import checked_pair
from fastcl.similarity.uncertainty.permuted import permuted, random_orders

QUANTILES = (0.05, 0.5, 0.95, 0.99)
_TIE = 1e-12  # similarities that differ by less are equal up to rounding


@dataclass(frozen=True, eq=False)
class PermutationTest:
    """A similarity beside those of permuted samples.

    Attributes:
        measure: its name.
        value: the similarity.
        p_value: the share of permutations that are at least as similar, this one included, in [1 / (1 + R), 1].
        null: (R,) float64 on the CPU, the similarities after each permutation, in the order in which they were drawn.
        seed: of the permutations.
    """

    measure: str
    value: float
    p_value: float
    null: Tensor
    seed: int

    @property
    def repeats(self) -> int:
        """R, the number of permutations."""
        return len(self.null)

    @property
    def null_mean(self) -> float:
        """The mean similarity after permutations: what the measure gives to representations without relation."""
        return self.null.mean().item()

    @property
    def null_quantiles(self) -> dict[float, float]:
        """The 5 %, 50 %, 95 % and 99 % quantiles of the similarities after permutations."""
        shares = self.null.new_tensor(QUANTILES)
        return dict(zip(QUANTILES, self.null.quantile(shares).tolist(), strict=True))

    def __repr__(self) -> str:
        return (
            f"PermutationTest({self.measure}={self.value:.6g}, p_value={self.p_value:.3g}, "
            f"null_mean={self.null_mean:.3g}, repeats={self.repeats}, seed={self.seed})"
        )


def permutation_test(
    x: Tensor,
    y: Tensor,
    measure: str = "cka_linear_debiased",
    *,
    repeats: int = 1000,
    seed: int = 0,
    k: int = NEIGHBOURS,
    progress: bool = False,
) -> PermutationTest:
    """Test whether two representations are more similar than chance.

    What does not depend on the pairing of the samples is computed once; a permutation then costs, in float64,

    | measures | a permutation |
    | --- | --- |
    | CKA, RSA | O(n d_x d_y), or O(n^2) if that is less and n is at most 4,096 |
    | mutual k-NN | O(n k log(n k)) |
    | Procrustes | O(n d_x d_y) and singular values |

    Args:
        x: (n, d_x) features, any floating dtype.
        y: (n, d_y) features of the same samples in the same order.
        measure: a name of `fastcl.similarity.SIMILARITIES`.
        repeats: number of permutations R.
        seed: the same seed gives the same permutations, for every measure and on every device.
        k: number of neighbours of "mutual_knn".
        progress: show a tqdm bar if standard error is a terminal.

    Raises:
        FastclError: an unknown measure, repeats < 1, a seed that is not an integer in [0, 2**32), and where the measure
            itself raises.
    """
    return permutation_tests(x, y, (measure,), repeats=repeats, seed=seed, k=k, progress=progress)[measure]


@torch.inference_mode()
def permutation_tests(
    x: Tensor,
    y: Tensor,
    measures: Sequence[str],
    *,
    repeats: int = 1000,
    seed: int = 0,
    k: int = NEIGHBOURS,
    progress: bool = False,
) -> dict[str, PermutationTest]:
    """`permutation_test` of several measures, by name, on the same permutations; those of one kernel share the work."""
    check_count(repeats, "repeats", 1)
    check_seed(seed)
    x, y = checked_pair(x, y)
    values = similarities(x, y, measures, k=k)
    choose_torch()
    tests = [(names, permuted(x, y, names, k)) for _, names in grouped(values)]
    identity = torch.arange(len(x), dtype=torch.int64, device=x.device)
    observed = {name: v for names, at in tests for name, v in zip(names, at(identity), strict=True)}
    nulls: dict[str, list[float]] = {name: [] for name in values}
    orders = random_orders(len(x), repeats, seed)
    for order in counted(orders, repeats, "permutations", progress):
        for names, at in tests:
            for name, value in zip(names, at(order.to(x.device)), strict=True):
                nulls[name].append(value)
    found = {}
    for name, value in values.items():
        null = torch.tensor(nulls[name], dtype=torch.float64, device="cpu")
        # Against the same arithmetic in the given order: a permutation that changes nothing must count.
        as_similar = int((null >= observed[name] - _TIE).sum())
        found[name] = PermutationTest(name, value, (1 + as_similar) / (1 + repeats), null, seed)
    return found
