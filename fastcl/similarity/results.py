"""The results of a `PairAccumulator`: statistics of every pair of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from fastcl.errors import FastclError, one_of
from fastcl.similarity.stats import PairStats
from fastcl.similarity.sums.forms import ratio
from fastcl.similarity.sums.rows import INNER, Inner


@dataclass(frozen=True)
class PairResult:
    """The statistics of one pair of models.

    Attributes:
        kernels: a `PairStats` for each accumulated kernel.
        minibatch: means over the batches of HSIC_1(K, L), HSIC_1(K, K) and HSIC_1(L, L); None if not accumulated.
        undefined: the first batch on which `cka_minibatch` is undefined, and why; None if it has a value.
    """

    kernels: Mapping[Inner, PairStats]
    minibatch: tuple[float, float, float] | None = None
    undefined: str | None = None

    @property
    def linear(self) -> PairStats:
        """Statistics of the linear kernel. Like the other two, raises FastclError if it was not accumulated."""
        return self._of("linear")

    @property
    def cosine(self) -> PairStats:
        """Statistics of the cosine kernel."""
        return self._of("cosine")

    @property
    def correlation(self) -> PairStats:
        """Statistics of the correlation kernel."""
        return self._of("correlation")

    def _of(self, kernel: Inner) -> PairStats:
        if kernel not in self.kernels:
            had = ", ".join(self.kernels)
            raise FastclError(f"the {kernel} kernel was not accumulated: the PairAccumulator was made with {had}")
        return self.kernels[kernel]

    @property
    def hsic1(self) -> tuple[float, float, float]:
        """Means over the batches of HSIC_1(K, L), HSIC_1(K, K) and HSIC_1(L, L).

        Raises:
            FastclError: the accumulator was not made with minibatch=True.
        """
        if self.minibatch is None:
            raise FastclError("minibatch CKA was not accumulated: make the PairAccumulator with minibatch=True")
        return self.minibatch

    @property
    def cka_minibatch(self) -> float:
        """Minibatch CKA (Nguyen et al. 2021): the unbiased HSIC_1 of each batch, averaged over the batches.

        It depends on how the samples are split into batches; use it to compare with published numbers.
        `linear.cka_debiased` is the same estimate from all samples at once.

        Raises:
            FastclError: the accumulator was not made with minibatch=True, or `cka_debiased` of a batch is undefined.
        """
        sums = self.hsic1
        if self.undefined is not None:
            raise FastclError(self.undefined)
        return ratio(*sums)


@dataclass(frozen=True)
class AllPairs:
    """The statistics of all pairs of models.

    Attributes:
        names: names of the models.
        n: number of samples.
        pairs: keyed (a, b) with a before b in `names`; K is a's Gram matrix, L is b's.
    """

    names: tuple[str, ...]
    n: int
    pairs: Mapping[tuple[str, str], PairResult]

    def __getitem__(self, pair: tuple[str, str]) -> PairResult:
        if pair not in self.pairs:
            raise FastclError(f"no pair {pair!r}: a pair is two of {self.names}, in this order")
        return self.pairs[pair]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.pairs)

    def matrix(self, measure: str) -> Tensor:
        """(M, M) float64 matrix of a symmetric measure that is 1 for equal models.

        Args:
            measure: "cka_minibatch", or a kernel and "cka", "cka_debiased" or "rsa", for example "cosine.rsa".

        Raises:
            FastclError: the measure is unknown, was not accumulated, or is undefined for a pair.
        """
        known = [f"{kernel}.{name}" for kernel in INNER for name in ("cka", "cka_debiased", "rsa")] + ["cka_minibatch"]
        if measure not in known:
            raise FastclError(one_of("measure", known, measure))
        table = torch.eye(len(self.names), dtype=torch.float64, device="cpu")
        for (a, b), result in self.pairs.items():
            i, j = self.names.index(a), self.names.index(b)
            table[i, j] = table[j, i] = attrgetter(measure)(result)
        return table
