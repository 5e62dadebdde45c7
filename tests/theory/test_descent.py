"""Similarity descent against autograd on the losses' formulas, every bound in it, and what fails elsewhere."""

import math

import pytest
import torch
from reference import TOLERANCE, masks, normal, row_losses
from torch import Tensor

from bench.theory.settings import KINDS, drawn
from bench.theory.slack import failed, slacks
from fastcl import FastclError, theory
from fastcl.theory import draw_batches, largest_drift, similarity_coupling_bound, similarity_descent

CLOSE = TOLERANCE[torch.float64].gradient


def uniform(n: int, seed: int = 0) -> Tensor:
    """(n, n) symmetric, entries between -1 and 1."""
    s = normal(n, n, seed=seed).tanh()
    return (s + s.T) / 2


@pytest.mark.parametrize("entries", ("free", "symmetric", "tied"))
def test_steps_are_those_of_autograd_on_the_formulas(entries):
    """Two views of 7 samples, batches of 5: the loss as the package defines it, on the entries of the batch."""
    labels, batches = torch.tensor([0, 0, 1, 1, 1, 2, 7]), draw_batches(7, 5, 3, seed=1)
    rates, tau = [0.3, 0.0, 2.0], 0.4
    found = similarity_descent(uniform(14), labels, batches, rates, tau, entries, clamp=False)
    wanted = {}
    for name in ("dcl", "nscl"):
        s = uniform(14)
        for rate, batch in zip(rates, batches, strict=True):
            s = s.detach().requires_grad_()
            rows = torch.cat([batch, batch + 7])
            both = s if entries == "free" else torch.tril(s) + torch.tril(s, -1).T  # one number for each pair
            of = row_losses(name, masks(batch.repeat(2), labels[batch].repeat(2)))
            of(both[rows][:, rows] / tau).mean().backward()
            if entries == "free":
                step = s.grad
            else:
                step = (torch.tril(s.grad) + torch.tril(s.grad, -1).T) * (0.5 if entries == "symmetric" else 1.0)
            s = s - rate * step
        wanted[name] = s.detach()
    assert (found.cl - wanted["dcl"]).norm() <= CLOSE and (found.nscl - wanted["nscl"]).norm() <= CLOSE
    assert found.drift[0] == 0 and found.drift[1] == found.drift[2] > 0  # the second rate is 0
    assert found.drift[-1] == pytest.approx((wanted["dcl"] - wanted["nscl"]).norm().item(), rel=1e-9)
    assert found.class_counts.tolist() == [[labels[b].eq(c).sum().item() for c in (0, 1, 2, 7)] for b in batches]


def test_what_a_step_records():
    labels = torch.tensor([0, 0, 1])
    start = uniform(3, seed=2)
    batches = torch.tensor([[0, 1, 2], [2, 1, 0]])
    found = similarity_descent(start, labels, batches[:1], [0.5], 0.7)
    second = similarity_descent(start, labels, batches, [0.5, 0.0], 0.7)
    p = (start / 0.7).masked_fill(torch.eye(3).bool(), -math.inf).softmax(1)
    mass = torch.stack([p[0, 1], p[1, 0], torch.zeros(())])
    assert found.softmax_gap.item() == pytest.approx(2 * mass.max().item())
    assert found.loss_gap.item() == pytest.approx(-(1 - mass[:2]).log().sum().item() / 3)
    assert found.gradient_gap.item() == pytest.approx(math.sqrt(2 * (mass**2).sum().item()) / (0.7 * 3))
    assert found.lemma.item() == pytest.approx(found.softmax_gap.item() / (0.7 * math.sqrt(3)))
    assert found.drift[1].item() == pytest.approx(0.5 * found.gradient_gap.item())
    right = second.softmax_gap[1] / (0.7 * math.sqrt(3)) + found.drift[1] / (2 * 0.7**2 * 3)
    assert second.lemma[1].item() == pytest.approx(right.item()) and second.drift[2] == second.drift[1] > 0


