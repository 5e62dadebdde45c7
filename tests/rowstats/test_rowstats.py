"""Row statistics: each field and its gradient against formulas, on both backends, and what the operator promises."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    DTYPES,
    Masks,
    assert_gradients,
    assert_rows,
    assert_temperature,
    masks,
    mean,
    normal,
    small_tiles,
    solve,
    sum_exp,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastcl
from fastcl import FastclError, RowStats
from fastcl.rowstats import chunked, dense
from fastcl.rowstats.order import Layout

BACKENDS = ("dense", "chunked")
FIELDS = ("lse_view", "spread_view", "mean_view", "lse_peer", "mean_peer", "lse_other")
EXAMPLES = settings(max_examples=400, deadline=None, derandomize=True, database=None)


def integers(high: int, n: int, seed: int = 0) -> Tensor:
    """n random integers below `high`."""
    return torch.randint(0, high, (n,), generator=torch.Generator().manual_seed(seed))


def uniform(n: int, seed: int) -> Tensor:
    """n random numbers in [0, 1), float32."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def expected(field: str, s: Tensor, m: Masks) -> Tensor:
    """A statistic of the logits, 0 where its relation is empty."""
    kind, relation = field.split("_")
    mask = getattr(m, relation)
    if kind == "mean":
        return mean(s, mask)
    lse = sum_exp(s, mask).log()
    return lse if kind == "lse" else lse - mean(s, mask)


def check(
    backend: str,
    fields: tuple[str, ...],
    x: Tensor,
    y: Tensor | None,
    ids: dict[str, Tensor],
    temperature: float,
    tile: Sequence[int] = (6, 8),
) -> RowStats:
    """A sum of fields, each weighted row by row, against its formula: values, gradients, -inf, counts."""
    m = masks(**ids)
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    weight = {f: (uniform(len(x), k) + 0.1).to(wide) for k, f in enumerate(fields)}
    x, y = x.detach().requires_grad_(), None if y is None else y.detach().requires_grad_()
    t = torch.tensor([temperature], dtype=wide, requires_grad=True)
    truth = solve(
        lambda s: sum(weight[f].double() * expected(f, s, m) for f in fields), x, t.item(), y, torch.ones(len(x))
    )
    with fastcl.backend(backend), small_tiles(chunked, *tile):
        stats = fastcl.row_stats(x, y, temperature=t, **ids)
        rows = torch.zeros(len(x), dtype=wide)
        for f in fields:
            empty = ~getattr(m, f.split("_")[1]).any(1)
            value = getattr(stats, f)
            assert value.dtype == wide
            assert (value[empty] == (-torch.inf if f.startswith("lse") else 0)).all()
            rows = rows + weight[f] * value.masked_fill(empty, 0)
        *grads, grad_t = torch.autograd.grad(rows.sum(), (x, t) if y is None else (x, y, t), materialize_grads=True)
    assert_rows(rows, truth, x.dtype)
    assert_gradients(grads, truth)
    assert grad_t.shape == t.shape
    assert_temperature(grad_t, truth, x.dtype)
    for relation in ("view", "peer", "other"):
        assert torch.equal(getattr(stats, f"n_{relation}"), getattr(m, relation).sum(1))
    assert torch.equal(stats.valid, m.view.any(1) & m.other.any(1))
    return stats


