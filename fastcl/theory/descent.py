"""Similarity descent: the dynamics that Theorem 1 of arXiv 2510.08852 speaks of, run on small matrices in float64.

Two similarity matrices of the same N samples with K views each start equal. At each step CL and NSCL (fastcl's "dcl"
and "nscl") take a gradient step on the entries of their own matrix, on the same batch. With p and q the softmaxes of an
anchor i over its candidates, v uniform over its K - 1 other views, and B K anchors in a batch of B samples,

    G^CL_ij = (p_ij - v_ij) / (tau B K),    G^NSCL_ij = (q_ij - v_ij) / (tau B K),    S <- S - eta G

Entries that the batch does not touch have gradient 0, and so have all entries of an anchor without candidates, as in
the package's losses: with one class in the batch that is every anchor of NSCL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.choices import ENTRIES, Entries
from fastcl.errors import FastclError, one_of, type_of
from fastcl.theory.ranges import check_count, check_range, check_temperature, checked_rates

_ROUNDING = 1e-6  # of float32 cosines
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Descent:
    """What `similarity_descent` returns; all float64 on the CPU, for T steps and n = N K rows.

    The theorem's quantities at step t belong to the matrices before the step.

    Attributes:
        cl: (n, n) similarities of CL after the last step.
        nscl: (n, n) those of NSCL.
        drift: (T + 1,) ||S_t^CL - S_t^NSCL||_F; 0 at t = 0.
        gradient_gap: (T,) ||G_t^CL - G_t^NSCL||_F, the left side of Lemma 7.
        lemma: (T,) softmax_gap / (tau sqrt(B K)) + drift / (2 tau^2 B K), its right side with the measured gap.
        softmax_gap: (T,) the largest ||p - q||_1 of an anchor, both of CL's matrix; 2 for an anchor without a q.
        loss_gap: (T,) CL's loss minus NSCL's on the batch, both of CL's matrix, in nats; inf if an anchor has no q.
        class_counts: (T, C) int64, samples of each class in each batch, classes in ascending order.
    """

    cl: Tensor
    nscl: Tensor
    drift: Tensor
    gradient_gap: Tensor
    lemma: Tensor
    softmax_gap: Tensor
    loss_gap: Tensor
    class_counts: Tensor


class _Batch(NamedTuple):
    """The rows of a batch, and (B K, B K) masks of who is what to whom."""

    rows: Tensor
    view: Tensor
    candidate: Tensor  # of CL: all other samples
    other: Tensor  # of NSCL: all of other classes


def similarity_descent(
    start: Tensor,
    labels: Tensor,
    batches: Tensor,
    learning_rates: Sequence[float],
    temperature: float,
    entries: Entries = "free",
    clamp: bool = True,
) -> Descent:
    """Run CL and NSCL on the entries of a similarity matrix, from one start on the same batches.

    Args:
        start: (n, n) float, entries in [-1, 1], symmetric unless entries are free, both up to 1e-6; n = N K, row
            k N + i is view k of sample i. Computed in float64 on the CPU.
        labels: (N,) integers.
        batches: (T, B) integers, the samples of each batch, as `draw_batches` gives them. The theorem assumes that no
            batch repeats a sample; one that does adds up its gradients.
        learning_rates: T numbers in [0, 1e30].
        temperature: tau, above 1e-30.
        entries: "free": S_ij belongs to anchor i and S_ji to anchor j, as in the proof. "symmetric": steps with
            (G + G') / 2, the gradient among symmetric matrices; no norm grows by it, and the bounds hold.
            "tied": steps with G + G', the derivative by the one number S_ij = S_ji; twice that, which the theorem does
            not cover.
        clamp: put entries that leave [-1, 1] back to its ends after every step. Projections do not increase distances:
            the bounds hold. Without it the recurrence with Delta = 2 still holds, but e^{2 / tau} no longer bounds
            ratios of weights.

    Raises:
        FastclError: shapes that do not match, indices or entries out of range, or a value out of range.
    """
    check_temperature(temperature)
    if entries not in ENTRIES:
        raise FastclError(one_of("entries", ENTRIES, entries))
    rates = checked_rates(learning_rates)
    _check_shapes(start, labels, batches, len(rates))
    views = len(start) // len(labels)
    s = _checked_entries(start.detach().to("cpu", torch.float64), entries)
    classes = labels.to("cpu").unique(return_inverse=True)[1]
    cl, nscl, drift, found = s.clone(), s.clone(), [0.0], []
    for rate, samples in zip(rates, batches.to("cpu", torch.int64), strict=True):
        batch = _batch(samples, classes, views)
        g_cl = _gradient(cl, batch, batch.candidate, temperature, entries)
        g_nscl = _gradient(nscl, batch, batch.other, temperature, entries)
        anchors, gap = len(batch.rows), _softmax_gap(cl, batch, temperature)
        right = gap[0] / (temperature * anchors**0.5) + drift[-1] / (2 * temperature**2 * anchors)
        found.append(((g_cl - g_nscl).norm().item(), right, *gap))
        for one, gradient in ((cl, g_cl), (nscl, g_nscl)):
            one.sub_(gradient, alpha=rate)
            if clamp:
                one.clamp_(-1.0, 1.0)
        drift.append((cl - nscl).norm().item())
    columns = torch.tensor(found, dtype=torch.float64, device="cpu").unbind(1)
    count = int(classes.max()) + 1
    counts = torch.stack([classes[row].bincount(minlength=count) for row in batches.to("cpu", torch.int64)])
    return Descent(cl, nscl, torch.tensor(drift, dtype=torch.float64, device="cpu"), *columns, class_counts=counts)


def draw_batches(samples: int, batch_size: int, steps: int, seed: int = 0, replacement: bool = False) -> Tensor:
    """(T, B) int64 batches of sample indices, drawn independently of each other.

    Args:
        samples: N, the number of samples to draw from.
        batch_size: B; at most N without replacement.
        steps: T.
        seed: of the draw.
        replacement: whether a batch may repeat a sample, which the theorem does not cover.

    Raises:
        FastclError: a number below 1, a seed that is not in [0, 2**32), or more samples in a batch than there are.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size), ("steps", steps)):
        check_count(name, value, 1)
    check_count("seed", seed, 0)
    check_range("seed", seed, 0, 1 << 32, includes="low")
    if batch_size > samples and not replacement:
        raise FastclError(f"batch_size is at most samples without replacement, got {batch_size} of {samples}")
    numbers = torch.Generator("cpu").manual_seed(seed)
    if replacement:
        return torch.randint(samples, (steps, batch_size), generator=numbers, dtype=torch.int64, device="cpu")
    keys = torch.rand(steps, samples, generator=numbers, dtype=torch.float64, device="cpu")
    return keys.argsort(dim=1, stable=True)[:, :batch_size]


