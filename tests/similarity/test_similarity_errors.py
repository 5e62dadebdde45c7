"""What pair statistics refuse, and the finite but extreme features that they accept."""

import pytest
import torch

import fastcl
from fastcl.errors import FastclError
from fastcl.similarity import GramSums, PairAccumulator, PairStats, linear_cka, pair_stats, rsa


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("constant", [torch.zeros(9, 4), torch.full((9, 4), 0.1), torch.randn(4).expand(9, 4)])
@pytest.mark.parametrize("kernel", ["linear", "cosine", "correlation"])
@pytest.mark.parametrize("route", ["features", "tiles"])
def test_constant_features_have_no_similarity(constant, kernel, route):
    stats = pair_stats(constant, normal(9, 3), kernel, route=route)
    for measure in ("cka", "cka_debiased", "rho", "rsa", "r"):
        with pytest.raises(FastclError, match=r"is undefined.*first representation"):
            getattr(stats, measure)
    with pytest.raises(FastclError, match="CKA .*second representation is constant over the samples"):
        _ = pair_stats(normal(9, 3), constant, kernel).cka
    assert stats.drift > 0


def test_parallel_rows_are_constant_in_the_cosine_kernel_only():
    x = torch.linspace(1, 5, 9, dtype=torch.float64)[:, None] * normal(1, 6)
    assert 0 < pair_stats(x, normal(9, 3), "linear").cka < 1
    stats = pair_stats(x, normal(9, 3), "cosine")
    for measure in ("cka", "cka_debiased", "rsa"):
        with pytest.raises(FastclError, match="is undefined"):
            getattr(stats, measure)


@pytest.mark.parametrize("n", [8, 300])
def test_orthonormal_rows_have_biased_cka_only(n):
    x = torch.linalg.qr(normal(n, n))[0]
    stats = pair_stats(x, x, route="features")
    assert stats.cka == 1.0
    with pytest.raises(FastclError, match="HSIC_1 of the first representation with itself is zero"):
        _ = stats.cka_debiased
    with pytest.raises(FastclError, match="all similarities of distinct samples are equal in the first"):
        rsa(x, normal(n, 3))


def test_orthogonal_rows_of_unequal_size_hold_rounding_only_off_the_diagonal():
    for seed in range(20):
        x = normal(100, 1, seed) * torch.linalg.qr(normal(100, 100, seed))[0]
        stats = pair_stats(x, normal(100, 3))
        assert 0 < stats.cka < 1
        for measure in ("cka_debiased", "rsa"):
            with pytest.raises(FastclError, match="is undefined"):
                getattr(stats, measure)


def test_too_few_samples():
    with pytest.raises(FastclError, match="n >= 4 samples.*got n=3"):
        linear_cka(normal(3, 5), normal(3, 4, seed=1), debiased=True)
    with pytest.raises(FastclError, match="n >= 3 samples.*got n=2"):
        rsa(normal(2, 5), normal(2, 4, seed=1))
    with pytest.raises(FastclError, match=r"CKA \(linear kernel, n=1\) is undefined"):
        linear_cka(normal(1, 5), normal(1, 4))
    with pytest.raises(FastclError, match=r"at least one row, got shapes \(0, 5\) and \(0, 4\)"):
        linear_cka(normal(0, 5), normal(0, 4))
    with pytest.raises(FastclError, match=r"no features were added for \('a', 'b'\): n=0"):
        PairAccumulator(["a", "b"]).compute()


def test_a_zero_row_is_the_zero_vector_of_the_cosine_kernel():
    x, y = normal(10, 4), normal(10, 4, seed=1)
    x[3] = 0
    unit = x / torch.where(x.norm(dim=1) > 0, x.norm(dim=1), 1.0)[:, None]
    unit_y = y / y.norm(dim=1, keepdim=True)
    assert pair_stats(x, y, "cosine").cka == pytest.approx(pair_stats(unit, unit_y, "linear").cka, rel=1e-12)
    assert rsa(x, y) == pytest.approx(pair_stats(unit, unit_y, "linear").rsa, rel=1e-12)


