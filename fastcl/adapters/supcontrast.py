"""SupContrast's SupConLoss (losses.py of the code of Khosla et al. 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcl.adapters.shared import class_ids, supcon_rows, with_positives
from fastcl.checks import is_readable
from fastcl.choices import Reduction
from fastcl.losses.functional import ntxent_loss, supcon_loss
from fastcl.rowstats.api import row_stats


class SupConLoss(nn.Module):
    """SupContrast's SupConLoss: L_out times temperature / base_temperature, of features that the caller normalises.

    Unlike `fastcl.supcon_loss`, a row whose batch holds no other class counts, and -1 is a class.

    Args:
        temperature: divides the logits.
        contrast_mode: "all" views are anchors, or "one", the first of each sample. All are candidates either way.
        base_temperature: the loss is multiplied by temperature / base_temperature.
    """

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Mean loss over the anchors.

        Args:
            features: (B, V, ...) of V views of B samples; further dimensions are flattened.
            labels: (B,) or (B, 1), of any dtype. Without labels and mask it is SimCLR.
            mask: (B, B) instead of labels: what sample j weighs among the positives of sample i; any numbers, of which
                those that compare labels are better given as labels.

        Raises:
            ValueError: fewer than three dimensions, labels and a mask, another number of labels or samples than in
                features, an unknown mode.
        """
        if features.ndim < 3:
            raise ValueError(f"`features` needs to be (samples, views, ...), got {tuple(features.shape)}")
        if labels is not None and mask is not None:
            raise ValueError("Cannot define both `labels` and `mask`")
        if self.contrast_mode not in ("all", "one"):
            raise ValueError(f"Unknown mode: {self.contrast_mode}, expected all or one")
        batch = len(features)
        if labels is not None and labels.numel() != batch:
            raise ValueError(f"Num of labels does not match num of features: {labels.numel()} and {batch}")
        if mask is not None and mask.shape != (batch, batch):
            raise ValueError(f"mask must have shape ({batch}, {batch}), got {tuple(mask.shape)}")
        if mask is not None:
            loss = with_positives(_rows(features), mask.to(features.device), self.temperature, normalize=False)
        else:
            classes = None if labels is None else class_ids(labels).to(features.device)
            loss = self._of_classes(features, classes, "mean" if self.contrast_mode == "all" else "none")
        if self.contrast_mode == "one":
            loss = loss[:batch]
        if loss.ndim:
            loss = loss.mean()
        factor = self.temperature / self.base_temperature
        return loss if factor == 1 else loss * factor

    def _of_classes(self, features: Tensor, classes: Tensor | None, reduction: Reduction) -> Tensor:
        """(N,) losses of all views, or their mean if `reduction` says so and it takes fewer steps."""
        options: Any = {"temperature": self.temperature, "normalize": False, "gather_distributed": False}
        batch, views = features.shape[:2]
        if views == 2 and (classes is None or (is_readable(classes) and not torch.equal(*classes.aminmax()))):
            z1, z2 = features.flatten(2).unbind(1)  # with rows of another class, which `supcon_loss` asks for
            if classes is None:
                return ntxent_loss(z1, z2, reduction=reduction, **options)
            return supcon_loss(z1, z2, classes, reduction=reduction, **options)
        ids = torch.arange(batch, dtype=torch.int64, device=features.device).repeat(views)
        labels = None if classes is None else classes.repeat(views)
        return supcon_rows(row_stats(_rows(features), sample=ids, labels=labels, **options))


def _rows(features: Tensor) -> Tensor:
    """(V * B, D) rows, views outermost, of (B, V, ...)."""
    return features.flatten(2).transpose(0, 1).flatten(0, 1)
