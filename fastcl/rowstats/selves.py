"""`self_y` of `fastcl.row_stats`: candidates that are the anchors themselves are left out.

Such a candidate has the anchor's sample and would count as a view, so nothing but the statistics of views changes. They
are computed again without it, by an operator of their own on the chunked and on the Triton backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.checks import check_ids
from fastcl.dispatch import choose
from fastcl.errors import FastclError
from fastcl.rowstats import chunked, dense
from fastcl.rowstats.api import scaled
from fastcl.rowstats.fields import RowStats, unpack
from fastcl.rowstats.order import Layout
from fastcl.rowstats.registration import differentiable_once, refuse_batched, register
from fastcl.rowstats.request import Batch

_library = torch.library.Library("fastcl", "FRAGMENT")
_INPUTS = "Tensor x, Tensor y, Tensor sample, Tensor sample_y, Tensor self_y"
_library.define(f"views_without_self({_INPUTS}) -> (Tensor, Tensor)")
_library.define(f"views_without_self_backward({_INPUTS}, Tensor[] grads) -> (Tensor, Tensor)")


def check(self_y: Tensor, batch: Batch, columns: bool) -> None:
    """Raise FastclError unless `self_y` may be used; its values are checked on the CPU only."""
    if batch.y is None or columns:
        why = "columns=True" if columns else "y=None: candidate i is then left out for anchor i without it"
        raise FastclError(f"self_y cannot be used with {why}")
    check_ids(self_y, batch.x, "self_y")
    if self_y.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (self_y < -1) | (self_y >= len(batch.y))
    if wrong.any():
        raise FastclError(
            f"self_y must hold positions of y, 0 to {len(batch.y) - 1}, or -1, got {int(self_y[wrong][0])}"
        )
    assert batch.sample is not None and batch.sample_y is not None
    known = (self_y >= 0).nonzero()[:, 0]
    mine, found = batch.sample[known], batch.sample_y[self_y[known].long()]
    for k in (mine != found).nonzero()[:1, 0].tolist():
        raise FastclError(
            f"an anchor and its self_y must be one sample, got sample {int(mine[k])} for anchor {int(known[k])} and "
            f"sample_y {int(found[k])} for candidate {int(self_y[known[k]])}"
        )


def left_out(
    stats: RowStats, rows: Sequence[Tensor | None], ids: Sequence[Tensor | None], temperature: float | Tensor,
    normalize: bool,
) -> RowStats:  # fmt: skip
    """The statistics without candidates that are among the views of `stats`.

    Args:
        rows: anchors and candidates.
        ids: sample, sample_y and self_y, all checked.
    """
    x, y, sample, sample_y, self_y = (v for v in (*rows, *ids) if v is not None)
    with torch.autocast(x.device.type, enabled=False):
        function = dense.views_without_self if choose(x) == "dense" else torch.ops.fastcl.views_without_self
        x, y = (scaled(v, temperature, normalize) for v in (x, y))
        views = function(x, y, sample.long(), sample_y.long(), self_y.long())
    counts = stats.n_view - (self_y >= 0).long(), stats.n_peer, stats.n_other
    return unpack((*views, stats.mean_peer, stats.lse_peer, stats.lse_other), counts)


def _positions(layout: Layout, self_y: Tensor) -> Tensor:
    """(N + 1,) positions among the sorted candidates of the sorted anchors' own; -1: none."""
    order = layout.y.order
    positions = torch.arange(len(order), dtype=order.dtype, device=order.device)
    place = torch.empty_like(order).index_copy_(0, order, positions)
    found = place[self_y.clamp(0, len(order) - 1)].masked_fill(self_y < 0, -1)[layout.x.order]
    return torch.nn.functional.pad(found, (0, 1), value=-1)


def _forward(x: Tensor, y: Tensor, sample: Tensor, sample_y: Tensor, self_y: Tensor) -> tuple[Tensor, ...]:
    layout = Layout.of(sample, None, sample_y, None)
    with torch.autocast(x.device.type, enabled=False):
        found = chunked.forward_views(x[layout.x.order], y[layout.y.order], layout, _positions(layout, self_y))
    return tuple(layout.x.restore(v) for v in found)


def _forward_fake(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    return x.new_empty(len(x)), x.new_empty(len(x))


def _backward(
    x: Tensor, y: Tensor, sample: Tensor, sample_y: Tensor, self_y: Tensor, grads: list[Tensor]
) -> tuple[Tensor, Tensor]:
    layout = Layout.of(sample, None, sample_y, None)
    a, b = layout.x, layout.y
    dx, dy = x.new_zeros(len(x) + 1, x.shape[1]), y.new_zeros(len(y) + 1, y.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        upstream = [g[a.order] for g in grads]
        chunked.backward_views(x[a.order], y[b.order], layout, upstream, dx, dy, _positions(layout, self_y))
    return a.restore(dx[:-1]), b.restore(dy[:-1])


def _backward_fake(x: Tensor, y: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _setup_context(ctx, inputs, **_) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    refuse_batched("chunked", *grads)
    found = torch.ops.fastcl.views_without_self_backward(*ctx.saved_tensors, [g.contiguous() for g in grads])
    return *found, None, None, None


register(_library, "views_without_self", _forward, _forward_fake, _autograd, _setup_context)
register(_library, "views_without_self_backward", _backward, _backward_fake, differentiable_once("chunked"))
