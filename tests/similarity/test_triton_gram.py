"""The Triton kernels of pair statistics against float64 n x n matrices, by either route; memory is poisoned."""

from contextlib import contextmanager

import pytest
import torch
from test_similarity import MEASURES, features, reference
from triton_runs import DEVICE, poisoned

import fastcl
from fastcl.errors import FastclError
from fastcl.kernels.common.launch import Config
from fastcl.similarity import PairAccumulator, pair_stats
from fastcl.similarity.sums import moments
from fastcl.similarity.sums import triton as gram

KERNELS = ("linear", "cosine", "correlation")
# Relative to a measure, or absolute below 1: split half precision, and sums of a chunk in float32.
TOLERANCE = {"features": 5e-6, "tiles": 1e-6, "rbf": 2e-5}
DRIFT = 1e-3  # of ||K - mean(K)||_F: the root of the error of a sum


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """The Triton backend, whose launches are recorded and whose new memory is NaN; large blocks in the interpreter."""
    ran = []
    start = gram.launch

    def recorded(kernel, grid, *options, **arguments):
        ran.append((kernel.fn.__name__, grid, arguments))
        start(kernel, grid, *options, **arguments)

    monkeypatch.setattr(gram, "launch", recorded)
    monkeypatch.setattr(torch, "empty", poisoned)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(gram, "_ROW_TILE", {"BLOCK_N": 64, "BLOCK_D": 128})
        monkeypatch.setattr(gram, "tabled", lambda *_: Config(128, 64, 64, 4, 1))
    with fastcl.backend("triton"):
        yield ran


@contextmanager
def plain():
    with fastcl.backend("chunked"):
        yield


def on_device(*features):
    return [x.to(DEVICE) for x in features]


