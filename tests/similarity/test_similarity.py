"""Pair statistics against n x n matrices written out plainly, in float64 and, where that cancels, in 50 digits."""

from decimal import Context, Decimal, localcontext
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcl.similarity import PairAccumulator, PairStats, linear_cka, pair_stats, rsa

MEASURES = ("cka", "cka_debiased", "rsa", "drift", "drift_centered")


def gram(x, kernel, number):
    """n x n Gram matrix of float64 or Decimal rows; a zero row keeps cosine 0 with all."""
    x = np.array([[number(value) for value in row] for row in x.double().tolist()])
    if kernel == "correlation":
        x = x - x.sum(axis=1, keepdims=True) / number(x.shape[1])
    if kernel in ("cosine", "correlation"):
        squares = (x * x).sum(axis=1, keepdims=True)
        x = x / np.where(squares == number(0), number(1), squares) ** number("0.5")
    return x @ x.T


def reference(x, y, kernel, number=float):
    """The measures by their definitions: centring matrix, HSIC_1 with 1'K~L~1, corrcoef over the lower triangle."""
    k, length = gram(x, kernel, number), len(x)
    l = gram(y, kernel, number)  # noqa: E741
    one = number(1)
    h = np.array([[one * (i == j) - one / length for j in range(length)] for i in range(length)])
    kc, lc = h @ k @ h, h @ l @ h
    off = np.array([[one * (i != j) for j in range(length)] for i in range(length)])

    def hsic1(a, b):
        a, b, ones, n = a * off, b * off, np.array([one] * length), length
        trace = (a * b).sum()
        product = ones @ a @ ones * (ones @ b @ ones) / ((n - 1) * (n - 2))
        return (trace + product - 2 * (ones @ a @ (b @ ones)) / (n - 2)) / (n * (n - 3))

    def ratio(a, b, c):
        return float(a) / float(b * c) ** 0.5

    lower = np.tril_indices(length, -1)
    rdms = [(one - matrix[lower]) - (one - matrix[lower]).mean() for matrix in (k, l)]
    return {
        "cka": ratio((kc * lc).sum(), (kc * kc).sum(), (lc * lc).sum()),
        "cka_debiased": ratio(hsic1(k, l), hsic1(k, k), hsic1(l, l)),
        "rsa": np.corrcoef(*[rdm.astype(np.float64) for rdm in rdms])[0, 1],
        "drift": float(((k - l) ** 2).sum()) ** 0.5,
        "drift_centered": float(((kc - lc) ** 2).sum()) ** 0.5,
    }


def check(stats: PairStats, expected: dict[str, float], rel: float) -> None:
    for measure in MEASURES:
        assert getattr(stats, measure) == pytest.approx(expected[measure], rel=rel, abs=rel), measure


