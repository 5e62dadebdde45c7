"""Row losses of an objective together with their derivatives: what autograd makes of its closed form, in fewer steps.

With L_R the log-sum-exp over a set R of relations, S what both positives P and denominator D hold, Q the rest of D and
O the rest of P, the loss of a row is L_D - L_P plus, for a mean over positives outside the log, the spread of the
positives, L_P less their mean logit; for a mean inside, the logarithm of their number. Where S is not empty,

    L_D - L_P = softplus(L_Q - L_S) - softplus(L_O - L_S)

keeps all digits of a small loss, as `fastcl.objectives` has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus as torch_softplus

Slopes = dict[str, "Tensor | float"]  # by "view" (its mean logit), "peer", "other" (log-sum-exps), "sum_peer"


@dataclass(frozen=True)
class Form:
    """An objective as data; see `fastcl.objectives.Objective`."""

    denominator: tuple[str, ...]
    positives: tuple[str, ...]
    inside: bool


@dataclass(frozen=True)
class Sides:
    """Statistics of N rows by relation, each with one view, whose logit is lse["view"]."""

    lse: dict[str, Tensor]  # without "peer": no row has peers
    sum_peer: Tensor | None
    n: dict[str, Tensor | int]  # (N,) or the same for all; of views 1


def rows_and_slopes(form: Form, s: Sides) -> tuple[Tensor, Slopes]:
    """(N,) row losses and their derivatives; a relation without influence has none. Rows that lack a positive, a
    denominator or, where the objective has any, a negative: 0."""
    positives, denominator = ([r for r in s.lse if r in group] for group in (form.positives, form.denominator))
    shared = [r for r in positives if r in denominator]
    repelled, only = ([r for r in group if r not in shared] for group in (denominator, positives))
    needed = [positives, denominator, *([repelled] if set(form.denominator) - set(form.positives) else [])]
    uncertain = [g for g in needed if not any(isinstance(s.n[r], int) and s.n[r] for r in g)]
    if any(all(isinstance(s.n[r], int) for r in group) for group in uncertain):
        return torch.zeros_like(s.lse["view"]), {}
    slopes: Slopes = {}
    attraction = _log_sum(s, positives) if shared or form.inside else None
    loss = _spread(form.inside, bool(shared), s, positives, attraction, slopes)
    if not shared:
        top, shares = _log_sum(s, denominator)
        loss = top + loss
        _add(slopes, shares)
    for group, sign in ((repelled, 1.0), (only, -1.0)) if shared else ():
        if group:
            base, base_shares = attraction if shared == positives else _log_sum(s, shared)
            lse, shares = _log_sum(s, group)
            gap = lse - base
            force = torch.sigmoid(gap)
            _add(slopes, shares, force, sign)
            _add(slopes, base_shares, force, -sign)
            loss = torch.add(softplus(gap), loss) if sign > 0 else loss - softplus(gap)
    loss = loss if isinstance(loss, Tensor) else torch.zeros_like(s.lse["view"])
    if not uncertain:
        return loss, slopes
    valid = torch.stack([sum(s.n[r] for r in group) > 0 for group in uncertain]).all(0)
    return loss.where(valid, 0), {r: torch.where(valid, slope, 0.0) for r, slope in slopes.items()}


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) to all digits of float64; torch's default returns x above 20."""
    return torch_softplus(x, threshold=40)


def _spread(
    inside: bool, softens: bool, s: Sides, positives: list[str], attraction: tuple | None, slopes: Slopes
) -> Tensor | float:
    """What the positives add to L_D - L_P or, where nothing `softens` that difference, to L_D.

    Args:
        attraction: `_log_sum` of the positives, where it is needed.
    """
    view = s.lse["view"]
    if positives == ["view"]:
        if not softens:
            slopes["view"] = -1.0
        return 0.0 if softens else -view
    n = s.n["peer"] + 1 if "view" in positives else s.n["peer"].clamp(min=1)
    if inside:
        if not softens:
            _add(slopes, attraction[1], sign=-1.0)
        return n.log() if softens else n.log() - attraction[0]
    inverse = 1 / n
    slopes["sum_peer"] = -inverse
    if "view" not in positives:
        _add(slopes, {"peer": 1.0} if softens else {})
        return (s.lse["peer"] if softens else 0.0) - s.sum_peer * inverse
    mean = (view + s.sum_peer) * inverse
    if not softens:
        slopes["view"] = -inverse
        return -mean
    lse, shares = attraction
    slopes["view"], slopes["peer"] = shares["view"] - inverse, shares["peer"]
    return lse - mean


def _log_sum(s: Sides, relations: list[str]) -> tuple[Tensor, Slopes]:
    """Log-sum-exp over one or two relations, and its derivative by each."""
    first, *rest = relations
    if not rest:
        return s.lse[first], {first: 1.0}
    a, b = s.lse[first], s.lse[rest[0]]
    if first != "view":
        return torch.logaddexp(a, b), {first: torch.sigmoid(a - b), rest[0]: torch.sigmoid(b - a)}
    gap = b - a  # a view there is
    share = torch.sigmoid(gap)
    return a + softplus(gap), {first: 1 - share, rest[0]: share}


def _add(slopes: Slopes, parts: Slopes, factor: Tensor | None = None, sign: float = 1.0) -> None:
    """slopes += sign * factor * parts."""
    for r, part in parts.items():
        term = part if factor is None else factor if isinstance(part, float) else part * factor
        if r in slopes:
            slopes[r] = slopes[r] + term if sign > 0 else slopes[r] - term
        else:
            slopes[r] = term if sign > 0 else -term
