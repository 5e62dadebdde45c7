"""Row statistics: what every contrastive loss is made of, as one differentiable operation.

For an anchor row i every candidate row j stands in one relation: `view` (same sample), `peer` (another sample of the
same class) or `other`. With s_ij = <x_i, y_j> / temperature, each relation r has lse_r[i] = log sum_j exp(s_ij) and a
mean of s_ij. The losses are lines of plain PyTorch on these (N,)-vectors; see `fastcl.objectives`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastcl import operators, small  # noqa: F401  (registers torch.ops.fastcl)
from fastcl.backends import dense
from fastcl.batch import Batch
from fastcl.checks import check_positive, describe
from fastcl.errors import FastclError

BACKENDS = ("auto", "triton", "chunked", "dense")
PRECISIONS = ("fp16", "bf16", "fp32")
MAX_WIDTH = 4096  # of rows on the Triton backend

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
    columns: bool = False,
    precision: str | None = None,
) -> RowStats | tuple[RowStats, RowStats]:
    """Row statistics of anchors x against candidates y, differentiable in x, y and the temperature.

    Args:
        x: (N, D) float16, bfloat16, float32 or float64; statistics are float32, float64 for float64.
        y: (M, D) of x's dtype and device. None: the candidates are x itself, and j = i is in no relation.
        sample: (N,) integer ids; rows with the same id are views of one sample.
        labels: (N,) integer classes, -1 for unlabelled rows (`other` to all but their own views); None: no classes.
            Views of one sample share a label.
        sample_y: (M,) ids of y's rows, in the same numbering as `sample`; required with y.
        labels_y: (M,) classes of y's rows; required with y and labels.
        temperature: positive number, or a tensor with one element (its gradient comes with the rest).
        normalize: divide each row by its Euclidean norm first. A zero row stays zero and gets zero gradient; a row of
            any finite size neither overflows nor underflows.
        columns: the statistics of y's rows against x too; on the Triton backend from the same pass where there are no
            labels.
        precision: of the Triton backend's products, accumulated in float32: "fp16", "bf16", or "fp32" for products in
            split half precision, as good as float32's. None: "fp32" for float32 rows, unless autocast is on or
            `torch.get_float32_matmul_precision()` is below "highest"; else "fp16". The other backends compute in
            float32, float64 for float64, whatever it is.

    Returns:
        RowStats of the N anchors; with columns, and those of the M candidates.

    Raises:
        FastclError: wrong rank, shape, dtype or device, an empty batch, ids that are not integers, a temperature that
            is not positive and finite, views of one sample with different labels, columns without y, an unknown
            precision; what the Triton backend does not take where it was asked for by name. Values of tensors are
            checked on the CPU only: elsewhere a check would wait for the device.

    Source: the relations generalise arXiv 2510.08852, section 3; NaN in a row shows in every row that meets it.
    """
    batch = Batch.of(x, y, sample, labels, sample_y, labels_y)
    if columns and y is None:
        raise FastclError("columns=True needs y: without it the rows' statistics are the columns' too")
    found = statistics(batch, temperature, normalize, columns, precision)
    return found if columns else found[0]


def statistics(
    batch: Batch, temperature: float | Tensor, normalize: bool, columns: bool, precision: str | None
) -> tuple[RowStats, ...]:
    """RowStats of the anchors and, with columns, of the candidates; arguments as `row_stats`."""
    check_positive(temperature, "temperature")
    _check_precision(precision)
    chosen = choose_backend(batch.x)
    if chosen == "triton":
        if columns and batch.labels is not None:
            batches = batch, batch.transposed()
            return tuple(statistics(b, temperature, normalize, False, precision)[0] for b in batches)
        stats, counts, _, stats_y, counts_y, _ = fused(batch, temperature, normalize, columns, precision, ())
        return tuple(unpack(*found) for found in ((stats, counts), (stats_y, counts_y))[: 1 + columns])
    if chosen == "chunked" and not columns and (few := small.row_stats(batch, temperature, normalize)) is not None:
        return (unpack(*few),)
    batch = batch.spelled_out()
    root = _square_root(temperature)
    with torch.autocast(batch.x.device.type, enabled=False):
        # Rows divided by sqrt(temperature) make the logits inner products, and autograd brings the temperature's
        # gradient for free. In the rectangular case both operands take their share too.
        rows = [None if v is None else _prepare(v, normalize) / root for v in (batch.x, batch.y)]
        batch = Batch(rows[0], None, rows[1], batch.sample, batch.labels, batch.sample_y, batch.labels_y)
        return tuple(_on_torch(b) for b in ((batch, batch.transposed()) if columns else (batch,)))


def fused(
    batch: Batch, temperature: float | Tensor, normalize: bool, columns: bool, precision: str | None,
    codes: Sequence[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The Triton operator: stats (5, N), counts (3, N) and losses (K, N) of the anchors, then of the candidates.

    Args:
        codes: of the K objectives whose row losses are wanted (`Objective.code`); none: counts are returned instead.
    """
    given, value, precision = operator_arguments(temperature, precision, batch.x, batch.x2, batch.y)
    return torch.ops.fastcl.fused(
        batch.x, batch.x2, batch.y, batch.sample, batch.labels, batch.sample_y, batch.labels_y, given, value, normalize,
        precision, columns, list(codes),
    )[:6]  # fmt: skip


