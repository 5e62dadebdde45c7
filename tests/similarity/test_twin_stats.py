"""Two models in one pass: row statistics and gradients, and the measures of both Gram matrices, on every backend."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from reference import assert_gradients, assert_rows, assert_temperature, masks, normal, solve, unit_rows
from test_rowstats import FIELDS, expected, integers, uniform
from torch import Tensor
from triton_runs import DEVICE, few_programs, launches, tiles, uneven_batch, workspace  # noqa: F401

import fastcl
from fastcl import FastclError, PairStats, TwinStats
from fastcl.rowstats.pair_sums import PairSums

pytestmark = pytest.mark.usefixtures("few_programs")
MEASURES = ("cka", "cka_debiased", "rsa", "drift", "drift_centered", "rho", "r", "cka_bound", "rsa_bound_tight")
BACKENDS = ("dense", "chunked", "triton")
# Of measures against float64. On the torch backends products are float32 where both models are and have one width.
# Cosines of half-precision rows are those of slightly different rows.
ERRORS = {"float64": 1e-10, "float32": 3e-7, "triton": 2e-6, "fp16": 1e-3}


def error_of(backend: str, za: Tensor, zb: Tensor) -> float:
    """Allowed error of measures in full precision."""
    if backend == "triton":
        return ERRORS["triton"]
    return ERRORS["float32" if za.dtype == torch.float32 and za.shape == zb.shape else "float64"]


@contextmanager
def on(backend: str):
    """On a backend; yields the launches of the Triton one."""
    with ExitStack() as stack:
        yield stack.enter_context(launches() if backend == "triton" else fastcl.backend(backend))


def run(backend: str, *given: Tensor | None, **options) -> TwinStats:
    """`twin_stats` on a backend and its device."""
    place = DEVICE if backend == "triton" else "cpu"
    moved = [None if v is None else v.to(place) for v in given]
    with on(backend):
        return fastcl.twin_stats(*moved, **options)


def measures(za: Tensor, zb: Tensor) -> dict[str, float]:
    """By their definitions, from n x n float64 matrices."""
    n = len(za)
    k, l = (u @ u.T for u in (unit_rows(z.double()) for z in (za, zb)))  # noqa: E741
    h, off = torch.eye(n).double() - 1 / n, 1 - torch.eye(n).double()
    kc, lc, kh, lh = h @ k @ h, h @ l @ h, k * off, l * off

    def hsic1(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.sum(0) @ b.sum(0))

    def ratio(f) -> float:
        return float(f[0] / (f[1] * f[2]).sqrt())

    i, j = torch.triu_indices(n, n, 1)
    pairs = torch.stack([k[i, j], l[i, j]])
    rho = float((kc - lc).norm() / kc.norm())
    r = float((kh - lh).norm() / ((n * (n - 1)) ** 0.5 * pairs[0].std(correction=0)))
    return {
        "cka": ratio([(kc * lc).sum(), kc.square().sum(), lc.square().sum()]),
        "cka_debiased": ratio([hsic1(kh, lh), hsic1(kh, kh), hsic1(lh, lh)]),
        "rsa": float(torch.corrcoef(pairs)[0, 1]),
        "drift": float((k - l).norm()),
        "drift_centered": float((kc - lc).norm()),
        "rho": rho,
        "r": r,
        "cka_bound": max(0.0, (1 - rho) / (1 + rho)),
        "rsa_bound_tight": (1 - r * r) ** 0.5 if r < 1 else -1.0,
    }


def close(pairs: PairStats, za: Tensor, zb: Tensor, error: float, *names: str) -> None:
    want = measures(za, zb)
    for name in names or MEASURES:
        assert getattr(pairs, name) == pytest.approx(want[name], rel=error, abs=error), name


def related(n: int, da: int, db: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rows of two models, float32, with a part in common, so that no measure is at 0 or 1; each has a zero row."""
    shared = normal(n, 4, seed=9)
    za, zb = (shared @ normal(4, d, seed=d) + noise * normal(n, d, seed=k) for k, d in enumerate((da, db), 1))
    za[3], zb[-1] = 0, 0
    return za.float(), zb.float()


