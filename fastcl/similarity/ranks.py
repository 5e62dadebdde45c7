"""Spearman RSA: the rank correlation of two Gram matrices over the pairs of samples, exact or with a proven bound.

Over the m = n(n-1)/2 pairs i < j let r and s be the centred average ranks of K_ij and L_ij. Spearman's correlation is
cos(r, s). Up to 2^25 pairs (n = 8,192) the ranks come from sorting. Beyond that the pairs are counted into bins and
every pair gets the mean rank of its bin: vectors R and S instead of r and s, in O(n d + block + bins) memory.

Error of the bins. R is the mean of r over each bin, so r = R + e with e orthogonal to R, and in a bin of c pairs |e|^2
is at most that of c distinct ranks, (c^3 - c)/12. With E the sum of these over the bins and T = (m^3 - m)/12,
|R|^2 = T - E and the angle between r and R is at most asin sqrt(E/T); the same holds for s. Angles between vectors obey
the triangle inequality, so the true angle differs from that of R and S by at most the sum of the two. For B bins of
equal counts sqrt(E/T) is 1/B, whatever the values. The bins are nearly equal: a first histogram with steps of equal
width locates the pairs, then each step is split into a number of bins proportional to its count.

Ties take average ranks. `fastcl.similarity.sums.entries` says what counts as a tie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from fastcl.dispatch import choose_torch
from fastcl.errors import FastclError, one_of
from fastcl.similarity.sums.entries import Entries
from fastcl.similarity.sums.features import checked
from fastcl.similarity.sums.rows import INNER, Inner

_EXACT_PAIRS = 1 << 25
_BINS = 1 << 20
_BLOCK = 1 << 20  # entries in one block of rows of a Gram matrix


@dataclass(frozen=True)
class SpearmanResult:
    """A rank correlation and an interval that contains the exact one.

    Attributes:
        value: the correlation in [-1, 1].
        low, high: the exact correlation lies in [low, high], up to rounding of the sums, about 1e-13; both equal
            `value` if the ranks are exact.
        pairs: number of pairs i < j.
        bins: bins requested per matrix; None if the ranks are exact.
    """

    value: float
    low: float
    high: float
    pairs: int
    bins: int | None

    @property
    def error(self) -> float:
        """The largest possible error of `value`."""
        return max(self.high - self.value, self.value - self.low)

    def __float__(self) -> float:
        return self.value


@torch.inference_mode()
def spearman_rsa(x: Tensor, y: Tensor, kernel: Inner = "cosine", bins: int | None = None) -> SpearmanResult:
    """Spearman rank correlation of the similarities K_ij and L_ij over all pairs i < j (ties take average ranks).

    The dissimilarities 1 - K_ij have the same correlation (Kriegeskorte et al. 2008, who recommend ranks where a linear
    match between dissimilarities cannot be assumed). Similarities are rounded to multiples of 2^-44 (for "linear":
    times the median |row|^2), so that values which differ only by rounding are ties.

    Args:
        x: (n, d_x) features, any floating dtype, n >= 3.
        y: (n, d_y) features of the same samples in the same order.
        kernel: "cosine", "correlation" (cosine after subtracting row means) or "linear".
        bins: None: exact up to 2^25 pairs (n = 8,192; at most about 2 GB), 2^20 bins beyond that. A number >= 2: that
            many bins at any n: at most 2 * bins counters of 8 bytes per matrix, and four passes over blocks of a
            million entries. Counts are integers, so two runs give the same bits.

    Returns:
        The correlation with an interval that contains the exact one.

    Raises:
        FastclError: on an unknown kernel, shapes that do not match, a dtype that is not floating, values that are not
            finite or too large, n < 3, bins < 2, or if all similarities of a matrix are equal.
    """
    if kernel not in INNER:
        raise FastclError(one_of("kernel", INNER, kernel))
    if bins is not None and (isinstance(bins, bool) or not isinstance(bins, int) or bins < 2):
        raise FastclError(f"bins must be an integer >= 2 or None, got {bins!r}")
    x, y = checked({"x": x, "y": y})
    choose_torch()
    n = len(x)
    if n < 3:
        raise FastclError(f"Spearman RSA needs n >= 3 samples (more than one pair), got n={n}")
    matrices = [_Matrix(x, kernel, "x", "first"), _Matrix(y, kernel, "y", "second")]
    pairs = n * (n - 1) // 2
    if bins is None and pairs <= _EXACT_PAIRS:
        r, s = (_exact_ranks(matrix, pairs) for matrix in matrices)
        value = _cosine(r @ s, r @ r, s @ s)
        return SpearmanResult(value, value, value, pairs, None)
    return _from_bins(matrices, pairs, bins or _BINS)


class _Matrix(Entries):
    """One Gram matrix, formed only block by block."""

    def blocks(self) -> Iterator[Tensor]:
        """Rounded K_ij for i < j; every call yields the same values in the same order."""
        n = len(self.rows)
        step = max(1, _BLOCK // n)
        for start in range(0, n - 1, step):
            block = self.rows[start : start + step] @ self.rows[start:].mT
            height = len(block)
            i, j = torch.triu_indices(height, height, 1, dtype=torch.int64, device=block.device)
            entries = torch.cat([block[i, j], block[:, height:].reshape(-1)])
            yield self.rounded(entries)


def _cosine(rs: Tensor, rr: Tensor, ss: Tensor) -> float:
    # Two ratios as in `forms.ratio`: exactly 1 if r and s are equal.
    rs, rr, ss = torch.stack([rs, rr, ss]).tolist()
    return max(-1.0, min(1.0, math.copysign(math.sqrt((rs / rr) * (rs / ss)), rs)))


def _middles(counts: Tensor) -> Tensor:
    """Twice the centred mean rank of each group, in order: integers in float64."""
    return (2 * counts.cumsum(0) - counts - counts.sum()).double()


def _exact_ranks(matrix: _Matrix, pairs: int) -> Tensor:
    """Twice the centred average ranks, (pairs,)."""
    keys, filled = matrix.rows.new_empty(pairs), 0
    for block in matrix.blocks():
        keys[filled : filled + len(block)] = block
        filled += len(block)
    values, order = keys.sort()
    matrix.check_spread("Spearman RSA", values[0], values[-1])
    counts = torch.unique_consecutive(values, return_counts=True)[1]
    del values
    return keys.scatter_(0, order, _middles(counts).repeat_interleave(counts))


class _Bins:
    """Bins of nearly equal counts for the entries of one matrix."""

    def __init__(self, matrix: _Matrix, pairs: int, bins: int) -> None:
        ends = torch.stack([torch.stack(block.aminmax()) for block in matrix.blocks() if len(block)])
        smallest, largest = ends[:, 0].min(), ends[:, 1].max()
        matrix.check_spread("Spearman RSA", smallest, largest)
        self.smallest, self.spread, self.steps = smallest, largest - smallest, bins
        coarse = reduce(torch.add, (torch.bincount(self._place(b).long(), minlength=bins) for b in matrix.blocks()))
        self.widths = 1 + coarse * bins // pairs
        self.starts = self.widths.cumsum(0) - self.widths
        total = int(self.widths.sum())
        self.counts = reduce(torch.add, (torch.bincount(self.index(b), minlength=total) for b in matrix.blocks()))
        self.middles = _middles(self.counts)

    def _place(self, values: Tensor) -> Tensor:
        # The clamp keeps the largest value in the last step.
        return ((values - self.smallest) / self.spread * self.steps).clamp_(max=math.nextafter(self.steps, 0))

    def index(self, values: Tensor) -> Tensor:
        """The bin of each value; even with rounding, a larger value is never in a lower bin."""
        place = self._place(values)
        step = place.long()
        # place - step is at most 1 - 2^-53; times an integer, this rounds to less than that integer.
        return self.starts[step] + ((place - step) * self.widths[step]).long()

    def angle(self, pairs: int) -> float:
        """The largest possible angle between the exact ranks and the bins' mean ranks."""
        c = self.counts.double()
        lost = ((c.square() - 1) * c).sum().item() / (float(pairs) ** 2 - 1) / pairs
        return math.asin(min(1.0, math.sqrt(lost)))


def _from_bins(matrices: list[_Matrix], pairs: int, bins: int) -> SpearmanResult:
    places = [_Bins(matrix, pairs, bins) for matrix in matrices]
    rs, rr, ss = matrices[0].rows.new_zeros(3)
    for blocks in zip(*(matrix.blocks() for matrix in matrices), strict=True):
        r, s = (place.middles[place.index(block)] for place, block in zip(places, blocks, strict=True))
        rs, rr, ss = rs + r @ s, rr + r @ r, ss + s @ s
    value = _cosine(rs, rr, ss)
    angle, reach = math.acos(value), sum(place.angle(pairs) for place in places)
    low, high = math.cos(min(math.pi, angle + reach)), math.cos(max(0.0, angle - reach))
    return SpearmanResult(value, min(low, value), max(high, value), pairs, bins)
