"""Float32 features that are hard on digits: an odd first sample, a far outlier, large means, lowered precision."""

import pytest
import torch
from test_similarity import features

import fastcl
from fastcl.errors import FastclError
from fastcl.similarity import PairAccumulator, linear_cka, pair_stats
from fastcl.similarity.sums.moments import CHUNK
from fastcl.similarity.sums.tiles import median_distance

ROUTES = ("features", "tiles")


def close(found, truth, tolerance):
    for measure in ("cka", "cka_debiased", "rsa"):
        assert getattr(found, measure) == pytest.approx(getattr(truth, measure), abs=tolerance), measure


# Errors are relative to the whole variance, of which that sample makes up most where there are few others.
@pytest.mark.parametrize(("backend", "n", "mean"), [("chunked", 3000, 100.0), ("triton", 300, 20.0)])
@pytest.mark.parametrize("kernel", ["linear", "cosine"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_dead_first_sample_costs_no_digits(backend, n, mean, kernel, route):
    x, y = ((z + mean).float() for z in features(n, 16, 12))
    x[0], y[0] = 0, 0
    truth = pair_stats(x.double(), y.double(), kernel)
    with fastcl.backend(backend):
        close(pair_stats(x, y, kernel, route=route), truth, 2e-6)


def test_a_stream_whose_first_chunk_is_typical_keeps_its_digits_over_many_chunks():
    n = 20 * CHUNK["cpu"]
    x, y = ((z + 300).float() for z in features(n, 8, 8))
    x[0], y[5] = 0, 0
    accumulator = PairAccumulator(["a", "b"], ("linear", "cosine"))
    accumulator.update({"a": x, "b": y})
    result = accumulator.compute()["a", "b"]
    for kernel in ("linear", "cosine"):
        close(getattr(result, kernel), pair_stats(x.double(), y.double(), kernel), 2e-5)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_an_outlier_leaves_the_rbf_kernel_of_the_others_alone(backend):
    x, y = (z.float() for z in features(100, 16, 16))
    x[7] += 1e6
    truth = pair_stats(x.double(), y.double(), "rbf")
    with fastcl.backend(backend):
        close(pair_stats(x, y, "rbf"), truth, 1e-6)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_large_mean_does_not_make_a_measure_undefined(backend, route):
    x, y = ((z + 1e4).float() for z in features(50, 6, 6))
    with fastcl.backend(backend):
        found = pair_stats(x, y, route=route)
    close(found, pair_stats(x.double(), y.double()), 1e-5)


@pytest.mark.parametrize("kernel", ["linear", "cosine", "rbf"])
@pytest.mark.parametrize("route", ROUTES)
def test_lowered_precision_of_products_elsewhere_is_not_ours(kernel, route):
    x, y = (z.float() for z in features(60, 9, 12))
    route = "tiles" if kernel == "rbf" else route
    expected = pair_stats(x, y, kernel, route=route)
    with torch.autocast("cpu", torch.bfloat16):
        assert pair_stats(x, y, kernel, route=route) == expected
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert pair_stats(x, y, kernel, route=route).rounding == 0  # multiplied in float64
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_correlation_exceeds_1():
    for seed in range(40):
        x = features(30, 7, 7, seed)[0]
        q = torch.linalg.qr(features(7, 7, 7, seed)[1])[0]
        assert linear_cka(x, x @ q) <= 1 and pair_stats(x, 3 * x @ q, "cosine").rsa <= 1


def test_the_median_distance_is_that_of_samples_spread_over_all():
    # Twice 2,048 samples: the first half close together, the second far apart.
    x = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[2048:] *= 100
    y = x[:, :1].contiguous()
    expected = pair_stats(x[::2].contiguous(), y[::2].contiguous(), "rbf").cka
    assert pair_stats(x, y, "rbf").cka == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("n", [2, 3, 512, 513, 1100])
@pytest.mark.parametrize("kind", ["plain", "far", "one outlier", "equal rows", "near pairs"])
def test_the_median_distance_is_that_of_differences(n, kind):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    most = n - n // 8
    if kind == "far":
        x += 1e6
    if kind == "one outlier":
        x[0] += 1e13
    if kind == "equal rows":  # all but a few: the median is 0
        x[:most] = x[0].clone()
    if kind == "near pairs":  # most rows within 1e-9 of one another, about a point that is not their mean
        x[:most] = 1 + 1e-9 * x[:most]
    expected = float(torch.pdist(x).median())
    if expected == 0:
        with pytest.raises(FastclError, match="no scale"):
            median_distance(x, "x")
        return
    # The entries of a row far from the origin are multiples of its last digit.
    assert median_distance(x, "x") == pytest.approx(expected, rel=1e-6 if kind == "near pairs" else 1e-9)


def test_what_is_printed_are_the_measures():
    x, y = features(20, 4, 4)
    stats = pair_stats(x, y)
    assert f"cka={stats.cka:.6g}, cka_debiased={stats.cka_debiased:.6g}" in repr(stats)
    assert "cka=undefined" in repr(pair_stats(torch.ones(5, 2), y[:5]))
