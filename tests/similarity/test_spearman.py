"""Spearman RSA against scipy's ranks of whole matrices: exact ranks, bins and the bound on what bins can spoil."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

import fastcl
from fastcl import FastclError, spearman_rsa
from fastcl.similarity import ranks

KERNELS = ("cosine", "correlation", "linear")


def similarities(x, kernel):
    """The entries above the diagonal of one Gram matrix, those that differ by rounding made equal."""
    x = x.double().numpy()
    if kernel == "correlation":
        x = x - x.mean(axis=1, keepdims=True)
    if kernel != "linear":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    entries = (x @ x.T)[np.triu_indices(len(x), 1)]
    return entries if kernel == "linear" else np.round(entries, 12)


def expected(x, y, kernel="cosine"):
    return spearmanr(similarities(x, kernel), similarities(y, kernel)).statistic


def features(n, dx, dy, seed=0, shared=2):
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, shared, generator=g)
    return tuple(latent @ torch.randn(shared, d, generator=g) + torch.randn(n, d, generator=g) for d in (dx, dy))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n", "dx", "dy"), [(3, 4, 5), (41, 7, 3), (130, 2, 200)])
def test_exact_ranks_are_those_of_scipy(kernel, n, dx, dy, monkeypatch):
    monkeypatch.setattr(ranks, "_BLOCK", 500)  # several blocks, the last of another height
    x, y = features(n, dx, dy)
    result = spearman_rsa(x, y, kernel)
    assert result.value == pytest.approx(expected(x, y, kernel), abs=1e-12)
    assert result.low == result.value == result.high == float(result) and result.error == 0
    assert result.pairs == n * (n - 1) // 2 and result.bins is None


def test_ties_take_average_ranks():
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randint(-1, 2, (60, d), generator=g).double() for d in (3, 4))
    assert len(np.unique(similarities(x, "linear"))) < 8
    assert spearman_rsa(x, y, "linear").value == pytest.approx(expected(x, y, "linear"), abs=1e-12)


def test_rounding_makes_no_order_of_equal_similarities():
    """Rows of two columns have correlations of +1 and -1 alone; collapsed classes have a few cosines."""
    x, y = features(150, 2, 30)
    assert len(np.unique(similarities(x, "correlation"))) == 2
    wanted = expected(x, y, "correlation")
    assert spearman_rsa(x, y, "correlation").value == pytest.approx(wanted, abs=1e-12)
    assert spearman_rsa(x, y, "correlation", 1 << 16).value == pytest.approx(wanted, abs=1e-6)
    g = torch.Generator().manual_seed(1)
    centres = torch.randn(6, 9, generator=g).double()
    collapsed = centres.repeat(25, 1) * torch.rand(150, 1, generator=g)  # every class on one ray
    unit = torch.nn.functional.normalize(centres).numpy()
    upper, label = np.triu_indices(150, 1), np.arange(150) % 6
    between = np.round(unit @ unit.T, 9)[label[upper[0]], label[upper[1]]]
    wanted = spearmanr(between, similarities(y, "cosine")).statistic
    assert spearman_rsa(collapsed, y).value == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("bins", [None, 2, 64, 4096])
def test_equal_representations_and_monotone_changes_score_exactly_one(bins):
    x, _ = features(90, 5, 5)
    for y in (x, x.double() * 4):
        assert spearman_rsa(x, y, bins=bins).value == 1.0
    assert spearman_rsa(x, x @ torch.linalg.qr(torch.randn(5, 5)).Q, bins=bins).value == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bins", [2, 3, 17, 256, 5000, 1 << 18])
def test_the_exact_value_lies_in_the_interval_of_the_bins(kernel, bins, monkeypatch):
    monkeypatch.setattr(ranks, "_BLOCK", 3000)
    x, y = features(150, 6, 20, seed=bins)
    result, true = spearman_rsa(x, y, kernel, bins), expected(x, y, kernel)
    assert result.low - 1e-12 <= true <= result.high + 1e-12 and result.bins == bins
    assert abs(result.value - true) <= result.error + 1e-12
    if bins >= 256:  # the interval says something, and shrinks as one over the bins
        assert result.error < 8 / bins


@settings(max_examples=150, deadline=None)
@given(
    st.integers(3, 25), st.integers(1, 4), st.integers(1, 4), st.integers(2, 40), st.booleans(), st.integers(0, 10**6)
)
def test_the_interval_holds_for_ties_and_few_samples(n, dx, dy, bins, whole, seed):
    x, y = features(n, dx, dy, seed)
    if whole:
        x, y = x.round(), y.round()
    try:
        result = spearman_rsa(x, y, "linear", bins)
    except FastclError:
        assert 0 in [np.ptp(similarities(v, "linear")) for v in (x, y)]
        return
    assert result.low - 1e-12 <= expected(x, y, "linear") <= result.high + 1e-12


def test_the_bound_is_reached_where_bins_hide_the_order():
    """Two ranks in each bin: swapping them in one matrix keeps the bins and moves the value by the bound."""
    m = 200
    r = np.arange(m, dtype=float)
    middle = np.repeat(np.arange(m // 2) * 2 + 0.5, 2)
    counts = torch.full((m // 2,), 2)
    angle = ranks._Bins.angle(type("Counts", (), {"counts": counts})(), m)
    cosine = np.corrcoef(r, middle)[0, 1]
    assert math.cos(angle) == pytest.approx(cosine, abs=1e-12)
    swapped = r.reshape(-1, 2)[:, ::-1].reshape(-1)
    assert np.arccos(np.corrcoef(r, swapped)[0, 1]) == pytest.approx(2 * angle, rel=1e-9)


def test_mean_ranks_of_counts_are_those_of_ties():
    counts = torch.tensor([3, 0, 1, 5])
    values = torch.arange(4).repeat_interleave(counts)
    wanted = 2 * (rankdata(values.numpy()) - (len(values) + 1) / 2)
    assert ranks._middles(counts)[values].tolist() == wanted.tolist()


@pytest.mark.parametrize("spoil", ["outlier", "tiny", "concentrated"])
def test_bins_find_the_values_wherever_they_lie(spoil):
    x, y = features(120, 8, 8)
    if spoil == "outlier":  # all other similarities lie within a millionth of the range
        x[7] *= 1e3
    elif spoil == "tiny":
        x *= 1e-12
    else:  # cosines between 0.999998 and 1
        x = x * 1e-3 + 1
    kernel = "cosine" if spoil == "concentrated" else "linear"
    result = spearman_rsa(x.double(), y, kernel, bins=1 << 14)
    assert abs(result.value - expected(x, y, kernel)) <= result.error < 1e-3


def test_many_pairs_go_to_bins_by_themselves(monkeypatch):
    x, y = features(100, 9, 4)
    monkeypatch.setattr(ranks, "_EXACT_PAIRS", 100 * 99 // 2 - 1)
    monkeypatch.setattr(ranks, "_BINS", 4096)
    result = spearman_rsa(x, y)
    assert result.bins == 4096 and 0 < result.error < 1e-2
    assert result.low <= expected(x, y) <= result.high
    assert result == spearman_rsa(x, y)


def test_half_precision_features_are_compared_as_the_numbers_they_are():
    x, y = (v.bfloat16() for v in features(50, 6, 7))
    assert spearman_rsa(x, y).value == pytest.approx(expected(x, y), abs=1e-12)


def test_errors_name_the_argument_and_the_numbers():
    x, y = features(12, 4, 4)
    broken = x.clone()
    broken[5, 1] = math.nan
    for arguments, message in (
        ((x, y[:9]), "{'x': 12, 'y': 9}"), ((x[:2], y[:2]), "n >= 3 samples (more than one pair), got n=2"),
        ((x.long(), y), "'x' must be a dense float16 to float64"), ((x[0], y), "shape (b, d)"),
        ((x, broken), "'y' are not finite: first in row 5"), ((x, y, "rbf"), "got 'rbf'"),
        ((x, y, "cosine", 1), "bins must be an integer >= 2 or None, got 1"),
        ((x, y, "cosine", 2.5), "got 2.5"), ((x.double() * 1e200, y, "linear"), "too large for float64"),
    ):  # fmt: skip
        with pytest.raises(FastclError) as error:
            spearman_rsa(*arguments)
        assert message in str(error.value), error.value


@pytest.mark.parametrize("bins", [None, 1024])
@pytest.mark.parametrize("x", [
    torch.ones(20, 3), torch.zeros(20, 3), torch.eye(20), torch.randn(1, 7).expand(20, 7) * torch.rand(20, 1),
], ids=["equal rows", "zero rows", "orthogonal rows", "one direction"])  # fmt: skip
def test_equal_similarities_have_no_ranks(x, bins):
    _, y = features(20, 3, 5)
    for pair in ((x, y), (y, x)):
        with pytest.raises(FastclError, match="undefined: all similarities of distinct samples are equal in the"):
            spearman_rsa(*pair, bins=bins)


def test_it_is_public():
    assert fastcl.spearman_rsa is spearman_rsa and isinstance(spearman_rsa(*features(9, 2, 2)), fastcl.SpearmanResult)