def ids(kind: str, n: int) -> tuple[Tensor, Tensor | None]:
    if kind == "two views":
        return torch.arange(n) % (n // 2), None
    sample, labels = (v[:n] for v in uneven_batch(2 * n))
    return sample, labels if kind == "classes" else torch.full_like(labels, -1)


CASES = (  # rows, widths, ids, temperature, precision
    (131, 24, 300, "classes", 0.2, "fp32"),
    (70, 8, 24, "two views", 0.01, "fp32"),
    (200, 24, 24, "unlabelled", torch.tensor(0.1), "fp32"),
    (131, 24, 24, "classes", torch.tensor([0.005]), "fp32"),
    (131, 24, 48, "classes", 0.5, "fp16"),
    (200, 48, 24, "two views", torch.tensor(0.3), "fp16"),
)


def weighted(stats, m, weights: dict[str, Tensor]) -> Tensor:
    """(N,) weighted sum of the fields, without those of empty relations."""
    rows = 0
    for field, weight in weights.items():
        value, empty = getattr(stats, field), ~getattr(m, field.split("_")[1]).any(1)
        rows = rows + weight.to(value.device) * value.masked_fill(empty.to(value.device), 0)
    return rows


@pytest.mark.parametrize(
    ("backend", "n", "da", "db", "kind", "temperature", "precision"),
    # The torch backends take no precision.
    [(backend, *case) for backend in BACKENDS for case in CASES if case[-1] == "fp32" or backend == "triton"],
)
def test_rows_gradients_and_pairs(backend, n, da, db, kind, temperature, precision) -> None:
    """Row statistics against their formulas and against separate calls, the measures against n x n matrices."""
    z, (sample, labels) = related(n, da, db), ids(kind, n)
    m = masks(sample, labels)
    sides = [{f: uniform(n, k + seed) + 0.1 for k, f in enumerate(FIELDS)} for seed in (0, 20)]
    results = []
    for together in (True, False):
        place = DEVICE if backend == "triton" else torch.device("cpu")
        leaves = [v.to(place, copy=True).requires_grad_() for v in z]
        t = temperature
        if isinstance(t, Tensor):
            t = t.to(place, copy=True).requires_grad_()
            leaves.append(t)
        given = [None if v is None else v.to(place) for v in (sample, labels)]
        options = {"temperature": t, "precision": precision}
        with on(backend):
            if together:
                twins = fastcl.twin_stats(*leaves[:2], *given, **options)
                stats = twins.a, twins.b
                assert fastcl.last_backend() == backend
            else:
                stats = [fastcl.row_stats(v, sample=given[0], labels=given[1], **options) for v in leaves[:2]]
            rows = [weighted(s, m, w) for s, w in zip(stats, sides, strict=True)]
            results.append((stats, torch.autograd.grad(sum(v.sum() for v in rows), leaves), rows))
    (stats, grads, rows), (separate, wanted, _) = results
    for one, other in zip(stats, separate, strict=True):
        for field in (*FIELDS, "n_view", "n_peer", "n_other"):
            got, want = getattr(one, field), getattr(other, field)
            # The order of sums is that of the tiles' sizes; in half precision its effect is far below the rounding.
            assert torch.equal(got, want) if backend != "triton" else torch.allclose(got, want, rtol=3e-6, atol=3e-5)
    for got, want in zip(grads[:2], wanted[:2], strict=True):
        assert torch.equal(got, want) if backend != "triton" else (got - want).norm() < 3e-5 * want.norm()

    truths = []
    for v, w in zip(z, sides, strict=True):
        truths.append(solve(lambda s, w=w: sum(w[f].double() * expected(f, s, m) for f in FIELDS), v,
            float(temperature), weights=torch.ones(n)))  # fmt: skip
    bounds = "fp16" if precision == "fp16" else torch.float32 if backend != "triton" else "fp32"
    for row, grad, truth in zip(rows, grads, truths, strict=False):
        assert_rows(row.cpu(), truth, bounds)
        assert_gradients([grad.cpu()], truth, bounds)
    if isinstance(temperature, Tensor):
        names = ("grad_temperature", "temperature_scale", "temperature_blur")
        both = replace(truths[0], **{name: sum(getattr(truth, name) for truth in truths) for name in names})
        assert grads[2].shape == temperature.shape
        assert_temperature(grads[2].cpu(), both, bounds)
    assert not twins.sums.requires_grad and twins.sums.dtype == torch.float64 and twins.sums.device == place
    close(twins.pairs(), *z, ERRORS["fp16"] if precision == "fp16" else error_of(backend, *z))


@pytest.mark.parametrize(("n", "width"), ((1100, 24), (200, 40)))  # width: of the second model
@pytest.mark.parametrize("lowered", (False, True))
def test_narrow_products_on_the_torch_backends(n: int, width: int, lowered: bool) -> None:
    """Float32 whatever autocast says, by products in float32 where both models have one width."""
    za, zb = related(n, 24, width)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lowered):
        found = run("chunked", za, zb, torch.arange(n), temperature=0.5)
    assert (found.rounding > 0) == (width == 24)
    close(found.pairs(), za, zb, error_of("chunked", za, zb))


