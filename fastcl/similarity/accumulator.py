"""Pair statistics of several models from one streaming pass over their features: no n x n matrix, any n.

Per model and kernel, a sample is the extended row x+ = [v, |v|^2, 1] where v = row - pilot. For models x and y the one
matrix M = sum x+ y+' (over the samples) holds the cross-moment of the features, both means, sum |v|^2, sum |w|^2,
sum |v|^2 |w|^2, sum |w|^2 v, sum |v|^2 w and n: every sum that the Gram matrices' statistics need. O(n d^2) time,
(d_x + 2)(d_y + 2) float64 memory a pair and kernel.

Why a pilot: with means far from zero (mean 1e3, spread 1) the entries of K are equal in their first 6 digits and
their squares in 12. The pilot is the first row of the stream, so constant features vanish exactly, and the result
does not depend on how the stream is cut into batches but through rounding: relative error of the centred cross-moment
at most about 1e-16 n, reached only when that row is an outlier that alone makes up the variance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastcl.errors import FastclError
from fastcl.similarity.stats import GramSums, PairStats

Kernel = Literal["linear", "cosine"]


def _unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1; a zero row has no direction and stays zero. Safe at any finite scale."""
    largest = x.abs().amax(dim=1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1.0)


_ROWS = {"linear": lambda x: x, "cosine": _unit_rows}


class _Model(NamedTuple):
    """Functionals of the extended row x+ of one model about its exact mean mu."""

    offset: Tensor  # (d,) mu - pilot
    mean: Tensor  # (d,) mu
    margin: Tensor  # (d + 2,): margin . x+ = mu . (row - mu) = mean of K's row i, less the mean of K
    diagonal: Tensor  # (d + 2,): diagonal . x+ = K_ii, less the mean of K
    shift: Tensor  # () |mu|^2, the mean of K
    trace: Tensor  # () sum of diagonal . x+


def _model(pilot: Tensor, moments: Tensor) -> _Model:
    sums = moments[:, -1]
    offset = sums[:-2] / sums[-1]
    mean = pilot + offset
    one = torch.ones_like(offset[:1])
    margin = torch.cat([mean, 0 * one, -(mean @ offset) * one])
    diagonal = torch.cat([2 * pilot, one, -((pilot + mean) @ offset) * one])
    return _Model(offset, mean, margin, diagonal, mean @ mean, diagonal @ sums)


class _Sums(NamedTuple):
    """Sums over K - mean(K) and L - mean(L) for one ordered pair of models: full and without the diagonals."""

    full: float
    full_rows: float
    hollow: float
    hollow_rows: float


def _sums(moments: Tensor, x: _Model, y: _Model) -> Tensor:
    """Sums of M = sum x+ y+' as a (4,) tensor, in the order of `_Sums`.

    With a_i, b_i the margins, K_ij - mean(K) = (HKH)_ij + a_i + a_j, where HKH is the Gram matrix of the centred rows,
    has zero row sums, and sum a_i = 0. So <K, L> = ||C||^2 + 2n<a, b> and the row sums are n a_i.
    """
    n = moments[-1, -1]
    centred = torch.addr(moments[:-2, :-2], -n * x.offset, y.offset)
    margins = x.mean @ (centred @ y.mean)
    full = centred.square_().sum() + 2 * n * margins
    full_rows = n * n * margins
    along_diagonal = moments @ y.diagonal
    diagonals = x.diagonal @ along_diagonal
    mixed = x.margin @ along_diagonal + x.diagonal @ (moments @ y.margin)
    return torch.stack([full, full_rows, full - diagonals, full_rows - n * mixed + diagonals])


