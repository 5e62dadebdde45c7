"""Plain baselines of the pair statistics: dense Gram matrices, moments of the features, the published form.

The functions take the feature matrices (n, d) of two or more models, or a stream of them, and return floats for some of
`MEASURES`. They compute in the caller's dtype. In float64 the dense forms are the reference of all providers; the tests
hold them to the definitions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor
from torch.nn import functional

# Each measure with the kernel of its Gram matrices.
MEASURES = {
    "CKA": "linear",
    "debiased CKA": "linear",
    "RSA": "cosine",
    "correlation RSA": "correlation",
    "RBF CKA": "rbf",
}
SUBSAMPLE = 10_000  # rows on which the published code computes CKA
_RDM_ROWS = 1024  # rows per block of the published code's RDM
_MEDIAN_ROWS = 2048  # evenly spaced rows for the median distance, as in fastcl
# Elements per dot product. cuBLAS counts them in 32 bits. On a CPU a float32 sum of 10^8 elements has an error of
# 10^-3, one of this size 10^-6, at the same speed.
_DOT = {"cpu": 2**18, "cuda": 2**30}


def dot(a: Tensor, b: Tensor) -> float:
    """Sum of the elementwise product, faster than (a * b).sum() and without that matrix."""
    pieces = (k.view(-1).split(_DOT[k.device.type]) for k in (a, b))
    return sum(float(u @ v) for u, v in zip(*pieces, strict=True))


def dense_linear(models: Sequence[Tensor]) -> dict[str, list[float]]:
    """CKA and debiased CKA of all pairs from the Gram matrices of centred rows, whose row sums are 0."""
    grams = [x @ x.T for x in (x - x.mean(0) for x in models)]
    diagonals = [k.diagonal().clone() for k in grams]
    traces = [float(a.sum()) for a in diagonals]
    n, full, hollow = len(models[0]), {}, {}
    for i, j in _upper(models):
        full[i, j] = dot(grams[i], grams[j])
        # HSIC_1 does not change with a shift of the rows. Without the diagonals, row sums are minus the diagonals.
        along = float(diagonals[i] @ diagonals[j])
        hollow[i, j] = full[i, j] - along + traces[i] * traces[j] / ((n - 1) * (n - 2)) - 2 * along / (n - 2)
    return {"CKA": _ratios(full), "debiased CKA": _ratios(hollow)}


def dense_cosine(models: Sequence[Tensor]) -> dict[str, list[float]]:
    """RSA of all pairs from the cosine matrices: the sign and offset of 1 - K cancel in a correlation."""
    units = [functional.normalize(x) for x in models]
    grams = [u @ u.T for u in units]
    diagonals = [k.diagonal().clone() for k in grams]
    totals = [float(u.sum(0).square().sum()) - float(k.sum()) for u, k in zip(units, diagonals, strict=True)]
    n = len(units[0])
    covariance = {}
    for i, j in _upper(models):
        inner = dot(grams[i], grams[j]) - float(diagonals[i] @ diagonals[j])
        covariance[i, j] = inner - totals[i] * totals[j] / (n * (n - 1))
    return {"RSA": _ratios(covariance)}


def dense_rbf(models: Sequence[Tensor]) -> dict[str, list[float]]:
    """CKA of Gaussian kernels with the median distance between two samples as width (Kornblith et al. 2019)."""
    grams = []
    for x in models:
        median = float(torch.pdist(x[:: -(-len(x) // _MEDIAN_ROWS)]).median())
        centred = x - x.mean(0)
        squares = centred.square().sum(1)
        k = torch.addmm(squares, centred, centred.T, alpha=-2).add_(squares[:, None])
        k.clamp_min_(0).fill_diagonal_(0).mul_(-0.5 / median**2).exp_()
        # Centre now: nearly equal entries would cancel in float32 sums.
        means = k.mean(1)
        grams.append(k.sub_(means).sub_(means[:, None]).add_(means.mean()))
    return {"RBF CKA": _ratios({(i, j): dot(grams[i], grams[j]) for i, j in _upper(models)})}


def feature_moments(batches: Iterable[Sequence[Tensor]], dtype: torch.dtype) -> dict[str, list[float]]:
    """CKA of all pairs from ||X'Y||^2 of centred features, in one pass about the means of the first batch."""
    n, pilots = 0, []
    for batch in batches:
        rows = [x.to(dtype) for x in batch]
        if not pilots:
            pilots = [x.mean(0) for x in rows]
            sums = [torch.zeros_like(p) for p in pilots]
            moments = {(i, j): pilots[i].new_zeros(len(pilots[i]), len(pilots[j])) for i, j in _upper(rows)}
        rows = [x - pilot for x, pilot in zip(rows, pilots, strict=True)]
        for total, x in zip(sums, rows, strict=True):
            total += x.sum(0)
        for (i, j), moment in moments.items():
            moment.addmm_(rows[i].T, rows[j])
        n += len(rows[0])
    norms = {}
    for (i, j), moment in moments.items():
        centred = torch.addr(moment, sums[i], sums[j], alpha=-1 / n)
        norms[i, j] = dot(centred, centred)
    return {"CKA": _ratios(norms)}


