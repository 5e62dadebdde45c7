"""The table of objectives. An objective is data, evaluated by a single function.

| name | denominator | positives | mean over positives | source |
| --- | --- | --- | --- | --- |
| ntxent | view, peer, other | view | outside the log | SimCLR (Chen et al. 2020) |
| dcl | peer, other | view | outside | decoupled (Yeh et al. 2022); CL in arXiv 2510.08852 |
| nscl | other | view | outside | arXiv 2510.08852 (negatives-only supervised) |
| nscl_with_positive | view, other | view | outside | the code published with arXiv 2510.08852 |
| supcon | view, peer, other | view, peer | outside | Khosla et al. 2020, eq. 2 (L_out) |
| supcon_in | view, peer, other | view, peer | inside | Khosla et al. 2020, eq. 3 (L_in) |
| supcon_negatives | other | view, peer | outside | SupCon with negatives only in the denominator |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastcl.choices import RELATIONS, ObjectiveName, Relation
from fastcl.errors import FastclError, suggest
from fastcl.rowstats.api import RowStats


@dataclass(frozen=True)
class Objective:
    """A contrastive loss, defined by the relations in its denominator and those it attracts.

    Args:
        denominator: one or more of "view", "peer", "other".
        positives: one or both of "view", "peer".
        inside: take the mean over positives inside the log (L_in) instead of outside (L_out).

    Raises:
        FastclError: an unknown or repeated relation, or an empty set.
    """

    denominator: tuple[Relation, ...]
    positives: tuple[Relation, ...]
    inside: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("denominator", self.denominator, RELATIONS),
            ("positives", self.positives, RELATIONS[:2]),
        ):
            if not value or len(set(value)) != len(value) or not set(value) <= set(allowed):
                raise FastclError(f"{name} must be distinct relations from {allowed}, got {value!r}")

    @property
    def negatives(self) -> tuple[Relation, ...]:
        """Relations that are only repelled."""
        return tuple(r for r in self.denominator if r not in self.positives)

    @property
    def needs_labels(self) -> bool:
        """Whether peers and others are treated differently, so that labels matter."""
        return "peer" in self.positives or ("peer" in self.denominator) != ("other" in self.denominator)

    @property
    def code(self) -> int:
        """The objective encoded for the kernels: see kernels/contrastive/objective.py."""
        denominator = sum(1 << RELATIONS.index(r) for r in self.denominator)
        return denominator | sum(8 << RELATIONS.index(r) for r in self.positives) | (32 if self.inside else 0)

    def __call__(self, stats: RowStats) -> Tensor:
        """(N,) row losses. Rows without a positive, a negative or a denominator have loss 0 and no gradient."""
        valid = (_count(stats, self.positives) > 0) & (_count(stats, self.denominator) > 0)
        if self.negatives:
            valid = valid & (_count(stats, self.negatives) > 0)
        lse = {r: getattr(stats, f"lse_{r}") for r in RELATIONS}
        n = _count(stats, self.positives).clamp(min=1)
        shared = set(self.positives) & set(self.denominator)
        if shared and shared != set(self.positives):
            return self._partly_shared(stats, n, valid)
        lse_positives = _logsumexp([lse[r] for r in self.positives], valid)
        spread = n.to(lse_positives.dtype).log() if self.inside else _spread(stats, self.positives, n)
        if shared:
            if not self.negatives:
                # With the mean inside the log the loss is a constant: give it a zero gradient, and NaN for NaN rows.
                return (spread + 0 * lse_positives if self.inside else spread).where(valid, 0)
            # log(P + Q) - log(P) as a softplus: exact at any distance (F.softplus returns its argument above 20).
            gap = lse_positives - _logsumexp([lse[r] for r in self.negatives], valid)
            return (spread - logsigmoid(gap)).where(valid, 0)
        return (_logsumexp([lse[r] for r in self.denominator], valid) - lse_positives + spread).where(valid, 0)

    def _partly_shared(self, stats: RowStats, n: Tensor, valid: Tensor) -> Tensor:
        """Row losses if one attracted relation, s, is in the denominator and the other, a, is not.

        The log-sum-exp of s cancels analytically, which leaves only softplus terms of the others in the denominator and
        of a. So the loss stays accurate in rows where these are small or absent, and the loss is small.
        """
        s, a = sorted(self.positives, key=lambda r: r not in self.denominator)
        has_s, has_a = ((_count(stats, (r,)) > 0) & valid for r in (s, a))
        lse_s, lse_a = (_filled(getattr(stats, f"lse_{r}"), has) for r, has in ((s, has_s), (a, has_a)))
        denominator, over = lse_s, torch.zeros_like(lse_s)
        if self.negatives:
            others = _filled(stats.lse_other, valid)
            over = -logsigmoid(_filled(lse_s - others, has_s))
            denominator = torch.where(has_s, lse_s + over, others)
        if self.inside:
            above = logsigmoid(_filled(lse_s - lse_a, has_s & has_a))
            found = torch.where(has_s, over + _filled(above, has_a), denominator - lse_a)
            return (n.to(found.dtype).log() + found).where(valid, 0)
        share_s, share_a = (_count(stats, (r,)).to(over.dtype) / n for r in (s, a))
        own_s, own_a = _own_spread(stats, s) + over, _own_spread(stats, a) + (denominator - lse_a)
        return (_filled(own_s, has_s) * share_s + _filled(own_a, has_a) * share_a).where(valid, 0)


ObjectiveLike: TypeAlias = ObjectiveName | Objective | Callable[[RowStats], Tensor]

_ALL = RELATIONS
OBJECTIVES: dict[str, Objective] = {
    "ntxent": Objective(_ALL, ("view",)),
    "dcl": Objective(("peer", "other"), ("view",)),
    "nscl": Objective(("other",), ("view",)),
    "nscl_with_positive": Objective(("view", "other"), ("view",)),
    "supcon": Objective(_ALL, ("view", "peer")),
    "supcon_in": Objective(_ALL, ("view", "peer"), inside=True),
    "supcon_negatives": Objective(("other",), ("view", "peer")),
}
# Names in use elsewhere, as `suggest` takes them; "ce" is one of the trainer's.
SYNONYMS = {
    "simclr": "ntxent", "infonce": "ntxent", "ntxentloss": "ntxent", "decoupled": "dcl", "decoupledcontrastive": "dcl",
    "supervisedcontrastive": "supcon", "supconout": "supcon", "crossentropy": "ce", "xent": "ce",
}  # fmt: skip


def resolve(objective: ObjectiveLike) -> Callable[[RowStats], Tensor]:
    """Look up an objective by name; an `Objective` or any other callable on RowStats is returned as it is.

    Raises:
        FastclError: an unknown name (the message suggests the nearest known one), or an object that is not callable.
    """
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise FastclError(f"unknown objective {objective!r}{suggest(objective, OBJECTIVES, synonyms=SYNONYMS)}")
        return OBJECTIVES[objective]
    if not callable(objective):
        raise FastclError(
            f"objective must be a name, an Objective or a callable that takes RowStats, got {objective!r}"
        )
    return objective


def same_class_mass(stats: RowStats) -> Tensor:
    """(N,) share of peers in the softmax of decoupled CL, exp(lse_peer - logaddexp(lse_peer, lse_other)).

    The L1 distance between a row's CL and NSCL softmaxes is twice this (arXiv 2510.08852, proof of Theorem 1).
    Rows without peers have mass 0; rows with peers but no others have mass 1.
    """
    gap = stats.lse_peer.masked_fill(stats.n_peer == 0, 0) - stats.lse_other.masked_fill(stats.n_other == 0, 0)
    mass = torch.sigmoid(gap).masked_fill(stats.n_other == 0, 1)
    return mass.masked_fill(stats.n_peer == 0, 0)


def _count(stats: RowStats, relations: tuple[str, ...]) -> Tensor:
    counts: list[Tensor] = [getattr(stats, f"n_{r}") for r in relations]
    return sum(counts[1:], start=counts[0])


def _spread(stats: RowStats, positives: tuple[str, ...], n: Tensor) -> Tensor:
    """Log-sum-exp over all positives minus their mean, as the weighted mean over relations of lse - mean_r.

    lse - mean_r is computed as (lse_r - mean_r) + (lse - lse_r), the second a softplus, so that the small gradients
    near the optimum are never differences of large ones.
    """
    total = torch.zeros_like(stats.lse_view)
    for r in positives:
        lse, count = getattr(stats, f"lse_{r}"), getattr(stats, f"n_{r}")
        absent = count == 0
        term = _own_spread(stats, r)
        for q in positives:
            if q != r:
                term = term - logsigmoid((lse - getattr(stats, f"lse_{q}")).masked_fill(absent, 0))
        total = total + term.masked_fill(absent, 0) * (count.to(term.dtype) / n)
    return total


def _own_spread(stats: RowStats, relation: str) -> Tensor:
    """Log-sum-exp of a relation minus its mean.

    For a single peer both are the same number, and the result is a constant 0. Otherwise a gradient p - 1 would be
    split into p for one and -1 for the other, with float32's error at 1.
    """
    if relation == "view":
        return stats.spread_view
    return (stats.lse_peer - stats.mean_peer).masked_fill(stats.n_peer <= 1, 0)


def _filled(values: Tensor, known: Tensor) -> Tensor:
    """The values, or 0 without a gradient where they are not known."""
    return values.masked_fill(~known, 0)


def _logsumexp(terms: list[Tensor], valid: Tensor) -> Tensor:
    """Log-sum-exp over (N,) terms, 0 in invalid rows. A term of -inf gets zero gradient, not NaN."""
    # All terms of an invalid row may be -inf, which would give a NaN gradient, so those rows are masked first.
    stacked = torch.stack(terms).masked_fill(~valid, 0)
    return stacked.logsumexp(0).where(valid, 0)
