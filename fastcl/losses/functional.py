"""Contrastive losses as functions: from ids to row statistics to an objective of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from fastcl.checks import check_positive
from fastcl.choices import PRECISIONS, ObjectiveName, Precision, Reduction
from fastcl.dispatch import choose
from fastcl.exchange import gathers
from fastcl.losses import global_batch
from fastcl.losses.arguments import Checked, checked_pairs, checked_rows, checked_views
from fastcl.losses.objectives import Objective, ObjectiveLike
from fastcl.rowstats import sharded
from fastcl.rowstats.api import RowStats, fused, statistics
from fastcl.rowstats.meeting import Options
from fastcl.rowstats.request import Batch
from fastcl.rowstats.sharded import inverse
from fastcl.rowstats.small import route

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def contrastive_loss(
    z: Tensor,
    sample: Tensor,
    labels: Tensor | None = None,
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
    checked = partial(checked_rows, z, sample, labels, [objective], reduction)
    if gather_distributed is not False and gathers(gather_distributed):
        return _gathered(checked, Options(temperature, normalize, False, precision), reduction, group)[0]
    batch, losses = checked()
    return _losses(batch, losses, temperature, normalize, reduction, precision=precision)[0]


def contrastive_losses(
    z: Tensor,
    sample: Tensor,
    labels: Tensor | None = None,
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
    names = objectives if isinstance(objectives, str) else list(dict.fromkeys(objectives))
    checked = partial(checked_rows, z, sample, labels, names, reduction)
    if gather_distributed is not False and gathers(gather_distributed):
        found = _gathered(checked, Options(temperature, normalize, False, precision), reduction, group)
    else:
        batch, losses = checked()
        found = _losses(batch, losses, temperature, normalize, reduction, precision=precision)
    return dict(zip(names, found, strict=True))


def ntxent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    reduction: Reduction = "mean",
    normalize: bool = True,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """NT-Xent (SimCLR, Chen et al. 2020): the other view against every other row, the positive in the denominator.

    Args:
        z1, z2: (B, D) embeddings of the two views; rows k of both are sample k. N = 2B anchors.
        temperature, reduction, normalize, gather_distributed, group: as `contrastive_loss`; "none" gives (2B,), z1's
            rows first.

    Returns:
        A scalar, or (2B,).

    Raises:
        FastclError: as `contrastive_loss`, or z1 and z2 differ in shape.
    """
    return _two_view_loss(z1, z2, None, "ntxent", temperature, reduction, normalize, gather_distributed, group)


def dcl_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    reduction: Reduction = "mean",
    normalize: bool = True,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Decoupled contrastive loss (Yeh et al. 2022; CL in arXiv 2510.08852): NT-Xent without the positive in the
    denominator. Arguments, result and errors as `ntxent_loss`."""
    return _two_view_loss(z1, z2, None, "dcl", temperature, reduction, normalize, gather_distributed, group)


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
) -> Tensor:
    """Negatives-only supervised contrastive loss (arXiv 2510.08852): the other view against other classes only.

    Args:
        labels: (B,) integer classes of the samples, -1 for unlabelled (negatives to all).
        positive_in_denominator: add the positive to the denominator, as the paper's published code does.
        z1, z2, temperature, reduction, normalize, gather_distributed, group: as `ntxent_loss`.

    Returns:
        A scalar, or (2B,).

    Raises:
        FastclError: as `ntxent_loss`.
    """
    objective = "nscl_with_positive" if positive_in_denominator else "nscl"
    return _two_view_loss(z1, z2, labels, objective, temperature, reduction, normalize, gather_distributed, group)