def _batch(samples: Tensor, classes: Tensor, views: int) -> _Batch:
    rows = (samples + len(classes) * torch.arange(views, dtype=torch.int64, device="cpu")[:, None]).flatten()
    of, label = samples.repeat(views), classes[samples].repeat(views)
    same, peers = of[:, None] == of, label[:, None] == label
    return _Batch(rows, same & (rows[:, None] != rows), ~same, ~peers)


def _weights(s: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Row softmaxes of s / tau over a mask; a row of zeros where the mask is empty."""
    shifted = (s / temperature).masked_fill(~mask, -torch.inf).softmax(dim=1)
    return shifted.masked_fill(~mask.any(dim=1, keepdim=True), 0.0)


def _gradient(s: Tensor, batch: _Batch, mask: Tensor, temperature: float, entries: Entries) -> Tensor:
    """(n, n) gradient of the mean loss over the anchors; `mask`: the denominators."""
    rows, has = batch.rows, mask.any(dim=1, keepdim=True)
    attracted = batch.view.double() / batch.view.sum(dim=1, keepdim=True).clamp_min(1)
    block = _weights(s[rows][:, rows], mask, temperature) - attracted.masked_fill(~has, 0.0)
    gradient = torch.zeros_like(s)
    where = (rows[:, None].expand_as(block), rows.expand_as(block))
    gradient.index_put_(where, block / (temperature * len(rows)), accumulate=True)
    if entries == "free":
        return gradient
    return (gradient + gradient.mT) * (0.5 if entries == "symmetric" else 1.0)


def _softmax_gap(s: Tensor, batch: _Batch, temperature: float) -> tuple[float, float]:
    """The largest ||p - q||_1 of an anchor, and the mean of CL - NSCL over the anchors."""
    logits = s[batch.rows][:, batch.rows] / temperature
    if not batch.candidate.any():
        return 0.0, 0.0  # one sample: both losses are 0 by convention
    own = logits.masked_fill(~(batch.candidate & ~batch.other), -torch.inf).logsumexp(dim=1)
    odds = own - logits.masked_fill(~batch.other, -torch.inf).logsumexp(dim=1)
    return 2 * torch.sigmoid(odds).max().item(), torch.nn.functional.softplus(odds, threshold=700).mean().item()


def _check_shapes(start: Tensor, labels: Tensor, batches: Tensor, steps: int) -> None:
    for name, value, dims in (("start", start, 2), ("labels", labels, 1), ("batches", batches, 2)):
        if not isinstance(value, Tensor):
            raise FastclError(f"{name} must be a tensor, got {type_of(value)}")
        fits = value.is_floating_point() if name == "start" else value.dtype in _INTEGERS
        if value.ndim != dims or 0 in value.shape or not fits:
            kind = "floating-point" if name == "start" else "integer"
            raise FastclError(
                f"{name} must be a non-empty {kind} tensor of {dims} dimensions, got shape {tuple(value.shape)} of "
                f"{value.dtype}"
            )
    if start.shape[0] != start.shape[1] or len(start) % len(labels):
        raise FastclError(
            f"start must be a square matrix of all views of {len(labels)} labels' samples, got {tuple(start.shape)}"
        )
    if len(batches) != steps:
        raise FastclError(f"batches must have one row per learning rate, got {len(batches)} and {steps}")
    low, high = int(batches.min()), int(batches.max())
    if low < 0 or high >= len(labels):
        raise FastclError(f"batches must hold indices in [0, {len(labels)}), got {low} to {high}")


def _checked_entries(s: Tensor, entries: Entries) -> Tensor:
    """The start with what float32 cosines lack in range and symmetry put right."""
    most, skew = s.abs().max().item(), (s - s.mT).abs().max().item()
    if not most <= 1 + _ROUNDING:
        raise FastclError(f"start must have entries in [-1, 1], got one of size {most:.7g}")
    if entries == "free":
        return s.clamp(-1.0, 1.0)
    if not skew <= _ROUNDING:
        raise FastclError(f"start must be symmetric for {entries} entries, got entries that differ by {skew:g}")
    return ((s + s.mT) / 2).clamp(-1.0, 1.0)
