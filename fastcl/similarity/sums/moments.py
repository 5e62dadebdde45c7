"""The feature route: all sums over Gram matrices from d x d moments of the features, one pass, any number of samples.

A sample is the extended row x+ = [v, |v|^2, <p, v>, 1] where p is the pilot and v = f(x) - p. For models x and y one
matrix M = sum x+ y+' (over the samples) holds the cross-moment of the features, both means, n, and all sums with |v|^2
and <p, v>: every sum that the statistics of the Gram matrices need. O(n d^2) time, (d_x + 3)(d_y + 3) float64 values
per pair.

Why a pilot: with means far from zero (mean 1e3, spread 1) the entries of K agree in their first 6 digits and their
squares in 12. The pilot is the mean of the first chunk, taken about its first row, so constant features vanish exactly.
<p, v> is a function of v but stored for its digits: if all cosines are nearly 1, it is as small as |v|^2.

For features narrower than float64 the products v v' are float32 within a chunk (in the Triton kernels all products are
split half precision). Sums over chunks, and all work on features before and on moments after, are float64.

Callers multiply rows in chunks that begin at multiples of `chunk_rows`, whatever the batches: the same samples in the
same order give the same bits however they were split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, combinations_with_replacement, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcl.dispatch import on_triton
from fastcl.similarity.sums.extended import extended, model_of, strain, sums_of, translation
from fastcl.similarity.sums.features import NARROW_ROUNDING, multiplied_narrow
from fastcl.similarity.sums.rows import Inner, mapped

if TYPE_CHECKING:
    from fastcl.similarity.sums.triton import StackedMoments

_BLOCK = 256  # columns of a block of moments on a CPU
_LARGEST = 1e30  # largest |v|^2 for float32: sums over a chunk stay below 1e38
# Rows of a chunk. A CPU's cache holds a few megabytes of them; a GPU needs long products, and its kernels sum a chunk
# in float32.
CHUNK = {"cpu": 512}
CHUNK_ELSEWHERE = 4096


def chunk_rows(x: Tensor) -> int:
    """Rows of a chunk on the device of x."""
    return CHUNK.get(x.device.type, CHUNK_ELSEWHERE)


class Moments:
    """Streaming moments of all pairs of models under one kernel that is an inner product of rows.

    Attributes:
        kernel: a member of rows.INNER.
        pilots: per model, (d_i,) float64; empty before the first chunk.
        rounding: relative rounding error of products; 0 for float64 products.
        swept: per model, () float64: over the streams merged into this one, the sum of their |v|^2 times the squared
            distance of their pilot from this one's. Times `rounding` it bounds the error that they brought into
            <p, v>; it is 0 in a stream that saw all its rows itself.
    """

    def __init__(self, kernel: Inner) -> None:
        self.kernel: Inner = kernel
        self.pilots: list[Tensor] = []
        self.swept: list[Tensor] = []
        self.rounding = 0.0
        # Formed by torch, for i <= j, since K and L are symmetric; for i = j only blocks on and right of the diagonal.
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._stack: StackedMoments | None = None  # formed by the Triton kernels

    def start(self, pilots: Sequence[Tensor]) -> None:
        """Set the pilots of an empty stream: per model (d_i,) float64."""
        self.pilots = list(pilots)
        self.swept = [pilot.new_zeros(()) for pilot in pilots]

    def add(self, batch: Sequence[Tensor]) -> None:
        """Add one (b, d_i) batch per model, 1 <= b <= chunk_rows(batch[0]), any floating dtype."""
        if on_triton(*batch):
            self._add_fused(batch)
            return
        rows = [mapped(x, self.kernel) for x in batch]
        if not self.pilots:
            self.start(_pilots(rows))
        rows = [extended(x, pilot) for x, pilot in zip(rows, self.pilots, strict=True)]
        narrow = multiplied_narrow(*batch) and _fit_float32(rows)
        self.rounding = max(self.rounding, NARROW_ROUNDING * narrow)
        parts = [x[:, :-3].float() if narrow else x[:, :-3] for x in rows]
        for i, j in combinations_with_replacement(range(len(rows)), 2):
            if (i, j) not in self._sums:
                self._sums[i, j] = self.pilots[i].new_zeros(rows[i].shape[1], rows[j].shape[1])
            sums = self._sums[i, j]
            _add_product(sums[:-3, :-3], parts[i], parts[j], symmetric=i == j)
            sums[:-3, -3:] += rows[i][:, :-3].mT @ rows[j][:, -3:]
            sums[-3:] += rows[i][:, -3:].mT @ rows[j]

    def _add_fused(self, batch: Sequence[Tensor]) -> None:
        from fastcl.similarity.sums import triton as gram

        self.rounding = NARROW_ROUNDING
        if not self.pilots:
            self.start(_pilots([mapped(x, self.kernel) for x in batch]))
        if self._stack is None:
            self._stack = gram.StackedMoments(self.kernel, self.pilots)
        self._stack.add(batch)

    def moments(self, i: int, j: int) -> Tensor:
        """(d_i + 3, d_j + 3) float64 sums over all rows so far, i <= j."""
        parts = []
        if (i, j) in self._sums:
            parts = [self._sums[i, j].clone()]
            if i == j:
                _mirror(parts[0][:-3, :-3])
        parts += [self._stack.moments(i, j)] if self._stack is not None else []
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def with_rows(self, batch: Sequence[Tensor]) -> Moments:
        """A new stream with these rows added; this one is not modified."""
        joined = Moments(self.kernel)
        joined.start(self.pilots)
        joined.add(batch)
        if self.pilots:
            joined.merge(self)
        return joined

    def merge(self, other: Moments) -> None:
        """Add the rows of another stream of the same models on the same device."""
        if not self.pilots:
            self.start(other.pilots)
        self.rounding = max(self.rounding, other.rounding)
        same = all(torch.equal(a, b) for a, b in zip(self.pilots, other.pilots, strict=True))
        shifts = [] if same else [translation(a, b) for a, b in zip(other.pilots, self.pilots, strict=True)]
        for i, j in combinations_with_replacement(range(len(self.pilots)), 2):
            moments = other.moments(i, j)
            if i == j:
                way = torch.linalg.vector_norm(other.pilots[i] - self.pilots[i])
                swept = other.swept[i].sqrt() + moments[-3, -1].clamp_min(0).sqrt() * way
                self.swept[i] = self.swept[i] + swept.square()
            self.load(i, j, moments if same else shifts[i] @ moments @ shifts[j].mT)

    def load(self, i: int, j: int, moments: Tensor) -> None:
        """Add moments about this stream's pilots."""
        if (i, j) in self._sums:
            self._sums[i, j] += moments
        else:
            self._sums[i, j] = moments.clone()

    def clear(self) -> None:
        """Drop all rows but keep the pilots."""
        self._sums, self._stack = {}, None
        self.swept = [pilot.new_zeros(()) for pilot in self.pilots]

    def to(self, device: torch.device | None) -> Moments:
        """A copy of the stream on a device; None: on its own."""
        return Moments.of_state(self.kernel, self.state(), device)

    def state(self) -> dict[str, Any]:
        """Pilots, moments, rounding and swept, for `of_state`."""
        pairs = combinations_with_replacement(range(len(self.pilots)), 2)
        moments = [self.moments(i, j) for i, j in pairs]
        return {
            "pilots": list(self.pilots), "moments": moments, "rounding": self.rounding, "swept": list(self.swept)
        }  # fmt: skip

    @classmethod
    def of_state(cls, kernel: Inner, state: Mapping[str, Any], device: torch.device | None = None) -> Moments:
        """A stream from its `state`, on a device; None: on the state's."""
        stream = cls(kernel)
        stream.rounding = state["rounding"]
        stream.start([pilot.to(device) for pilot in state["pilots"]])
        # States of versions that did not record it count as streams that saw all their rows themselves.
        stream.swept = [swept.to(device) for swept in state.get("swept", stream.swept)]
        pairs = combinations_with_replacement(range(len(stream.pilots)), 2)
        for (i, j), moments in zip(pairs, state["moments"], strict=True):
            stream.load(i, j, moments.to(device))
        return stream

    def pair_sums(self) -> Iterator[tuple[tuple[int, int], list[float], tuple[float, float]]]:
        """The 18 values and the strains of `PairStats.unpacked` for each pair i < j; the transfers from the device are
        shared by all pairs."""
        count = len(self.pilots)
        found = {}
        blocks = [self.moments(i, i) for i in range(count)]
        models = [model_of(*one) for one in zip(self.pilots, blocks, self.swept, strict=True)]
        for i, j in combinations_with_replacement(range(count), 2):
            found[i, j] = sums_of(blocks[i] if i == j else self.moments(i, j), models[i], models[j])
        strains = [strain(m, found[i, i], blocks[i][-1, -1]) for i, m in enumerate(models)]
        scalars = torch.stack([torch.stack([m.shift, m.trace, s]) for m, s in zip(models, strains, strict=True)])
        scalars = scalars.tolist()
        found = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
        for i, j in combinations(range(count), 2):
            (full, full_rows, hollow, hollow_rows) = zip(found[i, j], found[i, i], found[j, j], strict=True)
            (shift_k, trace_k, strain_k), (shift_l, trace_l, strain_l) = scalars[i], scalars[j]
            values = [*full, *full_rows, 0.0, 0.0, *hollow, *hollow_rows, -trace_k, -trace_l, shift_k, shift_l]
            yield (i, j), values, (max(1.0, strain_k), max(1.0, strain_l))


