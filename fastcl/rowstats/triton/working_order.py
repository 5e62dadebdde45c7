"""The working order of rows: from labels or ids by counting where rows are few, else sorted by PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.kernels.common.launch import cdiv, launch
from fastcl.kernels.contrastive.order import Ids, layout_kernel, order_kernel
from fastcl.rowstats.order import Layout, Sorted

COUNTED = 16384  # up to this many rows, counting takes less than the launches of a sort


class Order(NamedTuple):
    """The order of a side.

    Attributes:
        tensor: (5 or 7, n) int32, as `Operand.order`.
        views: 2 if rows k and k + n / 2 are views of sample k, 1 if rows k of both sides are pair k: `prepare_kernel`
            then writes the order. 0: it is complete.
        labels: (n / views,) int64 of samples whose order is not written yet; None: no labels, or a complete order.
    """

    tensor: Tensor
    views: int = 0
    labels: Tensor | None = None


def known_order(samples: int, views: int, labels: Tensor | None, device: torch.device) -> Order:
    """The order for two views of each sample (views = 2) or one row each (1).

    Args:
        labels: (samples,) int64, or None.
    """
    n = samples * views
    order = torch.empty(5, n, dtype=torch.int32, device=device)
    if labels is None or n <= COUNTED:
        return Order(order, views, None if labels is None else labels.contiguous())
    ordered, index = labels.sort(stable=True)
    launch(
        layout_kernel, (cdiv(n, 1024),), 4, 1,
        order_B=index, sorted_B=ordered, layout_5N=order, batch=samples, n=n, VIEWS=views,
        STEPS=samples.bit_length() + 1, BLOCK_N=1024,
    )  # fmt: skip
    return Order(order)


def orders(
    sample: Tensor, labels: Tensor | None, sample_y: Tensor | None = None, labels_y: Tensor | None = None
) -> tuple[Order, Order | None]:
    """The orders of both sides for arbitrary int64 ids; the second is None if the candidates are the rows."""
    if max(len(sample), 0 if sample_y is None else len(sample_y)) > COUNTED:
        return sorted_orders(Layout.of(sample, labels, sample_y, labels_y))
    x = _ids(sample, labels)
    if sample_y is None:
        return _counted(x, x, False), None
    y = _ids(sample_y, labels_y)
    return _counted(x, y, True), _counted(y, x, True)


def _ids(sample: Tensor, labels: Tensor | None) -> Ids:
    """Ids as the kernel reads them, one after the other in memory."""
    return Ids(sample.contiguous(), None if labels is None else labels.contiguous(), len(sample))


def _counted(own: Ids, other: Ids, with_own: bool) -> Order:
    order = torch.empty(7 if with_own else 5, own.n, dtype=torch.int32, device=own.sample_N.device)
    launch(
        order_kernel, (cdiv(own.n, 16),), 4, 1,
        own=own, other=other, layout=order, BLOCK_N=16, CHUNK=32, OWN=with_own,
    )  # fmt: skip
    return Order(order)


def sorted_orders(layout: Layout) -> tuple[Order, Order | None]:
    """The orders of both sides from sorted ids; the second is None in the symmetric case."""
    if layout.symmetric:
        return _order(layout.x, layout.x, False), None
    return _order(layout.x, layout.y, True), _order(layout.y, layout.x, True)


def _order(own: Sorted, other: Sorted, with_own: bool) -> Order:
    rows = [own.order, *_interval(other.group, own.group), *_interval(other.key, own.key)]
    if with_own:
        rows += [torch.searchsorted(own.group, own.group), torch.searchsorted(own.key, own.key)]
    return Order(torch.stack([row.int() for row in rows]))


def _interval(ordered: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end of each value in an ascending tensor; if it does not occur, the start is -1 - position."""
    first, last = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return torch.where(first < last, first, -1 - first), last