def operator_arguments(
    temperature: float | Tensor, precision: str | None, x: Tensor, *others: Tensor | None
) -> tuple[Tensor | None, float, str]:
    """Temperature as a tensor, as a number (one of the two), and precision of a Triton operator's call on rows x."""
    is_tensor = isinstance(temperature, Tensor)
    given = temperature.to(x.device) if is_tensor else None
    _check_no_tangent(x, *others, given)
    _check_precision(precision)
    return given, 0.0 if is_tensor else float(temperature), _precision(precision, x)


def _on_torch(batch: Batch) -> RowStats:
    arguments = batch.x, batch.y, batch.sample, batch.labels, batch.sample_y, batch.labels_y
    if _last == "dense":
        mean_view, spread_view, mean_peer, *rest = dense.row_stats(*arguments)
    else:
        _check_no_tangent(batch.x, batch.y)
        mean_view, spread_view, mean_peer, *rest = torch.ops.fastcl.row_stats(*arguments)
    lse_peer, lse_other, *counts = rest
    return unpack((mean_view, spread_view, mean_peer, lse_peer, lse_other), counts)


def unpack(stats: Sequence[Tensor], counts: Sequence[Tensor]) -> RowStats:
    """RowStats from (N,) tensors: mean_view, spread_view, mean_peer, lse_peer, lse_other; then the three counts."""
    mean_view, spread_view, mean_peer, lse_peer, lse_other = stats
    n_view, n_peer, n_other = counts
    lse_view = (mean_view + spread_view).masked_fill(n_view == 0, -torch.inf)
    return RowStats(lse_view, spread_view, mean_view, lse_peer, mean_peer, lse_other, n_view, n_peer, n_other)


def choose_backend(x: Tensor) -> str:
    """The backend for rows like x; `last_backend` tells it from then on.

    Raises:
        FastclError: the Triton backend was asked for by name, and does not take these rows.
    """
    global _last
    obstacle = _obstacle(x) if _backend in ("auto", "triton") else None
    if _backend == "triton" and obstacle:
        raise FastclError(f"the triton backend {obstacle}; got {describe(x)}")
    chosen = _backend
    if _backend == "auto":
        chosen = "triton" if x.device.type == "cuda" and not obstacle else "chunked"
    _last = chosen
    return chosen


def _obstacle(x: Tensor) -> str | None:
    """Why the Triton backend does not take these rows."""
    if x.dtype == torch.float64:
        return "computes in float32 at most"
    if x.shape[1] > MAX_WIDTH:
        return f"takes rows of at most {MAX_WIDTH} columns"
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs CUDA tensors; on a CPU it runs slowly, if TRITON_INTERPRET=1 was set before Python started"
    return None


@torch.compiler.assume_constant_result  # torch.compile cannot trace the question
def wants_float32() -> bool:
    """Whether `torch.get_float32_matmul_precision()` asks for whole float32."""
    return torch.get_float32_matmul_precision() == "highest"


def _precision(precision: str | None, x: Tensor) -> str:
    if precision is None:
        full = wants_float32() and not torch.is_autocast_enabled(x.device.type)
        return "fp32" if x.dtype == torch.float32 and full else "fp16"
    return precision


def _check_precision(precision: str | None) -> None:
    if precision is not None and precision not in PRECISIONS:
        raise FastclError(f"precision must be one of {', '.join(PRECISIONS)}, or None; got {precision!r}")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend inside a `with` block.

    Args:
        name: "triton" (fused kernels, differentiable once), "chunked" (torch, O(N x tile) memory, differentiable
            once), "dense" (the specification, N x N, differentiable twice) or "auto" (triton for CUDA tensors, chunked
            elsewhere and for what the kernels do not take: float64 and more than 4096 columns).

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


def current_backend() -> str:
    """The name that the surrounding `with backend(...)` was given; "auto" outside."""
    return _backend


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
            f"the {_last} backend has no forward-mode derivative; use `with fastcl.backend('dense')` for jvp"
        )


def _square_root(temperature: float | Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return math.sqrt(temperature)
    return (temperature if temperature.dtype == torch.float64 else temperature.float()).reshape(()).sqrt()


def _prepare(x: Tensor, normalize: bool) -> Tensor:
    if normalize:
        return normalize_rows(x)
    return x if x.dtype == torch.float64 else x.float()
