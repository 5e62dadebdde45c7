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

from fastcl.backends import chunked, dense
from fastcl.backends.layout import Layout
from fastcl.errors import FastclError

BACKENDS = ("auto", "chunked", "dense")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

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
        """(N,) bool: the row has a positive (a view) and a negative (an other), so that every objective counts it."""
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
    _check_rows(x, "x")
    if y is not None:
        _check_rows(y, "y")
        if (y.shape[1], y.dtype, y.device) != (x.shape[1], x.dtype, x.device):
            raise FastclError(
                f"y must match x in width, dtype and device: x is {_describe(x)}, y is {_describe(y)}"
            )
    ids = _check_ids(x, y, sample, labels, sample_y, labels_y)
    root = _sqrt_temperature(temperature)
    backend_used = _last = "chunked" if _backend == "auto" else _backend
    with torch.autocast(x.device.type, enabled=False):
        # Rows divided by sqrt(temperature) make the logits inner products, and autograd brings the temperature's
        # gradient for free. In the rectangular case both operands take their share too.
        xs, ys = (None if v is None else _prepare(v, normalize) / root for v in (x, y))
        if backend_used == "dense":
            mean_view, spread_view, mean_peer, *rest = dense.row_stats(xs, ys, *ids)
        else:
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
        (N, D) of x's dtype. Zero rows stay zero, with zero gradient; rows that are not finite become NaN.
    """
    peak = x.detach().abs().amax(dim=1, keepdim=True)
    is_zero = peak == 0
    u = (x / peak.masked_fill(is_zero, 1)).masked_fill(is_zero, 0)
    # The largest entry of u is 1, so the sum of squares is at least 1 except in zero rows.
    return u / u.square().sum(1, keepdim=True).masked_fill(is_zero, 1).sqrt()


def _prepare(x: Tensor, normalize: bool) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    return normalize_rows(x) if normalize else x


def _sqrt_temperature(temperature: float | Tensor) -> float | Tensor:
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or not temperature.is_floating_point():
            raise FastclError(f"temperature must be a float or a float tensor with one element, got {_describe(temperature)}")
        if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_temperature(temperature.item())
        wide = temperature if temperature.dtype == torch.float64 else temperature.float()
        return wide.reshape(()).sqrt()
    return math.sqrt(_check_temperature(temperature))


def _check_temperature(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise FastclError(f"temperature must be a positive finite number, got {value!r}")
    return value


def _check_rows(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise FastclError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] == 0:
        raise FastclError(f"{name} must be a non-empty (rows, width) matrix, got {_describe(x)}")
    if x.dtype not in _DTYPES:
        raise FastclError(f"{name} must be float16, bfloat16, float32 or float64, got {_describe(x)}")


def _check_ids(
    x: Tensor, y: Tensor | None, sample: Tensor, labels: Tensor | None, sample_y: Tensor | None, labels_y: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    wanted = {"sample": (sample, x, True), "labels": (labels, x, False)}
    wanted |= {"sample_y": (sample_y, y, y is not None), "labels_y": (labels_y, y, y is not None and labels is not None)}
    for name, (ids, rows, required) in wanted.items():
        if ids is None:
            if required:
                raise FastclError(f"{name} is required here: one integer id per row")
            continue
        if rows is None or (name == "labels_y" and labels is None):
            raise FastclError(f"{name} was given without {'y' if rows is None else 'labels'}")
        check_ids(ids, rows, name)
    if not torch.compiler.is_compiling():
        _check_views_agree(sample, labels, sample_y, labels_y)
    return tuple(None if v is None else v.long() for v in (sample, labels, sample_y, labels_y))


def check_ids(ids: Tensor, rows: Tensor, name: str) -> None:
    """Raise FastclError unless `ids` is one integer for each row of `rows`, on its device."""
    if not isinstance(ids, Tensor):
        raise FastclError(f"{name} must be an integer tensor, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise FastclError(f"{name} must be integers, got {_describe(ids)}")
    if ids.shape != rows.shape[:1] or ids.device != rows.device:
        raise FastclError(f"{name} must hold one id for each of {len(rows)} rows on {rows.device}, got {_describe(ids)}")


def _check_views_agree(
    sample: Tensor, labels: Tensor | None, sample_y: Tensor | None, labels_y: Tensor | None
) -> None:
    if labels is None or labels.device.type != "cpu":
        return
    samples = sample if sample_y is None else torch.cat([sample, sample_y])
    classes = labels if labels_y is None else torch.cat([labels, labels_y])
    ordered, order = samples.sort(stable=True)
    classes = classes[order]
    wrong = (ordered[1:] == ordered[:-1]) & (classes[1:] != classes[:-1])
    if wrong.any():
        k = int(wrong.nonzero()[0, 0])
        raise FastclError(
            f"labels must agree within a sample: sample {ordered[k].item()} has labels "
            f"{classes[k].item()} and {classes[k + 1].item()}"
        )


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


# The operator: registered, so that torch.compile keeps it whole; autograd at the Autograd key, so that it composes.
_library = torch.library.Library("fastcl", "DEF")
_IDS = "Tensor sample, Tensor? labels, Tensor? sample_y, Tensor? labels_y"
_library.define(f"row_stats(Tensor x, Tensor? y, {_IDS}) -> ({', '.join(['Tensor'] * 8)})")
_library.define(f"row_stats_backward(Tensor x, Tensor? y, {_IDS}, Tensor[] lse, Tensor[] grads) -> (Tensor, Tensor)")


def _forward(x: Tensor, y: Tensor | None, *ids: Tensor | None) -> tuple[Tensor, ...]:
    with torch.autocast(x.device.type, enabled=False):
        return chunked.forward(x, y, Layout.of(*ids))


def _forward_fake(x: Tensor, y: Tensor | None, *ids: Tensor | None) -> tuple[Tensor, ...]:
    n = x.shape[0]
    return tuple(x.new_empty(n) for _ in range(5)) + tuple(x.new_empty(n, dtype=torch.int64) for _ in range(3))


def _backward(x: Tensor, y: Tensor | None, *rest) -> tuple[Tensor, Tensor]:
    *ids, lse, grads = rest
    with torch.autocast(x.device.type, enabled=False):
        return chunked.backward(x, y, Layout.of(*ids), tuple(lse), tuple(grads))


def _backward_fake(x: Tensor, y: Tensor | None, *rest) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if y is None else torch.empty_like(y)


def _setup_context(ctx, inputs, output) -> None:
    x, y, *ids = inputs
    ctx.save_for_backward(x, y, *ids, output[3], output[4])
    ctx.mark_non_differentiable(*output[5:])


def _autograd(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x, y, *ids, lse_peer, lse_other = ctx.saved_tensors
    dx, dy = torch.ops.fastcl.row_stats_backward(x, y, *ids, [lse_peer, lse_other], [g.contiguous() for g in grads[:5]])
    return dx, None if y is None else dy, None, None, None, None


def _no_double_backward(ctx, *grads: Tensor) -> None:
    raise FastclError(
        "the chunked backend is differentiable once; for second derivatives run the forward pass "
        "inside `with fastcl.backend('dense')`"
    )


for _name, _impl, _fake in (("row_stats", _forward, _forward_fake), ("row_stats_backward", _backward, _backward_fake)):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastcl::{_name}", _fake, lib=_library)
torch.library.register_autograd("fastcl::row_stats", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("fastcl::row_stats_backward", _no_double_backward, lib=_library)
