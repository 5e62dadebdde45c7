"""The known mistakes of losses over ranks are caught by `test_global_batch`; compiled losses; operators' rules."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from gloo_ranks import Pool, groups, own, ranks  # noqa: F401
from reference import TOLERANCE, normal
from test_global_batch import Case, compiled, errors, inputs, loss_of, step
from torch import Tensor

import fastcl
from fastcl.exchange import Ranks
from fastcl.losses import global_batch
from fastcl.rowstats import apart, meeting, sharded
from fastcl.rowstats.order import Layout

pytestmark = pytest.mark.dist


def rows_without_gradient(patch: pytest.MonkeyPatch) -> None:
    """Rows of other ranks are constants: nobody hears what its rows do there."""
    backward = apart.backward
    patch.setattr(apart, "backward", lambda *given: backward(*given[:-1], None))


def own_rows_among_the_others(patch: pytest.MonkeyPatch) -> None:
    """Own rows are candidates twice."""
    patch.setattr(Ranks, "others", Ranks.gather)


def ids_of_all_ranks_compared(patch: pytest.MonkeyPatch) -> None:
    """Every rank numbers its samples from 0, and rows of the same number pass for views."""

    def layout_of(x: Tensor, y: Tensor, labels: Tensor | None, labels_y: Tensor | None, peers: bool) -> Layout:
        layout = Layout.of(torch.arange(len(x)), labels, torch.arange(len(y)), labels_y)
        return layout if peers else replace(layout, labelled=False)

    patch.setattr(apart, "layout_of", layout_of)


def peers_of_one_block_counted(patch: pytest.MonkeyPatch) -> None:
    """The gradient of the others' mean over peers is divided by the peers on this rank, not by all of them."""
    backward = apart.backward

    def wrong(x: Tensor, y: Tensor, layout: Layout, lse: Any, grads: Any, theirs: Tensor) -> Tensor:
        here = Layout(layout.y, layout.x, False, layout.labelled)
        _, n_peer, n_other = (layout.y.restore(n) for n in here.counts())
        theirs = theirs.clone()
        theirs[2] *= (n_peer + n_other) / n_peer.clamp(min=1)
        return backward(x, y, layout, lse, grads, theirs)

    patch.setattr(apart, "backward", wrong)


def a_mean_of_means(patch: pytest.MonkeyPatch) -> None:
    """Each rank divides by its own number of rows."""
    patch.setattr(sharded, "share_of", lambda rows, _ranks, _reduction: rows.mean())
    patch.setattr(global_batch.sharded, "share_of", sharded.share_of)


MISTAKES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    f.__name__: (f, wrong)
    for f, wrong in (
        (rows_without_gradient, "rows"), (own_rows_among_the_others, "loss"), (ids_of_all_ranks_compared, "loss"),
        (peers_of_one_block_counted, "rows"), (a_mean_of_means, "loss"),
    )
}  # fmt: skip
CASE = Case((3, 5), objective="supcon", backend="chunked")