@pytest.mark.parametrize("spread", (1e-1, 1e-2, 1e-4))
@pytest.mark.parametrize("swapped", (False, True))
def test_a_model_far_less_spread_than_the_other_keeps_its_digits(spread: float, swapped: bool) -> None:
    za, zb = related(200, 24, 24)
    za = za.double()[0] + spread * za.double()  # as float32 these would be other rows
    given = [z.double() for z in ((zb, za) if swapped else (za, zb))]
    want = fastcl.pair_stats(*given, "cosine", route="tiles")  # n x n matrices would leave no digits
    sums = PairSums.of_rows(*(unit_rows(z) for z in given), narrow=True).packed()
    found = PairStats.unpacked(200, "cosine", sums.tolist(), 2.0**-20)
    for name in MEASURES[:5]:
        assert getattr(found, name) == pytest.approx(getattr(want, name), rel=1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", (24, 40))  # of the second model
def test_measures_keep_their_digits_where_all_cosines_are_near_one(backend: str, width: int) -> None:
    """Cosines between 0.999 and 1. In half precision the entry of 1 is rounded, to which centred measures are blind."""
    n = 200
    za, zb = (0.01 * v for v in related(n, 24, width))
    za[:, 0] += 1
    zb[:, 0] += 1
    sample = torch.arange(n)
    error = 2e-3 if backend == "triton" else 1e-6 if width == 24 else 1e-8
    close(run(backend, za, zb, sample, temperature=0.5).pairs(), za, zb, error)
    if backend == "triton":
        found = run(backend, za, zb, sample, sample % 5, temperature=0.5, precision="fp16").pairs()
        close(found, za, zb, 1e-2, "cka", "cka_debiased")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ("fp32", "fp16"))
@pytest.mark.parametrize(("n", "d"), ((131, 24), (70, 300)))  # features and matrices on the torch backends
def test_equal_models_agree_exactly(backend: str, precision: str, n: int, d: int) -> None:
    z, _ = related(n, d, 4)
    sample, labels = ids("classes", n)
    for other in (z, z.clone()):
        pairs = run(backend, z, other, sample, labels, temperature=0.1, precision=precision).pairs()
        assert pairs.cka == pairs.cka_debiased == pairs.rsa == 1.0
        assert pairs.drift == pairs.drift_centered == pairs.rho == pairs.r == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_drift_keeps_its_digits(backend: str) -> None:
    z, _ = related(131, 24, 4)  # as two models are that were trained alike
    other = z * (1 + 1e-4 * normal(131, 24, seed=7).float())
    found = run(backend, z, other, torch.arange(131), temperature=0.5).pairs()
    close(found, z, other, 1e-8 if backend != "triton" else 1e-4, "drift", "drift_centered", "rho", "r")
    assert 0 < found.drift < 1e-3 * found.full.kk**0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_model_has_no_correlation(backend: str) -> None:
    za, zb = normal(1, 24, seed=1).float().repeat(70, 1), normal(70, 8).float()
    for given in ((za, zb), (zb, za)):
        pairs = run(backend, *given, torch.arange(70), temperature=0.5).pairs()
        for name in ("cka", "rsa"):
            with pytest.raises(FastclError, match="is undefined"):
                getattr(pairs, name)
        close(pairs, *given, 2e-6, "drift", "drift_centered")


@pytest.mark.parametrize("backend", BACKENDS)
def test_orthogonal_rows_have_no_correlation_beside_the_diagonal(backend: str) -> None:
    za, zb = torch.eye(70), normal(70, 8).float()
    simplex = torch.eye(9) - 1 / 9  # cosines of -1/8 off the diagonal
    for given in ((za, zb), (zb, za), (simplex, normal(9, 9).float())):
        pairs = run(backend, *given, torch.arange(len(given[0])), temperature=0.5).pairs()
        for name in ("cka_debiased", "rsa"):
            with pytest.raises(FastclError, match="is undefined"):
                getattr(pairs, name)
        close(pairs, *given, 2e-6, "cka", "drift")


def test_small_tiles_in_many_waves() -> None:
    """Blocks of other sizes, sums carried from wave to wave, few rows beyond a block of 128."""
    z, (sample, labels) = related(131, 24, 70), ids("classes", 131)
    with tiles(32, 64), workspace(2**12):
        found = run("triton", *z, sample, labels, temperature=0.2)
    want = run("dense", *(v.double() for v in z), sample, labels, temperature=0.2)
    for field in FIELDS:
        for a, b in ((found.a, want.a), (found.b, want.b)):
            assert torch.allclose(getattr(a, field).cpu().double(), getattr(b, field), rtol=3e-6, atol=3e-6)
    close(found.pairs(), *z, ERRORS["triton"])


def test_each_model_has_its_own_flag() -> None:
    """Two samples in opposite places: exponentials of one model leave a shift's range, those of the other do not."""
    sample = integers(2, 12)
    za = torch.where(sample[:, None] == 0, 1.0, -1.0) + 0.05 * normal(12, 8).float()
    zb = 1 + 0.05 * normal(12, 8, seed=1).float()
    with launches() as ran:
        found = fastcl.twin_stats(za.to(DEVICE), zb.to(DEVICE), sample.to(DEVICE), temperature=0.01)
        flags = [one.arguments["flag"].item() for one in ran.of("forward_online_kernel")]
    assert flags == [1, 0] and [one.arguments["MASKED"] for one in ran.of("twin_kernel")] == [False, True]
    want = run("dense", za.double(), zb.double(), sample, temperature=0.01)
    for a, b in ((found.a, want.a), (found.b, want.b)):
        assert torch.allclose(a.lse_other.cpu().double(), b.lse_other, rtol=1e-6, atol=1e-4)
    close(found.pairs(), za, zb, 1e-3)
