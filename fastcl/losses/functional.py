"""Contrastive losses as functions: from ids to row statistics to an objective of the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastcl.choices import ObjectiveName, Precision, Reduction
from fastcl.exchange import gathers
from fastcl.losses.call_plans import IN_ORDER, RECTANGLE, ROWS, TOWERS, TWO_VIEWS, Kind, plan_of
from fastcl.losses.explicit import check_smoothing, pairs_above_mean
from fastcl.losses.objectives import ObjectiveLike
from fastcl.rowstats.api import RowStats, statistics
from fastcl.rowstats.request import Batch, check_two_views

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def contrastive_loss(
    z: Tensor | tuple[Tensor, Tensor],
    sample: Tensor | tuple[Tensor, Tensor] | None,
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
    objective: ObjectiveLike = "ntxent",
    temperature: float | Tensor = 0.5,
    reduction: Reduction = "mean",
    normalize: bool = True,
    precision: Precision | None = None,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Any objective of the table, or your own, with any number of views.

    Args:
        z: (N, D) embeddings, float16, bfloat16, float32 or float64; computed in float32, float64 for float64. Or a
            pair: (N, D) anchors and (M, D) candidates of their own; `sample` and `labels` are then pairs too, and no
            candidate is left out as the anchor itself (`fastcl.row_stats` with y).
        sample: (N,) integers; rows with the same id are views of one sample. Samples may differ in their number of
            views. None, with a pair and without labels: candidate k is the view of anchor k; further candidates are
            negatives of all anchors.
        labels: (N,) integer classes, -1 for unlabelled rows; required by objectives that distinguish classes.
        objective: a name of `fastcl.OBJECTIVES`, an `Objective`, or a callable from RowStats to (N,) row losses.
        temperature: positive number, or a tensor with one element, which then gets a gradient.
        reduction: "mean" over all N rows, "sum", or "none" for the (N,) row losses. A row without a positive or without
            a negative contributes 0, gets no gradient from its own loss, and still counts in the mean.
        normalize: divide rows by their norms first (cosine similarities).
        precision: of the Triton backend's products: "fp16", "bf16", "fp32", or None, as `fastcl.row_stats`.
        gather_distributed: compute the loss of all ranks' rows together: each rank passes its own rows, with all views
            of a sample on one rank, and gets its share of the loss, whose average over the ranks is the loss of the
            global batch; so is the average of the gradients (DistributedDataParallel and FSDP2 take it). "sum" and
            "none" cover this rank's rows. See docs/distributed.md. None: False, with a warning in a process group of
            several ranks.
        group: the ranks, a group of torch.distributed; None: all.

    Returns:
        A scalar, or (N,) with reduction "none"; float32, or float64 for float64 rows.

    Raises:
        FastclError: as `fastcl.row_stats`; an unknown objective or reduction; missing labels that the objective needs.
    """
    kind, rows = _kind_of(z, sample, labels)
    ranks = gather_distributed, group
    return _losses(kind, rows, (objective,), temperature, normalize, reduction, ranks, precision)[0]


