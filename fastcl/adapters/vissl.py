"""vissl's SimclrInfoNCECriterion (vissl.losses.simclr_info_nce_loss)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcl.adapters.shared import check_world_size, rank, world_size
from fastcl.losses.functional import ntxent_loss


class SimclrInfoNCECriterion(nn.Module):
    """vissl's SimclrInfoNCECriterion: NT-Xent of 2n rows, first views first, that the caller has normalised.

    Args:
        buffer_params: has `effective_batch_size` (rows of all ranks), `world_size` and `embedding_dim`.
        temperature: divides the logits.
    """

    def __init__(self, buffer_params: Any, temperature: float) -> None:
        super().__init__()
        self.buffer_params = buffer_params
        self.temperature = temperature
        self.num_pos = 2
        self.dist_rank = rank()

    @property
    def pos_mask(self) -> Tensor:
        """(rows of this rank, rows of all ranks) 1 for the other view, else 0; made on request, not used here."""
        own, columns = self._places()
        return (columns == own.roll(len(own) // 2)[:, None]).float()

    @property
    def neg_mask(self) -> Tensor:
        """The same for rows of other samples."""
        own, columns = self._places()
        return 1 - self.pos_mask - (columns == own[:, None]).float()

    def _places(self) -> tuple[Tensor, Tensor]:
        columns = torch.arange(self.buffer_params.effective_batch_size, dtype=torch.int64, device="cpu")
        return columns.view(self.buffer_params.world_size, -1)[self.dist_rank], columns

    def forward(self, embedding: Tensor) -> Tensor:
        """Mean loss of this rank's rows (2n, D) against those of all ranks.

        Raises:
            AssertionError: another number of dimensions or columns than was told, or an odd number of rows.
            ValueError: another number of rows, or of processes, than was told.
        """
        assert embedding.ndim == 2
        assert embedding.shape[1] == int(self.buffer_params.embedding_dim)
        assert len(embedding) % self.num_pos == 0, "Batch size should be divisible by num_pos"
        check_world_size(self.buffer_params.world_size)
        rows = self.buffer_params.effective_batch_size // self.buffer_params.world_size
        if len(embedding) != rows:
            raise ValueError(f"buffer_params tell of {rows} rows on a rank, got {len(embedding)}")
        first, second = embedding.chunk(2)
        return ntxent_loss(first, second, self.temperature, normalize=False, gather_distributed=world_size() > 1)
