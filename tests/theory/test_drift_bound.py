"""Theorem 1's numbers: against the recurrence in decimals, published settings, and a descent that it must bound."""

import math
from decimal import Decimal, localcontext

import pytest
import torch

from fastcl import FastclError
from fastcl.theory import largest_drift, similarity_coupling_bound

SETTINGS = [
    # batch, temperature, largest class: Delta below 2, above 2, and without a condition
    (4096, 2.0, 0.01),
    (256, 0.5, 0.1),
    (64, 0.1, 0.9),
    (3, 0.05, 1.0),
]


def rates(epochs: int, horizon: int, steps_per_epoch: int) -> list[float]:
    """The published schedule: warm-up of 10 epochs times half a cosine, peak 1.2, constant within an epoch."""
    per_epoch = [1.2 * min(1, (e + 1) / 10) * (1 + math.cos(math.pi * e / horizon)) / 2 for e in range(epochs)]
    return [rate for rate in per_epoch for _ in range(steps_per_epoch)]


@pytest.mark.parametrize("batch, temperature, largest", SETTINGS)
def test_the_recurrence_in_decimals(batch, temperature, largest):
    etas = [0.0, 1e-9, 0.3, 0.0, 2.5, 40.0] * 50 + [6 * temperature**2 * batch]  # the last is 3 / L
    bound = similarity_coupling_bound(etas, batch, temperature, largest, delta=0.05)
    with localcontext() as context:
        context.prec = 60
        tau, b = Decimal(temperature), Decimal(batch)
        eps = ((Decimal(len(etas)) * b / Decimal(0.05)).ln() / (2 * b)).sqrt()
        share = Decimal(largest) + eps
        gap = 2 * (2 / tau).exp() * share / (1 - share) if share < 1 else None
        d, exact = Decimal(0), [Decimal(0)]
        c, convex = Decimal(0), [Decimal(0)]
        mass = gap / (2 + gap) if gap else 1  # x / (1 + x), x = gap / 2
        for eta in map(Decimal, etas):
            c = max(1, eta / (2 * tau**2 * b) - 1) * c + eta * Decimal(2).sqrt() * mass / (tau * b.sqrt())
            convex.append(c)
            d = (1 + eta / (2 * tau**2 * b)) * d + eta * (min(gap, 2) if gap else 2) / (tau * b.sqrt())
            exact.append(d)
        total = sum(map(Decimal, etas))
        printed = (total / (2 * tau**2 * b)).exp() * total / (tau * b.sqrt()) * gap if gap else None
        assert bound.epsilon == pytest.approx(float(eps), rel=1e-14)
        assert bound.log10_recurrence[:2] == (-math.inf, -math.inf)
        wanted = [float(value.log10()) for value in exact[2:]]
        assert bound.log10_recurrence[2:] == pytest.approx(wanted, rel=1e-12, abs=1e-12)
        assert bound.log10_convex[:2] == (-math.inf, -math.inf)
        wanted = [float(value.log10()) for value in convex[2:]]
        assert bound.log10_convex[2:] == pytest.approx(wanted, rel=1e-12, abs=1e-12)
        assert bound.log10_gap == (pytest.approx(float(gap.log10()), rel=1e-13) if gap else math.inf)
        assert bound.log10_printed == (pytest.approx(float(printed.log10()), rel=1e-13) if gap else math.inf)
    assert bound.log10_recurrence[-1] <= bound.log10_printed
    assert all(a <= b for a, b in zip(bound.log10_convex, bound.log10_recurrence, strict=True))
    assert bound.log10 == bound.log10_recurrence and bound.vacuous_from is None