def supcon_loss(
    z1: Tensor,
    z2: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    normalize: bool = True,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Supervised contrastive loss L_out (Khosla et al. 2020, eq. 2), without the factor temperature / base_temperature.

    For L_in and the negatives-only form use `contrastive_loss` with "supcon_in" and "supcon_negatives". Rows whose
    batch holds no other class contribute 0. Arguments, result and errors as `nscl_loss`.
    """
    return _two_view_loss(z1, z2, labels, "supcon", temperature, reduction, normalize, gather_distributed, group)


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    normalize: bool = True,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """CLIP's symmetric InfoNCE (Radford et al. 2021): the mean of image-to-text and text-to-image.

    Args:
        image, text: (B, D) embeddings; rows k of both are pair k. B = 1 has no negatives and gives 0.
        logit_scale: factor on the cosine similarities (1 / temperature): a positive number, or a tensor with one
            element, which then gets a gradient.
        normalize: divide rows by their norms first.
        gather_distributed, group: as `contrastive_loss`: the pairs of all ranks.

    Returns:
        A scalar.

    Raises:
        FastclError: as `contrastive_loss`, or image and text differ in shape.
    """
    checked = partial(checked_pairs, image, text, logit_scale)
    if gather_distributed is not False and gathers(gather_distributed):
        return _gathered(checked, Options(logit_scale, normalize, True, None, inverse=True), "mean", group)[0]
    batch, losses = checked()
    return _losses(batch, losses, inverse(logit_scale, image), normalize, "mean", columns=True)[0]


def two_view_stats(
    z1: Tensor, z2: Tensor, labels: Tensor | None, temperature: float | Tensor, normalize: bool = True,
    gather_distributed: bool | None = None, group: ProcessGroup | None = None,
) -> RowStats:  # fmt: skip
    """Row statistics of the 2B rows [z1; z2], from which several two-view losses can be computed.

    Arguments and errors as `nscl_loss`.
    """
    if gather_distributed is not False and gathers(gather_distributed):
        options = Options(temperature, normalize, False, None)
        return sharded.row_stats(partial(Batch.two_views, z1, z2, labels), options, "two_view_stats", group)[0]
    return statistics(Batch.two_views(z1, z2, labels), temperature, normalize, False, None)[0]


def _two_view_loss(
    z1: Tensor, z2: Tensor, labels: Tensor | None, objective: ObjectiveName,
    temperature: float | Tensor, reduction: Reduction, normalize: bool,
    gather_distributed: bool | None, group: ProcessGroup | None,
) -> Tensor:  # fmt: skip
    checked = partial(checked_views, z1, z2, labels, objective, reduction)
    if gather_distributed is not False and gathers(gather_distributed):
        return _gathered(checked, Options(temperature, normalize, False, None), reduction, group)[0]
    batch, losses = checked()
    return _losses(batch, losses, temperature, normalize, reduction)[0]


def _gathered(
    checked: Callable[[], Checked], options: Options, reduction: str, group: ProcessGroup | None
) -> Sequence[Tensor]:
    """This rank's share of the losses of the global batch."""
    found, options, sides = global_batch.agreed(checked, options, reduction, group)
    if sides[0].world == 1:
        return _losses(*found, options.temperature, options.normalize, reduction, options.columns, options.precision)
    return global_batch.losses(found, sides, options, reduction)


def _losses(
    batch: Batch, losses: Sequence[Callable[[RowStats], Tensor]], temperature: float | Tensor, normalize: bool,
    reduction: str, columns: bool = False, precision: str | None = None,
) -> Sequence[Tensor]:  # fmt: skip
    """Reduced row losses of the anchors; with columns, averaged with those of the candidates.

    On the Triton backend, and for small batches on a CPU, objectives of the table are evaluated together with the
    statistics. A callable of the caller's own is always evaluated by torch on the statistics.
    """
    # Exactly Objective: a subclass may compute something else.
    table = [loss for loss in losses if isinstance(loss, Objective) and type(loss) is Objective]
    chosen = choose(batch.x) if losses and len(table) == len(losses) else None
    if chosen == "chunked" and precision in (None, *PRECISIONS):
        check_positive(temperature, "temperature")
        found = route.losses(batch, table, temperature, normalize, reduction)
        if found is not None:
            return found
    if chosen == "triton":
        check_positive(temperature, "temperature")
        codes = [loss.code for loss in table]
        _, _, rows, _, _, rows_y = fused(batch, temperature, normalize, columns, precision, codes)
        sides = [list(side.unbind()) for side in ((rows, rows_y) if columns else (rows,))]
    else:
        stats = statistics(batch, temperature, normalize, columns, precision)
        sides = [[loss(found) for loss in losses] for found in stats]
    reduced = [[_reduce(rows, reduction) for rows in side] for side in sides]
    return [(a + b) / 2 for a, b in zip(*reduced, strict=True)] if columns else reduced[0]


def _reduce(rows: Tensor, reduction: str) -> Tensor:
    return rows if reduction == "none" else getattr(rows, reduction)()