SELF = {"sample": integers(20, 43, 1), "labels": torch.tensor([0, 1, 2, 3, -1])[integers(20, 43, 1) % 5]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("field", FIELDS)
def test_each_field(field: str, dtype: torch.dtype, backend: str) -> None:
    for temperature in (0.01, 0.2):  # log-sum-exp and bare exponentials
        check(backend, (field,), normal(43, 9).to(dtype), None, SELF, temperature)


SIZES = st.tuples(st.integers(1, 20), st.integers(1, 30), st.integers(1, 8), st.integers(1, 12))


@EXAMPLES
@given(
    st.sampled_from(BACKENDS), SIZES, st.sampled_from(DTYPES), st.sampled_from((0.01, 0.1, 1.0)), st.booleans(),
    st.integers(0, 999),
)  # fmt: skip
def test_anchors_against_other_rows(backend, sizes, dtype, temperature, labelled, seed) -> None:
    n, k, *tile = sizes
    label = integers(5, 12, seed) - 1
    ids = {"sample": integers(12, n, seed + 1), "sample_y": integers(12, k, seed + 2)}
    if labelled:
        ids |= {"labels": label[ids["sample"]], "labels_y": label[ids["sample_y"]]}
    x, y = normal(n, 5, seed=seed).to(dtype), normal(k, 5, seed=seed + 1).to(dtype)
    check(backend, FIELDS, x, y, ids, temperature, tile)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_of_the_anchors_is_candidates_like_any_other(backend: str) -> None:
    x, sample = normal(9, 4), integers(4, 9)
    stats = check(backend, FIELDS, x, x.clone(), {"sample": sample, "sample_y": sample}, 0.3)
    with fastcl.backend(backend):
        alone = fastcl.row_stats(x, sample=sample, temperature=0.3)
    assert torch.equal(stats.n_view, alone.n_view + 1) and torch.equal(stats.n_other, alone.n_other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", (torch.uint8, torch.int8, torch.int16, torch.int32))
def test_ids_of_any_integer_dtype(kind: torch.dtype, backend: str) -> None:
    ids = {name: value.to(kind) for name, value in SELF.items() if name == "sample" or kind != torch.uint8}
    check(backend, FIELDS, normal(43, 9), None, ids, 0.2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_spread_of_a_single_view_is_exactly_nothing(backend: str) -> None:
    x = normal(40, 8).float().requires_grad_()
    with fastcl.backend(backend), small_tiles(chunked, 8, 6):
        stats = fastcl.row_stats(x, sample=torch.arange(20).repeat(2), temperature=0.07)
        (grad,) = torch.autograd.grad(stats.spread_view.sum(), x)
    assert not stats.spread_view.any() and not grad.any()


def tuple_of_fields(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """Fields of a batch in which no relation is empty."""
    sample, labels = torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    stats = fastcl.row_stats(x, sample=sample, labels=labels, temperature=t)
    return stats.spread_view, stats.mean_view, stats.lse_view, stats.lse_peer[:4], stats.mean_peer, stats.lse_other


@pytest.mark.parametrize("temperature", (0.5, 0.015))
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_against_finite_differences(backend: str, temperature: float) -> None:
    inputs = (normal(7, 3).requires_grad_(), torch.tensor(temperature, dtype=torch.float64, requires_grad=True))
    with fastcl.backend(backend), small_tiles(chunked, 3, 4):
        assert gradcheck(tuple_of_fields, inputs, eps=1e-7, atol=1e-4 / temperature, rtol=1e-5)


def test_second_derivatives() -> None:
    inputs = (normal(7, 3).requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    with fastcl.backend("dense"):
        assert gradgradcheck(tuple_of_fields, inputs)
    with fastcl.backend("chunked"):
        loss = sum(v.square().sum() for v in tuple_of_fields(*inputs))
        (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
        with pytest.raises(FastclError, match="chunked .* second derivatives.*'dense'"):
            grad.sum().backward()


@pytest.mark.parametrize("temperature", (0.01, 0.2))
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bit_identical(backend: str, temperature: float) -> None:
    x, sample = normal(700, 16).float().requires_grad_(), torch.arange(350).repeat(2)
    with fastcl.backend(backend):
        losses = [fastcl.contrastive_loss(x, sample, temperature=temperature) for _ in range(2)]
    grads = [torch.autograd.grad(loss, x)[0] for loss in losses]
    assert torch.equal(*losses) and torch.equal(*grads)


class Results(TorchDispatchMode):
    """Counts the elements of what operators return: of the largest tensor and of all."""

    largest = total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for v in out if isinstance(out, (tuple, list)) else (out,):
            numel = v.numel() if isinstance(v, Tensor) else 0
            self.largest, self.total = max(self.largest, numel), self.total + numel
        return out


def both_passes(x: Tensor, sample: Tensor, labels: Tensor | None) -> Results:
    """What the chunked backend computes on its way forward and back."""
    layout, one = Layout.of(sample, labels, None, None), torch.ones(len(x))
    with Results() as seen:
        out = chunked.forward(x, None, layout)
        chunked.backward(x, None, layout, out[3:5], (one,) * 5)
    return seen


def test_no_tensor_of_the_size_of_the_similarity_matrix() -> None:
    for sample in (torch.arange(1500).repeat(2), torch.zeros(3000, dtype=torch.int64)):  # pairs; all views of one
        seen = both_passes(normal(3000, 8).float(), sample, sample % 7)
        assert math.prod(chunked.TILE["cpu"]) <= seen.largest < 3000 * 3000 / 8
    with Results() as seen:
        dense.row_stats(normal(100, 8), None, sample[:100], None, None, None)
    assert seen.largest == 100 * 100


@pytest.mark.parametrize("views", (2, 60, 600))
def test_work_does_not_depend_on_the_number_of_views(views: int) -> None:
    """Class ids may serve as sample ids. Elements computed: a few per pair of rows, not a row's width for each."""
    n, d = 600, 128
    seen = both_passes(normal(n, d).float(), torch.arange(n) % (n // views), None)
    assert n * n < seen.total < 40 * n * n + 100 * n * d


@pytest.mark.parametrize(("backend", "bytes_per_element"), (("chunked", 60), ("dense", 10_000)))
def test_memory_kept_for_backward(backend: str, bytes_per_element: int) -> None:
    n, d = 1024, 16
    x, sample, kept = normal(n, d).float().requires_grad_(), torch.arange(n // 2).repeat(2), {}

    def pack(v: Tensor) -> Tensor:
        kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with fastcl.backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        fastcl.contrastive_loss(x, sample, sample % 10, "supcon", 0.1)
    assert 4 <= sum(kept.values()) / (n * d) < bytes_per_element  # 4: a float32 gradient of the rows at least
    assert (max(kept.values()) >= 4 * n * n) == (backend == "dense")


def operands(labelled: bool, rectangular: bool, columns_first: bool) -> tuple[list[Tensor | None], tuple]:
    """x, y and ids for the operators; rows of x and y lie apart in memory where columns come first."""
    x, y = (v.T.contiguous().T if columns_first else v for v in (normal(10, 4).float(), normal(7, 4, seed=1).float()))
    sample = torch.arange(10) % 5
    ids = [sample, sample % 2, sample[:7].clone(), sample[:7] % 2]
    keep = (True, labelled, rectangular, labelled and rectangular)
    return [x, y if rectangular else None], tuple(v if k else None for v, k in zip(ids, keep, strict=True))


OPERANDS = pytest.mark.parametrize(
    ("labelled", "rectangular", "columns_first"), [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
)


@OPERANDS
def test_operators_keep_the_rules_of_torch_library(labelled: bool, rectangular: bool, columns_first: bool) -> None:
    rows, ids = operands(labelled, rectangular, columns_first)
    leaves = [None if v is None else v.detach().requires_grad_() for v in rows]
    forward, backward = torch.ops.fastcl.row_stats.default, torch.ops.fastcl.row_stats_backward.default
    torch.library.opcheck(forward, (*leaves, *ids))
    rest = (*ids, list(forward(*rows, *ids)[3:5]), [uniform(10, k) for k in range(5)])
    torch.library.opcheck(backward, (*rows, *rest))
    once = ("test_schema", "test_autograd_registration", "test_faketensor")  # the fourth differentiates the gradient
    torch.library.opcheck(backward, (*leaves, *rest), test_utils=once)


@OPERANDS
def test_fake_results_lie_in_memory_as_the_real_ones(labelled: bool, rectangular: bool, columns_first: bool) -> None:
    """torch.compile's generated code reads results by these strides; opcheck does not compare them."""
    rows, ids = operands(labelled, rectangular, columns_first)
    statistics = torch.ops.fastcl.row_stats(*rows, *ids)
    arguments = (*rows, *ids, list(statistics[3:5]), list(statistics[:5]))
    real = torch.ops.fastcl.row_stats_backward(*arguments)
    with FakeTensorMode() as mode:
        fake = torch.ops.fastcl.row_stats_backward(*tree_map_only(Tensor, mode.from_tensor, arguments))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole_for_any_number_of_rows(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def loss(z: Tensor, sample: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        return sum(fastcl.contrastive_losses(z, sample, labels, ("dcl", "supcon"), t).values())

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for n in (10, 16):
        sample = torch.arange(n) % (n // 2)
        leaves = normal(n, 4).float().requires_grad_(), torch.tensor(0.3, requires_grad=True)
        results = []
        with fastcl.backend(backend):
            for f in (compiled, loss):
                value = f(leaves[0], sample, sample % 2, leaves[1])
                results.append((value, *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    assert counter.frame_count == 1