@contextmanager
def mistaken(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        MISTAKES[name][0](patch)
        yield


def mistaken_step(rank: int, name: str) -> list[tuple[Tensor, ...]]:
    with mistaken(name):
        return step(rank, [CASE])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_known_mistake_is_seen(ranks: Pool, name: str) -> None:  # noqa: F811
    (shares,) = zip(*ranks.run(mistaken_step, name), strict=True)
    found = errors(CASE, shares)
    assert found[MISTAKES[name][1]] > 1e-3 and found["weights, rank 0"] > 1e-3, found


ON_TRITON = {"dtype": torch.float32, "backend": "triton"}
KERNELS = [
    *(Case((5,), objective=o, views=v, **ON_TRITON) for o, v in (("ntxent", 2), ("supcon", 3), ("nscl", 2))),
    *(Case((5,), loss, **ON_TRITON) for loss in ("clip", "supcon", "sigmoid")),
    Case((5,), "nscl", lowered=True, **ON_TRITON),
    *(
        Case((5,), loss, precision=precision, **ON_TRITON)
        for loss, precision in (("supcon", "fp16"), ("supcon", "bf16"), ("sigmoid", "fp16"))
    ),
]


def test_on_the_triton_backend(ranks: Pool) -> None:  # noqa: F811
    results = ranks.run(step, KERNELS, world=2)
    for case, shares in zip(KERNELS, zip(*results, strict=True), strict=True):
        bound = 2 * TOLERANCE[case.precision or ("fp16" if case.lowered else "fp32")].gradient
        for name, error in errors(case, shares).items():
            assert error <= bound, f"{name}: {error:.1e} in {case}"


def overflowing(rank: int | None, backend: str) -> list[Tensor]:
    """Rows at a narrow temperature: those of rank 0 are near each other, those of rank 1 far from all."""
    z = torch.zeros(100, 32, dtype=torch.float64)
    z[:40, :4] = normal(40, 4).abs() + 1
    z[60:, :4] = normal(40, 4, seed=1).abs() + 1
    z[torch.arange(40, 60), 8 + torch.arange(20) // 2] = 1
    mine = slice(None) if rank is None else own(rank, (40,), 100)
    rows = z[mine].to(torch.float32 if backend == "triton" else torch.float64).requires_grad_()
    gathering = {} if rank is None else {"gather_distributed": True, "group": groups["pair"]}
    with fastcl.backend(backend):
        loss = fastcl.contrastive_loss(rows, torch.arange(100)[mine] // 2, None, "dcl", 1 / 149, "sum", **gathering)
    return [loss.detach(), *torch.autograd.grad(loss, rows)]


def test_running_maxima_that_one_rank_alone_needs(ranks: Pool) -> None:  # noqa: F811
    loss, grad = overflowing(None, "dense")
    (a, da), (b, db) = ranks.run(overflowing, "triton", world=2)
    got = torch.cat([da, db]).double()
    assert abs(a + b - loss) <= 1e-6 * abs(loss) and got.isfinite().all()
    assert (got - grad).norm() <= 1e-4 * grad.norm()


SLICED = [
    Case((5,), objective="supcon", backend="chunked"), Case((5,), objective="nscl", views=3, backend="dense"),
    Case((3,), "clip"), Case((5,), objective="supcon", dtype=torch.float32, backend="triton"),
    *(Case((4,), "sigmoid", backend=backend) for backend in ("chunked", "dense")),
    Case((3,), "sigmoid", dtype=torch.float32, backend="triton"),
]  # fmt: skip


def sliced_step(rank: int, cases: Sequence[Case]) -> tuple[list[tuple[Tensor, ...]], int, int]:
    """Steps in slices; the most rows of float64 that a rank sent at once, and how often it sent any."""
    sent, start = [], Ranks.start

    def counted(self: Ranks, v: Tensor) -> Tensor:
        if v.dtype == torch.float64 and v.ndim == 2 and v.shape[1] == 6:  # the network's outputs
            sent.append(len(v))
        return start(self, v)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "SLICE", 300)
        patch.setattr(Ranks, "start", counted)
        return step(rank, cases), max(sent), len(sent)


def test_more_rows_than_a_rank_may_hold(ranks: Pool) -> None:  # noqa: F811
    results = ranks.run(sliced_step, SLICED, world=2)
    for _, most, times in results:
        # Forward and backward, of three cases that exchange in four slices and of two that do in three.
        assert most <= 6 and times >= 2 * (4 * 3 + 3 * 2), (most, times)
    for case, shares in zip(SLICED, zip(*(one[0] for one in results), strict=True), strict=True):
        bound = 1e-12 if case.dtype == torch.float64 else 2 * TOLERANCE[torch.float32].gradient
        for name, error in errors(case, shares).items():
            assert error <= bound, f"{name}: {error:.1e} in {case}"


COMPILED = {
    "aot_eager": (
        Case((5,), objective="mine", backend="chunked"), Case((7,), "clip", backend="chunked"),
        Case((5,), "sigmoid", backend="chunked"), Case((5,), "smooth clip", backend="chunked"),
        Case((3,), "explicit pairs", backend="dense"),
        Case((4,), labels="none", dtype=torch.float32, backend="triton"),
    ),
    "inductor": (Case((5,), objective="supcon", backend="chunked"),),
}  # fmt: skip


def outcome(case: Case, rank: int | None, engine: str | None) -> tuple[Tensor, ...]:
    """Loss, and gradients of rows and temperature, compiled as one graph if an engine is named; rank None: of one
    process in float64."""
    x, sample, labels = inputs(case)
    gathering, mine, backend = {}, slice(None), "dense"
    if rank is None:
        x = x.double()
    else:
        gathering, backend = {"gather_distributed": True, "group": groups["pair"]}, case.backend
        mine = own(rank, [c * case.views for c in case.cuts], len(x))
    sample, labels = sample[mine], None if labels is None else labels[mine]
    z, t = x[mine].clone().requires_grad_(), torch.tensor([0.3], dtype=x.dtype, requires_grad=True)

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return loss_of(case, z, t, sample, labels, **gathering)

    with fastcl.backend(backend):
        value = compiled(loss, engine)(z, t)
    return value.detach(), *torch.autograd.grad(value, [z, t])


def compiled_step(rank: int, engine: str) -> list[tuple[Tensor, ...]]:
    """For each case the outcome, then that of the compiled loss."""
    return [outcome(case, rank, one) for case in COMPILED[engine] for one in (None, engine)]


@pytest.fixture(params=COMPILED)
def engine(request: pytest.FixtureRequest) -> str:
    config = importlib.import_module("torch._inductor.config")
    if request.param == "inductor" and not hasattr(config, "fallback_by_default"):
        pytest.skip("this version of inductor cannot leave operations as they are, and compiles C++ for a minute")
    return request.param


def test_compiled_whole(ranks: Pool, engine: str) -> None:  # noqa: F811
    results = iter(zip(*ranks.run(compiled_step, engine, world=2), strict=True))
    for case in COMPILED[engine]:
        exact = case.dtype == torch.float64
        near = {"rtol": 1e-12, "atol": 1e-14} if exact else {"rtol": 1e-5, "atol": 1e-6}
        eager, found = next(results), next(results)
        torch.testing.assert_close(found, eager, **near)
        losses, rows, temperatures = zip(*found, strict=True)
        shares = sum(losses) / 2, torch.cat(rows) / 2, sum(temperatures) / 2
        bound = 1e-12 if exact else 2 * TOLERANCE[torch.float32].gradient
        for got, want in zip(shares, outcome(case, None, None), strict=True):
            assert (got - want).norm() <= bound * want.norm(), case


LEARNING = {
    "aot_eager": (
        Case((6,), "clip", backend="chunked"), Case((5,), objective="nscl", how="fsdp", backend="chunked"),
        Case((4, 5), objective="supcon", backend="chunked"), Case((3, 8), "sigmoid", how="mean", backend="chunked"),
    ),
    "inductor": (Case((3, 8), "clip", backend="chunked"),),
}  # fmt: skip


def test_weights_learn_from_a_compiled_loss_what_one_process_teaches(ranks: Pool, engine: str) -> None:  # noqa: F811
    for case in LEARNING[engine]:
        (shares,) = zip(*ranks.run(step, [case], engine, world=case.world), strict=True)
        for name, error in errors(case, shares).items():
            assert error <= 1e-12, f"{name}: {error:.1e} in {case}"


def rules(rank: int) -> None:
    """torch.library's checks of the operators; of the one that communicates on both ranks of a group."""
    stats = [normal(7, seed=k).requires_grad_() for k in range(3)]
    counts = torch.ones(2, 7, dtype=torch.int64)
    theirs, flag = normal(5, 7).requires_grad_(), counts.new_empty(0)
    group = groups["pair"].group_name
    sizes = torch.tensor([7, 7])
    torch.library.opcheck(torch.ops.fastcl.tell_ranks.default, (*stats, counts, theirs, flag, sizes, rank, group))
    rows = normal(3, 4).requires_grad_()
    shapes, ops = ("test_schema", "test_autograd_registration", "test_faketensor"), torch.ops.fastcl
    for values in ([], [torch.tensor(0.5)]):
        facts = [6, 3], "function: loss", "bias: 1.0", "temperature" if values else "", values
        torch.library.opcheck(ops.agree.default, (rows.detach(), *facts, rank, 2, group, "cpu"), test_utils=shapes)
    place = torch.tensor([3, 3]), rank, group
    torch.library.opcheck(ops.hear_ranks.default, (normal(3, 5), 3, *place), test_utils=shapes)
    torch.library.opcheck(ops.other_rows_backward.default, (normal(3, 4), 3, *place), test_utils=shapes)
    torch.library.opcheck(ops.pair_sums.default, (normal(3, 4), normal(3, 5), *place), test_utils=shapes)
    torch.library.opcheck(ops.gather_rows.default, (rows, [3, 3], rank, group), test_utils=shapes)
    torch.library.opcheck(ops.gather_rows_backward.default, (normal(6, 4), [3, 3], rank, group), test_utils=shapes)
    twice = ops.gather_rows(rows, [3, 3], rank, group).square().sum()
    (first,) = torch.autograd.grad(twice, rows, create_graph=True)
    with pytest.raises(fastcl.FastclError, match="second derivatives are not supported across ranks"):
        torch.autograd.grad(first.sum(), rows)
    if rank == 0:
        return
    x, y = normal(7, 4).requires_grad_(), normal(9, 4, seed=1)
    labels, labels_y = torch.arange(7) % 3 - 1, torch.arange(9) % 3 - 1
    for dense, of in ((False, (labels, labels_y)), (True, (None, None))):
        torch.library.opcheck(torch.ops.fastcl.apart.default, (x, y, *of, True, dense))
        gradients = [v.detach() for v in stats[:2]], [v.detach() for v in stats], normal(5, 9)
        torch.library.opcheck(torch.ops.fastcl.apart_backward.default, (x.detach(), y, *of, True, dense, *gradients))


def test_the_operators_keep_the_rules_of_torch_library(ranks: Pool) -> None:  # noqa: F811
    ranks.run(rules, world=2)
