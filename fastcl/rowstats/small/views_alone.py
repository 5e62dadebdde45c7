"""Pairs without classes whose only positive is the view (NT-Xent, CLIP, InfoNCE, DCL): the loss and its gradient.

What `whole` and `closed` compute for any objective, in a straight line: of few rows every step, and every function that
is called, takes as long as a sum. Sums of exponentials are checked in place of logits.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastcl.rowstats.chunked import EXP_LIMIT
from fastcl.rowstats.small import whole
from fastcl.rowstats.small.closed import softplus
from fastcl.rowstats.small.whole import MaybeNone, Need, Way, number

# A reduced loss, and what `whole.to_inputs` takes: the gradient of v, (N, D), or of the one tower that needs it, None
# if no gradient is wanted; v, (N, D), which may share memory with the rows given; norms (N, 1), or None.
Found: TypeAlias = tuple[Tensor, MaybeNone, Tensor, MaybeNone]


def fits(form: Any, labels: Tensor | None) -> bool:
    """Whether an objective (`closed.Form`) is one of those that are computed here."""
    return labels is None and form.positives == ("view",) and "other" in form.denominator


def reduced(form: Any, x: Tensor, x2: Tensor | None, way: Way, mean: bool, need: Need | None) -> Found | None:
    """The mean or the sum of the row losses; None if rows or sums are out of range.

    Args:
        x, x2: as `whole.forward`; every anchor has an other.
        need: which of two towers need a gradient; None: no gradient is wanted.
    """
    b = x.shape[0] // 2
    if x2 is not None:
        b, x = x.shape[0], torch.cat((x, x2))
    v, norm = x.float() if x.dtype.itemsize < 4 else x, None
    if way.normalize:
        if (found := whole.norms(v)) is None:
            return None
        norm = found[0]
        v = v / norm
    towers, scale = way.towers, 1 / way.temperature
    one, two = v.split_with_sizes((b, v.shape[0] - b)) if towers else (v, v)
    e = torch.addmm(number(0, v.dtype), one, two.t(), beta=0, alpha=scale)
    places = e.diagonal() if towers else whole.partners(e)
    view = places.clone()
    e.exp_()
    if towers:
        places.zero_()
        other = torch.stack((e.sum(1), e.sum(0))) if way.both_ways else e.sum(1, keepdim=True).t()
    else:
        whole.hide(e, False)
        other = e.sum(1).view(2, b)
    if (norm is None or scale > EXP_LIMIT) and not whole.in_range(other):
        return None
    losses = other.log().sub_(view)
    force = None  # all are 1
    if "view" in form.denominator:
        losses, force = softplus(losses), losses.sigmoid_()
    count = losses.numel() if mean else 1
    loss = losses.sum().div_(number(count, v.dtype))  # faster than losses.mean(), with the same bits
    if need is None:
        return loss, None, v, norm
    e.mul_(whole.weights(other.reciprocal_() if force is None else force / other, towers))
    places.sub_(number(way.halves, v.dtype) if force is None else force.sum(0))
    return loss, whole.pulled(e, v, way, need, scale / count), v, norm
