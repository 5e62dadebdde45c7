"""Entries of a Gram matrix that are compared with each other, for measures by ranks and by neighbours.

Similarities that are equal in exact arithmetic (rows of two columns can only have correlations +1 and -1, collapsed
classes have one cosine per pair of classes) differ by rounding, and comparisons would turn that noise into an order. So
entries are first rounded to multiples of 2^-44 of the median |row|^2 (1 for unit rows).
"""

from __future__ import annotations

import math

from torch import Tensor

from fastcl.errors import FastclError
from fastcl.similarity.sums.forms import EQUAL, ROUNDING
from fastcl.similarity.sums.rows import mapped

_GRID = 44  # entries are rounded to 2^-44 of the median |row|^2; their own rounding errors are about 2^-52
_SPREAD = 2 * ROUNDING  # times the largest |row|^2: range of the entries that rounding explains, twice the deviation


class Entries:
    """The rows behind one Gram matrix, and how its entries are rounded.

    Args:
        x: (n, d) checked features, n >= 1.
        kernel: a member of rows.INNER.
        name, which: the argument and the representation ("first" or "second") in messages.

    Raises:
        FastclError: similarities too large for float64.
    """

    def __init__(self, x: Tensor, kernel: str, name: str, which: str) -> None:
        self.rows, self.kernel, self.which = mapped(x, kernel), kernel, which
        squares = self.rows.square().sum(dim=1)
        self.limit = squares.max().item()  # bound of |K_ij|, by Cauchy-Schwarz
        if not math.isfinite(self.limit * self.limit):
            raise FastclError(f"the {kernel} similarities of {name!r} are not finite (features too large for float64)")
        typical = max(squares.median().item(), self.limit * 2.0**-50) or 1.0
        self.grid = 2.0 ** max(round(math.log2(typical)) - _GRID, -1022)

    def rounded(self, entries: Tensor) -> Tensor:
        """Entries of the matrix, rounded in place."""
        return entries.div_(self.grid).round_().mul_(self.grid)

    def check_spread(self, measure: str, smallest: Tensor, largest: Tensor) -> None:
        """Raise FastclError unless the entries differ by more than rounding."""
        spread = (largest - smallest).item()
        floor = _SPREAD * self.limit
        if not spread > floor:
            raise FastclError(
                f"{measure} ({self.kernel} kernel, n={len(self.rows)}) is undefined: "
                f"{EQUAL.format(which=self.which)} (spread {spread:.3g} is not above its rounding error {floor:.3g})"
            )
