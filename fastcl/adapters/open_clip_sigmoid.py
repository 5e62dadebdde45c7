"""open_clip's SigLipLoss; import it from `fastcl.adapters.open_clip`."""

from __future__ import annotations

from torch import Tensor, nn

from fastcl.adapters.shared import check_world_size
from fastcl.losses.sigmoid import sigmoid_loss

_EXCHANGES = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(nn.Module):
    """open_clip's SigLipLoss: the sigmoid loss of features that the caller has normalised.

    With several ranks the value is the loss of this rank's images against the texts of all ranks. Gradients are those
    of the sum over the ranks, as in open_clip: their average over the ranks is that of the global batch.

    Args:
        cache_labels: has no effect here.
        rank, world_size: of this process, and the number of processes.
        dist_impl: how open_clip exchanges the texts, "bidir", "shift", "reduce" or "gather"; all give the same loss
            and gradient. Here the texts are gathered.

    Raises:
        ValueError: an unknown dist_impl.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        if dist_impl and dist_impl not in _EXCHANGES:
            raise ValueError(f"dist_impl must be one of {', '.join(_EXCHANGES)}, or None, got {dist_impl!r}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None, output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """Loss of (B, D) features, whose logits are logit_scale * <image, text> + logit_bias; None: no bias."""
        bias = 0.0 if logit_bias is None else logit_bias
        check_world_size(self.world_size)
        rows, gathers = (image_features, text_features), self.world_size > 1
        loss = sigmoid_loss(*rows, logit_scale, bias, normalize=False, gather_distributed=gathers)
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, B) logits of this rank's images by its texts, as in open_clip: the matrix that the loss avoids."""
        return logit_scale * image_features @ text_features.T + (0 if logit_bias is None else logit_bias)
