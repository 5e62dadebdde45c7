"""What the adapters share: ranks as the originals see them, labels of any kind, one direction of InfoNCE."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch import distributed as dist

from fastcl.checks import describe, is_readable
from fastcl.choices import Reduction
from fastcl.errors import FastclError
from fastcl.exchange import callers
from fastcl.losses.functional import contrastive_loss
from fastcl.losses.objectives import OBJECTIVES, Objective
from fastcl.rowstats.api import RowStats, row_stats, scaled

IGNORED = -100  # a target without a positive
_NAN = 0x7FF8 << 48  # bits of the first NaN
_ALONE = Objective(("view", "peer"), ("view", "peer"))
_told: set[str] = set()


def tell_once(message: str) -> None:
    """Warn, once for each message in a process; the warning names the caller's line."""
    if message not in _told and not torch.compiler.is_compiling():
        _told.add(message)
        warnings.warn(message, stacklevel=callers("pytorch_metric_learning.", "sentence_transformers."))


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def gathered(x: Tensor) -> Tensor:
    """The rows of all ranks, which hold the same number of rows, without a gradient; x without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def everywhere(share: Tensor) -> Tensor:
    """The average of all ranks' shares of a loss, with the gradient of this rank's own."""
    if world_size() == 1:
        return share
    total = share.detach().clone()
    dist.all_reduce(total)
    return share + (total / world_size() - share).detach()


def with_gradient_times(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by a factor."""
    if factor == 1 or not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(lambda grad: grad * factor)
    return x


def with_gradient_summed(x: Tensor) -> Tensor:
    """x, whose gradient is added up over the ranks."""
    if world_size() == 1 or not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(_summed)
    return x


def _summed(grad: Tensor) -> Tensor:
    total = grad.contiguous().clone()
    dist.all_reduce(total)
    return total


def check_ranks(gather_distributed: bool) -> None:
    """Raise ValueError if ranks are to be gathered by a PyTorch that knows none."""
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed=True needs torch.distributed, which this build of PyTorch does not have")


def check_world_size(told: int) -> None:
    """Raise FastclError if there are not as many processes as the caller was told of."""
    if told != world_size():
        raise FastclError(f"world_size must be the number of processes in the group, {world_size()}, got {told}")


def class_ids(labels: Tensor) -> Tensor:
    """(N,) labels of any real dtype and any shape as integers, the same on all ranks; -1, which fastcl takes for
    unlabelled, stays a class. A NaN equals no other label.

    Raises:
        FastclError: complex labels.
    """
    labels = labels.reshape(-1)
    if labels.is_complex():
        raise FastclError(f"labels must be real, got {describe(labels)}")
    if labels.is_floating_point():
        number = labels.double() + 0.0  # -0.0 becomes 0.0
        apart = _NAN + torch.arange(len(labels), dtype=torch.int64, device=labels.device)
        return apart.where(number.isnan(), number.view(torch.int64))  # of these bits, only a NaN's are -1
    labels = labels.long()
    return labels.add(labels < 0, alpha=-1)


def one_way(
    anchors: Tensor,
    candidates: Tensor,
    target: Tensor | int = 0,
    temperature: float | Tensor = 1.0,
    normalize: bool = True,
    reduction: Reduction = "mean",
    gathers: bool = False,
) -> Tensor:
    """Cross-entropy of this rank's anchors (N, D) against candidates (M, D).

    Args:
        target: (N,) index of each anchor's positive among the candidates, or the index of the first anchor's, if those
            of the others follow it. IGNORED, as in torch's cross_entropy, gives a loss of 0.
        gathers: the candidates of all ranks; targets are among this rank's.

    Raises:
        IndexError: a target that is no index of a candidate; of tensors those on a CPU are checked.
    """
    if isinstance(target, int) and target + len(anchors) > len(candidates):
        raise IndexError(f"Target {target + len(anchors) - 1} is out of bounds for {len(candidates)} candidates")
    rows = anchors, candidates
    if anchors.dtype != candidates.dtype:
        dtype = torch.promote_types(anchors.dtype, candidates.dtype)
        rows = anchors.to(dtype), candidates.to(dtype)
    options = "ntxent", temperature, reduction, normalize, None, gathers
    if (counts_up(target, anchors) if isinstance(target, Tensor) else target == 0) and len(anchors) <= len(candidates):
        return contrastive_loss(rows, None, None, *options)
    if isinstance(target, Tensor) and is_readable(target):
        wrong = (target >= len(candidates)) | ((target < 0) & (target != IGNORED))
        if wrong.any():
            raise IndexError(f"Target {target[wrong][0].item()} is out of bounds for {len(candidates)} candidates")
    sample = _count(anchors) + target if isinstance(target, int) else target
    return contrastive_loss(rows, (sample, _count(candidates)), None, *options)


def counts_up(target: Tensor, rows: Tensor) -> bool:
    """Whether the targets are known to be 0, 1, 2 and so on, one for each of the rows (N, D). On another device a check
    would wait for it; a compiled call cannot read values."""
    return is_readable(target) and not target.is_floating_point() and torch.equal(target.long(), _count(rows))


def _count(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[0], dtype=torch.int64, device=rows.device)


def supcon_rows(stats: RowStats) -> Tensor:
    """(N,) losses L_out; unlike the objective "supcon", those of rows without a row of another class too."""
    return OBJECTIVES["supcon"](stats).where(stats.n_other > 0, _ALONE(stats))


def with_positives(x: Tensor, mask: Tensor, temperature: float | Tensor, normalize: bool, own: bool = False) -> Tensor:
    """(N,) means over any positives of log-sum-exp minus logit: each row against all rows but itself.

    The logits of positives are linear in the rows, so that the mask is multiplied with rows instead of logits.

    Args:
        x: (N, D) rows: V views of B samples, views outermost.
        mask: (B, B) weights of positives, the same for all views. Those of a row may add up to 0: its result is 0.
        own: whether the diagonal counts, which is each row with itself; V must be 1 then.
    """
    ids = torch.arange(len(x), dtype=torch.int64, device=x.device)
    stats = row_stats(x, sample=ids, temperature=temperature, normalize=normalize, gather_distributed=False)
    with torch.autocast(x.device.type, enabled=False):
        rows = scaled(x, temperature, normalize)
        batch, mask = len(mask), mask.to(rows.dtype)
        views, weight, itself = len(x) // batch, mask.sum(1), mask.diagonal()
        pull = (rows.view(views, batch, -1) * (mask @ rows.view(views, batch, -1).sum(0))).sum(2).view(-1)
        weight = (weight * views).repeat(views)
        if not own:
            weight, pull = weight - itself.repeat(views), pull - itself.repeat(views) * rows.square().sum(1)
        lse = stats.lse_other.masked_fill(stats.n_other == 0, 0)
        return (weight * lse - pull) / weight.where(weight >= 1e-6, 1)
