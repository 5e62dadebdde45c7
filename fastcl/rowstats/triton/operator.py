"""torch.ops.fastcl.fused: statistics and losses on the Triton backend, which is imported on the first call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastcl.checks import check_precision, check_transforms
from fastcl.choices import RELATIONS
from fastcl.dispatch import wants_float32
from fastcl.rowstats.registration import (
    call,
    call_backward,
    differentiable_once,
    keep,
    kept,
    refuse_batched,
    register_for_small,
)
from fastcl.rowstats.request import Batch

if TYPE_CHECKING:
    from fastcl.rowstats.triton.operand import Call

# The bits of `Objective.code` for peers in the denominator and among the positives.
_REPELLED, _ATTRACTED = (1 << RELATIONS.index("peer")), (8 << RELATIONS.index("peer"))


class Asked(NamedTuple):
    """The arguments of an operator other than rows and ids, in the order of its schema."""

    temperature: Tensor | None
    value: float  # the temperature, if `temperature` is None
    normalize: bool
    precision: str
    columns: bool
    codes: Sequence[int]  # of objectives (`Objective.code`); empty: the caller uses the statistics
    reduction: str  # of the losses over all anchors: "mean", "sum" or "none"
    inverted: bool  # the tensor holds 1 / T

    def call(self, labelled: bool) -> Call:
        """The call, as the launches take it."""
        from fastcl.rowstats.triton.operand import Call

        def any_of(bits: int) -> bool:
            return labelled and (not self.codes or any(code & bits for code in self.codes))

        split = "all" if self.precision == "fp32" else "peers" if any_of(_ATTRACTED) else "none"
        peers = any_of(_ATTRACTED | _REPELLED)
        options = self.temperature, self.value, self.normalize, self.precision, tuple(self.codes)
        return Call(*options, split, peers, self.reduction, 2 if self.columns else 1, self.inverted)


class Saved(NamedTuple):
    """Saved for the backward pass, besides the rows; what a call does not have is None."""

    z: Any  # working copies, inverse norms and orders of the anchors, then of the candidates
    inv: Any
    order: Any
    z_y: Any = None
    inv_y: Any = None
    order_y: Any = None
    scale: Any = None  # (1,) or (2,); of rows that are not normalised
    flag: Any = None
    # Weights of both sides at an upstream gradient of 1, and their divisor, if the losses are those of one objective,
    # reduced.
    weights: Any = None
    weights_y: Any = None
    bound: Any = None
    arrived: Any = None  # as `Degree.arrived`, if the temperature is a tensor
    stats: Any = None  # of both sides, if the caller does not get them
    stats_y: Any = None


class Returned(NamedTuple):
    """The results of the operator; the candidates' stats, counts and losses are None without `columns`. Where there are
    objectives, stats and counts are None, and `saved_stats` and `saved_stats_y` are not.

    Reduced losses are (K,), a single one (), of both sides together.
    """

    stats: Any
    counts: Any
    losses: Any
    stats_y: Any
    counts_y: Any
    losses_y: Any
    z: Any
    inv: Any
    order: Any
    z_y: Any
    inv_y: Any
    order_y: Any
    scale: Any
    flag: Any
    weights: Any
    weights_y: Any
    bound: Any
    arrived: Any
    saved_stats: Any
    saved_stats_y: Any

    @property
    def saved(self) -> Saved:
        """The part saved for the backward pass."""
        return Saved(*self[6:])


_is_any_autocast = torch._C._is_any_autocast_enabled
_library = torch.library.Library("fastcl", "FRAGMENT")
_ROWS = "Tensor x, Tensor? x2, Tensor? y"
_IDS = "Tensor? sample, Tensor? labels, Tensor? sample_y, Tensor? labels_y"
_DEGREE = "Tensor? temperature"
_CALL = "float value, bool normalize, str precision, bool columns, int[] codes, str reduction, bool inverted"
_SAVED = ", ".join(f"Tensor? {name}" for name in ("stats", "stats_y", *(f"saved_{name}" for name in Saved._fields)))
_GRADS = "Tensor? g_stats, Tensor? g_losses, Tensor? g_stats_y, Tensor? g_losses_y"
_library.define(f"fused({_ROWS}, {_DEGREE}, {_IDS}, {_CALL}) -> ({', '.join(['Tensor'] * len(Returned._fields))})")
_library.define(
    f"fused_backward({_ROWS}, {_DEGREE}, {_GRADS}, {_SAVED}, {_CALL}, bool labelled, bool[] need) "
    "-> (Tensor, Tensor, Tensor)"
)


def fused(
    batch: Batch, temperature: float | Tensor, normalize: bool, columns: bool, precision: str | None,
    codes: Sequence[int], reduction: str = "none", inverted: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """The Triton operator: stats (5, N), counts (3, N) and losses (K, N) of the anchors, then of the candidates; what a
    call does not have is None or empty.

    Args:
        codes: the K objectives whose losses are returned (`Objective.code`). If empty, stats and counts are.
        reduction: "mean" or "sum" of the losses over the anchors; the first losses are then (K,), a single one (), with
            columns the mean of both sides'.
        inverted: `temperature` is a tensor that holds 1 / T.
    """
    if batch.y is not None and len(batch.y) > len(batch.x):
        batch = batch.spelled_out()  # kernels know the order of pairs alone
    given, value, precision = operator_arguments(temperature, precision, batch.x, batch.x2, batch.y)
    options = value, normalize, precision, columns, tuple(codes), reduction, inverted
    x, x2, y, sample, labels, sample_y, labels_y, _ = batch  # PyTorch 2.7 cannot compile a slice of it
    return call("fused", (x, x2, y, given, sample, labels, sample_y, labels_y), options)[:6]


def operator_arguments(
    temperature: float | Tensor, precision: str | None, x: Tensor, *others: Tensor | None
) -> tuple[Tensor | None, float, str]:
    """Temperature as a tensor or else as a number, and the precision, for a Triton operator's call on rows x."""
    is_tensor = isinstance(temperature, Tensor)
    given = temperature.to(x.device) if is_tensor else None
    check_transforms("triton", x, *others, given)
    check_precision(precision)
    return given, 0.0 if is_tensor else float(temperature), _precision(precision, x)


