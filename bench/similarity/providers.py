"""The ways to compute pair statistics that the benchmark compares, with their costs and requirements.

A measure of `plain.MEASURES` is one number for two models. A provider returns, for each of its measures, the values of
all pairs of models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor

import fastcl
from bench.harness import suite
from bench.harness.ceilings import Ceilings
from bench.similarity import peers, plain
from bench.similarity.inputs import Case, Features
from fastcl.similarity.sums.routes import choose_route

# Absolute errors of measures between -1 and 1, on GATE rows.
TOLERANCES = {"fp64": 1e-9, "fp32": 1e-4, "tf32": 1e-2}
GATE = 400

Found: TypeAlias = dict[str, list[float]]


@dataclass(frozen=True)
class Provider(suite.Provider):
    """One way to compute measures.

    Args:
        measures: the measures it computes; keys of `bench.similarity.plain.MEASURES`.
        floats: from a case, peak memory beyond the features in float32 values, measured or counted.
        work: from a case, floating-point operations of its matrix products.
        note: added to the measures in its label.
        dense: whether it forms whole Gram matrices; the others are compared with these.
    """

    measure: Callable[[Features], Found]
    measures: tuple[str, ...]
    floats: Callable[[Case], float]
    work: Callable[[Case], float]
    note: str = ""
    dense: bool = False

    @property
    def label(self) -> str:
        """Description of what it computes."""
        return (", ".join(self.measures) or "nothing") + (f" ({self.note})" if self.note else "")


def _pairwise(function: Callable[[Tensor, Tensor], dict[str, float]], features: Features) -> Found:
    found: Found = {}
    for x, y in combinations(features.whole(), 2):
        for name, value in function(x, y).items():
            found.setdefault(name, []).append(value)
    return found


def _pair_stats(kernel: str, route: str, x: Tensor, y: Tensor) -> dict[str, float]:
    return _values(fastcl.pair_stats(x, y, kernel, route=route), kernel)


def _values(stats: fastcl.PairStats, kernel: str) -> dict[str, float]:
    if kernel == "linear":
        return {"CKA": stats.cka, "debiased CKA": stats.cka_debiased}
    if kernel == "rbf":
        return {"RBF CKA": stats.cka}
    return {"RSA" if kernel == "cosine" else "correlation RSA": stats.rsa}


def _accumulated(kernels: tuple[str, ...], features: Features) -> Found:
    names = [f"model {k}" for k in range(features.case.models)]
    accumulator = fastcl.PairAccumulator(names, kernels=kernels)
    for batch in features.batches():
        accumulator.update(dict(zip(names, batch, strict=True)))
    found: Found = {}
    result = accumulator.compute()
    for pair in combinations(names, 2):
        for kernel in kernels:
            for name, value in _values(getattr(result[pair], kernel), kernel).items():
                found.setdefault(name, []).append(value)
    return found


def _dense(dtype: torch.dtype, functions: tuple[Callable[..., Found], ...], features: Features) -> Found:
    models = [x.to(dtype) for x in features.whole()]
    return {name: values for function in functions for name, values in function(models).items()}


def _moments(dtype: torch.dtype, features: Features) -> Found:
    return plain.feature_moments(features.batches(), dtype)


def _in(precision: str, measure: Callable[..., Found], *args: object) -> dict[str, Any]:
    """The fields of a provider that calls `measure` with the dtype of a precision and `args`."""
    call = partial(measure, torch.float64 if precision == "fp64" else torch.float32, *args)
    if precision == "tf32":
        return {"measure": partial(_tf32, call), "precision": precision, "devices": ("cuda",)}
    return {"measure": call, "precision": precision}


def _tf32(measure: Callable[[Features], Found], features: Features) -> Found:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return measure(features)
    finally:
        torch.set_float32_matmul_precision(before)


def _drawn(features: Features) -> Found:
    for _ in features.batches():
        pass
    return {}


def _published(x: Tensor, y: Tensor) -> dict[str, float]:
    x, y = x.float(), y.float()
    return {"CKA": plain.published_cka(x, y), "RSA": plain.published_rsa(x, y)}


def feature_work(case: Case) -> float:
    """Floating-point operations of one product X'Y for each pair of models, including a model with itself."""
    return 2 * case.n * case.d**2 * (case.pairs + case.models)


def least(case: Case, kernels: Collection[str], ceilings: Ceilings) -> tuple[float, float | None]:
    """Lower bounds on the work and time of the measures of some kernels, for all pairs of a case.

    Kernels that are inner products of rows need either, per kernel, X'Y of every pair of models and half of each X'X,
    or half of each Gram matrix (n n d), which serves all kernels. Gaussian kernels need the latter and n n / 2
    exponentials. The features are read once.

    Returns:
        Floating-point operations of the products, and the time in ms of the slowest of products, exponentials and
        memory, which can overlap; None if there are no kernels.
    """
    if not kernels:
        return 0, None
    n, d, models = case.n, case.d, case.models
    gram, gaussian = models * n**2 * d, "rbf" in kernels
    products = gram if gaussian else min(gram, len(set(kernels)) * n * d**2 * (2 * case.pairs + models))
    size = models * n * d * getattr(torch, case.dtype).itemsize
    return products, ceilings.slowest_ms(products, gaussian * models * n**2 / 2, size)


def _dense_work(case: Case) -> float:
    return 2 * case.n**2 * (case.d * case.models + case.pairs + case.models)


