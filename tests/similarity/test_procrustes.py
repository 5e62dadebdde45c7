"""Procrustes against scipy's, exact cases, wide features, errors."""

import math

import pytest
import torch
from reference import TOLERANCE, normal
from scipy.spatial import procrustes as scipy_procrustes

from fastcl import FastclError, backend, procrustes

CLOSE = TOLERANCE[torch.float64].loss


def expected(x, y):
    """||X'Y||_* of the centred, normalised features, the narrower ones padded."""
    width = max(x.shape[1], y.shape[1])
    x, y = (torch.nn.functional.pad(v, (0, width - v.shape[1])) for v in (x.double(), y.double()))
    x, y = (v - v.mean(0) for v in (x, y))
    return torch.linalg.matrix_norm((x / x.norm()).T @ (y / y.norm()), "nuc").item()


@pytest.mark.parametrize(
    ("n", "dx", "dy"), [(40, 5, 9), (12, 30, 17), (33, 50, 8), (64, 64, 64), (3, 4, 5), (1200, 6, 3)]
)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_similarity_is_the_nuclear_norm_of_the_cross_moment(n, dx, dy, mean):
    x, y = normal(n, dx) + mean, normal(n, dy, seed=1) - mean
    y[:, 0] += x[:, 0]
    found = procrustes(x, y)
    assert found.similarity == pytest.approx(expected(x, y), abs=CLOSE if mean == 0 else 100 * CLOSE)
    assert float(found) == found.similarity and found.distance == 2 - 2 * found.similarity
    assert found.angle == math.acos(found.similarity)


def test_distance_is_what_the_best_rotation_leaves():
    x, y = normal(30, 4), normal(30, 4, seed=1)
    found = procrustes(x, y)
    _, _, disparity = scipy_procrustes(x.numpy(), y.numpy())  # scipy also rescales y, which leaves 1 - similarity^2
    assert disparity == pytest.approx(1 - found.similarity**2, abs=CLOSE)
    u, v = (m - m.mean(0) for m in (x, y))
    u, v = u / u.norm(), v / v.norm()
    left, _, right = torch.linalg.svd(v.T @ u)
    assert found.distance == pytest.approx((u - v @ (left @ right)).square().sum().item(), abs=CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_features_are_computed_in_float64(dtype):
    x, y = (normal(700, d, seed=d).to(dtype) for d in (6, 9))
    assert procrustes(x, y).similarity == pytest.approx(expected(x, y), abs=CLOSE)
    with backend("triton"):
        assert procrustes(x, y).similarity == pytest.approx(expected(x, y), abs=CLOSE)


def test_equal_representations_score_exactly_one_and_rotated_ones_up_to_rounding():
    x = normal(50, 6)
    for v in (x, x.float(), x.T):
        assert procrustes(v, v.clone()).similarity == 1.0 and procrustes(v, v.clone()).angle == 0.0
    turned = 3 * x @ torch.linalg.qr(normal(6, 6, seed=1))[0] + normal(1, 6, seed=2)
    assert procrustes(x, turned).similarity == pytest.approx(1, abs=CLOSE)
    wide = torch.linalg.qr(normal(20, 6, seed=3))[0].T  # an isometry into 20 dimensions
    assert procrustes(x, x @ wide).similarity == pytest.approx(1, abs=CLOSE)


def test_any_scale_and_what_is_undefined():
    x, y = normal(20, 4), normal(20, 6, seed=1)
    assert procrustes(1e-60 * x, 1e60 * y).similarity == pytest.approx(expected(x, y), abs=CLOSE)
    for width in (3, 40):
        with pytest.raises(FastclError, match="Procrustes similarity .* second representation is constant"):
            procrustes(x, torch.full((20, width), 0.1))
    for bad, told in ((y[1:], "same number of rows"), (y[:, :0], r"d >= 1, got \(20, 0\)"), (y.long(), "float16 to"),
                      (y / 0, "not finite: first in row 0")):  # fmt: skip
        with pytest.raises(FastclError, match=told):
            procrustes(x, bad)
    with pytest.raises(FastclError, match="at least one row"):
        procrustes(x[:0], y[:0])
