"""The losses as modules. A temperature passed as an `nn.Parameter` is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastcl.choices import Precision, Reduction
from fastcl.losses import functional as F

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _TwoViewLoss(nn.Module):
    """Base class of the two-view losses."""

    _loss: Callable[..., Tensor]  # a function of fastcl.losses.functional

    def __init__(
        self, temperature: float | Tensor = 0.5, reduction: Reduction = "mean", normalize: bool = True,
        gather_distributed: bool | None = None, group: ProcessGroup | None = None, precision: Precision | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.normalize = normalize
        self.gather_distributed = gather_distributed
        self.group = group
        self.precision: Precision | None = precision

    def _options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature, "reduction": self.reduction, "normalize": self.normalize,
            "gather_distributed": self.gather_distributed, "group": self.group, "precision": self.precision,
        }  # fmt: skip

    def extra_repr(self) -> str:
        """The options, for print(module)."""
        return ", ".join(f"{k}={v}" for k, v in self._options().items() if v is not None)


class _Unlabelled(_TwoViewLoss):
    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of two views, (B, D) each: a scalar, or (2B,) with reduction "none", z1's rows first."""
        return self._loss(z1, z2, **self._options())

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

        def __call__(self, z1: Tensor, z2: Tensor) -> Tensor: ...


class _Labelled(_TwoViewLoss):
    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor) -> Tensor:
        """Loss of two views, (B, D) each, of samples with (B,) integer labels (-1: unlabelled): a scalar, or (2B,)."""
        return self._loss(z1, z2, labels, **self._options())

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

        def __call__(self, z1: Tensor, z2: Tensor, labels: Tensor) -> Tensor: ...


class NTXentLoss(_Unlabelled):
    """NT-Xent (SimCLR, Chen et al. 2020): `fastcl.ntxent_loss` as a module.

    Args:
        temperature: positive number, or an `nn.Parameter` with one element, which is then learned.
        reduction: "mean" over the 2B rows of a batch, "sum", or "none" for the (2B,) row losses.
        normalize: divide rows by their norms first (cosine similarities).
        gather_distributed, group: compute the loss of all ranks' rows together, as `fastcl.contrastive_loss`.
        precision: of the Triton backend's products, as `fastcl.row_stats`.

    Raises:
        FastclError: when called, as `fastcl.ntxent_loss`.
    """

    _loss = staticmethod(F.ntxent_loss)


class DCLLoss(_Unlabelled):
    """Decoupled contrastive loss (Yeh et al. 2022; CL in arXiv 2510.08852): `fastcl.dcl_loss` as a module.

    Args:
        temperature: positive number, or an `nn.Parameter` with one element, which is then learned.
        reduction: "mean" over the 2B rows of a batch, "sum", or "none" for the (2B,) row losses.
        normalize: divide rows by their norms first (cosine similarities).
        gather_distributed, group: compute the loss of all ranks' rows together, as `fastcl.contrastive_loss`.
        precision: of the Triton backend's products, as `fastcl.row_stats`.

    Raises:
        FastclError: when called, as `fastcl.dcl_loss`.
    """

    _loss = staticmethod(F.dcl_loss)


class NSCLLoss(_Labelled):
    """Negatives-only supervised contrastive loss (arXiv 2510.08852): `fastcl.nscl_loss` as a module.

    Args:
        temperature: positive number, or an `nn.Parameter` with one element, which is then learned.
        positive_in_denominator: add the positive to the denominator, as the paper's published code does.
        reduction: "mean" over the 2B rows of a batch, "sum", or "none" for the (2B,) row losses.
        normalize: divide rows by their norms first (cosine similarities).
        gather_distributed, group: compute the loss of all ranks' rows together, as `fastcl.contrastive_loss`.
        precision: of the Triton backend's products, as `fastcl.row_stats`.

    Raises:
        FastclError: when called, as `fastcl.nscl_loss`.
    """

    _loss = staticmethod(F.nscl_loss)

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        positive_in_denominator: bool = False,
        reduction: Reduction = "mean",
        normalize: bool = True,
        gather_distributed: bool | None = None,
        group: ProcessGroup | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(temperature, reduction, normalize, gather_distributed, group, precision)
        self.positive_in_denominator = positive_in_denominator

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"positive_in_denominator": self.positive_in_denominator}


class SupConLoss(_Labelled):
    """Supervised contrastive loss L_out (Khosla et al. 2020, eq. 2): `fastcl.supcon_loss` as a module.

    Args:
        temperature: positive number (default 0.1 here), or an `nn.Parameter` with one element, which is then learned.
        reduction: "mean" over the 2B rows of a batch, "sum", or "none" for the (2B,) row losses.
        normalize: divide rows by their norms first (cosine similarities).
        gather_distributed, group: compute the loss of all ranks' rows together, as `fastcl.contrastive_loss`.
        precision: of the Triton backend's products, as `fastcl.row_stats`.

    Raises:
        FastclError: when called, as `fastcl.supcon_loss`.
    """

    _loss = staticmethod(F.supcon_loss)

    def __init__(
        self, temperature: float | Tensor = 0.1, reduction: Reduction = "mean", normalize: bool = True,
        gather_distributed: bool | None = None, group: ProcessGroup | None = None, precision: Precision | None = None,
    ) -> None:  # fmt: skip
        super().__init__(temperature, reduction, normalize, gather_distributed, group, precision)


class CLIPLoss(nn.Module):
    """CLIP's symmetric InfoNCE (Radford et al. 2021): `fastcl.clip_loss` as a module.

    Args:
        normalize: divide rows by their norms first (cosine similarities).
        gather_distributed, group: compute the loss of all ranks' pairs together, as `fastcl.clip_loss`.
        reduction: "mean" over the B pairs of a batch, "sum", or "none" for (B,).
        precision: of the Triton backend's products, as `fastcl.row_stats`.
        label_smoothing: in [0, 1), as `fastcl.clip_loss`.

    Raises:
        FastclError: when called, as `fastcl.clip_loss`.
    """

    def __init__(
        self, normalize: bool = True, gather_distributed: bool | None = None, group: ProcessGroup | None = None,
        reduction: Reduction = "mean", precision: Precision | None = None, label_smoothing: float = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalize = normalize
        self.gather_distributed = gather_distributed
        self.group = group
        self.reduction: Reduction = reduction
        self.precision: Precision | None = precision
        self.label_smoothing = label_smoothing

    def forward(self, image: Tensor, text: Tensor, logit_scale: float | Tensor) -> Tensor:
        """Loss of (B, D) image and text embeddings, a scalar or (B,); logit_scale: positive number or one-element
        tensor."""
        options = self.normalize, self.gather_distributed, self.group, self.reduction, self.precision
        return F.clip_loss(image, text, logit_scale, *options, self.label_smoothing)

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

        def __call__(self, image: Tensor, text: Tensor, logit_scale: float | Tensor) -> Tensor: ...
