"""Contrastive losses as functions: ids, then row statistics, then a row of the table of objectives."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastcl.checks import check_ids, check_positive, check_rows, describe
from fastcl.errors import FastclError
from fastcl.objectives import Objective, ObjectiveLike, resolve
from fastcl.rowstats import RowStats, row_stats

REDUCTIONS = ("mean", "sum", "none")


def contrastive_loss(
    z: Tensor,
    sample: Tensor,
    labels: Tensor | None = None,
    objective: ObjectiveLike = "ntxent",
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    normalize: bool = True,
) -> Tensor:
    """Any objective of the table, or your own, over any number of views.

    Args:
        z: (N, D) embeddings, float16, bfloat16, float32 or float64; computed in float32, float64 for float64.
        sample: (N,) integers; rows with the same id are views of one sample. Samples may differ in their views.
        labels: (N,) integer classes, -1 for unlabelled rows; required by objectives that treat classes apart.
        objective: a name of `fastcl.OBJECTIVES`, an `Objective`, or a callable from RowStats to (N,) row losses.
        temperature: positive number, or a tensor with one element, which then gets a gradient.
        reduction: "mean" over all N rows, "sum", or "none" for the (N,) row losses. A row without a positive or without
            a negative contributes 0, gets no gradient from its own loss, and stays in the mean's count.
        normalize: divide rows by their norms first (cosine similarities).

    Returns:
        A scalar, or (N,) with reduction "none"; float32, or float64 for float64 rows.

    Raises:
        FastclError: as `fastcl.row_stats`; an unknown objective or reduction; labels missing where they matter.
    """
    _check_reduction(reduction)
    check_rows(z, "z")
    loss = _labelled(objective, labels)
    stats = row_stats(z, sample=sample, labels=labels, temperature=temperature, normalize=normalize)
    return _reduce(loss(stats), reduction)


def contrastive_losses(
    z: Tensor,
    sample: Tensor,
    labels: Tensor | None = None,
    objectives: Iterable[str] = ("dcl", "nscl"),
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    normalize: bool = True,
) -> dict[str, Tensor]:
    """Several objectives from one pass over the similarities.

    Args:
        objectives: names of `fastcl.OBJECTIVES`. The other arguments are those of `contrastive_loss`.

    Returns:
        The loss of each name, in the order given.

    Raises:
        FastclError: as `contrastive_loss`.
    """
    _check_reduction(reduction)
    check_rows(z, "z")
    if isinstance(objectives, str):
        raise FastclError(f"objectives must be several names, got the one string {objectives!r}")
    losses = {name: _labelled(name, labels) for name in objectives}
    stats = row_stats(z, sample=sample, labels=labels, temperature=temperature, normalize=normalize)
    return {name: _reduce(loss(stats), reduction) for name, loss in losses.items()}


def ntxent_loss(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.5, reduction: str = "mean", normalize: bool = True
) -> Tensor:
    """NT-Xent (SimCLR, Chen et al. 2020): the other view against every other row, the positive in the denominator.

    Args:
        z1, z2: (B, D) embeddings of the two views; row k of both is sample k. N = 2B anchors.
        temperature, reduction, normalize: as `contrastive_loss`; "none" gives (2B,), z1's rows first.

    Returns:
        A scalar, or (2B,).

    Raises:
        FastclError: as `contrastive_loss`, or z1 and z2 differ in shape.
    """
    return _two_view_loss(z1, z2, None, "ntxent", temperature, reduction, normalize)


def dcl_loss(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.5, reduction: str = "mean", normalize: bool = True
) -> Tensor:
    """Decoupled contrastive loss (Yeh et al. 2022), the CL of arXiv 2510.08852: NT-Xent without the positive in the
    denominator. Arguments, result and errors as `ntxent_loss`."""
    return _two_view_loss(z1, z2, None, "dcl", temperature, reduction, normalize)


def nscl_loss(
    z1: Tensor,
    z2: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.5,
    positive_in_denominator: bool = False,
    reduction: str = "mean",
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
    return _two_view_loss(z1, z2, labels, objective, temperature, reduction, normalize)


def supcon_loss(
    z1: Tensor,
    z2: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
) -> Tensor:
    """Supervised contrastive loss L_out (Khosla et al. 2020, eq. 2), without the factor temperature / base_temperature.

    For L_in and the negatives-only form use `contrastive_loss` with "supcon_in" and "supcon_negatives". Rows whose
    batch holds no other class contribute 0. Arguments, result and errors as `nscl_loss`.
    """
    return _two_view_loss(z1, z2, labels, "supcon", temperature, reduction, normalize)


def clip_loss(image: Tensor, text: Tensor, logit_scale: float | Tensor, normalize: bool = True) -> Tensor:
    """CLIP's symmetric InfoNCE (Radford et al. 2021): the mean of image-to-text and text-to-image.

    Args:
        image, text: (B, D) embeddings; row k of both is pair k. B = 1 has no negatives and gives 0.
        logit_scale: factor on the cosine similarities (1 / temperature): a positive number, or a tensor with one
            element, which then gets a gradient.
        normalize: divide rows by their norms first.

    Returns:
        A scalar.

    Raises:
        FastclError: as `contrastive_loss`, or image and text differ in shape.
    """
    _check_pair(image, text, "image", "text")
    pair = torch.arange(len(image), device=image.device)
    check_positive(logit_scale, "logit_scale")
    if isinstance(logit_scale, Tensor) and logit_scale.dtype != torch.float64:
        logit_scale = logit_scale.float()
    loss = resolve("ntxent")
    # Widened once: both directions then add their gradients in float32, and only the sum is rounded to half precision.
    wide = [v if v.dtype == torch.float64 else v.float() for v in (image, text)]
    sides = (
        row_stats(x, y, sample=pair, sample_y=pair, temperature=1 / logit_scale, normalize=normalize)
        for x, y in (wide, reversed(wide))
    )
    return sum(loss(stats).mean() for stats in sides) / 2


def two_view_stats(
    z1: Tensor, z2: Tensor, labels: Tensor | None, temperature: float | Tensor, normalize: bool = True
) -> RowStats:
    """Row statistics of the 2B rows [z1; z2], from which several two-view losses can be taken at once.

    Args and errors as `nscl_loss`.
    """
    _check_pair(z1, z2, "z1", "z2")
    if labels is not None:
        check_ids(labels, z1, "labels")
        labels = labels.repeat(2)
    sample = torch.arange(len(z1), device=z1.device).repeat(2)
    return row_stats(torch.cat([z1, z2]), sample=sample, labels=labels, temperature=temperature, normalize=normalize)


def _two_view_loss(
    z1: Tensor, z2: Tensor, labels: Tensor | None, objective: str,
    temperature: float | Tensor, reduction: str, normalize: bool,
) -> Tensor:  # fmt: skip
    _check_reduction(reduction)
    loss = _labelled(objective, labels)
    return _reduce(loss(two_view_stats(z1, z2, labels, temperature, normalize)), reduction)


def _labelled(objective: ObjectiveLike, labels: Tensor | None):
    loss = resolve(objective)
    if labels is None and isinstance(loss, Objective) and loss.needs_labels:
        raise FastclError(f"labels are required by objective {objective!r}, which treats classes apart")
    return loss


def _reduce(rows: Tensor, reduction: str) -> Tensor:
    return rows if reduction == "none" else getattr(rows, reduction)()


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise FastclError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")


def _check_pair(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    check_rows(a, name_a)
    check_rows(b, name_b)
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        raise FastclError(f"{name_a} and {name_b} must agree: {name_a} is {describe(a)}, {name_b} is {describe(b)}")
