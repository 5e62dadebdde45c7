"""Float32 features with an outlier in parts that are put together: values as of one pass, refused where it refuses."""

import pytest
import torch
from test_accumulator import fed
from torch import distributed as dist

from fastcl import FastclError
from fastcl.similarity import PairAccumulator, pair_stats

MEASURES = ("cka", "cka_debiased", "rsa", "rho", "r", "drift")


def models(n, outlier, at, seed, mean=0.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 16, generator=g)
    y = x @ torch.randn(16, 12, generator=g) / 4 + torch.randn(n, 12, generator=g)
    x[at] *= outlier
    return {"a": x + mean, "b": y + mean}


def merged(parts):
    first, *rest = parts
    for part in rest:
        first.merge(part)
    return first


def split(features, cuts):
    n = len(features["a"])
    edges = [0, *cuts, n]
    return [
        fed({k: v[i:j] for k, v in features.items()}, [], kernels=("linear", "cosine"))
        for i, j in zip(edges, edges[1:], strict=False)
    ]


def resumed(accumulator):
    again = PairAccumulator(["a", "b"], ("linear", "cosine"))
    again.load_state_dict(accumulator.state_dict())
    return again


def value(stats, measure):
    try:
        return getattr(stats, measure)
    except FastclError as error:
        assert " is undefined: " in str(error)
        return None


# Outliers of which one pass has two digits or more, and such that it refuses.
@pytest.mark.parametrize(("outlier", "given"), [(1e3, True), (1e5, False)])
@pytest.mark.parametrize("at", [0, 85])
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_one_outlier(outlier, given, at, mean):
    features = models(256, outlier, at, 3, mean)
    truth = pair_stats(*(v.double() for v in features.values()), "linear")
    one = pair_stats(*features.values(), "linear", route="features")
    for cuts in ((64, 128, 192), (1, 2), (86,), tuple(range(16, 256, 16))):
        parts = split(features, cuts)
        states = [resumed(part) for part in parts]
        backwards = merged(split(features, cuts)[::-1])
        halves = [merged(half) for half in (split(features, cuts)[:2], split(features, cuts)[2:]) if half]
        for accumulator in (merged(parts), resumed(merged(states)), backwards, merged(halves)):
            found = accumulator.compute()["a", "b"].linear
            for measure in MEASURES:
                exact, whole, part = (value(stats, measure) for stats in (truth, one, found))
                assert (part is None) == (whole is None) and exact is not None, (measure, cuts)
                assert part is None or part == pytest.approx(exact, rel=0.02), (measure, cuts)
            assert (value(found, "cka_debiased") is not None) == given


def test_parts_with_means_of_their_own_keep_their_digits():
    features = models(400, 1.0, 0, 5, 300.0)
    for v in features.values():
        v[100:200] += 3
        v[200:300] -= 200
    truth = pair_stats(*(v.double() for v in features.values()), "linear")
    found = merged(split(features, (100, 200, 300))).compute()["a", "b"].linear
    for measure in MEASURES:
        assert getattr(found, measure) == pytest.approx(getattr(truth, measure), rel=1e-4), measure


def test_float64_loses_nothing_either():
    features = {k: v.double() for k, v in models(256, 1e4, 85, 1).items()}
    truth = pair_stats(*features.values(), "linear")
    found = merged(split(features, (64, 128, 192))).compute()["a", "b"].linear
    for measure in MEASURES:
        assert getattr(found, measure) == pytest.approx(getattr(truth, measure), rel=1e-6), measure


def test_a_group_carries_what_its_ranks_have_merged(tmp_path):
    features = models(256, 1e3, 85, 3)
    wanted = merged(split(features, (64, 128, 192)))
    before = wanted.compute()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wanted.all_reduce()
    finally:
        dist.destroy_process_group()
    after = wanted.compute()
    assert after["a", "b"].linear == before["a", "b"].linear
    assert any(float(v) > 0 for stream in wanted.state_dict()["streams"] for v in stream["swept"])