def features(n, dx, dy, seed=0, shared=2):
    """Two representations with `shared` latent directions in common, so that no measure sits at 0 or 1."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, shared, generator=g, dtype=torch.float64)
    x, y = (
        latent @ torch.randn(shared, d, generator=g, dtype=torch.float64)
        + torch.randn(n, d, generator=g, dtype=torch.float64)
        for d in (dx, dy)
    )
    return x, y


@pytest.mark.parametrize("kernel", ["linear", "cosine", "correlation"])
@pytest.mark.parametrize("route", ["features", "tiles"])
@pytest.mark.parametrize(("n", "dx", "dy"), [(40, 5, 9), (12, 30, 17), (64, 64, 64), (4, 4, 3), (60, 300, 530)])
def test_measures_equal_their_definitions(kernel, route, n, dx, dy):
    x, y = features(n, dx, dy)
    check(pair_stats(x, y, kernel, route=route), reference(x, y, kernel), rel=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(5, 24),
    dx=st.integers(3, 14),
    dy=st.integers(3, 14),
    seed=st.integers(0, 2**31),
    kernel=st.sampled_from(["linear", "cosine", "correlation"]),
    route=st.sampled_from(["features", "tiles"]),
    scale=st.sampled_from([1e-12, 1.0, 1e9]),
)
def test_measures_of_any_shape_and_scale(n, dx, dy, seed, kernel, route, scale):
    x, y = features(n, dx, dy, seed)
    stats, expected = pair_stats(scale * x, scale * y, kernel, route=route), reference(x, y, kernel)
    unit = scale**2 if kernel == "linear" else 1.0
    for measure in MEASURES:
        value = getattr(stats, measure) / (unit if "drift" in measure else 1.0)
        assert value == pytest.approx(expected[measure], rel=1e-8, abs=1e-8), measure


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("route", ["features", "tiles"])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_narrow_features_are_multiplied_in_float32_and_summed_in_float64(dtype, route, mean):
    x, y = (z.to(dtype) for z in features(50, 8, 12))
    x = x + mean if dtype == torch.float32 else x  # the narrower ones have no digits left at 100
    for kernel in ("linear", "cosine", "correlation"):
        with localcontext(Context(prec=50)):
            expected = reference(x, y, kernel, Decimal if mean else float)
        check(pair_stats(x, y, kernel, route=route), expected, rel=2e-6)
        check(pair_stats(x, y.double(), kernel, route=route), expected, rel=1e-10)


@pytest.mark.parametrize("route", ["features", "tiles"])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_float32_features_whose_squares_float32_cannot_hold(route, scale):
    x, y = (z.float() for z in features(30, 5, 6))
    scaled = (scale * x.double()).float()
    stats, expected = pair_stats(scaled, y, route=route), reference(scaled.double() / scale, y, "linear")
    for measure in ("cka", "cka_debiased", "rsa"):
        assert getattr(stats, measure) == pytest.approx(expected[measure], rel=2e-6), measure


@pytest.mark.parametrize("mean", [100.0, 1e3])
@pytest.mark.parametrize("kernel", ["linear", "cosine", "correlation"])
@pytest.mark.parametrize("route", ["features", "tiles"])
def test_a_mean_far_from_zero_does_not_cancel(kernel, route, mean):
    x, y = features(24, 10, 7)
    x, y = x + mean, y - 0.7 * mean
    with localcontext(Context(prec=50)):
        expected = reference(x, y, kernel, Decimal)
    whole = pair_stats(x, y, kernel, route=route)
    assert whole.cka == pytest.approx(expected["cka"], rel=1e-9)
    assert whole.cka_debiased == pytest.approx(expected["cka_debiased"], rel=1e-9)
    assert whole.rsa == pytest.approx(expected["rsa"], rel=1e-9)
    assert whole.drift == pytest.approx(expected["drift"], rel=1e-9)
    assert whole.drift_centered == pytest.approx(expected["drift_centered"], rel=1e-9)


def test_rows_that_are_constant_but_for_rounding_have_no_correlation():
    x, y = features(20, 7, 5)
    rounded, zero = x.clone(), x.clone()
    rounded[3], zero[3] = 0.1, 0.0  # the mean of seven times 0.1 is not 0.1
    assert (rounded[3] - rounded[3].mean()).any()
    found, expected = (pair_stats(z, y, "correlation") for z in (rounded, zero))
    for measure in ("rsa", "drift"):
        assert getattr(found, measure) == pytest.approx(getattr(expected, measure), rel=1e-12), measure


def test_an_outlier_as_the_first_sample_costs_no_digits():
    x, y = features(30, 6, 6)
    x[0] += 1e3
    for kernel in ("linear", "cosine"):
        with localcontext(Context(prec=50)):
            expected = reference(x, y, kernel, Decimal)
        check(pair_stats(x, y, kernel), expected, rel=1e-9)


def test_all_pairs_of_several_models_come_from_one_pass():
    x, y = features(33, 5, 8)
    models = {"cl": x, "nscl": x @ torch.randn(5, 5, dtype=torch.float64), "scl": y, "ce": y.square()}
    accumulator = PairAccumulator(list(models))
    for start in range(0, 33, 10):
        accumulator.update({name: z[start : start + 10] for name, z in models.items()})
    results = accumulator.compute()
    assert list(results) == list(combinations(models, 2))
    for (a, b), result in results.pairs.items():
        check(result.linear, reference(models[a], models[b], "linear"), rel=1e-9)
        check(result.cosine, reference(models[a], models[b], "cosine"), rel=1e-9)
        check(result.correlation, reference(models[a], models[b], "correlation"), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(5, 300),
    d=st.integers(2, 80),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    batch=st.integers(1, 64),
)
def test_twins_are_exactly_one_and_exactly_zero_apart(n, d, seed, dtype, batch):
    x = features(n, d, 2, seed)[0].to(dtype) + 3.0
    accumulator = PairAccumulator(["cl", "nscl", "other"])
    copy = x.mT.contiguous().mT  # equal values, another memory layout
    for i in range(0, n, batch):
        accumulator.update({"cl": x[i : i + batch], "nscl": copy[i : i + batch], "other": x[i : i + batch, :2]})
    result = accumulator.compute()["cl", "nscl"]
    tiles = [pair_stats(x, copy, kernel, route="tiles") for kernel in ("linear", "cosine", "rbf")]
    for stats in (result.linear, result.cosine, *tiles):
        assert stats.full.kl == stats.full.kk == stats.full.ll
        assert (stats.cka, stats.cka_debiased, stats.rsa) == (1.0, 1.0, 1.0)
        assert (stats.drift, stats.drift_centered, stats.rho, stats.r) == (0.0, 0.0, 0.0, 0.0)


def test_invariances():
    x, y = features(60, 9, 7)
    g = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(9, 9, generator=g, dtype=torch.float64))[0]
    order = torch.randperm(60, generator=g)
    assert linear_cka(x, x @ q * 3.5) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(x, x @ q, debiased=True) == pytest.approx(1.0, abs=1e-12)
    assert rsa(x, x @ q * 3.5) == pytest.approx(1.0, abs=1e-12)
    moved = {"orthogonal": (x @ q, y), "scale": (1e-3 * x, 40 * y), "order": (x[order], y[order]), "swap": (y, x)}
    for name, (a, b) in moved.items():
        for measure in (linear_cka, lambda u, v: linear_cka(u, v, debiased=True), rsa):
            assert measure(a, b) == pytest.approx(measure(x, y), abs=1e-12), name
    assert linear_cka(x + 5.0, y - 9.0) == pytest.approx(linear_cka(x, y), abs=1e-12)
    scales = torch.rand(60, 1, generator=g, dtype=torch.float64) + 0.1
    assert rsa(x * scales, y) == pytest.approx(rsa(x, y), abs=1e-12)


def test_drift_of_equal_gram_matrices_is_zero_up_to_its_resolution():
    for seed in range(30):
        x, _ = features(20, 6, 6, seed)
        q = torch.linalg.qr(features(6, 6, 6, seed)[0])[0]
        stats = pair_stats(x, x @ q)
        k = x @ x.T
        resolution = 1e-7 * (k - k.mean()).norm().item()
        assert 0 <= stats.drift <= resolution and 0 <= stats.drift_centered <= resolution


def test_biased_cka_of_independent_features_is_large_and_debiased_is_not():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(128, 512, generator=g), torch.randn(128, 512, generator=g)
    assert linear_cka(x, y) == pytest.approx(0.80, abs=0.01)
    assert linear_cka(x, y, debiased=True) == pytest.approx(0.0, abs=0.02)
    assert abs(rsa(x, y)) < 0.03


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), noise=st.floats(1e-3, 3.0), kernel=st.sampled_from(["linear", "cosine"]))
def test_certificates_hold(seed, noise, kernel):
    x, y = features(20, 6, 6, seed)
    y = x + noise * y
    stats, k, other = pair_stats(x, y, kernel), gram(x, kernel, float), gram(y, kernel, float)
    h = np.eye(20) - 1 / 20
    lower = np.tril_indices(20, -1)
    assert stats.rho == pytest.approx(np.linalg.norm(h @ (k - other) @ h) / np.linalg.norm(h @ k @ h), rel=1e-6)
    spread = np.sqrt(len(lower[0])) * np.std(k[lower])
    assert stats.r == pytest.approx(np.linalg.norm(k[lower] - other[lower]) / spread, rel=1e-6)
    rho, r = stats.rho, stats.r
    assert stats.cka_bound == pytest.approx((1 - rho) / (1 + rho) if rho < 1 else 0.0)
    assert stats.cka_bound_tight == pytest.approx((1 - rho**2) ** 0.5 if rho < 1 else 0.0)
    assert stats.rsa_bound == pytest.approx((1 - r) / (1 + r) if r < 1 else -1.0)
    assert stats.rsa_bound_tight == pytest.approx((1 - r**2) ** 0.5 if r < 1 else -1.0)
    assert stats.cka >= stats.cka_bound_tight - 1e-9 and stats.cka_bound_tight >= stats.cka_bound
    assert stats.rsa >= stats.rsa_bound_tight - 1e-9 and stats.rsa_bound_tight >= stats.rsa_bound


def test_the_tight_certificate_is_met_by_a_difference_at_a_right_angle():
    # HLH = K sin^2 + ..., chosen so that HKH - HLH stands at a right angle on HLH: CKA is the cosine that rho allows.
    one, two = torch.zeros(8, 1, dtype=torch.float64), torch.zeros(8, 1, dtype=torch.float64)
    one[:2, 0], two[2:4, 0] = torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0])
    x = torch.cat([one, two], 1)
    stats = pair_stats(x, one)
    assert stats.rho == pytest.approx(0.5**0.5) and stats.cka == pytest.approx(stats.cka_bound_tight)
