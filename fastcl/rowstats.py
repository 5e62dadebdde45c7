"""Row statistics: what every contrastive loss is made of, as one differentiable operation.

For an anchor row i every candidate row j stands in one relation: `view` (same sample), `peer` (another sample of the
same class) or `other`. With s_ij = <x_i, y_j> / temperature, each relation r has lse_r[i] = log sum_j exp(s_ij) and a
mean of s_ij. The losses are lines of plain PyTorch on these (N,)-vectors; see `fastcl.objectives`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastcl import operators  # noqa: F401  (registers torch.ops.fastcl)
from fastcl.backends import dense
from fastcl.checks import check_all_ids, check_positive, check_rows, describe
from fastcl.errors import FastclError

BACKENDS = ("auto", "chunked", "dense")

# A plain module global: a ContextVar breaks torch.compile(fullgraph=True).
_backend = "auto"
_last = "none"


@dataclass(frozen=True)
class RowStats:
    """Statistics of N anchors; every field is an (N,) tensor, float32 (float64 for float64 rows) or int64 for counts.

    Where a relation is empty its lse is -inf, its mean and spread are 0, and no gradient flows.
    """

    lse_view: Tensor
    spread_view: Tensor  # lse_view - mean_view without its cancellation: exactly 0 for a single view
    mean_view: Tensor
    lse_peer: Tensor
    mean_peer: Tensor
    lse_other: Tensor
    n_view: Tensor
    n_peer: Tensor
    n_other: Tensor

    @property
    def valid(self) -> Tensor:
        """(N,) bool: the row has a view and an other, so that every objective of the table counts it."""
        return (self.n_view > 0) & (self.n_other > 0)


def row_stats(
    x: Tensor,
    y: Tensor | None = None,
    *,
    sample: Tensor,
    labels: Tensor | None = None,
    sample_y: Tensor | None = None,
    labels_y: Tensor | None = None,
    temperature: float | Tensor,
    normalize: bool = True,
) -> RowStats:
    """Row statistics of anchors x against candidates y, differentiable in x, y and the temperature.

    Args:
        x: (N, D) float16, bfloat16, float32 or float64; computed in float32, float64 for float64.
        y: (M, D) of x's dtype and device. None: the candidates are x itself, and j = i is in no relation.
        sample: (N,) integer ids; rows with the same id are views of one sample.
        labels: (N,) integer classes, -1 for unlabelled rows (`other` to all but their own views); None: no classes.
            Views of one sample share a label.
        sample_y: (M,) ids of y's rows, in the same numbering as `sample`; required with y.
        labels_y: (M,) classes of y's rows; required with y and labels.
        temperature: positive number, or a tensor with one element (its gradient comes with the rest).
        normalize: divide each row by its Euclidean norm first. A zero row stays zero and gets zero gradient; a row of
            any finite size neither overflows nor underflows.

    Returns:
        RowStats of the N anchors.

    Raises:
        FastclError: wrong rank, shape, dtype or device, an empty batch, ids that are not integers, a temperature that
            is not positive and finite, views of one sample with different labels. Values of tensors are checked on the
            CPU only: elsewhere a check would wait for the device.

    Source: the relations generalise arXiv 2510.08852, section 3; NaN in a row shows in every row that meets it.
    """
    global _last
    check_rows(x, "x")
    if y is not None:
        check_rows(y, "y")
        if (y.shape[1], y.dtype, y.device) != (x.shape[1], x.dtype, x.device):
            raise FastclError(f"y must match x in width, dtype and device: x is {describe(x)}, y is {describe(y)}")
    ids = check_all_ids(x, y, sample, labels, sample_y, labels_y)
    check_positive(temperature, "temperature")
    root = _square_root(temperature)
    backend_used = _last = "chunked" if _backend == "auto" else _backend
    with torch.autocast(x.device.type, enabled=False):
        # Rows divided by sqrt(temperature) make the logits inner products, and autograd brings the temperature's
        # gradient for free. In the rectangular case both operands take their share too.
        xs, ys = (None if v is None else _prepare(v, normalize) / root for v in (x, y))
        if backend_used == "dense":
            mean_view, spread_view, mean_peer, *rest = dense.row_stats(xs, ys, *ids)
        else:
            _check_no_tangent(xs, ys)
            mean_view, spread_view, mean_peer, *rest = torch.ops.fastcl.row_stats(xs, ys, *ids)
    lse_peer, lse_other, n_view, n_peer, n_other = rest
    lse_view = (mean_view + spread_view).masked_fill(n_view == 0, -torch.inf)
    return RowStats(lse_view, spread_view, mean_view, lse_peer, mean_peer, lse_other, n_view, n_peer, n_other)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend inside a `with` block.

    Args:
        name: "dense" (the specification, N x N, differentiable twice), "chunked" (O(N x tile) memory) or "auto"
            (chunked).

    Raises:
        FastclError: an unknown name.
    """
    global _backend
    if name not in BACKENDS:
        raise FastclError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def last_backend() -> str:
    """The backend that the most recent `row_stats` call ran on; "none" before the first."""
    return _last


def normalize_rows(x: Tensor) -> Tensor:
    """Rows of unit Euclidean norm.

    Dividing by the largest entry first keeps the squares of any finite row in range; that entry is a constant to
    autograd, since the direction does not depend on it.

    Args:
        x: (N, D) floating point.

    Returns:
        (N, D) float32, float64 for float64. Zero rows stay zero, with zero gradient; rows not finite become NaN.
    """
    x = x if x.dtype == torch.float64 else x.float()
    peak = x.detach().abs().amax(dim=1, keepdim=True)
    is_zero = peak == 0
    u = (x / peak.masked_fill(is_zero, 1)).masked_fill(is_zero, 0)
    # The largest entry of u is 1, so the sum of squares is at least 1 except in zero rows.
    return u / u.square().sum(1, keepdim=True).masked_fill(is_zero, 1).sqrt()


def _check_no_tangent(*rows: Tensor | None) -> None:
    """The operator has no forward-mode derivative, and PyTorch would take it for zero without a word."""
    if torch.compiler.is_compiling():
        return
    if any(v is not None and forward_ad.unpack_dual(v).tangent is not None for v in rows):
        raise FastclError(
            "the chunked backend has no forward-mode derivative; use `with fastcl.backend('dense')` for jvp"
        )


def _square_root(temperature: float | Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return math.sqrt(temperature)
    return (temperature if temperature.dtype == torch.float64 else temperature.float()).reshape(()).sqrt()


def _prepare(x: Tensor, normalize: bool) -> Tensor:
    if normalize:
        return normalize_rows(x)
    return x if x.dtype == torch.float64 else x.float()