def contrastive_losses(
    z: Tensor | tuple[Tensor, Tensor],
    sample: Tensor | tuple[Tensor, Tensor] | None,
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
    objectives: Iterable[ObjectiveName] = ("dcl", "nscl"),
    temperature: float | Tensor = 0.5,
    reduction: Reduction = "mean",
    normalize: bool = True,
    precision: Precision | None = None,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Several objectives from one pass over the similarities.

    Args:
        objectives: names of `fastcl.OBJECTIVES`. The other arguments are as in `contrastive_loss`.

    Returns:
        The loss of each name, in the order given.

    Raises:
        FastclError: as `contrastive_loss`.
    """
    names: Any = objectives  # a string, or what is no sequence, is refused where all ranks hear of it
    if isinstance(objectives, Iterable) and not isinstance(objectives, str):
        given = list(objectives)
        names = tuple(name for k, name in enumerate(given) if name not in given[:k])
    kind, rows = _kind_of(z, sample, labels)
    ranks = gather_distributed, group
    found = _losses(kind, rows, names, temperature, normalize, reduction, ranks, precision)
    if len(found) < len(names):  # compiled code that refuses has one result
        found = [found[0]] * len(names)
    return dict(zip(names, found, strict=True))


def _kind_of(z: Any, sample: Any, labels: Any) -> tuple[Kind, tuple[Any, ...]]:
    """The kind of a call, and its tensors. What should be a pair and is none is refused where all ranks hear of it."""
    if isinstance(z, tuple) and len(z) == 2 and sample is None and labels is None:
        return IN_ORDER, z
    if not isinstance(z, tuple):
        return ROWS, (z, sample) if labels is None else (z, sample, labels)
    given = (z, sample) if labels is None else (z, sample, labels)
    pairs = (one if isinstance(one, tuple) and len(one) == 2 else (one, None) for one in given)
    return RECTANGLE, tuple(tensor for pair in pairs for tensor in pair)


def ntxent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    reduction: Reduction = "mean",
    normalize: bool = True,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """NT-Xent (SimCLR, Chen et al. 2020): the other view against every other row, the positive in the denominator.

    Args:
        z1, z2: (B, D) embeddings of the two views; rows k of both are sample k. N = 2B anchors.
        temperature, reduction, normalize, gather_distributed, group, precision: as `contrastive_loss`; "none" gives
            (2B,), z1's rows first.

    Returns:
        A scalar, or (2B,).

    Raises:
        FastclError: as `contrastive_loss`, or z1 and z2 differ in shape.
    """
    ranks = gather_distributed, group
    return _losses(TWO_VIEWS, (z1, z2), ("ntxent",), temperature, normalize, reduction, ranks, precision)[0]


def dcl_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    reduction: Reduction = "mean",
    normalize: bool = True,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """Decoupled contrastive loss (Yeh et al. 2022; CL in arXiv 2510.08852): NT-Xent without the positive in the
    denominator. Arguments, result and errors as `ntxent_loss`."""
    ranks = gather_distributed, group
    return _losses(TWO_VIEWS, (z1, z2), ("dcl",), temperature, normalize, reduction, ranks, precision)[0]


def nscl_loss(
    z1: Tensor,
    z2: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.5,
    positive_in_denominator: bool = False,
    reduction: Reduction = "mean",
    normalize: bool = True,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """Negatives-only supervised contrastive loss (arXiv 2510.08852): the other view against other classes only.

    Args:
        labels: (B,) or (B, 1) integer classes of the samples, -1 for unlabelled (negatives to all).
        positive_in_denominator: add the positive to the denominator, as the paper's published code does.
        z1, z2, temperature, reduction, normalize, gather_distributed, group, precision: as `ntxent_loss`.

    Returns:
        A scalar, or (2B,).

    Raises:
        FastclError: as `ntxent_loss`.
    """
    objective, ranks = "nscl_with_positive" if positive_in_denominator else "nscl", (gather_distributed, group)
    return _losses(TWO_VIEWS, (z1, z2, labels), (objective,), temperature, normalize, reduction, ranks, precision)[0]


def supcon_loss(
    z1: Tensor,
    z2: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    normalize: bool = True,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """Supervised contrastive loss L_out (Khosla et al. 2020, eq. 2), without the factor temperature / base_temperature.

    For L_in and the negatives-only form use `contrastive_loss` with "supcon_in" and "supcon_negatives". Rows whose
    batch holds no other class contribute 0. Arguments, result and errors as `nscl_loss`.
    """
    ranks = gather_distributed, group
    return _losses(TWO_VIEWS, (z1, z2, labels), ("supcon",), temperature, normalize, reduction, ranks, precision)[0]


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    normalize: bool = True,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
    reduction: Reduction = "mean",
    precision: Precision | None = None,
    label_smoothing: float = 0,  # not 0.0, which torch.compile may take for a number that changes
) -> Tensor:
    """CLIP's symmetric InfoNCE (Radford et al. 2021): the mean of image-to-text and text-to-image.

    Args:
        image, text: (B, D) embeddings; rows k of both are pair k. B = 1 has no negatives and gives 0.
        logit_scale: factor on the cosine similarities (1 / temperature): a positive number, or a tensor with one
            element, which then gets a gradient.
        normalize: divide rows by their norms first.
        gather_distributed, group: as `contrastive_loss`: the pairs of all ranks.
        reduction: "mean" over the B pairs, "sum", or "none" for (B,): for pair k the mean of the losses of image k and
            of text k.
        precision: of the Triton backend's products, as `fastcl.row_stats`.
        label_smoothing: in [0, 1), the part of the target that is spread evenly over all B candidates, in both
            directions, as torch's cross_entropy does.

    Returns:
        A scalar, or (B,).

    Raises:
        FastclError: as `contrastive_loss`, or image and text differ in shape, or `label_smoothing` is out of range.
    """
    tensors, ranks = (image, text), (gather_distributed, group)
    if gather_distributed:  # what is refused is refused on all ranks
        from fastcl.losses import global_batch

        plan = partial(plan_of, TOWERS, tensors, ("ntxent",), normalize, reduction, precision)
        return global_batch.losses(plan, tensors, logit_scale, group, label_smoothing)[0]
    if label_smoothing != 0:
        check_smoothing(label_smoothing)
    loss = _losses(TOWERS, tensors, ("ntxent",), logit_scale, normalize, reduction, ranks, precision)[0]
    if not label_smoothing:
        return loss
    rows = pairs_above_mean(image, text, logit_scale, normalize)
    return loss + label_smoothing * (rows if reduction == "none" else getattr(rows, reduction)())


def two_view_stats(
    z1: Tensor, z2: Tensor, labels: Tensor | None, temperature: float | Tensor, normalize: bool = True,
    gather_distributed: bool | None = None, group: ProcessGroup | None = None,
) -> RowStats:  # fmt: skip
    """Row statistics of the 2B rows [z1; z2], from which several two-view losses can be computed.

    Arguments and errors as `nscl_loss`.
    """
    if gather_distributed is not False and gathers(gather_distributed):
        from fastcl.rowstats import meeting, sharded  # which one process does not need

        options = meeting.Options(temperature, normalize, False, None)
        return sharded.row_stats(partial(_two_views, z1, z2, labels), options, "two_view_stats", group)[0]
    return statistics(_two_views(z1, z2, labels), temperature, normalize, False, None)[0]


def _two_views(z1: Tensor, z2: Tensor, labels: Tensor | None) -> Batch:
    check_two_views(z1, z2, labels)
    return Batch.two_views(z1, z2, labels)


def _losses(
    kind: Kind, tensors: Sequence[Tensor], objectives: tuple[ObjectiveLike, ...] | str, temperature: float | Tensor,
    normalize: bool, reduction: str, ranks: tuple[bool | None, ProcessGroup | None], precision: str | None = None,
) -> Sequence[Tensor]:  # fmt: skip
    """The reduced losses of the objectives, from which every loss of this module is made.

    Args:
        temperature: or what `kind` takes in its place.
        ranks: gather_distributed and group, as `contrastive_loss`.
    """
    plan = kind, tensors, objectives, normalize, reduction, precision
    gather, group = ranks
    if gather is not False and gathers(gather):
        from fastcl.losses import global_batch

        return global_batch.losses(partial(plan_of, *plan), tensors, temperature, group)
    return plan_of(*plan).run(tensors, temperature)