def test_features_of_any_finite_size():
    x, y = normal(20, 4), normal(20, 6, seed=1)
    for scale in (1e-300, 1e-40, 1e40, 1e300):
        assert rsa(scale * x, y / scale) == pytest.approx(rsa(x, y), rel=1e-9)
    for scale in (1e-60, 1e60):
        assert linear_cka(scale * x, y / scale) == pytest.approx(linear_cka(x, y), rel=1e-9)
        assert linear_cka(scale * x, scale * y) == pytest.approx(linear_cka(x, y), rel=1e-9)
    with pytest.raises(FastclError, match="linear Gram matrices are not finite"):
        linear_cka(1e120 * x, y)


def test_bad_features_name_the_model_and_leave_the_sums_alone():
    accumulator = PairAccumulator(["cl", "nscl"])
    good = {"cl": normal(6, 3), "nscl": normal(6, 2, seed=1)}
    accumulator.update(good)
    before = accumulator.compute()
    broken = normal(5, 3)
    broken[2, 1] = float("nan")
    infinite = normal(5, 2)
    infinite[4, 0] = float("inf")
    widths = r"from \{'cl': 3, 'nscl': 2\} to \{'cl': 3, 'nscl': 4\} at sample 6"
    cases = [
        ({"cl": broken, "nscl": normal(5, 2)}, r"'cl' are not finite: first in row 2 of 5 of this batch, sample 8"),
        ({"cl": normal(5, 3), "nscl": infinite}, r"'nscl' are not finite: first in row 4 of 5 .*, sample 10"),
        ({"cl": normal(5, 3), "nscl": normal(4, 2)}, r"the same number of rows, got \{'cl': 5, 'nscl': 4\}"),
        ({"cl": normal(5, 3), "nscl": normal(5, 4)}, widths),
        ({"cl": normal(5, 3)}, r"missing \['nscl'\], unknown \[\]"),
        ({**good, "ce": normal(6, 3)}, r"missing \[\], unknown \['ce'\]"),
        ({"cl": normal(5, 3), "nscl": normal(5, 2)[0]}, r"'nscl' must have shape \(b, d\) with d >= 1, got \(2,\)"),
        ({"cl": normal(5, 3), "nscl": normal(5, 0)}, r"got \(5, 0\)"),
        ({"cl": normal(5, 3).long(), "nscl": normal(5, 2)}, r"'cl' must be a dense .* tensor, got torch.int64"),
        ({"cl": normal(5, 3).tolist(), "nscl": normal(5, 2)}, r"'cl' must be a dense .* tensor, got list$"),
        ({"cl": normal(5, 3).numpy(), "nscl": normal(5, 2)}, r"tensor, got ndarray; convert it with torch.from_numpy"),
    ]
    for features, message in cases:
        with pytest.raises(FastclError, match=message):
            accumulator.update(features)
        assert accumulator.compute() == before