class _GramStream:
    """Streaming sums of all pairs of models under one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.pilots: list[Tensor] = []
        self.moments: dict[tuple[int, int], Tensor] = {}  # i <= j: K and L are symmetric

    def add(self, batch: list[Tensor]) -> None:
        """Add one (b, d_i) float64 batch per model, b >= 1."""
        rows = [_ROWS[self.kernel](x) for x in batch]
        if not self.pilots:
            self.pilots = [x[0].clone() for x in rows]
            for i, j in combinations_with_replacement(range(len(rows)), 2):
                self.moments[i, j] = rows[0].new_zeros(rows[i].shape[1] + 2, rows[j].shape[1] + 2)
        extended = []
        for x, pilot in zip(rows, self.pilots, strict=True):
            v = x - pilot
            extended.append(torch.cat([v, v.square().sum(dim=1, keepdim=True), v.new_ones(len(v), 1)], dim=1))
        # One product a pair, all from fresh contiguous buffers of equal shape: half the work of the stacked product,
        # and models with equal features take the same arithmetic in all three of their sums.
        for (i, j), moments in self.moments.items():
            moments.addmm_(extended[i].mT, extended[j])

    def pairs(self) -> dict[tuple[int, int], PairStats]:
        """The statistics of each pair i < j."""
        models = [_model(pilot, self.moments[i, i]) for i, pilot in enumerate(self.pilots)]
        keys = list(self.moments)
        sums = torch.stack([_sums(self.moments[i, j], models[i], models[j]) for i, j in keys]).tolist()
        scalars = torch.stack([torch.stack([m.shift, m.trace]) for m in models]).tolist()
        at = {key: _Sums(*values) for key, values in zip(keys, sums, strict=True)}
        n = round(self.moments[0, 0][-1, -1].item())
        pairs = {}
        for i, j in combinations(range(len(models)), 2):
            kl, kk, ll = at[i, j], at[i, i], at[j, j]
            (shift_k, trace_k), (shift_l, trace_l) = scalars[i], scalars[j]
            full = GramSums(kl.full, kk.full, ll.full, kl.full_rows, kk.full_rows, ll.full_rows, 0.0, 0.0)
            hollow = GramSums(
                kl.hollow, kk.hollow, ll.hollow, kl.hollow_rows, kk.hollow_rows, ll.hollow_rows, -trace_k, -trace_l
            )
            pairs[i, j] = PairStats(n, self.kernel, full, hollow, shift_k, shift_l)
        return pairs


def _checked(features: Mapping[str, Tensor], seen: int, device: torch.device | None) -> list[Tensor]:
    """The features in float64 on one device, after checking types, shapes and values; `seen` rows came before."""
    for name, x in features.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise FastclError(f"features of {name!r} must be a floating-point tensor, got {kind}")
        if x.ndim != 2 or x.shape[1] == 0:
            raise FastclError(f"features of {name!r} must have shape (b, d) with d >= 1, got {tuple(x.shape)}")
    rows = {name: len(x) for name, x in features.items()}
    if len(set(rows.values())) > 1:
        raise FastclError(f"all models need features of the same samples, got numbers of rows {rows}")
    device = device or next(iter(features.values())).device
    # A copy even of float64 features: equal values take equal arithmetic from buffers of equal layout and alignment.
    batch = [
        x.to(device=device, dtype=torch.float64, copy=True, memory_format=torch.contiguous_format)
        for x in features.values()
    ]
    for name, x in zip(features, batch, strict=True):
        finite = x.isfinite().all(dim=1)
        if not finite.all():
            row = int(finite.logical_not().nonzero()[0])
            place = f"first in row {row} of {len(x)} of this batch, sample {seen + row}"
            raise FastclError(f"features of {name!r} are not finite: {place}")
    return batch


@dataclass(frozen=True)
class PairResult:
    """The statistics of one pair of models under both kernels."""

    linear: PairStats
    cosine: PairStats


class PairAccumulator:
    """CKA, debiased CKA, RSA and drifts of all pairs of models from one streaming pass over their features.

    All sums are kept in float64 on the device of the first batch: 8 (d_x + 2)(d_y + 2) bytes for each of the M(M+1)/2
    pairs (a model with itself included) and each of two kernels. The result does not depend on how the samples are
    split into batches, up to rounding (see `PairStats`).

    Args:
        names: distinct names of at least two models; the order in which pairs are keyed.

    Raises:
        FastclError: for fewer than two names, or a name that is repeated.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise FastclError(f"names must be at least two distinct names of models, got {self.names}")
        self.n = 0
        self._widths: dict[str, int] = {}
        self._device: torch.device | None = None
        self._streams = (_GramStream("linear"), _GramStream("cosine"))

    @torch.inference_mode()
    def update(self, features: Mapping[str, Tensor]) -> None:
        """Add one batch; nothing is added where an error is raised.

        Args:
            features: per name, (b, d_name) features of the same b samples in the same order; any floating dtype and
                device. Batches may differ in b. In the cosine kernel a zero row counts as the zero vector: its
                cosine with every sample is 0.

        Raises:
            FastclError: on missing or unknown names, unequal numbers of rows, a width that differs from the batch
                before, a shape that is not (b, d), a dtype that is not floating, or features that are not finite.
        """
        missing = [name for name in self.names if name not in features]
        unknown = [name for name in features if name not in self.names]
        if missing or unknown:
            raise FastclError(f"features must be given for {self.names}: missing {missing}, unknown {unknown}")
        batch = _checked({name: features[name] for name in self.names}, self.n, self._device)
        widths = {name: x.shape[1] for name, x in zip(self.names, batch, strict=True)}
        if self._widths and widths != self._widths:
            raise FastclError(f"widths of the features changed from {self._widths} to {widths} at sample {self.n}")
        if len(batch[0]) == 0:
            return
        self._widths, self._device = widths, batch[0].device
        for stream in self._streams:
            stream.add(batch)
        self.n += len(batch[0])

    @torch.inference_mode()
    def compute(self) -> dict[tuple[str, str], PairResult]:
        """The statistics of all samples so far; more batches may follow.

        Returns:
            A `PairResult` for each pair of names (a, b), a before b in `names`; a's Gram matrix is K, b's is L.

        Raises:
            FastclError: if no sample was added, or sums overflow float64.
        """
        if self.n == 0:
            raise FastclError(f"no features of {self.names} were added: n=0")
        linear, cosine = (stream.pairs() for stream in self._streams)
        return {(self.names[i], self.names[j]): PairResult(linear[i, j], cosine[i, j]) for i, j in linear}