def _precision(precision: str | None, x: Tensor) -> str:
    if precision is None:
        autocast = _is_any_autocast() and torch.is_autocast_enabled(x.device.type)  # the first in a fifth of the time
        return "fp32" if x.dtype == torch.float32 and wants_float32() and not autocast else "fp16"
    return precision


def _forward(x, x2, y, temperature, sample, labels, sample_y, labels_y, *asked) -> Returned:
    from fastcl.rowstats.triton import forward, working_order
    from fastcl.rowstats.triton.operand import Source

    columns, call = Asked(temperature, *asked).columns, Asked(temperature, *asked).call(labels is not None)
    flag = torch.empty(1, dtype=torch.int32, device=x.device) if call.may_overflow else None
    if sample is not None:
        order_x, order_y = working_order.orders(sample, labels, sample_y, labels_y)
    else:
        order_x, order_y = working_order.known_order(len(x), 2 if y is None else 1, labels, x.device), None
    theirs = None if y is None else Source(y, None, order_x if order_y is None else order_y)
    operands, found, arrived = forward.statistics(Source(x, x2, order_x), theirs, call, flag, columns)
    stats: list[Any] = [one.stats for one in found] + [None] * (2 - len(found))
    first, *others = found
    losses = first.losses.rows if first.losses.total is None else first.losses.total
    counts_y = losses_y = None
    for r in others:  # with columns; reduced losses are those of both sides
        counts_y, losses_y = r.counts, None if call.reduced else r.losses.rows
    shown, hidden = ([None] * 2, stats) if call.codes else (stats, [None] * 2)
    a, b = operands[0], operands[1] if y is not None else None
    saved_y = (None, None, None) if b is None else (b.z, b.inv, None if order_y is None else b.order)
    scales = [operand.scale for operand in operands if operand.scale is not None]
    scale = torch.cat(scales) if len(scales) > 1 else scales[0] if scales else None
    ready: list[Any] = [one.losses.ready for one in found]
    weights = None if ready[0] is None else ready[0].weights
    weights_y = None if ready[-1] is None or len(ready) < 2 else ready[-1].weights
    bound = None if ready[0] is None else ready[0].bound
    return Returned(
        shown[0], first.counts, losses, shown[1], counts_y, losses_y, a.z, a.inv, a.order, *saved_y, scale, flag,
        weights, weights_y, bound, arrived, *hidden,
    )  # fmt: skip


