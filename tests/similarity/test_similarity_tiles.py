"""The tile route: RBF kernels by their definition, which route is taken, and that tiles of any size agree."""

import pytest
import torch
from test_similarity import MEASURES, check, features

from fastcl.similarity import linear_cka, pair_stats
from fastcl.similarity.sums import routes


@pytest.mark.parametrize(("n", "dx", "dy"), [(5, 1, 3), (60, 9, 4), (33, 40, 70)])
@pytest.mark.parametrize("bandwidth", [0.2, 0.8, 1.0, 4.0, 1e3])
def test_rbf_measures_equal_their_definitions(n, dx, dy, bandwidth):
    x, y = features(n, dx, dy)
    x = x + 1e3
    grams = []
    for z in (x, y):
        distances = (z[:, None] - z).square().sum(2).sqrt()
        sigma = bandwidth * torch.pdist(z).median()
        # Less 1, which no centred measure sees: a wide kernel would lose its digits here, not there.
        grams.append(torch.expm1(-distances.square() / (2 * sigma**2)))
    k, l = grams  # noqa: E741
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    kc, lc, off = h @ k @ h, h @ l @ h, ~torch.eye(n, dtype=torch.bool)
    stats = pair_stats(x, y, "rbf", bandwidth=bandwidth)
    assert stats.cka == pytest.approx(((kc * lc).sum() / (kc.norm() * lc.norm())).item(), rel=1e-8)
    assert stats.rsa == pytest.approx(torch.corrcoef(torch.stack([k[off], l[off]]))[0, 1].item(), rel=1e-8)
    assert stats.drift == pytest.approx((k - l).norm().item(), rel=1e-8)
    assert stats.drift_centered == pytest.approx((kc - lc).norm().item(), rel=1e-8)
    u, v = (_u_centred(z * off) for z in (k, l))
    expected = (u * v).sum() / ((u * u).sum() * (v * v).sum()).sqrt()
    assert stats.cka_debiased == pytest.approx(expected.item(), rel=1e-6)


def _u_centred(k):
    """Szekely and Rizzo 2014: <U(K), U(L)> is n (n - 3) HSIC_1(K, L)."""
    n = len(k)
    rows = k.sum(1)
    u = k - rows[:, None] / (n - 2) - rows / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return u.fill_diagonal_(0)


def test_a_wide_rbf_kernel_is_the_linear_one():
    x, y = features(50, 6, 6)
    wide = pair_stats(x, y, "rbf", bandwidth=1e5)
    assert wide.cka == pytest.approx(linear_cka(x, y), rel=1e-8)
    assert wide.cka_debiased == pytest.approx(linear_cka(x, y, debiased=True), rel=1e-6)


def test_the_cheaper_route_is_taken_and_another_may_be_asked_for(monkeypatch):
    ran = []
    for name in ("Moments", "tile_sums"):
        real = getattr(routes, name)
        monkeypatch.setattr(routes, name, lambda *a, name=name, real=real: ran.append(name) or real(*a))
    few, many = features(20, 300, 300), features(300, 20, 20)
    for (x, y), route in ((few, "auto"), (many, "auto"), (few, "features"), (many, "tiles")):
        pair_stats(x, y, route=route)
    pair_stats(*many, kernel="rbf")
    assert ran == ["tile_sums", "Moments", "Moments", "tile_sums", "tile_sums"]


@pytest.mark.parametrize("kernel", ["linear", "cosine", "rbf"])
def test_many_tiles_give_what_one_tile_gives(kernel, monkeypatch):
    x, y = features(97, 6, 11)
    expected = pair_stats(x, y, kernel, route="tiles")
    for size in (1, 16, 96):
        monkeypatch.setattr("fastcl.similarity.sums.tiles.TILE", size)
        check(pair_stats(x, y, kernel, route="tiles"), {m: getattr(expected, m) for m in MEASURES}, rel=1e-12)