def test_bad_arguments():
    for names in ([], ["a"], ["a", "b", "a"]):
        with pytest.raises(FastclError, match="at least two distinct model names"):
            PairAccumulator(names)
    for bad in (["linear", "rbf"], [], ["cosine", "cosine"]):
        with pytest.raises(
            FastclError, match=r"kernels must be distinct kernels from \('linear', 'cosine', 'correlation'\)"
        ):
            PairAccumulator(["a", "b"], bad)
    with pytest.raises(FastclError, match="route must be 'auto', 'features' or 'tiles', got 'fast'"):
        pair_stats(normal(5, 2), normal(5, 2), route="fast")
    with pytest.raises(FastclError, match="route 'features' supports the kernels .*; 'rbf' needs route 'tiles'"):
        pair_stats(normal(5, 2), normal(5, 2), "rbf", route="features")
    with pytest.raises(FastclError, match="bandwidth must be a positive number.* got 0"):
        pair_stats(normal(5, 2), normal(5, 2), "rbf", bandwidth=0)
    with pytest.raises(FastclError, match="no scale for y: the median distance between its 9 samples is 0"):
        pair_stats(normal(9, 2), normal(9, 2) * (torch.arange(9) > 6)[:, None], "rbf")
    with pytest.raises(FastclError, match=r"kernel must be 'linear', .* or 'rbf', got 'poly'"):
        pair_stats(normal(5, 2), normal(5, 2), kernel="poly")
    sums = GramSums(*[1.0] * 8)
    with pytest.raises(FastclError, match="n >= 1 samples, got n=0"):
        PairStats(0, "linear", sums, sums)
    with pytest.raises(FastclError, match="not finite"):
        PairStats(5, "linear", GramSums(float("nan"), *[1.0] * 7), sums)


def test_a_shift_changes_no_measure():
    """Sums of the plain Gram matrices (shift 0) and of shifted ones describe the same pair."""
    x, y = normal(15, 4), normal(15, 6, seed=1)

    def sums(k, other):
        rows, columns = k.sum(1), other.sum(1)
        products = [(k * other).sum(), (k * k).sum(), (other * other).sum()]
        products += [rows @ columns, rows @ rows, columns @ columns, k.sum(), other.sum()]
        return GramSums(*[float(value) for value in products])

    def stats(shift_k, shift_l):
        k, other, off = x @ x.T - shift_k, y @ y.T - shift_l, 1 - torch.eye(15, dtype=torch.float64)
        return PairStats(15, "linear", sums(k, other), sums(k * off, other * off), shift_k, shift_l)

    plain, shifted, streamed = stats(0.0, 0.0), stats(0.8, -2.0), pair_stats(x, y)
    for measure in ("cka", "cka_debiased", "rsa", "drift", "drift_centered", "rho", "r"):
        assert getattr(shifted, measure) == pytest.approx(getattr(plain, measure), rel=1e-10)
        assert getattr(streamed, measure) == pytest.approx(getattr(plain, measure), rel=1e-10)


def test_gradients_and_inference_mode_are_of_no_concern():
    x = normal(8, 3).requires_grad_()
    accumulator = PairAccumulator(["a", "b"])
    accumulator.update({"a": x, "b": x * 2})
    with torch.inference_mode():
        accumulator.update({"a": x * 1, "b": x * 2})
    accumulator.update({"a": x, "b": x * 2})
    assert accumulator.compute()["a", "b"].linear.cka == pytest.approx(1.0, abs=1e-12)
    assert accumulator.n == 24


@pytest.mark.parametrize(("call", "message"), [
    (lambda: PairAccumulator("ab"), "names must be a sequence of strings, got 'ab'"),
    (lambda: PairAccumulator([["a"], ["b"]]), "names must be a sequence of strings"),
    (lambda: PairAccumulator(["a", "b"], "linear"), "kernels must be a sequence of strings, got 'linear'"),
    (lambda: PairAccumulator(["a", "b"]).merge("x"), "other must be a PairAccumulator, got str"),
    (lambda: PairAccumulator(["a", "b"]).load_state_dict(None), "state_dict of a PairAccumulator, got NoneType"),
])  # fmt: skip
def test_what_is_no_name_accumulator_or_state(call, message):
    with pytest.raises(FastclError, match=message):
        call()


def test_rows_that_wait_are_refused_before_anything_is_added():
    x, y = normal(700, 5), normal(700, 4)
    accumulator = PairAccumulator(["a", "b"])
    accumulator.update({"a": x[:100], "b": y[:100]})
    before = accumulator.compute()
    with fastcl.backend("triton"), pytest.raises(FastclError, match="does not support float64"):
        accumulator.update({"a": x[100:].float(), "b": y[100:].float()})
    assert accumulator.n == 100 and accumulator.compute() == before
