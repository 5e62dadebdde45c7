"""The losses as modules. A temperature given as an `nn.Parameter` is learned with the rest."""

from __future__ import annotations

from torch import Tensor, nn

from fastcl import functional as F


class _TwoViewLoss(nn.Module):
    """Holds what the two-view losses share.

    Args:
        temperature: positive number, or an `nn.Parameter` with one element.
        reduction: "mean", "sum" or "none".
        normalize: divide rows by their norms first.
    """

    def __init__(self, temperature: float | Tensor = 0.5, reduction: str = "mean", normalize: bool = True) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.normalize = normalize

    def _options(self) -> dict:
        return {"temperature": self.temperature, "reduction": self.reduction, "normalize": self.normalize}

    def extra_repr(self) -> str:
        """The options, for print(module)."""
        return ", ".join(f"{k}={v}" for k, v in self._options().items())


class NTXentLoss(_TwoViewLoss):
    """`fastcl.ntxent_loss` as a module."""

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of two views, (B, D) each."""
        return F.ntxent_loss(z1, z2, **self._options())


class DCLLoss(_TwoViewLoss):
    """`fastcl.dcl_loss` as a module."""

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of two views, (B, D) each."""
        return F.dcl_loss(z1, z2, **self._options())


class NSCLLoss(_TwoViewLoss):
    """`fastcl.nscl_loss` as a module.

    Args:
        positive_in_denominator: the form of the paper's published code. The others as for every two-view loss.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        positive_in_denominator: bool = False,
        reduction: str = "mean",
        normalize: bool = True,
    ) -> None:
        super().__init__(temperature, reduction, normalize)
        self.positive_in_denominator = positive_in_denominator

    def _options(self) -> dict:
        return super()._options() | {"positive_in_denominator": self.positive_in_denominator}

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor) -> Tensor:
        """Loss of two views, (B, D) each, with (B,) labels."""
        return F.nscl_loss(z1, z2, labels, **self._options())


class SupConLoss(_TwoViewLoss):
    """`fastcl.supcon_loss` as a module; the temperature's default is 0.1."""

    def __init__(self, temperature: float | Tensor = 0.1, reduction: str = "mean", normalize: bool = True) -> None:
        super().__init__(temperature, reduction, normalize)

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor) -> Tensor:
        """Loss of two views, (B, D) each, with (B,) labels."""
        return F.supcon_loss(z1, z2, labels, **self._options())


class CLIPLoss(nn.Module):
    """`fastcl.clip_loss` as a module.

    Args:
        normalize: divide rows by their norms first.
    """

    def __init__(self, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, image: Tensor, text: Tensor, logit_scale: float | Tensor) -> Tensor:
        """Loss of (B, D) image and text embeddings."""
        return F.clip_loss(image, text, logit_scale, self.normalize)
