"""Streaming pair statistics: splits, merges, interruptions and minibatches, against all samples at once."""

import io

import pytest
import torch
from gloo_ranks import ranks  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from test_similarity import MEASURES, check, features, reference

import fastcl
from fastcl.errors import FastclError
from fastcl.similarity import PairAccumulator, pair_stats
from fastcl.similarity.sums.features import NARROW_ROUNDING
from fastcl.similarity.sums.moments import CHUNK

KERNELS = ("linear", "cosine", "correlation")
ROWS = CHUNK["cpu"]


def fed(models, sizes, **arguments):
    """An accumulator that was given the models' rows in batches of these sizes, then the rest."""
    accumulator = PairAccumulator(list(models), **arguments)
    n = len(next(iter(models.values())))
    start = 0
    for size in (*sizes, n - sum(sizes)):
        accumulator.update({name: x[start : start + size] for name, x in models.items()})
        start += size
    return accumulator


def three(n, mean=0.0, seed=0):
    x, y = (z + mean for z in features(n, 6, 4, seed))
    return {"cl": x, "nscl": y, "ce": x.square()}


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(0, 1500), max_size=6), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_split_into_batches_changes_no_bit(sizes, dtype):
    n = sum(sizes) + 530
    models = {name: x.to(dtype) for name, x in three(n, 50.0).items()}
    assert fed(models, sizes).compute() == fed(models, [n]).compute()


def test_batches_that_are_overwritten_or_looked_at_midway_change_nothing():
    models = three(ROWS + 300)
    accumulator, buffer = PairAccumulator(list(models)), {name: x[:100].clone() for name, x in models.items()}
    for start in range(0, ROWS + 300, 100):
        rows = slice(start, min(start + 100, ROWS + 300))
        for name, x in models.items():
            buffer[name][: rows.stop - rows.start] = x[rows]
        accumulator.update({name: x[: rows.stop - rows.start] for name, x in buffer.items()})
        accumulator.compute()
    for x in buffer.values():
        x.fill_(1e9)
    assert accumulator.compute() == fed(models, []).compute()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_stream_gives_what_the_definitions_give(kernel):
    x, y = (z + 20.0 for z in features(90, 6, 11))
    result = fed({"a": x, "b": y}, [7, 40]).compute()
    assert result.n == 90 and getattr(result["a", "b"], kernel).kernel == kernel
    check(getattr(result["a", "b"], kernel), reference(x, y, kernel), rel=1e-9)


def test_only_the_kernels_that_were_asked_for_are_accumulated():
    result = fed(three(30), [10], kernels=("cosine",)).compute()
    pair = result["cl", "ce"]
    for read in (lambda: pair.linear, lambda: pair.correlation.rsa, lambda: pair.hsic1, lambda: pair.cka_minibatch):
        with pytest.raises(FastclError, match="was not accumulated"):
            read()
    table = result.matrix("cosine.rsa")
    assert table.dtype == torch.float64 and torch.equal(table, table.T) and table.diag().tolist() == [1, 1, 1]
    assert list(result) == [("cl", "nscl"), ("cl", "ce"), ("nscl", "ce")]
    assert table[0, 2] == result["cl", "ce"].cosine.rsa
    with pytest.raises(FastclError, match="linear kernel was not accumulated: .* was made with cosine"):
        result.matrix("linear.cka")
    for measure in ("cosine.kca", "nothing", "cosine.drift", "linear"):
        with pytest.raises(FastclError, match=f"measure must be 'linear.cka', .* or 'cka_minibatch', got '{measure}'"):
            result.matrix(measure)
    with pytest.raises(FastclError, match=r"no pair \('ce', 'cl'\): a pair is two of \('cl', 'nscl', 'ce'\)"):
        _ = result["ce", "cl"]
    with pytest.raises(FastclError, match="make the PairAccumulator with minibatch=True"):
        _ = result["cl", "nscl"].cka_minibatch


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 120), mean=st.sampled_from([0.0, 1e3]), seed=st.integers(0, 99))
def test_merged_accumulators_hold_all_samples(cut, mean, seed):
    models = three(120, mean, seed)
    whole = fed(models, []).compute()
    first, second = (fed({k: x[rows] for k, x in models.items()}, [10]) for rows in (slice(cut), slice(cut, None)))
    before = second.compute() if cut < 120 else None
    first.merge(second)
    merged = first.compute()
    assert merged.n == 120 and (before is None or second.compute() == before)
    for pair, result in whole.pairs.items():
        for kernel in KERNELS:
            expected = {m: getattr(getattr(result, kernel), m) for m in MEASURES}
            check(getattr(merged[pair], kernel), expected, rel=1e-9)


