"""The slack of every bound in a setting: log10 of the bound over what was measured, at the step where it is smallest.

A bound from below of CKA or RSA counts by what is left to 1: log10 of (1 - bound) / (1 - measured). Where the measured
side is 0, nothing can fail and there is no slack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.theory.few_shot import few_shot
from bench.theory.settings import COVERED, Setting
from fastcl.theory import (
    CouplingBound,
    Descent,
    cka_coupling_bound,
    loss_gap_bound,
    parameter_divergence_bound,
    rsa_coupling_bound,
    similarity_coupling_bound,
    softmax_gap_bound,
)
from fastcl.theory.corollaries import AlignmentBound

_ROUNDING = 1e-9  # relative error that the measured sides may have
_NOTHING = 1e-12  # measured values below are rounding
_ALIGNED = 1e-6  # of 1 - CKA and 1 - RSA, which lose their digits near 0


class Slack(NamedTuple):
    """The slack of a bound, None if nothing was measured, and whether the bound is vacuous; None if that has no
    meaning for it."""

    log10: float | None
    vacuous: bool | None = None


def failed(slack: float | None) -> bool:
    """Whether the bound of a slack is below what was measured."""
    return slack is not None and slack < -_ROUNDING


def slacks(setting: Setting) -> dict[str, Slack]:
    """Every bound in a setting, by name."""
    descent = setting.run()
    largest = setting.labels().bincount().max().item() / setting.samples
    rates, tau, b, views = setting.rates, setting.temperature, setting.batch_size, setting.views
    bound = similarity_coupling_bound(rates, b, tau, largest, setting.delta, views=views)
    smoothness = 1 / (2 * tau**2 * b * views)  # the similarities are the weights: beta of the batch loss, and G = 1
    weights = parameter_divergence_bound(rates, b, tau, largest, smoothness, 1.0, setting.delta)
    n = len(descent.cl)
    most = math.log10(2 * math.sqrt(n * (n - 1)))  # of matrices with entries in [-1, 1] and equal diagonals
    drift = descent.drift.tolist()

    def of(log10_bounds: Sequence[float], measured: Sequence[float] = drift) -> Slack:
        return Slack(_least(log10_bounds, measured), log10_bounds[-1] >= most)

    return {
        **_on_batches(setting, descent, bound),
        "Theorem 1, recurrence": of(bound.log10_recurrence),
        "Theorem 1, as printed": of([bound.log10_printed], drift[-1:]),
        "Theorem 1, convex": of(bound.log10_convex),
        "Theorem 2, weights are similarities": of(weights.log10_recurrence),
        **_alignment(descent, bound),
        **(_few_shot(setting.seed) if setting.kind == COVERED else {}),
    }


def _few_shot(seed: int) -> dict[str, Slack]:
    return {
        name: Slack(_least([_log10(value)], [error]), value >= chance) for name, value, error, chance in few_shot(seed)
    }


def _on_batches(setting: Setting, descent: Descent, bound: CouplingBound) -> dict[str, Slack]:
    tau, counts = setting.temperature, descent.class_counts.tolist()
    gaps, steps = descent.softmax_gap.tolist(), len(counts)
    known = [softmax_gap_bound(row, tau) for row in counts]
    losses = [loss_gap_bound(row, tau, setting.views) for row in counts]
    loss_gap = descent.loss_gap.tolist()
    return {
        "Lemma 4, known classes": Slack(_least(map(_log10, known), gaps), min(known) >= 2),
        "Lemma 4, Delta as printed": Slack(_least([bound.log10_gap] * steps, gaps), bound.log10_gap >= math.log10(2)),
        "Lemma 7": Slack(_least(map(_log10, descent.lemma.tolist()), descent.gradient_gap.tolist())),
        "loss gap, mean": Slack(
            _least((_log10(gap.mean) for gap in losses), loss_gap), all(gap.vacuous for gap in losses)
        ),
        "loss gap, as printed": Slack(
            _least((_log10(gap.printed) for gap in losses), loss_gap),
            all(gap.printed >= gap.uninformed for gap in losses),
        ),
    }


def _alignment(descent: Descent, bound: CouplingBound) -> dict[str, Slack]:
    """Both corollaries, of the measured drift (the entries need not be cosines) and of Theorem 1's convex bound."""
    n, found = len(descent.cl), {}
    drift = bound.log10_convex[-1]
    apart = ~torch.eye(n, dtype=torch.bool)
    centred = [_centred(s) for s in (descent.cl, descent.nscl)]
    hollow = [s[apart] - s[apart].mean() for s in (descent.cl, descent.nscl)]
    for name, (k, other), predicted in (
        ("Corollary 1, CKA", centred, lambda size: cka_coupling_bound(drift, size)),
        ("Corollary 2, RSA", hollow, lambda size: rsa_coupling_bound(drift, n, size / math.sqrt(n * (n - 1)))),
    ):
        size, distance = k.norm().item(), (k - other).norm().item()
        if n < 3 or size < _NOTHING or not other.norm() > _NOTHING:
            continue
        missing = 1 - (k * other).sum().item() / (size * other.norm().item())
        certificate = AlignmentBound(_log10(distance / size), -1.0)
        for of, one, floor in (
            ("measured drift", certificate, certificate.printed),
            ("measured drift, tight", certificate, certificate.tight),
            ("Theorem 1, convex", predicted(size), predicted(size).printed),
        ):
            slack = None if one.vacuous else _least([_log10(1 - floor)], [missing] if missing > _ALIGNED else [])
            found[f"{name} of {of}"] = Slack(slack, one.vacuous)
    return found


def _centred(s: Tensor) -> Tensor:
    return s - s.mean(dim=0) - s.mean(dim=1, keepdim=True) + s.mean()


def _least(log10_bounds: Iterable[float], measured: Iterable[float]) -> float | None:
    """The least slack over the steps; None if there is none or the bound is infinite."""
    found = [b - math.log10(m) for b, m in zip(log10_bounds, measured, strict=False) if _NOTHING < m < math.inf]
    least = min(found, default=math.inf)
    return least if math.isfinite(least) else None


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf
