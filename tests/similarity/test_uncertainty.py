"""Permutation tests and intervals against plain recomputation, their calibration, seeds, errors."""

import itertools

import pytest
import torch
from reference import TOLERANCE, normal
from scipy.stats import kstest

from fastcl import FastclError, linear_cka, pair_stats
from fastcl.similarity import SIMILARITIES, bootstrap_interval, permutation_test, similarity
from fastcl.similarity.uncertainty import halves, permuted
from fastcl.similarity.uncertainty.bootstrap import bootstrap_intervals, half_samples
from fastcl.similarity.uncertainty.permutation import permutation_tests

CLOSE = TOLERANCE[torch.float64].gradient
NAMES = tuple(SIMILARITIES)


def related(n, dx, dy, seed=0, noise=1.0):
    latent, mix, other = normal(n, 3, seed=seed), normal(3, dx, seed=1), normal(3, dy, seed=2)
    x, y = (noise * normal(n, d, seed=seed + k) for k, d in ((10**6, dx), (2 * 10**6, dy)))
    return latent @ mix + x + 1, latent @ other + y - 2


@pytest.mark.parametrize(("n", "dx", "dy"), [(40, 5, 9), (12, 30, 17), (30, 60, 60)])
@pytest.mark.parametrize("held", [0, 4096])
def test_permuted_similarities_are_those_of_permuted_rows(n, dx, dy, held, monkeypatch):
    monkeypatch.setattr(permuted, "_HELD", held)  # from features, or from Gram matrices where that is less
    monkeypatch.setattr(permuted, "_PRODUCTS", 1)
    x, y = related(n, dx, dy)
    found = permutation_tests(x, y, NAMES, repeats=5, seed=3, k=4)
    generator = torch.Generator().manual_seed(3)
    for r in range(5):
        order = torch.randperm(n, generator=generator)
        for name, test in found.items():
            assert test.null[r].item() == pytest.approx(similarity(x, y[order], name, k=4), abs=CLOSE), name
    for name, test in found.items():
        assert test.value == similarity(x, y, name, k=4) and test.repeats == 5 and test.seed == 3
        assert test.null_mean == pytest.approx(test.null.mean().item())
        assert test.null_quantiles[0.5] == test.null.median().item()
        assert test.p_value == (1 + (test.null >= test.value - 1e-9).sum().item()) / 6


def test_p_values_count_permutations_that_change_nothing():
    """Of the 24 orders of 4 samples, two equal rows leave the similarity alone in every second one."""
    x, y = normal(4, 3), normal(4, 2, seed=1)
    x[1], y[1] = x[0], y[0]
    values = [pair_stats(x, y[list(order)]).cka_debiased for order in itertools.permutations(range(4))]
    exact = sum(value >= values[0] - 1e-9 for value in values) / 24
    found = permutation_test(x, y, repeats=2000)
    assert exact >= 4 / 24 and found.p_value == pytest.approx(exact, abs=0.04)
    assert permutation_test(x, x.clone(), "cka_linear", repeats=200).p_value > 1 / 24


def test_intervals_end_where_the_measure_does():
    found = bootstrap_interval(normal(16, 5), normal(16, 4, seed=1), "mutual_knn", k=1, repeats=20)
    assert found.low == 0 < found.standard_error and found.value < 1.9 * found.standard_error


def test_p_values_are_uniform_without_relation_and_small_with_one():
    for name in ("cka_linear", "rsa_cosine", "mutual_knn", "procrustes"):
        given = dict(repeats=39, k=3)
        p = [permutation_test(normal(16, 4, seed=s), normal(16, 3, seed=s + 500), name, **given).p_value
             for s in range(60)]  # fmt: skip
        assert kstest(p, "uniform").pvalue > 1e-3 and max(p) <= 1, name
        assert permutation_test(*related(60, 4, 3, noise=0.3), name, **given).p_value == 1 / 40
    biased = permutation_test(normal(40, 30), normal(40, 30, seed=1), "cka_linear", repeats=50)
    assert biased.value > 0.3 and biased.p_value > 0.02  # large, but no larger than chance
    assert biased.null_mean == pytest.approx(biased.value, abs=0.1) and "p_value=" in repr(biased)


@pytest.mark.parametrize("few", [0, 10**6])
def test_statistics_of_halves_are_those_of_their_rows(few, monkeypatch):
    monkeypatch.setattr(halves, "_FEW", few)  # from the features of each half, or from tiles
    monkeypatch.setattr(halves, "_TILE", 16)
    monkeypatch.setattr(halves, "_GROUP", 3)
    x, y = related(41, 5, 9)
    chosen = list(half_samples(41, 5, seed=0))
    assert all(half.shape == (20,) and len(set(half.tolist())) == 20 for half in chosen)
    for kernel in ("linear", "cosine", "correlation"):
        for half, stats in zip(chosen, halves.half_stats(x, y, kernel, chosen), strict=True):
            wanted = pair_stats(x[half], y[half], kernel)
            for field in ("cka", "cka_debiased", "rsa", "rho", "r"):
                assert getattr(stats, field) == pytest.approx(getattr(wanted, field), abs=CLOSE), field