def published_cka(x: Tensor, y: Tensor) -> float:
    """CKA as in the code published with arXiv 2510.08852: a random subsample, its Gram matrices centred by row and
    column means, and traces of three n x n x n products."""
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:SUBSAMPLE].to(x.device)
    centred = []
    for rows in (x[chosen], y[chosen]):
        k = rows @ rows.T
        centred.append(k - k.mean(1, keepdim=True) - k.mean(0, keepdim=True) + k.mean())
    a, b = centred
    ab, aa, bb = (torch.trace(p @ q) for p, q in ((a, b), (a, a), (b, b)))
    return float(ab / torch.sqrt(aa * bb))


def published_rsa(x: Tensor, y: Tensor) -> float:
    """RSA as in the code published with arXiv 2510.08852: both n x n RDMs on the CPU, block by block without using
    symmetry, then the entries below the diagonal, gathered by index."""
    triangles = []
    rdms = [_published_rdm(x), _published_rdm(y)]
    for rdm in rdms:
        below = torch.tril_indices(*rdm.shape, offset=-1)
        triangles.append(rdm[below[0], below[1]])
    a, b = (v - v.mean() for v in triangles)
    return float(torch.dot(a / a.norm(), b / b.norm()))


def _published_rdm(x: Tensor) -> Tensor:
    rdm = torch.zeros(len(x), len(x))
    u = functional.normalize(x)
    for i in range(0, len(x), _RDM_ROWS):
        for j in range(0, len(x), _RDM_ROWS):
            a, b = (functional.normalize(u[k : k + _RDM_ROWS]) for k in (i, j))
            rdm[i : i + _RDM_ROWS, j : j + _RDM_ROWS] = (1 - a @ b.T).cpu()
    return rdm.fill_diagonal_(0).clamp_(min=0)


def reference(models: Sequence[Tensor]) -> dict[str, list[float]]:
    """Every measure of all pairs from float64 Gram matrices on the CPU."""
    rows = [x.double().cpu() for x in models]
    (correlation,) = dense_cosine([x - x.mean(1, keepdim=True) for x in rows]).values()
    return dense_linear(rows) | dense_cosine(rows) | {"correlation RSA": correlation} | dense_rbf(rows)


def _upper(models: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """All pairs of models, including a model with itself."""
    return combinations_with_replacement(range(len(models)), 2)


def _ratios(forms: dict[tuple[int, int], float]) -> list[float]:
    """form(K, L) / sqrt(form(K, K) form(L, L)) for each pair of different models."""
    return [value / math.sqrt(forms[i, i] * forms[j, j]) for (i, j), value in forms.items() if i < j]