def test_batches_without_negatives_and_entries_at_the_ends():
    start, labels, batch = torch.zeros(4, 4), torch.tensor([3, 3]), torch.tensor([[1, 0]])
    one_class = similarity_descent(start, labels, batch, [100.0], 1.0)
    assert torch.equal(one_class.nscl, torch.zeros(4, 4).double())  # no candidates: nothing moves
    assert one_class.cl.abs().max() == 1 and one_class.softmax_gap.item() == 2 and one_class.loss_gap.item() == math.inf
    assert similarity_descent(start, labels, batch, [100.0], 1.0, clamp=False).cl.abs().max() > 1
    alone = similarity_descent(torch.zeros(4, 4), torch.tensor([3, 1]), torch.tensor([[1]]), [1.0], 1.0)
    assert not alone.cl.any() and not alone.drift.any() and alone.loss_gap.item() == 0


def test_batches():
    batches = draw_batches(9, 6, 50, seed=3)
    assert batches.shape == (50, 6) and all(len(set(row)) == 6 and max(row) < 9 for row in batches.tolist())
    assert torch.equal(batches, draw_batches(9, 6, 50, seed=3)) and not torch.equal(batches, draw_batches(9, 6, 50))
    assert batches.flatten().bincount(minlength=9).min() > 15
    assert draw_batches(2, 6, 5, replacement=True).shape == (5, 6)


@pytest.mark.parametrize("seed", range(36))
def test_every_bound_holds(seed):
    found = slacks(drawn(1000 + seed, most=24))
    assert len(found) >= 9 and not {name: slack for name, slack in found.items() if failed(slack.log10)}


def test_some_settings_measure_something_of_each_bound():
    found: dict[str, float] = {}
    for seed in range(1000, 1036):
        for name, slack in slacks(drawn(seed, most=24)).items():
            if slack.log10 is not None:
                found[name] = min(found.get(name, math.inf), slack.log10)
    assert len(found) == 17
    assert found["Lemma 4, known classes"] < CLOSE and found["Theorem 1, convex"] < math.log10(2.5)


@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_other_settings_are_drawn_as_they_say(kind):
    settings = [drawn(seed, kind, most=12) for seed in range(8)]
    assert all(setting.kind == kind for setting in settings)
    assert all(setting.entries == "tied" for setting in settings) == (kind == "one number a pair")
    assert any(setting.batch_size > setting.samples for setting in settings) == (kind == "repeated samples")
    assert any(setting.run().cl.abs().max() > 1 + CLOSE for setting in settings) == (kind == "unbounded")


def near_pairs() -> tuple[Tensor, Tensor]:
    """Four samples, two classes: every sample has one near sample of its class, and one of the other class nearer than
    the third. At a low temperature CL's softmax lies on the first and NSCL's on the second."""
    s = torch.full((4, 4), -1.0, dtype=torch.float64)
    for i, j, value in ((0, 1, 1.0), (2, 3, 1.0), (0, 2, 0.0), (1, 3, 0.0)):
        s[i, j] = s[j, i] = value
    return s.fill_diagonal_(1.0), torch.tensor([0, 0, 1, 1])


def test_one_number_for_both_entries_breaks_the_recurrence():
    (start, labels), all_four = near_pairs(), torch.arange(4)[None]
    bound = similarity_coupling_bound([1e-3], 4, 0.05, 0.5)
    drifts = {entries: similarity_descent(start, labels, all_four, [1e-3], 0.05, entries).drift[1].item()
              for entries in ("free", "symmetric", "tied")}  # fmt: skip
    line = 10 ** bound.log10_recurrence[1]
    assert drifts["free"] == pytest.approx(line / math.sqrt(2)) and drifts["symmetric"] <= drifts["free"]
    assert drifts["tied"] == pytest.approx(line * math.sqrt(2))  # below the printed form, whose Delta is not clamped
    assert bound.log10_convex[1] == pytest.approx(math.log10(drifts["free"]), abs=1e-6)  # attained