@pytest.mark.parametrize("n", [24, 25])
def test_intervals_are_quantiles_about_the_value(n):
    x, y = related(n, 4, 3)
    found = bootstrap_intervals(x, y, NAMES, repeats=20, seed=5, level=0.8, k=4)
    for name, interval in found.items():
        replicates = torch.tensor([similarity(x[h], y[h], name, k=4) for h in half_samples(n, 20, 5)])
        apart = (replicates - replicates.mean()) * (12 / (n - 12)) ** 0.5
        low, high = (interval.value + apart.quantile(q).item() for q in (0.1, 0.9))
        lowest = SIMILARITIES[name].lowest
        assert interval.low == pytest.approx(max(lowest, low), abs=1e-6), name
        assert interval.high == pytest.approx(min(1.0, high), abs=1e-6), name
        assert interval.standard_error == pytest.approx(apart.std().item(), abs=1e-6)
        assert interval.value == similarity(x, y, name, k=4) and (interval.repeats, interval.level) == (20, 0.8)


def test_intervals_cover_and_the_biased_ones_are_not_moved():
    """90 % intervals of 100 data sets, about the mean of 400."""
    names = ("cka_linear", "cka_linear_debiased", "rsa_cosine")
    sets = [related(60, 8, 6, seed=s) for s in range(400)]
    truth = {name: sum(similarity(*given, name) for given in sets) / 400 for name in names}
    hits = dict.fromkeys(names, 0)
    for s, given in enumerate(sets[:100]):
        for name, found in bootstrap_intervals(*given, names, repeats=100, level=0.9, seed=s).items():
            hits[name] += found.low <= truth[name] <= found.high
            assert name != "cka_linear" or found.replicate_mean > found.value  # grows with d / n
    assert all(80 <= count <= 99 for count in hits.values()), hits  # binomial: 90 within 3.3 deviations


def test_the_seed_decides_and_narrow_features_do():
    x, y = related(30, 5, 4)
    for ask in (permutation_test, bootstrap_interval):
        a, b, c = (ask(x, y, "rsa_cosine", repeats=20, seed=seed) for seed in (1, 1, 2))
        assert repr(a) == repr(b) != repr(c)
        narrow = ask(x.float(), y.half(), "cka_cosine", repeats=20)
        assert narrow.value == pytest.approx(pair_stats(x, y, "cosine").cka, abs=1e-3)
    assert permutation_test(x, y).measure == bootstrap_interval(x, y).measure == "cka_linear_debiased"
    assert bootstrap_interval(x, y).value == linear_cka(x, y, debiased=True)


def test_bad_input_is_named():
    x, y = related(12, 4, 3)
    for ask, least in ((permutation_test, 1), (bootstrap_interval, 2)):
        for given, told in (
            ({"measure": "cka_linaer"}, "unknown name 'cka_linaer'; did you mean 'cka_linear'"),
            ({"measure": 3}, "unknown name 3; expected one of: cka_cosine, "),
            ({"repeats": least - 1}, f"repeats must be an integer >= {least}, got {least - 1}"),
            ({"repeats": 1.5}, "got 1.5"),
            ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*32\), got -1"),
            ({"seed": 1 << 64}, r"seed must be an integer in \[0, 2\*\*32\), got 18446744073709551616"),
            ({"measure": "mutual_knn", "k": 12}, r"k must be an integer in \[1, 11\]"),
        ):  # fmt: skip
            with pytest.raises(FastclError, match=told):
                ask(x, y, **given)
        with pytest.raises(FastclError, match="same number of rows"):
            ask(x, y[1:])
        with pytest.raises(FastclError, match="second representation is constant"):
            ask(x, torch.ones(12, 3), "cka_linear")
    for level in (0, 1, "x", True):
        with pytest.raises(FastclError, match=r"level must be a number in \(0, 1\), got"):
            bootstrap_interval(x, y, level=level)
    with pytest.raises(FastclError, match="n >= 8 samples, got n=7"):
        bootstrap_interval(x[:7], y[:7])
    with pytest.raises(FastclError, match=r"half-sample \d+ of 50: .*k must be an integer in \[1, 5\]"):
        bootstrap_interval(x, y, "mutual_knn", k=6, repeats=50)
    rare = torch.zeros(12, 2)
    rare[3] = 1  # constant in every half without sample 3
    with pytest.raises(FastclError, match=r"half-sample \d+ of 50: CKA .*second representation is constant"):
        bootstrap_interval(x, rare, "cka_linear", repeats=50)
