"""Inf-CL's losses (inf_cl 1.2): one direction of CLIP, on one rank (flash) or on all (ring, inf)."""

from __future__ import annotations

from torch import Tensor

from fastcl.adapters.shared import one_way, with_gradient_summed, world_size
from fastcl.choices import Reduction


def cal_flash_loss(
    q: Tensor,
    k: Tensor,
    labels: Tensor | None = None,
    scale: float | Tensor | None = None,
    head_dim: int = 256,  # noqa: ARG001
) -> Tensor:
    """(N,) cross-entropies of scale * q (N, D) against k (M, D), which are not normalised.

    Args:
        labels: (N,) index of each row's positive in k; None: row by row.
        scale: factor on the logits, positive; None: 1. A tensor gets a gradient.
        head_dim: has no effect here: any D will do.
    """
    return _loss(q, k, labels, scale, "none", gathers=False)


def cal_ring_loss(
    q: Tensor,
    k: Tensor,
    labels: Tensor | None = None,
    scale: float | Tensor | None = None,
    head_dim: int = 256,  # noqa: ARG001
) -> Tensor:
    """Mean loss of this rank's q against the k of all ranks, without gathering them at once where they are many.

    Arguments as `cal_flash_loss`; `labels` index this rank's k. As in Inf-CL, the gradient of `scale` is the sum over
    the ranks.
    """
    if isinstance(scale, Tensor):
        scale = with_gradient_summed(scale)
    return _loss(q, k, labels, scale, "mean", gathers=world_size() > 1)


cal_inf_loss = cal_ring_loss


def _loss(
    q: Tensor, k: Tensor, labels: Tensor | None, scale: float | Tensor | None, reduction: Reduction, gathers: bool
) -> Tensor:
    if labels is None and len(q) > len(k):
        raise ValueError(f"without labels k must have a row for each of q, got {len(k)} and {len(q)} rows")
    temperature = 1.0 if scale is None else 1 / scale
    target = 0 if labels is None else labels
    return one_way(q, k, target, temperature, False, reduction, gathers)
