"""solo-learn's contrastive losses (solo.losses): SimCLR in both forms, MoCo v2+, MoCo v3, NNCLR."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastcl.adapters.shared import class_ids, gathered, one_way, rank, with_positives, world_size
from fastcl.losses.functional import contrastive_loss, ntxent_loss
from fastcl.losses.queue import queue_loss
from fastcl.rowstats.api import RowStats


def simclr_loss_func(
    z: Tensor | None = None,
    indexes: Tensor | None = None,
    temperature: float = 0.1,
    extra_pos_mask: Tensor | None = None,
    *,
    z1: Tensor | None = None,
    z2: Tensor | None = None,
) -> Tensor:
    """solo-learn's SimCLR loss, in the form of its source, (z, indexes), or of release 1.0.2, (z1, z2).

    Args:
        z: (N, D) rows, of all ranks together in a process group; or z1.
        indexes: (N,) ids: rows with the same id are positives, whose exponentials are added up. Sample ids give
            SimCLR, classes SupCon with the sum inside the log. Or z2, (B, D), the second views of z1.
        temperature: divides the logits.
        extra_pos_mask: (2B, 2B) bool, with z1 and z2 only: positives besides the views; the mean is outside the log.

    Returns:
        The mean over the rows. One without a positive counts as 0, where solo-learn returns inf and NaN gradients.

    Raises:
        TypeError: a missing argument. ValueError: shapes that do not fit together.
    """
    first, second = z if z1 is None else z1, indexes if z2 is None else z2
    if first is None or second is None:
        raise TypeError("simclr_loss_func needs z and indexes, or z1 and z2")
    if second.ndim == 1:
        if extra_pos_mask is not None:
            raise ValueError("extra_pos_mask belongs to z1 and z2; with z and indexes, positives share an index")
        ids = torch.arange(len(first), dtype=torch.int64, device=first.device)
        labels, gathers = class_ids(second).to(first.device), world_size() > 1
        return contrastive_loss(first, ids, labels, _sum_inside, temperature, gather_distributed=gathers)
    if extra_pos_mask is None:
        return ntxent_loss(first, second, temperature, gather_distributed=False)
    x, batch = torch.cat([first, second]), len(first)
    if extra_pos_mask.shape != (len(x), len(x)):
        raise ValueError(f"extra_pos_mask must be ({len(x)}, {len(x)}), got {tuple(extra_pos_mask.shape)}")
    views = torch.eye(len(x), dtype=torch.bool, device=x.device).roll(batch, 1)
    return with_positives(x, views | extra_pos_mask.bool(), temperature, normalize=True, own=True).mean()


def _sum_inside(stats: RowStats) -> Tensor:
    """-log of the share of all positives' exponentials; 0 without a positive."""
    valid = (stats.n_peer > 0) & (stats.n_other > 0)
    gap = stats.lse_peer.masked_fill(~valid, 0) - stats.lse_other.masked_fill(~valid, 0)
    return (-logsigmoid(gap)).masked_fill(~valid, 0)


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """MoCo's loss of queries and keys (N, D) and a queue (D, K), none of which is normalised here."""
    return queue_loss(query, key, queue.T, temperature, normalize=False)


moco_loss_func = mocov2plus_loss_func  # its name in release 1.0.2


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    """MoCo v3's loss of queries (N, D) against the keys of all ranks, times 2 * temperature.

    In a process group the keys get no gradient.
    """
    return one_way(query, gathered(key), rank() * len(query), temperature) * (2 * temperature)


def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    """NNCLR's loss of nearest neighbours nn (N, D) against the predictions p (N, D) of all ranks.

    So does solo-learn's source; release 1.0.2 compares with the rank's own predictions alone.
    """
    return one_way(nn, p, 0, temperature, gathers=world_size() > 1)