def _forward_fake(x, x2, y, temperature, sample, labels, _sample_y, _labels_y, *options) -> Returned:
    from fastcl.rowstats.triton.operand import DTYPES, working_shape

    asked = Asked(temperature, *options)
    codes, columns, call = asked.codes, asked.columns, asked.call(labels is not None)
    n, d = x.shape[0] * (1 if x2 is None else 2), x.shape[1]
    orders = 7 if y is not None and sample is not None else 5

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    def results(rows: int, first: bool) -> tuple[Tensor | None, ...]:
        total = () if len(codes) == 1 else (len(codes),)
        losses = (empty(*total) if first else None) if call.reduced else empty(len(codes), rows)
        found = (None, None) if codes else (empty(5, rows), empty(3, rows, dtype=torch.int64))
        return *found, losses

    def saved(rows: int, with_order: bool) -> tuple[Tensor | None, ...]:
        z = empty(*working_shape(rows, d, call.split, x.device), dtype=DTYPES[call.precision])
        order = empty(orders, rows, dtype=torch.int32) if with_order else None
        return z, empty(rows) if call.normalize else None, order

    ready: list[Any] = [None] * 4
    both = (n, y.shape[0]) if columns and y is not None else (n,)
    if call.settles(sum(both)):
        weights = [empty(5, working_shape(rows, d, call.split, x.device)[1]) for rows in both]
        ready = [*weights, *[None] * (2 - len(weights)), empty(1), None]
        if call.temperature is not None:
            ready[3] = empty(1, dtype=torch.int32)
    scale = None if call.normalize else empty(1 if y is None else 2)
    flag = empty(1, dtype=torch.int32) if call.may_overflow else None
    given_y = saved_y = (None, None, None)
    if y is not None:
        given_y = results(y.shape[0], False) if columns else given_y
        saved_y = saved(y.shape[0], orders == 7)
    stats = [empty(5, rows) if codes else None for rows in both] + [None] * (2 - len(both))
    parts = *results(n, True), *given_y, *saved(n, True), *saved_y, scale, flag, *ready, *stats
    return Returned(*parts)


def _backward(x, x2, y, temperature, *rest) -> tuple[Tensor | None, ...]:
    from fastcl.rowstats.triton import backward, operand

    grads, saved, (*asked, labelled, need) = rest[:4], Saved(*rest[6:-9]), rest[-9:]
    stats, stats_y = (saved.stats, saved.stats_y) if rest[4] is None else rest[4:6]
    columns, call = Asked(temperature, *asked).columns, Asked(temperature, *asked).call(labelled)
    flag = saved.flag
    scales = [None, None] if saved.scale is None else [saved.scale[:1], saved.scale[1:]]
    a = operand.restored(x, x2, saved.order, saved.z, saved.inv, scales[0])
    upstreams = [backward.Upstream(stats, grads[0], grads[1])]
    b = None
    if y is not None:
        order_y = saved.order if saved.order_y is None else saved.order_y
        b = operand.restored(y, None, order_y, saved.z_y, saved.inv_y, scales[1])
        if not columns:  # read only if the flag is set, with zero weights
            stats_y = stats.new_zeros(5, len(y) if flag is not None else 0)
        upstreams.append(backward.Upstream(stats_y, grads[2], grads[1] if call.reduced and columns else grads[3]))
    ready = None
    if saved.bound is not None:
        ready = backward.Settled((saved.weights, saved.weights_y), saved.bound, saved.arrived)
    return backward.gradients(a, b, call, flag, upstreams, tuple(need), ready)


def _backward_fake(x, x2, y, *rest) -> tuple[Tensor | None, ...]:
    need = rest[-1]
    n = x.shape[0] * (1 if x2 is None else 2)
    has_dx = y is None or need[0] or need[2]
    return (
        x.new_empty((n, x.shape[1])) if has_dx else None, y.new_empty(y.shape) if y is not None and need[1] else None,
        x.new_empty((), dtype=torch.float32) if need[2] else None,
    )  # fmt: skip


def _setup_context(ctx, inputs, results, hidden) -> None:
    x, x2, y, temperature, _, labels, _, _, *asked = inputs
    ctx.options = *asked, labels is not None
    keep(ctx, (x, x2, y, temperature, results[0], results[3]), hidden)
    ctx.set_materialize_grads(False)


def _autograd(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # The kernels read gradients of losses with any strides, including the expanded scalar of a mean.
    given = [None if g is None or not g.numel() else g for g in (grads[0], grads[2], grads[3], grads[5])]
    if given[0] is given[1] is given[2] is given[3] is None:
        return (None,) * 15
    refuse_batched("triton", *given)
    given[::2] = [None if g is None else g.contiguous() for g in given[::2]]
    if given[3] is not None and given[3] is given[1]:  # of losses that were added; a recording tells arguments apart
        given[3] = given[3].detach()
    (x, x2, y, temperature, *stats), hidden = kept(ctx)
    needed = ctx.needs_input_grad
    need = needed[0] or needed[1], needed[2], needed[3]
    tensors, options = (x, x2, y, temperature, *given, *stats), (*ctx.options, need)
    dx, dy, dt = call_backward("fused_backward", tensors, hidden, options)
    two = (None, None) if not need[0] else (dx, None) if x2 is None else dx.split_with_sizes((x.shape[0], x2.shape[0]))
    dt = dt.reshape(temperature.shape).to(temperature.dtype) if need[2] else None
    return *two, dy if need[1] else None, dt, *(None,) * 11


register_for_small(_library, "fused", _forward, _forward_fake, _autograd, _setup_context, 8, 4, 6, 6)
register_for_small(_library, "fused_backward", _backward, _backward_fake, differentiable_once("triton"), None, 24, 4)
