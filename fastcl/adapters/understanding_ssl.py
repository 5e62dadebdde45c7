"""The losses published with arXiv 2510.08852 (understanding-ssl-v2, utils/losses.py), under their names there.

Two names mean something else than elsewhere: NTXentLoss counts the positive twice in its denominator, and
DecoupledNTXentLoss is what others call NT-Xent. The paper's own formulas are `fastcl.dcl_loss` and `fastcl.nscl_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastcl.adapters.shared import class_ids, everywhere, tell_once, with_gradient_times, world_size
from fastcl.choices import ObjectiveName
from fastcl.losses.functional import contrastive_loss
from fastcl.rowstats.api import RowStats

_FLOOR = math.log(1e-9)  # of a sum of exponentials whose largest, the row's with itself, is 1


class _Published(nn.Module):
    """Base class: two views and labels, on all ranks, with the gradient of the published code."""

    def __init__(self, temperature: float = 0.5, device: str = "cuda") -> None:
        super().__init__()
        self.temperature = temperature
        self.device = device

    def forward(self, z_i: Tensor, z_j: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean loss over all ranks' rows, of the views z_i and z_j, (B, D) each, and labels (B,)."""
        ids = torch.arange(len(z_i), dtype=torch.int64, device=z_i.device).repeat(2)
        classes = None if labels is None else class_ids(labels).to(z_i.device).repeat(2)
        world = world_size()
        if world > 1:
            tell_once(
                f"the losses published with arXiv 2510.08852 give 1/{world} of the gradient of the global batch on "
                f"{world} ranks, and so do their adapters; fastcl's own, with gather_distributed=True, give all of it"
            )
        rows = with_gradient_times(torch.cat([z_i, z_j]), 1 / world)
        objective = self._objective()
        return everywhere(
            contrastive_loss(rows, ids, classes, objective, self.temperature, gather_distributed=world > 1)
        )

    def _objective(self) -> ObjectiveName | Callable[[RowStats], Tensor]:
        raise NotImplementedError


class NTXentLoss(_Published):
    """ "cl": log(2 exp(s_p) + sum of the other exponentials) - s_p."""

    def _objective(self) -> ObjectiveName | Callable[[RowStats], Tensor]:
        return _positive_twice


class DecoupledNTXentLoss(_Published):
    """ "dcl": NT-Xent, with the positive in the denominator."""

    def _objective(self) -> ObjectiveName | Callable[[RowStats], Tensor]:
        return "ntxent"


class NegSupConLoss(_Published):
    """ "nscl": NSCL with the positive in the denominator. Rows without negatives count as 0."""

    def _objective(self) -> ObjectiveName | Callable[[RowStats], Tensor]:
        return "nscl_with_positive"


class SupConLoss(_Published):
    """ "scl": SupCon (L_out), with the published code's 1e-9 in sums and counts."""

    def _objective(self) -> ObjectiveName | Callable[[RowStats], Tensor]:
        return self._rows

    def _rows(self, stats: RowStats) -> Tensor:
        return self._gap(stats, (stats.lse_view, stats.lse_peer, stats.lse_other))

    def _gap(self, stats: RowStats, terms: tuple[Tensor, ...]) -> Tensor:
        """Log-sum-exp of the terms and the floor, minus the mean logit of views and peers."""
        floor = torch.full_like(stats.lse_view, 1 / self.temperature + _FLOOR)
        lse = torch.stack([*terms, floor]).logsumexp(0)
        n = stats.n_view + stats.n_peer
        total = stats.mean_view * stats.n_view + stats.mean_peer * stats.n_peer
        return (lse * n - total) / (n + 1e-9)


class HybridSupConLoss(SupConLoss):
    """SupCon with other classes alone in the denominator; the floor of 1e-9 is all of it where there are none."""

    def _rows(self, stats: RowStats) -> Tensor:
        return self._gap(stats, (stats.lse_other,))


def _positive_twice(stats: RowStats) -> Tensor:
    twice = stats.mean_view + math.log(2)
    return torch.stack([twice, stats.lse_peer, stats.lse_other]).logsumexp(0) - stats.mean_view
