"""open_clip's ClipLoss and SigLipLoss (open_clip.loss, 2 and 3)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fastcl.adapters.open_clip_sigmoid import SigLipLoss
from fastcl.adapters.shared import check_world_size, everywhere, gathered, one_way, tell_once, with_gradient_times
from fastcl.checks import describe
from fastcl.errors import FastclError
from fastcl.exchange import Ranks
from fastcl.losses.functional import clip_loss
from fastcl.rowstats.gathered import gather_rows

__all__ = ["ClipLoss", "SigLipLoss"]


class ClipLoss(nn.Module):
    """open_clip's ClipLoss: CLIP's symmetric loss of features that the caller has normalised.

    With several ranks the options decide about the gradient, as they do in open_clip: only `gather_with_grad=True`
    gives that of the global batch. The others are reproduced, with a warning.

    Args:
        local_loss: the loss of this rank's pairs; False: that of all ranks' pairs, the same number on every rank.
        gather_with_grad: let the gradient reach the features of other ranks.
        cache_labels: has no effect here.
        rank, world_size: of this process, and the number of processes.
        use_horovod: not supported.

    Raises:
        NotImplementedError: use_horovod.
    """

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False, rank: int = 0,
        world_size: int = 1, use_horovod: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if use_horovod:
            raise NotImplementedError("use_horovod=True: start the ranks with torchrun, or use open_clip's own loss")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """Loss of (B, D) features, whose logits are logit_scale * <image, text> + logit_bias.

        The bias is one number for all logits, so it changes neither the loss nor another gradient: its own is 0.

        Raises:
            FastclError: a bias of several numbers, a world_size that is not the process group's, and as
                `fastcl.clip_loss`.
        """
        loss = ClipLoss._loss(self, image_features, text_features, logit_scale)  # self: also open_clip's (fastcl.patch)
        if isinstance(logit_bias, Tensor):
            if logit_bias.numel() != 1:
                raise FastclError(f"logit_bias must be one number for all logits, got {describe(logit_bias)}")
            loss = loss + 0 * logit_bias.reshape(()).to(loss)
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Logits of images by texts, and of texts by images; of all ranks' pairs with the bias twice, as in open_clip,
        which adds it in place to a matrix and its transpose."""
        images, texts = self._everyone(image_features), self._everyone(text_features)
        own = (image_features, text_features) if self.local_loss else (images, texts)
        bias = 0 if logit_bias is None else logit_bias * (1 if self.local_loss or self.world_size == 1 else 2)
        return logit_scale * own[0] @ texts.T + bias, logit_scale * own[1] @ images.T + bias

    def _everyone(self, x: Tensor) -> Tensor:
        """The rows of all ranks; those of others, and under `local_loss` all, have a gradient only if asked for."""
        if self.world_size == 1:
            return x
        if self.gather_with_grad:
            return gather_rows(x, replace(Ranks.of(None), sizes=(len(x),) * self.world_size)).to(x.dtype)
        parts = list(gathered(x).chunk(self.world_size))
        if not self.local_loss:
            parts[self.rank] = x
        return torch.cat(parts)

    def _loss(self, image: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
        if self.world_size == 1:
            return clip_loss(image, text, scale, normalize=False, gather_distributed=False)
        check_world_size(self.world_size)
        if self.gather_with_grad:
            share = clip_loss(image, text, scale, normalize=False, gather_distributed=True)
            return share if self.local_loss else everywhere(share)
        if self.local_loss:
            tell_once(
                "ClipLoss(local_loss=True, gather_with_grad=False): as in open_clip, features get no gradient as "
                "candidates, which is not the gradient of the global batch; gather_with_grad=True is"
            )
            sides = (image, gathered(text)), (text, gathered(image))
            first, temperature = self.rank * len(image), 1 / scale
            losses = [one_way(x, y, first, temperature, normalize=False) for x, y in sides]
            return (losses[0] + losses[1]) / 2
        tell_once(
            f"ClipLoss(gather_with_grad=False): as in open_clip, the gradient of the features, averaged over the "
            f"ranks, is 1/{self.world_size} of that of the global batch; gather_with_grad=True gives all of it"
        )
        image, text = (with_gradient_times(v, 1 / self.world_size) for v in (image, text))
        return everywhere(clip_loss(image, text, scale, normalize=False, gather_distributed=True))
