"""One threshold and one wording for what holds nothing but rounding, and what is undefined ends none of the rest."""

import pytest
import torch

from fastcl import FastclError, twin_stats
from fastcl.similarity import PairAccumulator, pair_stats, spearman_rsa

BOTH = ("cka", "rho", "cka_bound", "cka_bound_tight")
PAIRS = ("rsa", "r", "rsa_bound", "rsa_bound_tight")


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reasons(stats, measures):
    """Why measures are undefined, without their names; None for one that has a value."""
    found = []
    for measure in measures:
        try:
            getattr(stats, measure)
            found.append(None)
        except FastclError as error:
            found.append(str(error).partition(" is undefined: ")[2])
    return found


CONSTANT = {
    "a point": lambda z: z * 0 + 0.1, "zero": lambda z: z * 0, "1e-15 about 10": lambda z: z * 1e-15 + 10,
    "1e-5 about 100": lambda z: (100 + 1e-5 * z).float().double(), "1e-8 about 1": lambda z: 1 + 1e-8 * z,
}  # fmt: skip


@pytest.mark.parametrize("kind", CONSTANT)
@pytest.mark.parametrize("kernel", ["linear", "cosine"])
@pytest.mark.parametrize("route", ["features", "tiles"])
def test_what_certifies_a_measure_is_undefined_with_it(kind, kernel, route):
    x, y = normal(30, 4), CONSTANT[kind](normal(30, 4, 1))
    for pair, which in ((x, y), "second"), ((y, x), "first"):
        stats = pair_stats(*pair, kernel, route=route)
        for measures in (BOTH, PAIRS):
            found = reasons(stats, measures)
            assert len(set(found)) == 1, found
            assert found[0] is None or which in found[0]
        assert reasons(stats, BOTH)[0] is not None and stats.drift > 0


def test_a_tiny_model_against_itself_far_away_certifies_nothing():
    x = normal(40, 3) * 1e-15
    stats = pair_stats(x, x + 10)
    for measure in (*BOTH, *PAIRS):
        with pytest.raises(FastclError, match="of distinct samples are equal in the second|constant over the samples"):
            getattr(stats, measure)
    twins = pair_stats(x, x * 1)
    assert twins.rho == twins.r == 0 and twins.cka_bound == twins.rsa_bound == twins.cka == 1


@pytest.mark.parametrize("kernel", ["linear", "cosine"])
def test_rank_correlation_is_refused_where_the_linear_one_is(kernel):
    x, y = normal(30, 4), normal(1, 4).expand(30, 4)
    for pair, which in ((x, y), "second"), ((y, x), "first"):
        message = f"is undefined: all similarities of distinct samples are equal in the {which} representation"
        for bins in (None, 16):
            with pytest.raises(FastclError, match=message):
                spearman_rsa(*pair, kernel, bins)
        with pytest.raises(FastclError, match=message):
            _ = pair_stats(*pair, kernel).rsa


def test_twins_of_which_one_has_collapsed():
    z, ids = normal(32, 8), torch.arange(16).repeat(2)
    pairs = twin_stats(z, z * 0 + 1, ids, temperature=0.5).pairs()
    for measure in (*BOTH, *PAIRS, "cka_debiased"):
        with pytest.raises(FastclError, match="second representation"):
            getattr(pairs, measure)


def minibatches(models, size, cuts=()):
    """Accumulators of consecutive batches, a new one from each of the cuts on."""
    n, found = len(next(iter(models.values()))), []
    for start in range(0, n, size):
        if start == 0 or start in cuts:
            found.append(PairAccumulator(list(models), ("linear",), minibatch=True))
        found[-1].update({name: x[start : start + size] for name, x in models.items()})
    return found


@pytest.mark.parametrize("kind", CONSTANT)
def test_minibatch_cka_names_the_batch_that_is_constant(kind):
    models = {"a": normal(48, 4), "b": normal(48, 3, 1), "c": normal(48, 4, 2)}
    whole = minibatches(models, 12)[0].compute()
    models["c"] = models["c"].clone()
    models["c"][24:] = CONSTANT[kind](models["c"][24:])
    (one,) = minibatches(models, 12)
    first, second = minibatches(models, 12, (36,))
    resumed = PairAccumulator(list(models), ("linear",), minibatch=True)
    resumed.load_state_dict(first.state_dict())
    first.merge(second)
    resumed.merge(second)
    with pytest.raises(FastclError, match="batch 0 of 1: minibatch CKA is undefined"):
        _ = second.compute()["a", "c"].cka_minibatch
    for accumulator in (one, first, resumed):
        result = accumulator.compute()
        for pair in (("a", "c"), ("b", "c")):
            message = "batch 2 of 4: minibatch CKA is undefined: HSIC_1 of the second .* not above its rounding error"
            with pytest.raises(FastclError, match=message):
                _ = result[pair].cka_minibatch
        assert result["a", "b"].cka_minibatch == pytest.approx(whole["a", "b"].cka_minibatch, rel=1e-12)


def test_an_overflow_ends_its_own_pair_alone():
    models = {"a": normal(48, 4), "b": normal(48, 3, 1), "c": normal(48, 4, 2) * 1e120}
    accumulator = PairAccumulator(list(models), ("linear", "cosine"), minibatch=True)
    for start in range(0, 48, 12):
        accumulator.update({name: x[start : start + 12] for name, x in models.items()})
    result = accumulator.compute()
    alone = pair_stats(models["a"], models["b"])
    assert result["a", "b"].linear == alone and -1 < result["a", "b"].cka_minibatch < 1
    assert result["a", "c"].cosine.cka == pair_stats(models["a"], models["c"], "cosine").cka
    for measure in (*BOTH, *PAIRS, "cka_debiased", "drift", "drift_centered"):
        with pytest.raises(FastclError, match="sums of the linear Gram matrices are not finite"):
            getattr(result["a", "c"].linear, measure)
    with pytest.raises(FastclError, match="batch 0 of 4: sums of the linear Gram matrices are not finite"):
        _ = result["b", "c"].cka_minibatch
    assert "cka=undefined" in repr(result["b", "c"].linear)