def test_the_rounding_of_narrow_features_goes_where_their_moments_go():
    models = three(40)
    narrow = fed({k: x.float() for k, x in models.items()}, [])
    wide = fed(models, [])
    assert wide.compute()["cl", "ce"].linear.rounding == 0
    wide.merge(narrow)
    resumed = PairAccumulator(list(models))
    resumed.load_state_dict(wide.state_dict())
    for accumulator in (narrow, wide, resumed):
        assert accumulator.compute()["cl", "ce"].linear.rounding == NARROW_ROUNDING


def test_an_update_that_is_refused_adds_nothing():
    models = three(ROWS + 100)
    accumulator = fed(models, [])
    before = accumulator.compute()
    with fastcl.backend("triton"), pytest.raises(FastclError, match="triton backend"):
        accumulator.update(models)  # float64
    with pytest.raises(FastclError, match="features must map the names"):
        accumulator.update(list(models.values()))
    assert accumulator.compute() == before
    with pytest.raises(FastclError, match="missing .*'streams'"):
        PairAccumulator(list(models)).load_state_dict({"names": []})


def test_without_a_process_group_there_is_nothing_to_put_together():
    accumulator = fed(three(30), [])
    before = accumulator.compute()
    accumulator.all_reduce()
    assert accumulator.compute() == before


def test_what_may_not_be_merged():
    models = three(30)
    accumulator = fed(models, [])
    others = {
        r"same names, got \['cl', 'nscl', 'ce'\] and \['cl', 'nscl'\]": fed({k: models[k] for k in ("cl", "nscl")}, []),
        r"same kernels, got .* and \['linear'\]": fed(models, [], kernels=("linear",)),
        "same minibatch, got False and True": fed(models, [], minibatch=True),
        r"same widths, got \{'cl': 6, .* and \{'cl': 5": fed(models | {"cl": models["cl"][:, :5]}, []),
    }
    before = accumulator.compute()
    for message, other in others.items():
        with pytest.raises(FastclError, match=message):
            accumulator.merge(other)
    assert accumulator.compute() == before


@pytest.mark.parametrize("rows", [0, 5, ROWS, ROWS + 7])
def test_an_interrupted_stream_continues_bit_for_bit(rows):
    models = three(ROWS + 50)
    accumulator = fed({k: x[:rows] for k, x in models.items()}, [3] if rows else [], minibatch=False)
    file = io.BytesIO()
    torch.save(accumulator.state_dict(), file)
    file.seek(0)
    resumed = PairAccumulator(list(models))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.update({k: x[rows:] for k, x in models.items()})
    assert resumed.compute() == fed(models, []).compute()


def test_a_state_fits_a_new_accumulator_of_the_same_kind_only():
    state = fed(three(30), []).state_dict()
    with pytest.raises(FastclError, match="same kernels"):
        PairAccumulator(["cl", "nscl", "ce"], ["linear"]).load_state_dict(state)
    used = fed(three(30), [])
    with pytest.raises(FastclError, match="this one has seen 30 samples"):
        used.load_state_dict(state)


def test_minibatch_cka_is_the_ratio_of_means_over_batches():
    models = {"a": features(64, 6, 9)[0], "b": features(64, 6, 9)[1]}
    accumulator = fed(models, [16, 16, 16], minibatch=True)
    kinds = []
    for start in range(0, 64, 16):
        x, y = (v[start : start + 16] for v in models.values())
        ones, found = torch.ones(16, dtype=torch.float64), []
        for left, right in ((x, y), (x, x), (y, y)):
            k, l = (v @ v.T for v in (left, right))  # noqa: E741
            k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
            product = (ones @ k @ ones) * (ones @ l @ ones) / (15 * 14)
            found.append(((k @ l).trace() + product - 2 / 14 * (ones @ k @ l @ ones)) / (16 * 13))
        kinds.append(torch.stack(found))
    kl, kk, ll = torch.stack(kinds).mean(0)
    result = accumulator.compute()["a", "b"]
    assert result.hsic1 == pytest.approx((kl.item(), kk.item(), ll.item()), rel=1e-10)
    assert result.cka_minibatch == pytest.approx((kl / (kk * ll).sqrt()).item(), rel=1e-10)
    one = fed(models, [], minibatch=True).compute()["a", "b"]
    assert one.cka_minibatch == pytest.approx(one.linear.cka_debiased, rel=1e-10)
    assert one.linear.cka_debiased == pair_stats(*models.values()).cka_debiased


