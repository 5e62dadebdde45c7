"""Class geometry, nearest-centre accuracy and the weight gap against plain loops in float64."""

from copy import deepcopy
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastcl.errors import FastclError
from fastcl.metrics import cdnv, directional_cdnv, ncc_accuracy, weight_gap


def clusters(n, d, classes, seed=0, spread=1.0):
    """Features of `classes` Gaussian clusters; every class is present."""
    g = torch.Generator().manual_seed(seed)
    index = torch.cat([torch.arange(classes), torch.randint(classes, (n - classes,), generator=g)])
    index = index[torch.randperm(n, generator=g)]
    centres = 2 * torch.randn(classes, d, generator=g, dtype=torch.float64)
    return centres[index] + spread * torch.randn(n, d, generator=g, dtype=torch.float64), index


def plain_cdnv(x, labels):
    groups = [x[labels == c].double() for c in labels.unique()]
    terms = []
    for a, b in combinations(groups, 2):
        va, vb = (((z - z.mean(0)) ** 2).sum(1).mean() for z in (a, b))
        terms.append((va + vb) / 2 / ((a.mean(0) - b.mean(0)) ** 2).sum())
    return float(sum(terms) / len(terms))


def plain_directional_cdnv(x, labels):
    groups = [x[labels == c].double() for c in labels.unique()]
    terms = []
    for a, b in permutations(groups, 2):
        difference = b.mean(0) - a.mean(0)
        along = (a - a.mean(0)) @ (difference / difference.norm())
        terms.append((along**2).mean() / difference.norm() ** 2)
    return float(sum(terms) / len(terms))


def plain_ncc(train, train_labels, x, labels):
    names = sorted(set(train_labels.tolist()))
    right = 0
    for row, label in zip(x.double(), labels.tolist(), strict=True):
        distances = [float((row - train[train_labels == c].double().mean(0)).norm()) for c in names]
        right += names[distances.index(min(distances))] == label
    return right / len(x)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(8, 60), d=st.integers(1, 12), classes=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_geometry_equals_loops_over_pairs(n, d, classes, seed):
    x, labels = clusters(n, d, classes, seed)
    assert cdnv(x, labels) == pytest.approx(plain_cdnv(x, labels), rel=1e-9)
    assert directional_cdnv(x, labels) == pytest.approx(plain_directional_cdnv(x, labels), rel=1e-9)
    assert 0 <= directional_cdnv(x, labels) <= cdnv(x, labels) * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_geometry_of_low_precision_features_and_any_labels(dtype):
    x, index = clusters(50, 7, 4)
    x, labels = x.to(dtype), torch.tensor([900, -3, 12, 2**40])[index]
    assert cdnv(x, labels) == pytest.approx(plain_cdnv(x, labels), rel=1e-10)
    assert directional_cdnv(x, labels) == pytest.approx(plain_directional_cdnv(x, labels), rel=1e-10)


def test_geometry_does_not_cancel_far_from_the_origin():
    x, labels = clusters(400, 6, 5, spread=1e-3)
    expected = cdnv(x, labels), directional_cdnv(x, labels)
    for shift, scale in ((1e5, 1.0), (0.0, 1e-200), (0.0, 1e200)):
        moved = (x + shift) * scale
        assert cdnv(moved, labels) == pytest.approx(expected[0], rel=1e-7)
        assert directional_cdnv(moved, labels) == pytest.approx(expected[1], rel=1e-7)


def test_isotropic_clusters_have_a_known_geometry():
    """Two classes at distance 4, each the corners of a cross of radius 1 in d = 3 dimensions."""
    cross = torch.cat([torch.eye(3), -torch.eye(3)])
    x = torch.cat([cross, cross + torch.tensor([4.0, 0, 0])])
    labels = torch.tensor([1] * 6 + [0] * 6)
    assert cdnv(x, labels) == pytest.approx(1 / 16, rel=1e-12)
    assert directional_cdnv(x, labels) == pytest.approx(1 / 3 / 16, rel=1e-12)
    collapsed = torch.tensor([[0.0, 1], [0, 1], [2, 0]])
    assert cdnv(collapsed, torch.tensor([0, 0, 1])) == directional_cdnv(collapsed, torch.tensor([0, 0, 1])) == 0.0


@pytest.mark.parametrize("metric", [cdnv, directional_cdnv])
def test_geometry_refuses_bad_input(metric):
    x, labels = clusters(12, 3, 3)
    with pytest.raises(FastclError, match=r"at least 2 classes, got only labels \[7\]"):
        metric(x, torch.full((12,), 7))
    with pytest.raises(FastclError, match=r"classes 0 and 2 have the same mean \(1 such pairs\)"):
        metric(torch.cat([x[:6], x[:6], x]), torch.tensor([0] * 6 + [2] * 6 + [1] * 12))
    with pytest.raises(FastclError, match="have the same mean"):
        metric(torch.tensor([0.1, 0.7, 1.3]).expand(500, 3), torch.tensor([0] * 70 + [1] * 130 + [2] * 300))
    with pytest.raises(FastclError, match="have the same mean"):
        metric(torch.zeros(12, 3), labels)
    with pytest.raises(FastclError, match=r"features must be .* got shape \(12,\)"):
        metric(x[:, 0], labels)
    with pytest.raises(FastclError, match=r"labels must be integers of shape \(12,\).*got shape \(11,\)"):
        metric(x, labels[:11])
    with pytest.raises(FastclError, match=r"features must be a tensor, got ndarray; convert it with torch.from_numpy"):
        metric(x.numpy(), labels)
    with pytest.raises(FastclError, match="labels must be a tensor, got list"):
        metric(x, labels.tolist())
    with pytest.raises(FastclError, match="labels must be integers.*torch.float32"):
        metric(x, labels.float())
    x[4, 1] = float("nan")
    with pytest.raises(FastclError, match="features are not finite: first in row 4"):
        metric(x, labels)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(8, 50), d=st.integers(1, 9), classes=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_ncc_equals_a_loop_over_samples(n, d, classes, seed):
    (train, train_labels), (x, labels) = clusters(n, d, classes, seed), clusters(n, d, classes, seed + 1)
    assert ncc_accuracy(train, train_labels, x, labels) == plain_ncc(train, train_labels, x, labels)
    far = ncc_accuracy(train + 1e7, train_labels, x + 1e7, labels)
    assert far == plain_ncc(train + 1e7, train_labels, x + 1e7, labels)
    huge = ncc_accuracy(train * 1e200, train_labels, x * 1e200, labels)
    assert huge == plain_ncc(train, train_labels, x, labels)


