"""What ids cannot say: positives given as a list of pairs, negatives of one anchor alone, a margin, label smoothing.

Each is a closed form of the row statistics and of O(D) numbers for each row or pair; nothing is N x N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastcl.checks import check_finite, check_positive, check_rows, describe, holds_integers, is_readable
from fastcl.choices import REDUCTIONS, Reduction
from fastcl.errors import FastclError, brief, one_of, type_of
from fastcl.exchange import gathers
from fastcl.losses.objectives import Objective, ObjectiveLike, resolve
from fastcl.rowstats.api import RowStats, prepared, row_stats
from fastcl.rowstats.request import Batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def explicit_pairs_loss(
    z: Tensor,
    pairs: Tensor,
    weights: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    reduction: Reduction = "mean",
    normalize: bool = True,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """SupCon with its positives given as a list: any set of pairs, symmetric or not, each with a weight of its own.

    With logits s and the pairs (i, p) of anchor i, of weight w, its loss is
    sum_p w_p (log sum_{a != i} exp(s_ia) - s_ip) / sum_p w_p: L_out of Khosla et al. 2020, eq. 2, whose pairs are those
    of equal labels, all of weight 1. Takes O(P D) memory for P pairs beside the row statistics.

    Args:
        z: (N, D) embeddings, float16, bfloat16, float32 or float64; N >= 2.
        pairs: (P, 2) integers, the rows of the anchor and of its positive; a pair may be repeated. For a symmetric loss
            list both orders.
        weights: (P,) non-negative; None: 1. They get no gradient.
        temperature: positive number, or a tensor with one element, which then gets a gradient.
        reduction: "mean" over all N rows, "sum", or "none" for the (N,) losses. A row without a pair, or whose weights
            are all 0, contributes 0 and still counts in the mean.
        normalize: divide rows by their norms first.
        gather_distributed, group: as `fastcl.contrastive_loss`: rows of other ranks are candidates. Pairs name this
            rank's rows.

    Returns:
        A scalar, or (N,); float32, or float64 for float64 rows. In float32 a loss is known to the rounding of the
        logits, however small it is.

    Raises:
        FastclError: as `fastcl.row_stats`; pairs that are no (P, 2) integers or name no row or a row with itself;
            weights of another shape, or negative or not finite ones (values are checked on the CPU only); an unknown
            reduction.
    """
    call = _Pairs(z, pairs, weights, temperature, normalize)
    if gather_distributed is not False and gathers(gather_distributed):
        return _share(call, reduction, group)
    call.check(reduction)
    lse = row_stats(z, sample=_ids(z), temperature=temperature, normalize=normalize, gather_distributed=False).lse_other
    losses = call.losses(lse)
    return losses if reduction == "none" else getattr(losses, reduction)()


class _Pairs(NamedTuple):
    """The arguments of `explicit_pairs_loss` that decide about the losses of its rows."""

    z: Tensor
    pairs: Tensor
    weights: Tensor | None
    temperature: float | Tensor
    normalize: bool

    def check(self, reduction: str) -> None:
        """Raise FastclError unless they, and the reduction, can be used."""
        check_rows(self.z, "z")
        check_positive(self.temperature, "temperature")
        if reduction not in REDUCTIONS:
            raise FastclError(one_of("reduction", REDUCTIONS, reduction))
        _check_pairs(self.pairs, len(self.z))
        _check_weights(self.weights, self.pairs)

    def losses(self, lse: Tensor) -> Tensor:
        """(N,) losses, from the log-sum-exps over all other rows."""
        with torch.autocast(self.z.device.type, enabled=False):
            anchor, positive = self.pairs.long().to(self.z.device).unbind(1)
            rows = prepared(self.z, self.normalize)
            logits = (rows[anchor] * rows[positive]).sum(1) / _number(self.temperature, rows)
            share = _shares(self.weights, anchor, lse)
            total = torch.zeros_like(lse).index_add(0, anchor, share)
            mean = torch.zeros_like(lse).index_add(0, anchor, share * logits) / total.where(total > 0, 1)
            return (lse - mean).where(total > 0, 0)


def _share(call: _Pairs, reduction: str, group: ProcessGroup | None) -> Tensor:
    """This rank's share of the loss of all ranks' rows."""
    from fastcl.rowstats import meeting, sharded  # which one process does not need
    from fastcl.rowstats.agreement import Request, agreed

    def request() -> Request:
        call.check(reduction)
        options = meeting.Options(call.temperature, call.normalize, False, None)
        return Batch.rows(call.z, _ids(call.z)), options

    facts = {"function": "explicit_pairs_loss", "reduction": reduction}
    found = agreed(request, facts, group)
    if isinstance(found, Tensor):  # refused
        return found
    batch, options, sides = found
    (stats,) = sharded.sharded_statistics(batch, options, sides, meeting.Needs(False, False))
    return sharded.share_of(call.losses(stats.lse_other), sides[0], reduction)


def _ids(z: Tensor) -> Tensor:
    return torch.arange(len(z), dtype=torch.int64, device=z.device)


def paired_negatives(
    x: Tensor, negatives: Tensor, temperature: float | Tensor = 0.5, normalize: bool = True
) -> RowStats:
    """Row statistics of anchors against negatives of their own, such as mined hard negatives, all of them others.

    Join them to the statistics of the batch:
    `fastcl.OBJECTIVES["ntxent"](fastcl.row_stats(x, y, ...).union(fastcl.paired_negatives(x, hard, ...)))`.

    Args:
        x: (N, D) anchors, as `fastcl.row_stats`.
        negatives: (N, M, D), the M negatives of each anchor, of x's dtype and device.
        temperature, normalize: as `fastcl.row_stats`, and as in the call whose statistics they join.

    Raises:
        FastclError: as `fastcl.row_stats`; negatives of another shape, dtype or device.
    """
    check_rows(x, "x")
    check_positive(temperature, "temperature")
    if not isinstance(negatives, Tensor) or negatives.ndim != 3 or 0 in negatives.shape:
        found = describe(negatives) if isinstance(negatives, Tensor) else type_of(negatives)
        raise FastclError(f"negatives must be a non-empty (rows, negatives, width) tensor, got {found}")
    given, wanted = (len(negatives), negatives.shape[2]), tuple(x.shape)
    if given != wanted or (negatives.dtype, negatives.device) != (x.dtype, x.device):
        raise FastclError(
            f"negatives must have x's rows, width, dtype and device, got {describe(negatives)} for x {describe(x)}"
        )
    with torch.autocast(x.device.type, enabled=False):
        rows = prepared(x, normalize)
        others = prepared(negatives.flatten(0, 1), normalize).view(negatives.shape)
        lse = (torch.einsum("nd,nmd->nm", rows, others) / _number(temperature, rows)).logsumexp(1)
    none, zero = torch.full_like(lse.detach(), -torch.inf), torch.zeros_like(lse.detach())
    count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return RowStats(none, zero, zero, none, zero, lse, count, count, count + negatives.shape[1])


@dataclass(frozen=True, eq=False)
class Margin:
    """An objective of `with_margin`."""

    objective: Objective
    margin: float | Tensor

    def __call__(self, stats: RowStats) -> Tensor:
        """(N,) row losses."""
        fields = [f"{field}_{relation}" for relation in self.objective.positives for field in ("lse", "mean")]
        shift = _number(self.margin, stats.mean_view)
        return self.objective(replace(stats, **{name: getattr(stats, name) - shift for name in fields}))


def with_margin(objective: ObjectiveLike, margin: float | Tensor) -> Callable[[RowStats], Tensor]:
    """An objective whose positives have to win by a margin (as additive-margin softmax, Wang et al. 2018).

    Args:
        objective: a name of `fastcl.OBJECTIVES` or an `Objective`.
        margin: what is subtracted from the logits of the positives, in the numerator and in the denominator: a margin
            of the cosine divided by the temperature; a number, or a tensor with one element, which gets a gradient.

    Returns:
        A callable from RowStats to (N,) row losses, to be passed as the `objective` of `fastcl.contrastive_loss`.

    Raises:
        FastclError: an unknown objective, or a callable of your own, whose positives nobody knows; a margin that is no
            finite number.
    """
    form = resolve(objective)
    if not isinstance(form, Objective):
        raise FastclError(f"objective must be a name or an Objective, whose positives are known, got {objective!r}")
    check_finite(margin, "margin")

    return Margin(form, margin)


def check_smoothing(label_smoothing: float) -> None:
    """Raise FastclError unless `fastcl.clip_loss` takes it."""
    if not isinstance(label_smoothing, Real) or not 0 <= label_smoothing < 1:
        raise FastclError(f"label_smoothing must be a number in [0, 1), got {brief(label_smoothing)}")


def _mean(rows: Tensor) -> Tensor:
    return rows.mean(0)


def pairs_above_mean(
    x: Tensor, y: Tensor, logit_scale: float | Tensor, normalize: bool, mean_of: Callable[[Tensor], Tensor] = _mean
) -> Tensor:
    """(N,): by how much the logit of pair k exceeds the mean of its row and its column. Times e it is what label
    smoothing by e adds to the two cross-entropies, whose rows are then (1 - e) (lse - s_kk) + e (lse - mean of s).

    Args:
        x, y, logit_scale, normalize: as `fastcl.clip_loss`, checked by it.
        mean_of: the mean row of a tower.
    """
    with torch.autocast(x.device.type, enabled=False):
        u, v = prepared(x, normalize), prepared(y, normalize)
        apart = (u * v).sum(1) - (u @ mean_of(v) + v @ mean_of(u)) / 2
        return apart * _number(logit_scale, u)


def _number(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like).reshape(()) if isinstance(value, Tensor) else value


def _check_pairs(pairs: Tensor, rows: int) -> None:
    if not isinstance(pairs, Tensor) or pairs.ndim != 2 or pairs.shape[1] != 2 or not holds_integers(pairs):
        found = describe(pairs) if isinstance(pairs, Tensor) else type_of(pairs)
        raise FastclError(f"pairs must be a (P, 2) tensor of integers, got {found}")
    if not len(pairs) or not is_readable(pairs):
        return
    low, high = (v.item() for v in pairs.aminmax())
    if low < 0 or high >= rows:
        raise FastclError(f"pairs must name rows 0 to {rows - 1}, got {low if low < 0 else high}")
    if (own := pairs[:, 0] == pairs[:, 1]).any():
        raise FastclError(f"pairs must not pair a row with itself, got row {pairs[own][0, 0].item()}")


def _check_weights(weights: Tensor | None, pairs: Tensor) -> None:
    if weights is None:
        return
    if not isinstance(weights, Tensor) or weights.shape != pairs.shape[:1] or weights.is_complex():
        found = describe(weights) if isinstance(weights, Tensor) else type_of(weights)
        raise FastclError(f"weights must be one real number for each of {len(pairs)} pairs, got {found}")
    if is_readable(weights) and (wrong := ~((weights >= 0) & weights.isfinite())).any():
        raise FastclError(f"weights must be finite and not negative, got {weights[wrong][0].item():g}")


def _shares(weights: Tensor | None, anchor: Tensor, lse: Tensor) -> Tensor:
    """(P,) weights relative to the largest of their anchor: any finite ones have sums in range."""
    if weights is None:
        return torch.ones_like(anchor, dtype=lse.dtype)
    wide = torch.promote_types(weights.dtype, lse.dtype)
    weights = weights.detach().to(lse.device, wide)
    largest = torch.zeros_like(lse, dtype=wide).scatter_reduce(0, anchor, weights, "amax")[anchor]
    return (weights / largest.where(largest > 0, 1)).to(lse.dtype)