def test_published_settings():
    # CIFAR-100, B = 1024, temperature 0.1, 300 of 1201 epochs: 10^355. Entries of 2 at most give 10^335.
    cifar = rates(300, 1201, 50_000 // 1024)
    assert sum(cifar) == pytest.approx(16_165, abs=1)
    bound = similarity_coupling_bound(cifar, 1024, 0.1, 0.01, n=50_000)
    assert bound.epsilon == pytest.approx(0.102, abs=5e-4) and 10**bound.log10_gap == pytest.approx(1.2e8, rel=0.02)
    assert round(bound.log10_printed) == 355 and round(bound.log10_recurrence[-1]) == 335
    assert 0 < bound.vacuous_from < 1000 and bound.log10[-1] == bound.log10_largest
    # Without the exponential it says something: a tenth of the largest drift.
    assert 10 ** (bound.log10_convex[-1] - bound.log10_largest) == pytest.approx(0.101, abs=5e-4)
    # ImageNet-1k, temperature 0.1, 100 of 301 epochs: 10^2783, which no float64 holds.
    imagenet = similarity_coupling_bound(rates(100, 301, 1_281_167 // 1024), 1024, 0.1, 0.001)
    assert round(imagenet.log10_printed) == 2783 and 2000 < imagenet.log10_recurrence[-1] < 2783
    # Temperature 1: 3e4, below the largest drift of 50,000 images.
    warm = similarity_coupling_bound([8438 / 14_400] * 14_400, 1024, 1.0, 0.01, n=50_000)
    assert 10**warm.log10_gap == pytest.approx(1.86, abs=0.01)
    assert 10**warm.log10_printed == pytest.approx(3.0e4, rel=0.01)
    assert warm.vacuous_from is None and warm.log10[-1] < warm.log10_printed < warm.log10_largest


def _bound(**changes) -> list[float]:
    arguments = {"learning_rates": [0.1, 0.2, 0.3], "batch_size": 512, "temperature": 2.0, "largest_class": 0.05}
    return list(similarity_coupling_bound(**arguments | changes).log10[1:])


@pytest.mark.parametrize("less, more", [
    ({"learning_rates": [0.1, 0.2, 0.3]}, {"learning_rates": [0.1, 0.2, 0.4]}),
    ({"batch_size": 1024}, {}),
    ({}, {"temperature": 1.5}),
    ({}, {"largest_class": 0.06}),
    ({"delta": 0.1}, {"delta": 0.001}),
])  # fmt: skip
def test_the_bound_moves_as_it_should(less, more):
    low, high = _bound(**less), _bound(**more)
    assert low < high and all(a <= b for a, b in zip(low, high, strict=True))
    assert low == sorted(low) and high == sorted(high)


def test_beyond_its_condition_two_softmaxes_still_differ_by_two_at_most():
    # B = 4: eps is 0.97, so that the class frequency 0.5 fulfils no condition; one step of rate 0.1 moves 0.1 * 2 / 2.
    bound = similarity_coupling_bound([0.1], 4, 1.0, 0.5)
    assert bound.log10_gap == bound.log10_printed == math.inf
    assert bound.log10[1] == pytest.approx(math.log10(0.1))
    assert similarity_coupling_bound([0.0, 0.0], 4, 1.0, 0.5).log10_printed == -math.inf


def test_the_bound_is_capped_and_says_from_where_on():
    bound = similarity_coupling_bound([1.0] * 400, 4, 0.1, 0.5, n=8)
    start = bound.vacuous_from
    assert start > 0 and bound.log10[start:] == (math.log10(largest_drift(8)),) * (401 - start)
    assert bound.log10[:start] == bound.log10_recurrence[:start] and bound.log10[start - 1] < bound.log10[start]


@pytest.mark.parametrize("n", [2, 5, 8])
def test_no_drift_is_larger_than_the_largest(n):
    signs = torch.tensor([1.0, -1.0]).repeat(n)[:n].double()
    extreme = (torch.ones(n, n) - torch.outer(signs, signs)).norm().item()
    assert extreme <= largest_drift(n) * (1 + 1e-15)
    assert (extreme == pytest.approx(largest_drift(n))) == (n % 2 == 0)  # attained
    numbers = torch.Generator().manual_seed(n)
    for width in (1, 2, n):
        for _ in range(50):
            rows = torch.randn(2, n, width, generator=numbers, dtype=torch.float64)
            rows = rows / rows.norm(dim=2, keepdim=True)
            k, other = rows @ rows.mT
            assert (k - other).norm() <= largest_drift(n) * (1 + 1e-15)


def _gradient(s: torch.Tensor, views: torch.Tensor, negatives: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of the mean over anchors of -s_iv / tau + log sum over negatives of exp(s_ij / tau), entry by entry."""
    p = (s / temperature).masked_fill(~negatives, -math.inf).softmax(1)
    return (p - views.double()) / (temperature * len(s))


@pytest.mark.parametrize("temperature, rate, adverse", [(2.0, 5.0, False), (0.5, 1.0, False), (0.1, 0.02, True)])
def test_similarity_descent_stays_below_the_bound(temperature, rate, adverse):
    """CL and NSCL descend on their similarities from one start, all samples in the batch. In the adverse one peers
    have similarity 1 and all others -1: CL's softmax lies on the peers, and the bound is within a factor of 3."""
    samples, classes, steps = 64, 32, 60
    sample, label = torch.arange(samples).repeat(2), torch.arange(samples).remainder(classes).repeat(2)
    views = (sample[:, None] == sample) & ~torch.eye(2 * samples).bool()
    others, peers = sample[:, None] != sample, label[:, None] == label
    start = torch.randn(2 * samples, 2 * samples, generator=torch.Generator().manual_seed(0)).double().tanh()
    start = peers * 2.0 - 1.0 if adverse else start
    cl, nscl, drift = start.double(), start.double(), [0.0]
    for _ in range(steps):
        cl = cl - rate * _gradient(cl, views, others, temperature)
        nscl = nscl - rate * _gradient(nscl, views, ~peers, temperature)
        drift.append((cl - nscl).norm().item())
    bound = similarity_coupling_bound([rate] * steps, 2 * samples, temperature, 1 / classes)
    assert all(a < b for a, b in zip(drift, drift[1:], strict=False))
    for line in (bound.log10, bound.log10_convex):
        assert all(d == 0 or math.log10(d) <= b for d, b in zip(drift, line, strict=True))
    assert not adverse or drift[1] > 10 ** bound.log10[1] / 3


def test_views_are_anchors_but_not_samples():
    one, two = (similarity_coupling_bound([0.1] * 5, 64, 0.5, 0.1, views=views) for views in (1, 2))
    assert one.epsilon == two.epsilon and one.log10_gap == two.log10_gap
    assert one.log10_recurrence[1] - two.log10_recurrence[1] == pytest.approx(math.log10(2) / 2)
    assert all(a > b for a, b in zip(one.log10_convex[1:], two.log10_convex[1:], strict=True))


BAD = [
    ({"learning_rates": []}, "steps must be an integer >= 1, .* got 0"),
    ({"learning_rates": [0.1, -0.1]}, r"learning_rates must be in \[0, 1e\+30\], got -0.1 at step 1"),
    ({"learning_rates": [math.nan]}, "learning_rates .* got nan at step 0"),
    ({"learning_rates": [math.inf]}, "learning_rates .* got inf at step 0"),
    ({"learning_rates": [None]}, "learning_rates .* got None at step 0"),
    ({"batch_size": 0}, "batch_size must be an integer >= 1, .* got 0"),
    ({"batch_size": 2.5}, "batch_size .* got 2.5"),
    ({"batch_size": True}, "batch_size .* got True"),
    ({"temperature": 0.0}, r"temperature must be in \(1e-30, inf\), got 0.0"),
    ({"temperature": math.nan}, "temperature .* got nan"),
    ({"temperature": 10**400}, "temperature .* got 1000"),
    ({"largest_class": 10**400}, "largest_class .* got 1000"),
    ({"largest_class": 0.0}, r"largest_class must be in \(0, 1\], got 0.0"),
    ({"largest_class": 1.5}, "largest_class .* got 1.5"),
    ({"largest_class": None}, "largest_class .* got None"),
    ({"delta": 1.0}, r"delta must be in \(0, 1\), got 1.0"),
    ({"n": 1}, "n must be an integer >= 2, .* got 1"),
    ({"views": 0}, "views must be an integer >= 1, .* got 0"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_arguments(change, message):
    arguments = {"learning_rates": [0.1], "batch_size": 8, "temperature": 0.5, "largest_class": 0.1}
    with pytest.raises(FastclError, match=message):
        similarity_coupling_bound(**arguments | change)


def test_extreme_arguments_stay_numbers():
    bound = similarity_coupling_bound([1e30] * 3, 1, 1e-29, 1.0, n=2)
    assert all(value == value for value in bound.log10_recurrence) and bound.log10_recurrence[-1] > 100
    assert bound.log10[1:] == (math.log10(largest_drift(2)),) * 3
