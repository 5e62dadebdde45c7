"""lightly's contrastive losses (lightly.loss, 1.6): NTXentLoss with its memory bank, DCLLoss, DCLWLoss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fastcl.adapters.memory_bank import MemoryBankModule
from fastcl.adapters.shared import check_ranks, world_size
from fastcl.losses.functional import dcl_loss, ntxent_loss, two_view_stats
from fastcl.losses.queue import queue_loss
from fastcl.rowstats.api import normalize_rows, row_stats


class NTXentLoss(nn.Module):
    """lightly's NTXentLoss: NT-Xent of two views, or with a memory bank InfoNCE of out0 against out1 and the bank.

    Args:
        temperature: divides the logits; a negative one attracts what is unlike.
        memory_bank_size: 0, or (number of rows, width) of a bank whose rows are the only negatives.
        gather_distributed: negatives, or what is enqueued, come from all ranks.

    Raises:
        ValueError: a temperature of 0, an illegal size of the bank, gather_distributed without torch.distributed.
    """

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        if abs(temperature) < 1e-8:
            raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8")
        check_ranks(gather_distributed)
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Mean loss of the views out0 and out1, (B, D) each; the bank takes out1 if out0 requires a gradient."""
        if self.memory_bank.size[0] > 0:
            return self._against_bank(out0, out1)
        gathers = self.gather_distributed and world_size() > 1
        if self.temperature > 0:
            return ntxent_loss(out0, out1, self.temperature, gather_distributed=gathers)
        # exp(-s / |T|) against the rows turned round; the row itself is left out together with its view.
        x, sample, degree = (
            torch.cat([out0, out1]),
            torch.arange(len(out0), dtype=torch.int64, device=out0.device).repeat(2),
            -self.temperature,
        )
        options = {"temperature": degree, "gather_distributed": gathers}
        others = row_stats(x, -x, sample=sample, sample_y=sample, **options).lse_other
        positive = -(normalize_rows(out0) * normalize_rows(out1)).sum(1).repeat(2) / degree
        return -logsigmoid(positive - others).mean()

    def _against_bank(self, out0: Tensor, out1: Tensor) -> Tensor:
        u0, u1 = normalize_rows(out0), normalize_rows(out1)
        bank = self.memory_bank.bank.clone().to(out0.device)
        if out0.requires_grad:
            self.memory_bank.enqueue(u1.detach())
        if self.temperature < 0:
            u0 = -u0
        return queue_loss(u0, u1, bank, abs(self.temperature), normalize=False)


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """(B,) weights of positives, 2 - B softmax(<out0_i, out1_i> / sigma), without a gradient."""
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - len(out0) * similarity.softmax(0)


class DCLLoss(nn.Module):
    """lightly's DCLLoss: decoupled contrastive learning, whose positives may be weighted.

    Args:
        temperature: divides the logits.
        weight_fn: maps the unit rows of both views, (B, D) each, to the (B,) weights of their positives, or one weight.
        gather_distributed: negatives come from all ranks.

    Raises:
        ValueError: gather_distributed without torch.distributed.
    """

    def __init__(
        self, temperature: float = 0.1, weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_ranks(gather_distributed)
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Mean loss of the views out0 and out1, (B, D) each."""
        options = {"temperature": self.temperature, "gather_distributed": self.gather_distributed and world_size() > 1}
        if self.weight_fn is None:
            return dcl_loss(out0, out1, **options)
        stats = two_view_stats(out0, out1, None, **options)
        u0, u1 = normalize_rows(out0), normalize_rows(out1)
        sides = zip(*(v.chunk(2) for v in (stats.lse_other, stats.mean_view, stats.n_other)), strict=True)
        losses = [
            (lse - self.weight_fn(*rows) * positive).where(others > 0, 0).mean()
            for (lse, positive, others), rows in zip(sides, ((u0, u1), (u1, u0)), strict=True)
        ]
        return (losses[0] + losses[1]) / 2


class DCLWLoss(DCLLoss):
    """lightly's DCLWLoss: DCLLoss with negative von Mises-Fisher weights of width sigma."""

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False) -> None:
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)
