"""Losses and statistics of small batches on a CPU, without the dispatcher, which for 64 rows costs more than the sums.

Compiled code uses `torch.ops.fastcl.row_stats`, because the choice made here depends on values.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastcl.rowstats.registration import differentiable_once, refuse_batched
from fastcl.rowstats.small import masked, views_alone, whole
from fastcl.rowstats.small.closed import Form, Slopes, rows_and_slopes
from fastcl.rowstats.small.whole import Kept, MaybeNone

_refuse = differentiable_once("chunked")


class Pairs(NamedTuple):
    """2B rows of B samples with two views each, or two towers of B rows, of which both or the first are anchors; the
    second may then have further rows, which are nobody's view."""

    x: Tensor  # (B, D), or (2B, D) without x2
    x2: Tensor | None  # (B, D), or (M, D)
    order: Tensor | None  # (2B,) rows of x: first views, then second views, samples in the same order; None: as in x
    labels: Tensor | None  # (B,)
    towers: bool
    both_ways: bool = True


def losses(
    pairs: Pairs, temperature: float | Tensor, inverted: bool, normalize: bool, forms: Sequence[Form], peers: bool,
    reduction: str,
) -> Sequence[Tensor] | None:  # fmt: skip
    """Reduced row losses of each form (both towers together); None if `whole.forward` rejects the rows.

    Args:
        inverted: whether the temperature is given by its reciprocal, which then gets the gradient.
        peers: whether statistics of peers are needed, because a form attracts or repels peers.
    """
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return losses(pairs, temperature, inverted, normalize, forms, peers, reduction)
    given = temperature if isinstance(temperature, Tensor) else None
    x, x2, order, labels, towers, both_ways = pairs
    degree = as_float(temperature)
    way = whole.Way(1 / degree if inverted else degree, normalize, towers, both_ways, inverted)
    if len(forms) == 1 and reduction != "none":
        options = forms[0], peers, reduction, torch.is_grad_enabled()
        found = _Reduced.apply(options, way, order, labels, x, x2, given)
        return found if found is None else (found,)
    with torch.no_grad():
        if (found := _forward(pairs, way, peers)) is None:
            return None
        stats, kept = found
        rows, slopes = zip(*[rows_and_slopes(form, stats) for form in forms], strict=True)
        count = rows[0].numel() if reduction == "mean" else 1
        if reduction != "none":
            rows = [v.sum().div_(whole.number(count, v.dtype)) for v in rows]
    return _Attached.apply(rows, slopes, count, way, kept, order, x, x2, given)


