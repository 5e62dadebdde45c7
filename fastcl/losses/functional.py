"""Contrastive losses as functions: from ids to row statistics to an objective of the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastcl.checks import check_positive
from fastcl.choices import ObjectiveName, Precision, Reduction
from fastcl.errors import FastclError
from fastcl.losses.call_plans import ROWS, TOWERS, TWO_VIEWS, Kind, plan_of
from fastcl.losses.objectives import ObjectiveLike
from fastcl.rowstats.api import RowStats, statistics
from fastcl.rowstats.request import Batch, check_two_views


def contrastive_loss(
    z: Tensor,
    sample: Tensor,
    labels: Tensor | None = None,
    objective: ObjectiveLike = "ntxent",
    temperature: float | Tensor = 0.5,
    reduction: Reduction = "mean",
    normalize: bool = True,
    precision: Precision | None = None,
) -> Tensor:
    """Any objective of the table, or your own, with any number of views.

    Args:
        z: (N, D) embeddings, float16, bfloat16, float32 or float64; computed in float32, float64 for float64.
        sample: (N,) integers; rows with the same id are views of one sample. Samples may differ in their number of
            views.
        labels: (N,) integer classes, -1 for unlabelled rows; required by objectives that distinguish classes.
        objective: a name of `fastcl.OBJECTIVES`, an `Objective`, or a callable from RowStats to (N,) row losses.
        temperature: positive number, or a tensor with one element, which then gets a gradient.
        reduction: "mean" over all N rows, "sum", or "none" for the (N,) row losses. A row without a positive or without
            a negative contributes 0, gets no gradient from its own loss, and still counts in the mean.
        normalize: divide rows by their norms first (cosine similarities).
        precision: of the Triton backend's products: "fp16", "bf16", "fp32", or None, as `fastcl.row_stats`.

    Returns:
        A scalar, or (N,) with reduction "none"; float32, or float64 for float64 rows.

    Raises:
        FastclError: as `fastcl.row_stats`; an unknown objective or reduction; missing labels that the objective needs.
    """
    rows = (z, sample) if labels is None else (z, sample, labels)
    return _losses(ROWS, rows, (objective,), temperature, normalize, reduction, precision)[0]


def contrastive_losses(
    z: Tensor,
    sample: Tensor,
    labels: Tensor | None = None,
    objectives: Iterable[ObjectiveName] = ("dcl", "nscl"),
    temperature: float | Tensor = 0.5,
    reduction: Reduction = "mean",
    normalize: bool = True,
    precision: Precision | None = None,
) -> dict[str, Tensor]:
    """Several objectives from one pass over the similarities.

    Args:
        objectives: names of `fastcl.OBJECTIVES`. The other arguments are as in `contrastive_loss`.

    Returns:
        The loss of each name, in the order given.

    Raises:
        FastclError: as `contrastive_loss`.
    """
    if isinstance(objectives, str):
        raise FastclError(f"objectives must be a sequence of names, got the string {objectives!r}")
    names = tuple(dict.fromkeys(objectives))
    rows = (z, sample) if labels is None else (z, sample, labels)
    return dict(zip(names, _losses(ROWS, rows, names, temperature, normalize, reduction, precision), strict=True))


def ntxent_loss(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.5, reduction: Reduction = "mean", normalize: bool = True
) -> Tensor:
    """NT-Xent (SimCLR, Chen et al. 2020): the other view against every other row, the positive in the denominator.

    Args:
        z1, z2: (B, D) embeddings of the two views; rows k of both are sample k. N = 2B anchors.
        temperature, reduction, normalize: as `contrastive_loss`; "none" gives (2B,), z1's rows first.

    Returns:
        A scalar, or (2B,).

    Raises:
        FastclError: as `contrastive_loss`, or z1 and z2 differ in shape.
    """
    return _losses(TWO_VIEWS, (z1, z2), ("ntxent",), temperature, normalize, reduction)[0]


def dcl_loss(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.5, reduction: Reduction = "mean", normalize: bool = True
) -> Tensor:
    """Decoupled contrastive loss (Yeh et al. 2022; CL in arXiv 2510.08852): NT-Xent without the positive in the
    denominator. Arguments, result and errors as `ntxent_loss`."""
    return _losses(TWO_VIEWS, (z1, z2), ("dcl",), temperature, normalize, reduction)[0]


def nscl_loss(
    z1: Tensor,
    z2: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.5,
    positive_in_denominator: bool = False,
    reduction: Reduction = "mean",
    normalize: bool = True,
) -> Tensor:
    """Negatives-only supervised contrastive loss (arXiv 2510.08852): the other view against other classes only.

    Args:
        labels: (B,) integer classes of the samples, -1 for unlabelled (negatives to all).
        positive_in_denominator: add the positive to the denominator, as the paper's published code does.
        z1, z2, temperature, reduction, normalize: as `ntxent_loss`.

    Returns:
        A scalar, or (2B,).

    Raises:
        FastclError: as `ntxent_loss`.
    """
    objective = "nscl_with_positive" if positive_in_denominator else "nscl"
    return _losses(TWO_VIEWS, (z1, z2, labels), (objective,), temperature, normalize, reduction)[0]


def supcon_loss(
    z1: Tensor,
    z2: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    normalize: bool = True,
) -> Tensor:
    """Supervised contrastive loss L_out (Khosla et al. 2020, eq. 2), without the factor temperature / base_temperature.

    For L_in and the negatives-only form use `contrastive_loss` with "supcon_in" and "supcon_negatives". Rows whose
    batch holds no other class contribute 0. Arguments, result and errors as `nscl_loss`.
    """
    return _losses(TWO_VIEWS, (z1, z2, labels), ("supcon",), temperature, normalize, reduction)[0]


def clip_loss(image: Tensor, text: Tensor, logit_scale: float | Tensor, normalize: bool = True) -> Tensor:
    """CLIP's symmetric InfoNCE (Radford et al. 2021): the mean of image-to-text and text-to-image.

    Args:
        image, text: (B, D) embeddings; rows k of both are pair k. B = 1 has no negatives and gives 0.
        logit_scale: factor on the cosine similarities (1 / temperature): a positive number, or a tensor with one
            element, which then gets a gradient.
        normalize: divide rows by their norms first.

    Returns:
        A scalar.

    Raises:
        FastclError: as `contrastive_loss`, or image and text differ in shape.
    """
    check_positive(logit_scale, "logit_scale")
    if not isinstance(logit_scale, Tensor):
        logit_scale = float(logit_scale)
    elif logit_scale.dtype != torch.float64:
        wide = isinstance(image, Tensor) and image.dtype == torch.float64
        logit_scale = logit_scale.to(torch.float64 if wide else torch.float32)
    return _losses(TOWERS, (image, text), ("ntxent",), 1 / logit_scale, normalize, "mean")[0]


def two_view_stats(
    z1: Tensor, z2: Tensor, labels: Tensor | None, temperature: float | Tensor, normalize: bool = True
) -> RowStats:
    """Row statistics of the 2B rows [z1; z2], from which several two-view losses can be computed.

    Arguments and errors as `nscl_loss`.
    """
    check_two_views(z1, z2, labels)
    return statistics(Batch.two_views(z1, z2, labels), temperature, normalize, False, None)[0]


def _losses(
    kind: Kind, tensors: Sequence[Tensor], objectives: tuple[ObjectiveLike, ...], temperature: float | Tensor,
    normalize: bool, reduction: str, precision: str | None = None,
) -> Sequence[Tensor]:  # fmt: skip
    """The reduced losses of the objectives, from which every loss of this module is made."""
    return plan_of(kind, tensors, objectives, normalize, reduction, precision).run(tensors, temperature)
