"""Mutual nearest neighbours against scikit-learn's neighbours, ties, several k, errors."""

import numpy as np
import pytest
import torch
from reference import normal
from sklearn.neighbors import NearestNeighbors

from fastcl import FastclError, mutual_knn
from fastcl.similarity import neighbours


def expected(x, y, k, metric="cosine"):
    found = [NearestNeighbors(n_neighbors=k, metric=metric).fit(v).kneighbors(return_distance=False) for v in (x, y)]
    return shared(*found, k)


def by_products(x, y, k):
    found = [(v @ v.T).fill_diagonal_(-torch.inf).numpy().argsort(1)[:, ::-1][:, :k] for v in (x, y)]
    return shared(*found, k)


def shared(first, second, k):
    return np.mean([len(set(a) & set(b)) / k for a, b in zip(first, second, strict=True)])


def related(n, dx, dy):
    latent = normal(n, 3)
    return latent @ normal(3, dx, seed=1) + normal(n, dx, seed=2), latent @ normal(3, dy, seed=3) + normal(
        n, dy, seed=4
    )


@pytest.mark.parametrize(("n", "dx", "dy", "k"), [(41, 7, 3, 1), (130, 5, 200, 10), (30, 4, 4, 28), (9, 3, 2, 8)])
def test_neighbours_are_those_of_scikit_learn(n, dx, dy, k, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", 500)  # several blocks, the last of another height
    x, y = related(n, dx, dy)
    assert mutual_knn(x, y, k) == pytest.approx(expected(x, y, k), abs=1e-12)
    assert mutual_knn(x, y, k, "correlation") == pytest.approx(expected(x, y, k, "correlation"), abs=1e-12)
    assert mutual_knn(x, y, k, "linear") == pytest.approx(by_products(x, y, k), abs=1e-12)


def test_several_k_cost_one_pass_and_are_those_of_one_each(monkeypatch):
    x, y = related(60, 6, 5)
    wanted = {k: mutual_knn(x, y, k) for k in (20, 1, 7, 59)}
    passes = []
    lists = neighbours.neighbour_lists
    monkeypatch.setattr(neighbours, "neighbour_lists", lambda *given: passes.append(given) or lists(*given))
    assert mutual_knn(x, y, (20, 1, 7, 59)) == wanted and len(passes) == 1
    assert list(wanted) == list(mutual_knn(x, y, (20, 1, 7, 59))) and wanted[59] == 1.0


def test_equal_and_rescaled_representations_agree_on_all_neighbours():
    x, _ = related(50, 6, 6)
    assert mutual_knn(x, x.clone()) == mutual_knn(x, 7 * x) == 1.0
    assert mutual_knn(x.float(), x.half().float(), 40) > 0.9


def test_of_tied_samples_the_first_are_nearer():
    """Collapsed classes: the cosines within a class differ by rounding alone."""
    label = torch.arange(40) % 4
    x = normal(4, 9)[label] * (0.5 + normal(40, 1, seed=1).abs())
    y = normal(4, 30, seed=2)[label] * (0.5 + normal(40, 1, seed=3).abs())
    assert mutual_knn(x, y, (1, 5, 9)) == {1: 1.0, 5: 1.0, 9: 1.0}
    found = neighbours.neighbour_lists(x, y, 3)[0]
    for i in range(40):
        assert found[i].tolist() == [j for j in range(40) if j % 4 == i % 4 and j != i][:3]


def test_representations_without_relation_agree_by_chance_alone():
    shares = [mutual_knn(normal(60, 8, seed=2 * s), normal(60, 8, seed=2 * s + 1), 6) for s in range(40)]
    assert np.mean(shares) == pytest.approx(6 / 59, abs=4 * np.std(shares) / 40**0.5)


def test_bad_input_is_named():
    x, y = related(12, 4, 3)
    for k, told in ((0, "got 0"), (12, r"\[1, 11\] \(there are 12 samples\), got 12"), (True, "got True"),
                    (2.0, "got 2.0"), ("5", "got '5'"), ((3, 15), "got 15"), ((), "k is empty")):  # fmt: skip
        with pytest.raises(FastclError, match=told):
            mutual_knn(x, y, k)
    with pytest.raises(FastclError, match="kernel must be 'linear', 'cosine' or 'correlation', got 'rbf'"):
        mutual_knn(x, y, 3, "rbf")
    with pytest.raises(FastclError, match="same number of rows"):
        mutual_knn(x, y[1:], 3)
    with pytest.raises(FastclError, match="at least one row"):
        mutual_knn(x[:0], y[:0], 3)
    with pytest.raises(FastclError, match=r"mutual k-NN .* all similarities .* equal in the second representation"):
        mutual_knn(x, torch.ones(12, 3), 3)
    with pytest.raises(FastclError, match="features of 'y' are not finite"):
        mutual_knn(x, y.index_fill(0, torch.tensor([4]), torch.nan), 3)