def in_full() -> AbstractContextManager:
    """Disable autocast if it is on. Entering the context costs as much as a sum over few rows."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def row_stats(
    pairs: Pairs, temperature: float | Tensor, normalize: bool, peers: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
    """mean_view, spread_view, mean_peer, lse_peer, lse_other and three counts of N rows; None as in `losses`."""
    given = temperature if isinstance(temperature, Tensor) else None
    way = whole.Way(as_float(temperature), normalize, pairs.towers, pairs.both_ways)
    with torch.no_grad(), in_full():
        if (found := _forward(pairs, way, peers)) is None:
            return None
        stats, kept = found
        n = kept.other.numel()
        zero = kept.v.new_zeros(n)
        n_view = torch.ones(n, dtype=torch.int64, device=zero.device)
        if peers:
            n_peer = stats.n_peer.long().reshape(-1)
            inverse = 1 / stats.n_peer.clamp(min=1)
            peer = stats.sum_peer * inverse, stats.lse["peer"]
            slopes_peer = {"sum_peer": inverse}, {"peer": 1.0}
        else:
            n_peer, peer = n_view - 1, (zero.clone(), torch.full_like(zero, -torch.inf))
            slopes_peer = {}, {}
        statistics = stats.lse["view"], zero, *peer, stats.lse["other"]
        n_other = kept.e_other.shape[1] - (1 if pairs.towers else 2) - n_peer
        counts = tuple(_restored(v, pairs.order) for v in (n_view, n_peer, n_other))
    slopes = [{"view": 1.0}, {}, *slopes_peer, {"other": 1.0}]
    return _Attached.apply(statistics, slopes, 1, way, kept, pairs.order, pairs.x, pairs.x2, given), counts


def any_row_stats(
    x: Tensor, sample: Tensor, labels: Tensor | None, temperature: float | Tensor, normalize: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
    """`row_stats` for rows (N, D) with any number of views."""
    given = temperature if isinstance(temperature, Tensor) else None
    way = whole.Way(as_float(temperature), normalize, False)
    with torch.no_grad(), in_full():
        if (found := masked.forward(x, sample, labels, way)) is None:
            return None
        statistics, counts, kept = found
    return _Masked.apply(statistics, way, kept, x, given), counts


def _forward(pairs: Pairs, way: whole.Way, peers: bool) -> tuple[whole.Stats, Kept] | None:
    x = pairs.x if pairs.order is None else pairs.x[pairs.order]
    return whole.forward(x, pairs.x2, pairs.labels, peers, way)


def _restored(values: Tensor, order: Tensor | None) -> Tensor:
    return values if order is None else torch.empty_like(values).index_copy_(0, order, values)


def as_float(temperature: float | Tensor) -> float:
    """The temperature as a Python float; other number types would add their own rounding to the logits."""
    return temperature.item() if isinstance(temperature, Tensor) else float(temperature)


class _Given(NamedTuple):
    """Shapes and dtypes of the gradients. They do not read the inputs again, which may be changed in place."""

    dtype: torch.dtype  # dtype of the rows
    sizes: tuple[int, int] | None  # numbers of rows, if they are in two tensors
    need: whole.Need
    temperature: tuple[torch.Size, torch.dtype] | MaybeNone  # None: the temperature is not a tensor

    @classmethod
    def of(cls, x: Tensor, x2: Tensor | None, temperature: Tensor | None, need: whole.Need = (True, True)) -> _Given:
        kind = None if temperature is None else (temperature.shape, temperature.dtype)
        return cls(x.dtype, None if x2 is None else (x.shape[0], x2.shape[0]), need, kind)

    def gradients(self, dx: Tensor, dt: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, x2 and the temperature, converted from working precision."""
        if dx.dtype != self.dtype:
            dx = dx.to(self.dtype)
        if self.need == (True, True):
            rows = (dx, None) if self.sizes is None else dx.split_with_sizes(self.sizes)
        else:
            rows = (dx, None) if self.need[0] else (None, dx)
        if dt is not None:
            shape, dtype = self.temperature
            dt = dt.reshape(shape).to(dtype)
        return *rows, dt


def _need(way: whole.Way, wanted: Sequence[bool]) -> whole.Need:
    """Which gradients of rows to compute: of towers those wanted, one for a temperature alone; else all."""
    first, second = wanted
    return (first or not second, second) if way.towers else (True, True)


class _Reduced(Function):
    """The mean or the sum of an objective's row losses. The gradients are computed with it, so that N x D numbers are
    kept for the backward pass instead of N x N."""

    @staticmethod
    def forward(ctx, options, way, order, labels, x, x2, temperature):
        form, peers, reduction, wanted = options
        need = _need(way, ctx.needs_input_grad[4:6]) if wanted and True in ctx.needs_input_grad else None
        rows = x if order is None else x[order]
        if views_alone.fits(form, labels):
            found = views_alone.reduced(form, rows, x2, way, reduction == "mean", need)
        else:
            found = _reduced(form, rows, x2, labels, peers, way, reduction == "mean", need)
        if found is None:
            return None
        loss, dv, v, norm = found
        if need is not None:
            dx, dt = whole.to_inputs(v, norm, way, need, dv, temperature is not None)
            ctx.given, ctx.inputs = _Given.of(x, x2, temperature, need), (x, x2, temperature)
            ctx.save_for_backward(_restored(dx, order), dt)
        return loss

    @staticmethod
    def backward(ctx, *grads):
        refuse_batched("chunked", *grads)
        dx, dt = ctx.saved_tensors
        (grad,) = grads
        found = ctx.given.gradients(dx * grad, None if dt is None else dt * grad)
        return None, None, None, None, *once(found, ctx.inputs, grads)


def _reduced(
    form: Form, x: Tensor, x2: Tensor | None, labels: Tensor | None, peers: bool, way: whole.Way, mean: bool,
    need: whole.Need | None,
) -> views_alone.Found | None:  # fmt: skip
    """As `views_alone.reduced`, for any objective."""
    if (found := whole.forward(x, x2, labels, peers, way)) is None:
        return None
    stats, kept = found
    rows, slopes = rows_and_slopes(form, stats)
    count = rows.numel() if mean else 1
    loss = rows.sum().div_(whole.number(count, rows.dtype))  # faster than rows.mean(), with the same bits
    if need is None:
        return loss, None, kept.v, kept.norm
    return loss, whole.backward(kept, way, need, 1 / count, *map(slopes.get, whole.PULLS)), kept.v, kept.norm


