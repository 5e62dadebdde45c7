"""stable-pretraining's contrastive losses (stable_pretraining.losses, 0.1): NTXEntLoss, CLIPLoss, their InfoNCELoss."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor, nn

from fastcl.adapters.shared import IGNORED, counts_up, one_way, tell_once, world_size
from fastcl.losses.functional import clip_loss, ntxent_loss


class InfoNCELoss(nn.Module):
    """stable-pretraining's InfoNCELoss: anchors against candidates, of which one is the positive."""

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(
        self, anchors: Tensor, candidates: Tensor, targets: Tensor, mask: Tensor | None = None,
        logit_scale: Tensor | float | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean loss.

        Args:
            anchors, candidates: (N, D) and (M, D), normalised here.
            targets: (N,) index of each anchor's positive; -100 leaves the anchor out.
            mask: (N, M) bool, True for pairs to leave out: computed by stable-pretraining itself.
            logit_scale: divides the logits, in place of the temperature.

        Raises:
            NotImplementedError: a mask, where stable-pretraining is not installed.
        """
        degree = self.temperature if logit_scale is None else logit_scale
        if mask is not None:
            return _original(self.temperature)(anchors, candidates, targets, mask, logit_scale)
        if counts_up(targets, anchors):
            return one_way(anchors, candidates, 0, degree)
        return one_way(anchors, candidates, targets, degree, reduction="sum") / (targets != IGNORED).sum()


class NTXEntLoss(InfoNCELoss):
    """stable-pretraining's NTXEntLoss: NT-Xent of two views, with the negatives of all ranks."""

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__(temperature)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Mean loss of the views z_i and z_j, (B, D) each."""
        return ntxent_loss(z_i, z_j, self.temperature, gather_distributed=world_size() > 1)


class CLIPLoss(InfoNCELoss):
    """stable-pretraining's CLIPLoss: both directions, with the candidates of all ranks."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, feats_i: Tensor, feats_j: Tensor, logit_scale: Tensor | float | None = None
    ) -> Tensor:
        """Mean loss of features (B, D), normalised here; logit_scale divides the logits, not the temperature then."""
        degree = self.temperature if logit_scale is None else logit_scale
        return clip_loss(feats_i, feats_j, 1 / degree, gather_distributed=world_size() > 1)


def _original(temperature: float) -> Any:
    try:
        loss = import_module("stable_pretraining.losses.joint_embedding").InfoNCELoss
    except ImportError as error:
        raise NotImplementedError(
            "InfoNCELoss(mask=...) leaves out any pairs, which needs the whole matrix: install stable-pretraining "
            f"({error}), or use fastcl.row_stats with labels where the pairs to leave out share a class"
        ) from error
    tell_once("InfoNCELoss(mask=...) is computed by stable_pretraining itself, with an N x M matrix")
    return loss(temperature)
