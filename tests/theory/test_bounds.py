"""The other bounds: against the package's losses and measures, decimals, and examples that reach or break them."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from reference import TOLERANCE, normal

import fastcl
from fastcl import FastclError
from fastcl.theory import (
    cka_coupling_bound,
    few_shot_bound,
    loss_gap_bound,
    parameter_divergence_bound,
    rsa_coupling_bound,
    sampling_error,
    softmax_gap_bound,
)

CLOSE = TOLERANCE[torch.float64].loss
BATCHES = ([2, 2], [5, 1], [3, 3, 1, 1, 0, 2], [1] * 6, [30, 1, 1], [7])  # samples of each class


def stats_of(counts: list[int], kind: str, temperature: float) -> fastcl.RowStats:
    """Statistics of both views of a batch: random rows, all equal rows, or classes at the ends of one line."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    z = {
        "random": normal(2 * len(labels), 5, seed=sum(counts)),
        "equal": torch.ones(2 * len(labels), 3, dtype=torch.float64),
        "line": torch.where(labels == int(torch.tensor(counts).argmax()), 1.0, -1.0).double().repeat(2)[:, None],
    }[kind]
    sample = torch.arange(len(labels)).repeat(2)
    return fastcl.row_stats(z, sample=sample, labels=labels.repeat(2), temperature=temperature)


@pytest.mark.parametrize("counts", BATCHES, ids=str)
@pytest.mark.parametrize("kind", ("random", "equal", "line"))
@pytest.mark.parametrize("temperature", (0.05, 0.5, 5.0))
def test_the_loss_gap_of_the_losses_is_below_its_bound(counts, kind, temperature):
    stats = stats_of(counts, kind, temperature)
    for positive, names in ((False, ("dcl", "nscl")), (True, ("ntxent", "nscl_with_positive"))):
        bound = loss_gap_bound(counts, temperature, positive_in_denominator=positive)
        cl, nscl = (fastcl.OBJECTIVES[name](stats).mean().item() for name in names)
        if len(counts) == 1 and not positive:
            assert bound.mean == bound.largest == bound.printed == math.inf and bound.vacuous
            continue
        assert -CLOSE <= cl - nscl <= bound.mean * (1 + CLOSE) + CLOSE
        assert bound.mean <= bound.largest * (1 + CLOSE) and bound.largest <= bound.printed
        if kind == "equal":
            assert cl == pytest.approx(bound.uninformed, rel=1e-9)
        if kind == "line" and len([n for n in counts if n]) == 2 and not positive:
            assert cl - nscl == pytest.approx(bound.mean, rel=1e-9)  # peers at 1, others at -1: attained
    assert 2 * fastcl.same_class_mass(stats).max() <= softmax_gap_bound(counts, temperature) + CLOSE


def test_the_loss_gap_with_positives_counts_the_other_views():
    found = loss_gap_bound([3, 1], 0.5, views=3, positive_in_denominator=True)
    largest = math.log1p(math.exp(4) * 6 / (3 + 2))  # an anchor's 6 peers against 3 others and 2 views of its own
    assert (found.largest, found.mean) == pytest.approx((largest, 3 / 4 * largest), rel=1e-14)
    assert found.uninformed == pytest.approx(math.log(11), rel=1e-15)


def test_published_loss_gaps():
    # Balanced classes of many samples, temperature 1: log(1 + e^2 / (C - 1)).
    for classes, wanted in ((2, 2.127), (5, 1.047), (10, 0.600), (100, 0.0719), (1000, 0.00737)):
        bound = loss_gap_bound([10_000] * classes, 1.0)
        assert bound.printed == pytest.approx(wanted, rel=2e-3)
        assert bound.mean == pytest.approx(bound.largest) and bound.mean == pytest.approx(bound.printed, rel=2e-4)
    # At equal similarities the gap is about log(C / (C - 1)), which a large temperature gives.
    assert loss_gap_bound([5000] * 10, 1e9).mean == pytest.approx(math.log(10 / 9), rel=1e-3)
    low = loss_gap_bound([2, 2], 1e-29)
    assert low.mean == pytest.approx(2e29) and low.vacuous and not loss_gap_bound([1, 1, 1], 1e-29).mean


def test_the_softmax_gap():
    assert softmax_gap_bound([1, 1, 1], 0.1) == 0 and softmax_gap_bound([4], 0.1) == 2
    x = math.exp(2 / 0.7) * 4 / 6
    assert softmax_gap_bound([5, 3, 3, 0], 0.7) == pytest.approx(2 * x / (1 + x), rel=CLOSE)
    assert softmax_gap_bound([2, 10**6], 1e9) == pytest.approx(2 * (1 - 2 / (10**6 + 1)), rel=1e-6)


