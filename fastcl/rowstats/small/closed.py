"""Row losses of an objective together with their derivatives: the result of autograd in closed form, in fewer steps.

With L_R the log-sum-exp over a set R of relations, D the denominator, P the positives and Q the rest of D, the loss of
a row is L_D - L_P plus, for a mean over positives outside the log, the spread of the positives, which is L_P minus
their mean logit; for a mean inside, the logarithm of their number. If D contains all of P, L_D - L_P is computed as
softplus(L_Q - L_P), which keeps all digits of a small loss, as in `fastcl.losses.objectives`. If it contains none of
P, there is no cancellation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import softplus as torch_softplus

from fastcl.rowstats.small.whole import MaybeNone, Stats, number

# Derivatives by "view" (its mean logit), "peer", "other" (log-sum-exps) and "sum_peer": (N,), or 1 or -1 for all rows.
Slopes: TypeAlias = dict[str, Tensor | float]
LogSum: TypeAlias = tuple[Tensor, Slopes]  # a log-sum-exp and its derivative by each relation


@dataclass(frozen=True)
class Form:
    """An objective as data; see `fastcl.losses.objectives.Objective`."""

    denominator: tuple[str, ...]
    positives: tuple[str, ...]
    inside: bool


class Plan(NamedTuple):
    """What follows from an objective and from the relations that are there, whatever their values."""

    positives: tuple[str, ...]
    denominator: tuple[str, ...]
    repelled: tuple[str, ...]
    softens: bool  # the denominator contains the positives, so that L_D - L_P is a softplus
    is_empty: bool  # no row has a loss
    needs_peer: bool  # a row without peers has no loss


def has_slopes(form: Form) -> bool:
    """Whether `rows_and_slopes` supports the objective: its denominator contains all of the positives or none."""
    return len(set(form.positives) - set(form.denominator)) in (0, len(form.positives))


@lru_cache(maxsize=64)
def _plan(wanted: tuple[str, ...], attracted: tuple[str, ...], peers: bool, others: bool) -> Plan:
    """Plan of an objective with this denominator and these positives.

    Args:
        peers, others: whether statistics of peers were computed; whether the rows have others.
    """
    present = ("view", "other", "peer") if peers else ("view", "other")
    positives, denominator = (tuple(r for r in present if r in group) for group in (attracted, wanted))
    repelled = tuple(r for r in denominator if r not in positives)
    needed = [positives, denominator, *([repelled] if set(wanted) - set(attracted) else [])]
    uncertain = [g for g in needed if "view" not in g and not (others and "other" in g)]
    is_empty = any("peer" not in g for g in uncertain)
    return Plan(positives, denominator, repelled, attracted[0] in wanted, is_empty, bool(uncertain))


def rows_and_slopes(form: Form, s: Stats) -> tuple[Tensor, Slopes]:
    """Row losses and their derivatives; a relation without influence has no entry. A row without a positive, without a
    denominator or, if the objective has negatives, without a negative has loss 0."""
    plan = _plan(form.denominator, form.positives, "peer" in s.lse, s.n_other > 0)
    if plan.is_empty:
        return torch.zeros_like(s.lse["view"]), {}
    positives, softens = plan.positives, plan.softens
    slopes: Slopes = {}
    attraction: Tensor | MaybeNone = None
    pulled: Slopes = {}
    if softens or form.inside:
        attraction, pulled = _log_sum(s, positives)
    loss = _spread(form.inside, softens, s, positives, attraction, pulled, slopes)
    if not softens:  # the denominator and the positives are disjoint
        top, shares = _log_sum(s, plan.denominator)
        loss = top + loss
        slopes |= shares
    elif plan.repelled:
        lse, shares = _log_sum(s, plan.repelled)
        gap = lse - attraction
        force = gap.sigmoid()
        for r, share in shares.items():
            slopes[r] = force if isinstance(share, float) else share * force
        for r, share in pulled.items():
            term = force if isinstance(share, float) else share * force
            slopes[r] = slopes[r] - term if r in slopes else -term
        loss = softplus(gap) + loss if isinstance(loss, Tensor) else softplus(gap)
    elif not isinstance(loss, Tensor):
        loss = torch.zeros_like(s.lse["view"])
    if not plan.needs_peer:
        return loss, slopes
    valid = s.n_peer > 0
    return loss.where(valid, 0), {r: torch.where(valid, slope, 0.0) for r, slope in slopes.items()}


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) to full float64 precision; torch's default returns x above 20."""
    return torch_softplus(x, threshold=40)


def _spread(
    inside: bool, softens: bool, s: Stats, positives: tuple[str, ...], attraction: MaybeNone, pulled: Slopes,
    slopes: Slopes,
) -> Tensor | float:  # fmt: skip
    """The positives' term to be added to L_D - L_P or, without `softens`, to L_D; their derivatives go into `slopes`.

    Args:
        softens: whether the denominator contains the positives, so that L_D - L_P is a softplus.
        attraction, pulled: `_log_sum` of the positives, if it is needed.
    """
    view = s.lse["view"]
    if positives == ("view",):
        if not softens:
            slopes["view"] = -1.0
        return 0.0 if softens else -view
    n = s.n_peer + number(1, s.n_peer.dtype) if "view" in positives else s.n_peer.clamp(min=1)
    if inside:
        if not softens:
            slopes |= {r: -share for r, share in pulled.items()}
        return n.log() if softens else n.log() - attraction
    inverse = n.reciprocal()
    slopes["sum_peer"] = -inverse
    if "view" not in positives:
        if softens:
            slopes["peer"] = 1.0
        return (s.lse["peer"] if softens else 0.0) - s.sum_peer * inverse
    mean = (view + s.sum_peer) * inverse
    if not softens:
        slopes["view"] = -inverse
        return -mean
    slopes["view"], slopes["peer"] = pulled["view"] - inverse, pulled["peer"]
    return attraction - mean


def _log_sum(s: Stats, relations: tuple[str, ...]) -> LogSum:
    """Log-sum-exp over one or two relations."""
    first, *rest = relations
    if not rest:
        return s.lse[first], {first: 1.0}
    a, b = s.lse[first], s.lse[rest[0]]
    if first != "view":
        return torch.logaddexp(a, b), {first: torch.sigmoid(a - b), rest[0]: torch.sigmoid(b - a)}
    gap = b - a  # finite or -inf: every row has a view
    share = torch.sigmoid(gap)
    return a + softplus(gap), {first: number(1, share.dtype) - share, rest[0]: share}