def test_ncc_ties_and_absent_classes():
    train, train_labels = torch.tensor([[1.0, 0], [-1, 0], [9, 9]]), torch.tensor([5, 2, 40])
    x = torch.tensor([[0.0, 3], [0.5, 0], [-0.5, 0], [8, 8]])
    assert ncc_accuracy(train, train_labels, x, torch.tensor([2, 5, 2, 40])) == 1.0  # the first is a tie: lowest label
    assert ncc_accuracy(train, train_labels, x, torch.tensor([5, 5, 2, 40])) == 0.75
    assert ncc_accuracy(train, train_labels, x, torch.tensor([2, 5, 2, 41])) == 0.75  # 41 has no centre
    same = torch.ones(4, 3)
    assert ncc_accuracy(same, torch.tensor([3, 1, 2, 1]), same, torch.tensor([3, 1, 2, 1])) == 0.5


def test_ncc_refuses_bad_input():
    x, labels = clusters(10, 3, 2)
    with pytest.raises(FastclError, match="features and train_features must have the same width, got 2 and 3"):
        ncc_accuracy(x, labels, x[:, :2], labels)
    with pytest.raises(FastclError, match=r"train_labels must be integers of shape \(10,\)"):
        ncc_accuracy(x, labels[:4], x, labels)
    with pytest.raises(FastclError, match=r"features must be a non-empty .* got shape \(0, 3\)"):
        ncc_accuracy(x, labels, x[:0], labels[:0])
    x[2] = float("inf")
    with pytest.raises(FastclError, match="train_features are not finite: first in row 2"):
        ncc_accuracy(x, labels, x, labels)


def network(seed):
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 2, bias=False))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), head)


def plain_weight_gap(a, b):
    gaps = []
    for name, w in a.state_dict().items():
        if name.endswith(".weight"):
            wa, wb = w.double().flatten(), b.state_dict()[name].double().flatten()
            norms = [sum(v * v for v in z.tolist()) ** 0.5 for z in (wa - wb, wa, wb)]
            gaps.append(norms[0] / (0.5 * (norms[1] + norms[2])) if norms[1] + norms[2] else 0.0)
    assert len(gaps) == 4
    return sum(gaps) / len(gaps)


def test_weight_gap_equals_a_loop_over_tensors():
    a, b = network(0), network(1)
    with torch.no_grad():
        for model in (a, b):
            model[2][1].weight.zero_()
            model[2][0].bias.fill_(9.0)  # not a weight: does not count
        b[1].weight.mul_(1.5)
    assert weight_gap(a, b) == pytest.approx(plain_weight_gap(a, b), rel=1e-12)
    assert weight_gap(a, b) == weight_gap(b, a)
    assert weight_gap(a, b.to(torch.bfloat16)) == pytest.approx(plain_weight_gap(a, b), rel=1e-12)


def test_weight_gap_of_known_models():
    a = network(0)
    assert weight_gap(a, deepcopy(a)) == 0.0
    b = deepcopy(a)
    with torch.no_grad():
        b[1].bias.add_(1.0)
        b[1].running_mean.add_(1.0)
    assert weight_gap(a, b) == 0.0
    with torch.no_grad():
        for p in b.parameters():
            p.copy_(-p)
    assert weight_gap(a, b) == pytest.approx(2.0, rel=1e-12)
    line = nn.Linear(3, 2)
    assert weight_gap(line, deepcopy(line)) == 0.0


def test_weight_gap_refuses_models_that_differ():
    a = network(0)
    with pytest.raises(FastclError, match=r"weight '3.weight' is missing from a \(1 such weights\)"):
        weight_gap(a, nn.Sequential(*deepcopy(a), nn.Linear(2, 2)))
    with pytest.raises(FastclError, match=r"weight '2.0.weight' is missing from b \(2 such weights\)"):
        weight_gap(a, a[:2])
    wide = deepcopy(a)
    wide[2][0] = nn.Linear(9, 5)
    with pytest.raises(FastclError, match=r"weight '2.0.weight' has shape \(5, 8\) in a and \(5, 9\) in b"):
        weight_gap(a, wide)
    broken = deepcopy(a)
    with torch.no_grad():
        broken[1].weight[3] = float("nan")
    with pytest.raises(FastclError, match="weight '1.weight' is not finite"):
        weight_gap(a, broken)
    with pytest.raises(FastclError, match="no parameter named 'weight'"):
        weight_gap(nn.ReLU(), nn.ReLU())