def test_two_views_of_a_sample_do_not_count_twice_in_epsilon():
    """10,000 batches of 32 samples of two classes: the chance that some class exceeds 1/2 + eps, exactly."""

    def chance(epsilon: float) -> float:
        least = math.floor(32 * (0.5 + epsilon)) + 1
        tail = 2 * sum(math.comb(32, k) for k in range(least, 33)) / 2**32
        return 1 - (1 - tail) ** 10_000

    assert chance(sampling_error(10_000, 32, 0.01)) <= 0.01
    assert chance(sampling_error(10_000, 64, 0.01)) > 0.1  # with 64 anchors of 32 samples


def test_the_parameter_recurrence_in_decimals():
    etas = [0.0, 0.3, 2.5, 1e-9] * 20
    bound = parameter_divergence_bound(etas, 512, 0.9, 0.02, smoothness=3.0, similarity_gradient=0.7)
    with localcontext() as context:
        context.prec = 60
        gap, d = Decimal(min(10**bound.log10_gap, 2)), Decimal(0)
        for eta in map(Decimal, etas):
            d = (1 + 3 * eta) * d + eta * Decimal(0.7) * gap / Decimal(0.9)
        assert bound.log10_recurrence[-1] == pytest.approx(float(d.log10()), rel=1e-12)
    growth = 0.7 / (3 * 0.9) * math.expm1(3 * sum(etas))
    assert bound.log10_printed == pytest.approx(math.log10(growth) + bound.log10_gap)
    assert bound.log10_summary == pytest.approx(math.log10(growth * 0.02) + 2 / 0.9 / math.log(10))
    assert bound.log10_recurrence[-1] <= bound.log10_printed and bound.vacuous_from is None
    capped = parameter_divergence_bound(etas, 512, 0.9, 0.02, 3.0, 0.7, largest=5.0)
    assert capped.log10[-1] == math.log10(5) and 0 < capped.vacuous_from < 80
    still = parameter_divergence_bound([0.0], 512, 0.9, 0.02, 3.0, 0.7)
    assert still.log10_printed == still.log10_recurrence[-1] == still.log10_summary == -math.inf


def test_one_weight_breaks_the_summary_of_theorem_2_and_not_the_bound():
    """s_ij = w a_ij, a = 1 within a class and -1 between: at w = 1 the weight moves by 2 m / tau, and e^{2/tau} / C is
    less than 2 m. One step of SGD on all samples; beta = 1 / tau^2, G = 1."""
    classes, each, tau, eta = 16, 64, 4.0, 1e-3
    label = torch.arange(classes * each) % classes
    a = torch.where(label[:, None] == label, 1.0, -1.0).double()
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    peers = (label[:, None] == label).double().fill_diagonal_(0)
    others = (label[:, None] != label).double()
    for k, mask in enumerate((peers + others, others)):
        ((w[k] * a / tau).exp() * mask).sum(1).log().mean().backward()
    moved = eta * (w.grad[0] - w.grad[1]).abs().item()
    bound = parameter_divergence_bound([eta], classes * each, tau, 1 / classes, 1 / tau**2, 1.0)
    assert 10**bound.log10_summary < moved < 10 ** bound.log10_recurrence[1]


def test_corollaries_beside_the_measured_certificates():
    x = normal(40, 6, seed=1)
    stats = fastcl.pair_stats(x, x + 0.05 * normal(40, 6, seed=2), kernel="cosine")
    drift = math.log10(stats.drift)
    k = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T
    centred = k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()
    cka = cka_coupling_bound(drift, centred.norm().item())
    rsa = rsa_coupling_bound(drift, 40, k[~torch.eye(40).bool()].std(correction=0).item())
    # The whole drift is no less than the centred one, and equal to that off the diagonal.
    assert 0 < cka.printed <= stats.cka_bound and cka.printed < cka.tight <= stats.cka_bound_tight <= stats.cka
    assert rsa.printed == pytest.approx(stats.rsa_bound) and rsa.tight == pytest.approx(stats.rsa_bound_tight)
    assert not cka.vacuous and cka_coupling_bound(drift + 2, centred.norm().item()).vacuous
    assert (cka_coupling_bound(9.0, 1.0).printed, rsa_coupling_bound(9.0, 3, 1.0).tight) == (0.0, -1.0)
    assert cka_coupling_bound(-math.inf, 1.0).printed == 1.0


def test_the_second_corollary_says_nothing_beyond_one():
    """Four rows on a circle: RSA is -1, the printed bound -0.42."""
    angles = torch.tensor([[0.0, 0.0, 90.0, 90.0], [0.0, 180.0, 90.0, 270.0]], dtype=torch.float64).deg2rad()
    k, other = torch.stack([angles.cos(), angles.sin()], dim=2)
    stats = fastcl.pair_stats(k, other, kernel="cosine")
    assert stats.rsa == pytest.approx(-1) and (1 - stats.r) / (1 + stats.r) > -0.43
    assert stats.rsa_bound == stats.rsa_bound_tight == -1