def test_repeated_samples_break_the_printed_theorem():
    """2,000 draws from 8 samples: rows of S belong to 250 anchors each, and the 1 / sqrt(B) is lost."""
    labels = torch.arange(8) % 4
    start = torch.where(labels[:, None] == labels, 1.0, -1.0).double()
    batch = draw_batches(8, 2000, 1, replacement=True)
    found = similarity_descent(start, labels, batch, [1.0], 20.0)
    bound = similarity_coupling_bound([1.0], 2000, 20.0, 0.25)
    assert found.class_counts.max() / 2000 < 0.25 + bound.epsilon and bound.log10_gap < math.log10(2)
    assert found.drift[1] > 2 * 10**bound.log10_printed


def test_the_largest_drift_of_cosines_is_no_bound_here():
    """One class, all similarities 1: CL moves all to -1, NSCL nothing."""
    found = similarity_descent(torch.ones(16, 16), torch.zeros(16).long(), torch.arange(16)[None], [1e6], 1.0)
    assert found.drift[1].item() == pytest.approx(2 * math.sqrt(16 * 15)) and found.drift[1] > largest_drift(16)


GOOD = {"start": uniform(6), "labels": torch.tensor([0, 0, 1]), "batches": torch.tensor([[0, 1, 2]]),
        "learning_rates": [0.1], "temperature": 0.5}  # fmt: skip
BAD = [
    ({"start": [[1.0]]}, "start must be a tensor, got list"),
    ({"start": uniform(6).long()}, "start must be a non-empty floating-point tensor of 2 dimensions, got shape .6, 6."),
    ({"start": uniform(6)[:4]}, r"start must be a square matrix of all views of 3 labels' samples, got \(4, 6\)"),
    ({"start": uniform(5)}, "start must be a square matrix .* got .5, 5."),
    ({"start": 2 * torch.eye(6)}, r"start must have entries in \[-1, 1\], got one of size 2"),
    ({"start": (1 + 1e-5) * torch.eye(6)}, "start must have entries .* got one of size 1.00001"),
    ({"start": math.nan * torch.eye(6)}, "start must have entries .* got one of size nan"),
    (
        {"start": normal(6, 6).tanh(), "entries": "tied"},
        "start must be symmetric for tied entries, got entries that differ by",
    ),
    ({"labels": torch.tensor([0.0, 1.0, 2.0])}, "labels must be a non-empty integer tensor of 1 dimensions"),
    ({"labels": torch.tensor([0j, 1.0, 2.0])}, "labels must be a non-empty integer tensor of 1 dimensions"),
    ({"batches": torch.tensor([[False, True]])}, "batches must be a non-empty integer tensor of 2 dimensions"),
    ({"batches": torch.tensor([0, 1])}, "batches must be a non-empty integer tensor of 2 dimensions"),
    ({"batches": torch.tensor([[0, 3]])}, r"batches must hold indices in \[0, 3\), got 0 to 3"),
    ({"learning_rates": [0.1, 0.2]}, "batches must have one row per learning rate, got 1 and 2"),
    ({"learning_rates": [-0.1]}, "learning_rates must be in"),
    ({"temperature": 0.0}, "temperature must be in"),
    ({"entries": "both"}, "entries must be 'free', 'symmetric' or 'tied', got 'both'"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_arguments(change, message):
    with pytest.raises(FastclError, match=message):
        similarity_descent(**GOOD | change)
    with pytest.raises(FastclError, match=r"seed must be in \[0, 4.29497e\+09\), got 4294967296"):
        draw_batches(5, 2, 3, seed=1 << 32)
    with pytest.raises(FastclError, match="batch_size is at most samples without replacement, got 3 of 2"):
        draw_batches(2, 3, 1)
    with pytest.raises(AttributeError, match="has no attribute 'descend'"):
        _ = theory.descend