class _Attached(Function):
    """Results (N,), or their sums divided by `count`, computed without autograd, with the derivatives of the results
    (`Slopes`)."""

    @staticmethod
    def forward(ctx, results, slopes, count, way, kept, order, *inputs):
        ctx.way, ctx.count = way, count
        ctx.slopes = [{r: v if isinstance(v, float) else None for r, v in s.items()} for s in slopes]
        x, x2, temperature = ctx.inputs = inputs
        ctx.given = _Given.of(x, x2, temperature, _need(way, ctx.needs_input_grad[6:8]))
        tensors = [v for s in slopes for v in s.values() if not isinstance(v, float)]
        ctx.save_for_backward(order, *kept, *tensors)
        ctx.set_materialize_grads(False)
        return tuple(_restored(v.reshape(-1), order) if v.dim() else v for v in results)

    @staticmethod
    def backward(ctx, *grads):
        refuse_batched("chunked", *grads)
        order, *rest = ctx.saved_tensors
        with torch.no_grad(), in_full():
            kept, tensors = Kept(*rest[: len(Kept._fields)]), iter(rest[len(Kept._fields) :])
            slopes = [{r: next(tensors) if v is None else v for r, v in s.items()} for s in ctx.slopes]
            scale, pulls = _pulls(slopes, grads, order, ctx.way.halves)
            need = ctx.given.need
            dv = whole.backward(kept, ctx.way, need, scale / ctx.count, *pulls)
            dx, dt = whole.to_inputs(kept.v, kept.norm, ctx.way, need, dv, ctx.needs_input_grad[8])
            found = ctx.given.gradients(_restored(dx, order), dt)
        return None, None, None, None, None, None, *once(found, ctx.inputs, grads)


class _Masked(Function):
    """The five statistics of rows with any number of views, computed without autograd."""

    @staticmethod
    def forward(ctx, statistics, way, kept, x, temperature):
        ctx.way, ctx.given, ctx.inputs = way, _Given.of(x, None, temperature), (x, temperature)
        ctx.save_for_backward(*kept)
        return statistics

    @staticmethod
    def backward(ctx, *grads):
        refuse_batched("chunked", *grads)
        with torch.no_grad(), in_full():
            kept = masked.Kept(*ctx.saved_tensors)
            scale = torch.stack(grads).abs().amax().item() or 1.0
            dv = masked.backward(kept, tuple(g / scale for g in grads)).mul_(scale / ctx.way.temperature)
            dx, dt = whole.to_inputs(kept.v, kept.norm, ctx.way, (True, True), dv, ctx.needs_input_grad[4])
            dx, _, dt = ctx.given.gradients(dx, dt)
        return None, None, None, *once((dx, dt), ctx.inputs, grads)


def _pulls(
    slopes: Sequence[Slopes], grads: Sequence[Tensor | None], order: Tensor | None, halves: int
) -> tuple[float, list[whole.Pull]]:
    """Largest upstream gradient, and the gradients of `whole.PULLS` divided by it, so that products with exponentials
    stay in range whatever the reduction. The gradient of a sum is one number for all rows."""
    given = [(s, _upstream(g, order)) for s, g in zip(slopes, grads, strict=True) if g is not None and s]
    scale = max((g.abs().amax().item() if isinstance(g, Tensor) else abs(g) for _, g in given), default=0.0) or 1.0
    totals: dict[str, Tensor | float] = {}
    for s, g in given:
        share = (g / scale).view(halves, -1) if isinstance(g, Tensor) else g / scale
        for r, slope in s.items():
            term = slope if isinstance(share, float) and share == 1 else share * slope
            totals[r] = totals[r] + term if r in totals else term
    return scale, [totals.get(r) for r in whole.PULLS]


def _upstream(grad: Tensor, order: Tensor | None) -> Tensor | float:
    if not grad.dim():
        return grad.item()
    return grad if order is None else grad[order]


def once(
    found: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return the gradients; under create_graph, tied to all that they depend on, so that differentiating them raises
    FastclError and is never silently zero."""
    if not torch.is_grad_enabled():
        return found
    return _Once.apply(len(found), *found, *inputs, *grads)


class _Once(Function):
    @staticmethod
    def forward(_, count, *tensors):
        return tuple(None if v is None else v.detach().clone() for v in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        return _refuse(ctx, *grads)