def _route_work(route: str, case: Case) -> float:
    if choose_route(case.n, (case.d, case.d), "linear", route) == "features":
        return case.pairs * 6 * case.n * case.d**2
    return case.pairs * 2 * case.n**2 * case.d  # half of the tiles of both matrices


def _pairs_work(case: Case) -> float:
    """Floating-point operations of both Gram matrices of each pair."""
    return case.pairs * 4 * case.n**2 * case.d


def _published_work(case: Case) -> float:
    m = min(case.n, plain.SUBSAMPLE)
    return _pairs_work(case) + case.pairs * (6 * m**3 + 4 * m**2 * case.d)


def _features_floats(case: Case) -> float:
    """Memory of one kernel: float64 moments and chunks of rows."""
    return 2 * (case.d + 2) ** 2 * (case.pairs + case.models) + 12 * 1024 * case.d * case.models


def _route_floats(case: Case) -> float:
    gathered = case.n * case.d * case.models if case.chunk else 0
    return 8 * case.n * case.d + 8 * 1024**2 + _features_floats(case) + gathered


def _matrices(count: float, width: int, case: Case) -> float:
    """Memory of `count` n x n matrices per model and twice the features, in values of `width` times 4 bytes; plus the
    features once if they are drawn on the fly."""
    rows = case.n * case.d * case.models
    return width * (count * case.n**2 * case.models + 2 * rows) + (rows if case.chunk else 0)


def _pair_matrices(count: float, width: int, case: Case) -> float:
    return _matrices(count, width, replace(case, models=2))


def _fastcl(name: str, kernel: str, measures: tuple[str, ...], route: str = "auto") -> Provider:
    work = partial(_route_work, "tiles" if kernel == "rbf" else route)
    return Provider(name, partial(_pairwise, partial(_pair_stats, kernel, route)), measures, _route_floats, work)


def _accumulator(name: str, kernels: tuple[str, ...], measures: tuple[str, ...]) -> Provider:
    count = len(kernels)
    return Provider(name, partial(_accumulated, kernels), measures, lambda case: count * _features_floats(case),
        lambda case: count * feature_work(case))  # fmt: skip


def _gram(precision: str, functions: tuple[Callable, ...], measures: tuple[str, ...], suffix: str = "") -> Provider:
    floats = partial(_matrices, 1.1, 2 if precision == "fp64" else 1)
    return Provider(f"dense Gram {precision}{suffix}", measures=measures, floats=floats, dense=True,
        work=lambda case: len(functions) * _dense_work(case), **_in(precision, _dense, functions))  # fmt: skip


def _moment_floats(case: Case) -> float:
    return 4 * (case.chunk or case.n) * case.d * case.models + 2 * _features_floats(case)


_CKAS = ("CKA", "debiased CKA")
_ALL = (*_CKAS, "RSA")
_BOTH = (plain.dense_linear, plain.dense_cosine)
ALL_THREE = "fastcl PairAccumulator"
DRAWN = "drawing the features alone"

PROVIDERS = (
    _accumulator(ALL_THREE, ("linear", "cosine"), _ALL),
    _accumulator("fastcl PairAccumulator (3 kernels)", ("linear", "cosine", "correlation"), (*_ALL, "correlation RSA")),
    _fastcl("fastcl linear", "linear", _CKAS),
    _fastcl("fastcl linear (features)", "linear", _CKAS, "features"),
    _fastcl("fastcl linear (tiles)", "linear", _CKAS, "tiles"),
    _fastcl("fastcl cosine", "cosine", ("RSA",)),
    _fastcl("fastcl correlation", "correlation", ("correlation RSA",)),
    _fastcl("fastcl rbf", "rbf", ("RBF CKA",)),
    *(_gram(p, functions, measures, suffix) for p in ("fp32", "tf32")
      for functions, measures, suffix in ((_BOTH, _ALL, ""), (_BOTH[:1], _CKAS, " (linear)"),
                                          (_BOTH[1:], ("RSA",), " (cosine)"))),
    _gram("fp64", _BOTH, _ALL),
    _gram("fp32", (plain.dense_rbf,), ("RBF CKA",), " (rbf)"),
    *(Provider(f"X'Y {p}", measures=("CKA",), floats=_moment_floats, work=feature_work, **_in(p, _moments))
      for p in ("fp32", "tf32", "fp64")),
    Provider("authors' formulation", partial(_pairwise, _published), ("CKA", "RSA"), partial(_pair_matrices, 3.5, 1),
        _published_work, f"CKA of at most {plain.SUBSAMPLE:,} rows"),
    Provider("torch-cka", partial(_pairwise, peers.torch_cka), _CKAS[1:], partial(_pair_matrices, 1.6, 1),
        lambda case: _pairs_work(case) + case.pairs * 6 * case.n**3, "one batch of n rows", module="torch_cka",
        package="torch-cka", ours=False),
    *(Provider(name, partial(_pairwise, partial(peers.ckatorch, debiased)), (_CKAS[debiased],),
        partial(_pair_matrices, 3.5, 2), _pairs_work, precision="fp64", module="ckatorch", package="ckatorch",
        ours=False)
      for name, debiased in (("ckatorch", False), ("ckatorch unbiased", True))),
    Provider("rsatoolbox", partial(_pairwise, peers.rsatoolbox), ("correlation RSA",), partial(_pair_matrices, 2.0, 2),
        _pairs_work, precision="fp64", devices=("cpu",), module="rsatoolbox", package="rsatoolbox", ours=False),
    Provider(DRAWN, _drawn, (), lambda case: 0, lambda case: 0),
)  # fmt: skip
PACKAGES = ("triton", *(p.package for p in PROVIDERS if p.package))