def test_few_shot():
    bound = few_shot_bound(0.4, 0.01, 100, 5, a=16)
    c = 2 + 2**1.5 / 100
    spread = 0.2 * (math.sqrt(0.4) + 0.4) + 0.004
    assert bound.error == pytest.approx(4 * (0.01 / (0.5 - c / 16) ** 2 + 4 * spread))
    assert bound.printed == pytest.approx(4 * (0.08 + 0.8 * (math.sqrt(0.4) + 0.4) + 4 / 100 * 0.4))
    assert bound.error < bound.printed and bound.chance == 0.8 and bound.vacuous
    assert few_shot_bound(0.4, 0.01, 100, 5, a=16, root_cdnv=0.5).error < bound.error
    assert few_shot_bound(0.0, 0.0, 10, 2).error == 0 and few_shot_bound(1e-4, 0.0, 10, 2).a == 5


@pytest.mark.parametrize("v, along, shots", [(0.4, 0.01, 100), (0.4, 0.4, 10_000), (1e-4, 1e-5, 10), (30.0, 3.0, 10**9),
                                             (0.5, 0.5, 10), (1e3, 1e-9, 10), (1e-8, 1e-8, 10)])  # fmt: skip
def test_the_best_a_is_the_best(v, along, shots):
    best = few_shot_bound(v, along, shots, 2)
    grid = [5 * 1.01**k for k in range(3000)]
    assert best.error <= min(few_shot_bound(v, along, shots, 2, a=a).error for a in grid) * (1 + CLOSE)


BAD = [
    (lambda: loss_gap_bound([1], 1.0), "class_counts must have a sum of at least 2, got 1"),
    (lambda: loss_gap_bound([3, -1], 1.0), r"class_counts must be integers in \[0, 1e\+30\], got -1 at 1"),
    (lambda: loss_gap_bound([3, 10**400], 1.0), r"class_counts must be integers in \[0, 1e\+30\], got 1000"),
    (lambda: loss_gap_bound(3, 1.0), "class_counts must be a list of numbers, got 3"),
    (lambda: loss_gap_bound([3, 2.0], 1.0), "class_counts .* got 2.0 at 1"),
    (lambda: loss_gap_bound([3, 3], 0.0), "temperature must be in"),
    (lambda: loss_gap_bound([3, 3], 1.0, views=0), "views must be an integer >= 1, .* got 0"),
    (lambda: softmax_gap_bound([], 1.0), "class_counts must have a sum of at least 2, got 0"),
    (lambda: parameter_divergence_bound([1.0], 4, 1.0, 0.5, 0.0, 1.0), "smoothness must be in .* got 0.0"),
    (lambda: parameter_divergence_bound([1.0], 4, 1.0, 0.5, 1.0, math.inf), "similarity_gradient .* got inf"),
    (lambda: parameter_divergence_bound([1.0], 4, 1.0, 0.5, 1.0, 1.0, largest=0.0), "largest must be in .* got 0.0"),
    (lambda: parameter_divergence_bound([], 4, 1.0, 0.5, 1.0, 1.0), "steps must be an integer >= 1, .* got 0"),
    (lambda: parameter_divergence_bound(0.1, 4, 1.0, 0.5, 1.0, 1.0), "learning_rates must be a list of .* got 0.1"),
    (lambda: sampling_error(1, 10**31), r"batch_size must be an integer >= 1, at most 1e\+30, got 1000"),
    (lambda: cka_coupling_bound(1.0, 0.0), "centred_norm must be in .* got 0.0"),
    (lambda: cka_coupling_bound(math.nan, 1.0), "log10_drift must be a number, got nan"),
    (lambda: cka_coupling_bound(1.0, 10**400), "centred_norm must be .* got 1000"),
    (lambda: rsa_coupling_bound(1.0, 2, 1.0), "n must be an integer >= 3, .* got 2"),
    (lambda: rsa_coupling_bound(1.0, 3, -1.0), "spread must be in .* got -1.0"),
    (lambda: few_shot_bound(-1.0, 0.0, 10, 2), "cdnv must be in .* got -1.0"),
    (lambda: few_shot_bound(1.0, 2.0, 10, 2), "directional_cdnv is at most cdnv, got 2.0 and 1.0"),
    (lambda: few_shot_bound(1.0, 0.5, 9, 2), "shots must be an integer >= 10, .* got 9"),
    (lambda: few_shot_bound(1.0, 0.5, 10, 1), "ways must be an integer >= 2, .* got 1"),
    (lambda: few_shot_bound(1.0, 0.5, 10, 2, a=4.9), "a must be in .* got 4.9"),
    (lambda: few_shot_bound(1.0, 0.5, 10, 2, root_cdnv=1.1), "root_cdnv must be in .* got 1.1"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", BAD)
def test_bad_numbers(call, message):
    with pytest.raises(FastclError, match=message):
        call()