def check(stats, expected, tolerance):
    for measure in MEASURES:
        value = getattr(stats, measure)
        if "drift" in measure:
            scale = (stats.full.kk + stats.full.ll) ** 0.5
            assert abs(value - expected[measure]) <= max(DRIFT * scale, tolerance * expected[measure]), measure
        else:
            assert value == pytest.approx(expected[measure], rel=tolerance, abs=tolerance), measure


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("route", ["features", "tiles"])
@pytest.mark.parametrize(("n", "dx", "dy"), [(5, 3, 65), (130, 64, 30), (70, 129, 200)])
def test_measures_equal_their_definitions(kernel, route, n, dx, dy, on_triton):
    x, y = (z.float() for z in features(n, dx, dy))
    few = 5 if n == 5 else 1  # HSIC_1 of five samples is a small difference of large sums
    check(pair_stats(*on_device(x, y), kernel, route=route), reference(x, y, kernel), few * TOLERANCE[route])
    products = {name for name, _, _ in on_triton} & {"moments_kernel", "gram_kernel"}
    assert products == {{"features": "moments_kernel", "tiles": "gram_kernel"}[route]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("route", ["features", "tiles"])
def test_narrow_features_of_any_layout(dtype, route):
    x, y = (z.to(dtype) for z in features(40, 20, 9))
    x_turned, y_strided = x.mT.contiguous().mT, torch.cat([y, y], 1)[:, :9]
    for kernel in KERNELS:
        expected = reference(x, y, kernel)
        check(pair_stats(*on_device(x_turned, y_strided), kernel, route=route), expected, TOLERANCE[route])


@pytest.mark.parametrize("bandwidth", [0.3, 1.0, 50.0])
def test_rbf(bandwidth):
    x, y = features(100, 10, 70)
    x, y = (x + 100).float(), y.float()
    with plain():
        expected = pair_stats(x.double(), y.double(), "rbf", bandwidth=bandwidth)
    found = pair_stats(*on_device(x, y), "rbf", bandwidth=bandwidth)
    check(found, {m: getattr(expected, m) for m in MEASURES}, TOLERANCE["rbf"])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("route", ["features", "tiles"])
@pytest.mark.parametrize("mean", [100.0, 1e3])
def test_a_mean_far_from_zero_does_not_cancel(kernel, route, mean):
    x, y = features(50, 30, 20)
    x, y = (x + mean).float(), (y - 0.7 * mean).float()
    with plain():
        expected = pair_stats(x.double(), y.double(), kernel)
    found = pair_stats(*on_device(x, y), kernel, route=route)
    check(found, {m: getattr(expected, m) for m in MEASURES}, TOLERANCE[route])


@pytest.mark.parametrize("scale", [1e-30, 1e15, 3e37])
def test_features_of_any_finite_size(scale):
    x, y = features(30, 6, 5)
    x, y = (scale * x).float(), y.float()
    for kernel, route in (("linear", "features"), ("linear", "tiles"), ("cosine", "features"), ("rbf", "auto")):
        with plain():
            expected = pair_stats(x.double(), y.double(), kernel)
        found = pair_stats(*on_device(x, y), kernel, route=route)
        for measure in ("cka", "cka_debiased", "rsa"):
            assert getattr(found, measure) == pytest.approx(getattr(expected, measure), abs=2e-5), (kernel, route)


@pytest.mark.parametrize("d", [7, 300])
def test_twins_are_exactly_one_and_exactly_zero_apart(d):
    x, other = on_device(*(z.float() for z in features(70, d, 40)))
    accumulator = PairAccumulator(["cl", "other", "nscl"])
    accumulator.update({"cl": x, "other": other, "nscl": x.clone()})
    result = accumulator.compute()["cl", "nscl"]
    tiles = [pair_stats(x, x.clone(), kernel, route="tiles") for kernel in (*KERNELS, "rbf")]
    for stats in (result.linear, result.cosine, result.correlation, *tiles):
        assert stats.full.kl == stats.full.kk == stats.full.ll
        assert (stats.cka, stats.cka_debiased, stats.rsa) == (1.0, 1.0, 1.0)
        assert (stats.drift, stats.drift_centered, stats.rho, stats.r) == (0.0, 0.0, 0.0, 0.0)


def test_a_stream_of_several_models_in_chunks(monkeypatch, on_triton):
    monkeypatch.setattr(moments, "CHUNK", {DEVICE.type: 64})
    x, y = features(150, 140, 9)
    models = dict(zip("abc", on_device((x + 3).float(), y.float(), x[:, :20].square().bfloat16()), strict=True))
    accumulators = []
    for sizes in ([150], [1, 62, 3, 84]):
        accumulator = PairAccumulator(list(models))
        for part in zip(*(z.split(sizes) for z in models.values()), strict=True):
            accumulator.update(dict(zip(models, part, strict=True)))
        accumulators.append(accumulator)
    first, second = (accumulator.compute() for accumulator in accumulators)
    assert first == second and len([name for name, _, _ in on_triton if name == "moments_kernel"]) == 2 * 3 * 3
    resumed = PairAccumulator(list(models))
    resumed.load_state_dict(accumulators[0].state_dict())
    resumed.merge(accumulators[1])
    twice = resumed.compute()
    for pair, result in first.pairs.items():
        a, b = (models[name].cpu() for name in pair)
        for kernel in KERNELS:
            check(getattr(result, kernel), reference(a, b, kernel), TOLERANCE["features"])
            # Every sample twice: the same biased measure, of twice as many samples.
            assert getattr(twice[pair], kernel).cka == pytest.approx(getattr(result, kernel).cka, abs=1e-6)
    assert twice.n == 300


def test_float64_rows_among_others_are_summed_in_float64(on_triton):
    x, y = features(40, 6, 5)
    with fastcl.backend("auto"):
        stats = pair_stats(*on_device(x, y.float()))
    assert not on_triton and stats.rounding == 0
    with pytest.raises(FastclError, match="triton backend does not support float64, got .* float64"):
        pair_stats(*on_device(x, y.float()))


@pytest.mark.parametrize("route", ["features", "tiles"])
def test_rounding_is_not_taken_for_similarity(route):
    constant, other = on_device(torch.full((20, 5), 0.1), features(20, 3, 3)[0].float())
    for kernel in KERNELS:
        stats = pair_stats(constant, other, kernel, route=route)
        for measure in ("cka", "cka_debiased", "rsa", "rho", "r"):
            with pytest.raises(FastclError, match=r"is undefined.*first representation"):
                getattr(stats, measure)
    orthonormal = torch.linalg.qr(features(40, 40, 2)[0])[0].float()
    stats = pair_stats(*on_device(orthonormal, features(40, 3, 3)[0].float()), route=route)
    assert 0 < stats.cka < 1
    for measure in ("cka_debiased", "rsa"):
        with pytest.raises(FastclError, match="is undefined"):
            getattr(stats, measure)


@pytest.mark.parametrize("route", ["features", "tiles"])
def test_zero_and_constant_rows_have_no_direction(route):
    x, y = (z.float() for z in features(30, 6, 5))
    x[3], y[7] = 0, 0.3
    x, y = on_device(x, y)
    for kernel in ("cosine", "correlation"):
        with plain():
            expected = pair_stats(x.double(), y.double(), kernel)
        check(pair_stats(x, y, kernel, route=route), {m: getattr(expected, m) for m in MEASURES}, TOLERANCE[route])