def _pilots(rows: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each model's rows, computed about its first row."""
    return [x[0] + (x - x[0]).mean(dim=0) for x in rows]


def _fit_float32(rows: Sequence[Tensor]) -> bool:
    """Whether float32 can hold the products of v: squares do not overflow and the largest do not underflow."""
    largest = torch.stack([x[:, -3].amax() for x in rows])
    return bool((largest < _LARGEST).all() and (largest > 1 / _LARGEST).all())


def _blocks(width: int) -> list[slice]:
    """Slices of about _BLOCK columns."""
    count = max(1, round(width / _BLOCK))
    edges = [width * k // count for k in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _add_product(sums: Tensor, x: Tensor, y: Tensor, symmetric: bool) -> None:
    """sums += x'y, by blocks of columns; symmetric: without the blocks below the diagonal.

    A block below the diagonal is formed as the transpose of one above it, with x and y swapped. So models with equal
    features go through the same arithmetic in all three products of a pair, and their moments are bitwise equal.
    """
    for a, left in enumerate(_blocks(x.shape[1])):
        for b, right in enumerate(_blocks(y.shape[1])):
            if a <= b:
                _accumulate(sums[left, right], x[:, left], y[:, right])
            elif not symmetric:
                _accumulate(sums[left, right].mT, y[:, right], x[:, left])


def _accumulate(sums: Tensor, x: Tensor, y: Tensor) -> None:
    if x.dtype == sums.dtype:
        sums.addmm_(x.mT, y)
    else:
        with torch.autocast(x.device.type, enabled=False):
            sums += x.mT @ y


def _mirror(sums: Tensor) -> None:
    """Fill the blocks below the diagonal, in place."""
    for block in _blocks(len(sums)):
        sums[block.stop :, block] = sums[block, block.stop :].mT