@torch.inference_mode()
def pair_stats(x: Tensor, y: Tensor, kernel: Kernel = "linear") -> PairStats:
    """Statistics of the Gram matrices of two representations of the same samples.

    Args:
        x: (n, d_x) features, any floating dtype; sums are formed in float64 on x's device.
        y: (n, d_y) features of the same samples in the same order.
        kernel: "linear" (K = xx') or "cosine" (rows normalised first; a zero row stays zero).

    Returns:
        The `PairStats` whose properties are the measures.

    Raises:
        FastclError: on an unknown kernel, shapes that do not match, n = 0, a dtype that is not floating, or values
            that are not finite.
    """
    if kernel not in _ROWS:
        raise FastclError(f"kernel must be one of {tuple(_ROWS)}, got {kernel!r}")
    batch = _checked({"x": x, "y": y}, 0, None)
    if len(x) == 0:
        raise FastclError(f"x and y hold no samples: shapes {tuple(x.shape)} and {tuple(y.shape)}")
    stream = _GramStream(kernel)
    stream.add(batch)
    return stream.pairs()[0, 1]


def linear_cka(x: Tensor, y: Tensor, debiased: bool = False) -> float:
    """Linear centred kernel alignment of raw features (Kornblith et al. 2019).

    Args:
        x: (n, d_x) features, any floating dtype.
        y: (n, d_y) features of the same samples in the same order.
        debiased: use the unbiased HSIC_1 (Song et al. 2012, Nguyen et al. 2021; n >= 4) instead of HSIC_0, whose value
            for independent features grows with d/n.

    Returns:
        CKA in [0, 1], or in [-1, 1] where debiased.

    Raises:
        FastclError: as `pair_stats`; where CKA is undefined (constant features); for n < 4 where debiased.
    """
    stats = pair_stats(x, y, "linear")
    return stats.cka_debiased if debiased else stats.cka


def rsa(x: Tensor, y: Tensor) -> float:
    """Representational similarity analysis: Pearson correlation of the cosine dissimilarities over all pairs i < j.

    Args:
        x: (n, d_x) features, any floating dtype, n >= 3.
        y: (n, d_y) features of the same samples in the same order.

    Returns:
        RSA in [-1, 1] (Kriegeskorte et al. 2008, as in arXiv 2510.08852).

    Raises:
        FastclError: as `pair_stats`; where RSA is undefined (n < 3, or all dissimilarities of a model equal).
    """
    return pair_stats(x, y, "cosine").rsa