def test_a_batch_too_small_for_minibatch_cka_adds_nothing():
    models = three(20)
    accumulator = fed(models, [], minibatch=True)
    before = accumulator.compute()
    with pytest.raises(FastclError, match="batches of at least 4 samples, got 3 at sample 20"):
        accumulator.update({k: x[:3] for k, x in models.items()})
    assert accumulator.compute() == before


def test_a_million_samples_far_from_zero():
    # Integers: all moments about the first row are exact in float64, so the direct formula is the truth.
    g = torch.Generator().manual_seed(0)
    latent = torch.randint(-3, 4, (10**6, 1), generator=g)
    x = torch.randint(-2, 3, (10**6, 2), generator=g) + latent + 1000
    y = torch.randint(-4, 5, (10**6, 3), generator=g) - latent + 1000
    accumulator = PairAccumulator(["a", "b"], ("linear",))
    for a, b in zip(x.double().split(70_000), y.double().split(70_000), strict=True):
        accumulator.update({"a": a, "b": b})

    def squared(u, v):
        # n^2 ||C||_F^2 from exact integers: n sum u v' - sum u sum v'.
        n = len(u)
        c = [[n * int((u[:, i] * v[:, j]).sum()) - int(u[:, i].sum()) * int(v[:, j].sum()) for j in range(v.shape[1])]
             for i in range(u.shape[1])]  # fmt: skip
        return sum(entry * entry for row in c for entry in row)

    expected = squared(x, y) / (squared(x, x) * squared(y, y)) ** 0.5
    # 1e-16 m^2 with the features m = 1,000 standard deviations from the origin, as PairStats says.
    assert accumulator.compute()["a", "b"].linear.cka == pytest.approx(expected, rel=1e-9)


def test_a_state_is_left_as_it_is_and_the_largest_rounding_counts():
    x, y = features(1300, 5, 4)
    accumulator = PairAccumulator(["a", "b"])
    accumulator.update({"a": x[:600].float(), "b": y[:600].float()})  # a whole chunk in float32
    state = accumulator.state_dict()
    results = []
    for _ in range(2):
        again = PairAccumulator(["a", "b"])
        again.load_state_dict(state)
        again.update({"a": x[600:], "b": y[600:]})
        results.append(again.compute())
    assert results[0] == results[1] and results[0]["a", "b"].linear.rounding == NARROW_ROUNDING


def put_together(rank: int, measures: tuple[str, ...]) -> tuple[list, int, float, str]:
    """On each rank: measures of all samples, their number, the rounding of one pair, and a refusal."""
    models, cuts = three(90, 30.0), (0, 0, 50, 90)  # the first rank has no sample
    dtype = torch.float32 if rank == 1 else torch.float64
    part = {k: x[cuts[rank] : cuts[rank + 1]].to(dtype) for k, x in models.items()}
    accumulator = fed(part, [], minibatch=True)
    accumulator.all_reduce()
    result = accumulator.compute()
    odd = PairAccumulator(["a", "b"], ("linear",) if rank == 1 else ("cosine",))
    with pytest.raises(FastclError) as refused:
        odd.all_reduce()
    table = torch.stack([result.matrix(measure) for measure in measures])
    return table.tolist(), accumulator.n, result["cl", "ce"].cosine.rounding, str(refused.value)


@pytest.mark.dist
def test_ranks_put_their_samples_together(ranks):  # noqa: F811
    measures = ("linear.cka", "linear.cka_debiased", "cosine.rsa", "correlation.rsa", "cka_minibatch")
    said = ranks.run(put_together, measures)
    whole = fed(three(90, 30.0), [50], minibatch=True).compute()
    expected = torch.stack([whole.matrix(measure) for measure in measures])
    assert said[0] == said[1] == said[2]
    table, n, rounding, refusal = said[0]
    assert n == 90 and torch.allclose(torch.tensor(table, dtype=torch.float64), expected, rtol=1e-6)
    assert rounding == NARROW_ROUNDING  # of the rank that has float32 rows
    assert refusal == "accumulators must have the same kernels, got ['cosine'] and ['linear']"
