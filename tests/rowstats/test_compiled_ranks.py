"""What ranks compare when their loss is compiled: at run time, all that an uncompiled call compares."""

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from gloo_ranks import Pool, ranks  # noqa: F401
from reference import normal
from test_global_batch import compiled
from test_rank_refusals import assert_common
from test_ranks import collectives
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.profiler import ProfilerActivity, profile

import fastcl
from fastcl.choices import Reduction
from fastcl.rowstats.registration import KEEPS_ORDER

pytestmark = pytest.mark.dist


class Own:
    """An objective."""

    def __call__(self, stats: fastcl.RowStats) -> Tensor:
        return stats.lse_other


# The calls of ranks 0 to 2, and the words that every rank then reads.
ODD: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "temperature": ([{}, {"t": torch.tensor(0.25)}, {}], ("temperature", "0.5 on rank 0", "0.25 on rank 1")),
    "width": ([{}, {"width": 5}, {}], ("number of columns", "4 on rank 0", "5 on rank 1")),
    "objective": ([{}, {}, {"objective": "supcon"}], ("objective", "ntxent on rank 0", "supcon on rank 2")),
    "reduction": ([{}, {"reduction": "sum"}, {}], ("reduction", "mean on rank 0", "sum on rank 1")),
    "sigmoid reduction": (
        [{"towers": True}, {"towers": True, "reduction": "sum"}, {"towers": True}],
        ("reduction", "sum on rank 1"),
    ),
    "sigmoid or not": ([{"towers": True}, {}, {}], ("function", "sigmoid_loss on rank 0", "loss on rank 1")),
    "explicit reduction": (
        [{"explicit": True, "reduction": one} for one in ("mean", "mean", "sum")],
        ("reduction", "sum on rank 2"),
    ),
    "explicit or not": ([{}, {"explicit": True}, {}], ("function", "explicit_pairs_loss on rank 1")),
    "uncompiled": ([{"engine": None}, {}, {}], ("torch.compile", "not compiled on rank 0", "compiled on rank 1")),
    "uncompiled rows": ([{}, {"n": 8, "engine": None}, {}], ("torch.compile", "not compiled on rank 1")),
    "refused": ([{}, {"t": -1.0, "engine": None}, {}], ("rank 1 of 3", "temperature", "-1.0")),
    "own objective": (
        [{"objective": lambda stats: stats.lse_other}, *[{"objective": lambda stats: 2 * stats.lse_other}] * 2],
        ("objective", "<lambda>, code", "on rank 0", "on rank 1"),
    ),
    "own type": ([{"objective": fastcl.Objective(("view",), ("view",))}, {"objective": Own()}, {}], ("Own, code",)),
    "margin": (
        [{"objective": fastcl.with_margin("dcl", margin)} for margin in (0.1, 0.1, torch.tensor(0.2))],
        ("margin of objective 1", "0.1 on rank 0", "0.2", "on rank 2"),
    ),
}


def call(
    rank: int, n: int = 6, width: int = 4, t: float | Tensor = 0.5, objective: Any = "ntxent", towers: bool = False,
    engine: str | None = "aot_eager", seed: int = 0, reduction: Reduction = "mean", explicit: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """This rank's share of the loss and the gradient of its rows."""
    z = normal(n, width, seed=seed).requires_grad_()
    sample, pairs = torch.arange(n) // 2, torch.tensor([[0, 1], [3, 2]])

    def loss(z: Tensor) -> Tensor:
        if towers:
            return fastcl.sigmoid_loss(z[::2], z[1::2], 1 / t, -1.0, reduction=reduction, gather_distributed=True)
        if explicit:
            return fastcl.explicit_pairs_loss(z, pairs, temperature=t, reduction=reduction, gather_distributed=True)
        return fastcl.contrastive_loss(
            z, sample, sample % 2, objective, t, reduction=reduction, gather_distributed=True
        )

    value = compiled(loss, engine)(z)
    return value.detach(), *torch.autograd.grad(value, z)


def odd(rank: int, name: str) -> Any:
    return call(rank, **ODD[name][0][rank])


@pytest.mark.parametrize("name", ODD)
def test_what_one_rank_of_a_compiled_loss_does_otherwise_raises_on_all(ranks: Pool, name: str) -> None:  # noqa: F811
    assert_common(ranks.outcomes(odd, name), ODD[name][1])


def sizes(rank: int) -> list[int]:
    """The sizes of the collectives of a compiled forward pass."""
    z, sample = normal(6, 4), torch.arange(6) // 2
    loss = compiled(
        lambda z: fastcl.contrastive_loss(z, sample, sample, "supcon", gather_distributed=True), "aot_eager"
    )
    loss(z)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        loss(z)
    return collectives(seen.events())


def test_a_compiled_loss_sends_what_an_uncompiled_one_does(ranks: Pool) -> None:  # noqa: F811
    for sent in ranks.run(sizes):
        assert sorted(sent) == [6, 6 * 4, 83]  # labels, rows, what ranks compare


def two_losses(z: Tensor, t: float = 2.0) -> Tensor:
    first, second = z[::2], z[1::2]
    smooth = fastcl.clip_loss(first, second, t, label_smoothing=0.1, gather_distributed=True)
    return smooth + fastcl.sigmoid_loss(first, second, t, -1.0, gather_distributed=True)


def graphs(rank: int) -> list[list[tuple[str, bool]]]:
    """The operators that communicate in the graphs of both passes, and whether the compiler is to keep their order."""
    seen = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        found = []
        for node in graph.graph.nodes:
            kept = str(node.target) == "with_effects"
            name = str(node.args[1] if kept else node.target)
            if name.startswith("fastcl.") and name not in LOCAL:
                found.append((name, kept))
        seen.append(found)
        return make_boxed_func(graph.forward)

    z = normal(6 + 2 * rank, 4).requires_grad_()
    torch.compile(two_losses, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))(z).backward()
    return seen


LOCAL = [
    f"fastcl.{name}.default"
    for name in (
        "row_stats", "row_stats_backward", "apart", "apart_backward", "tell_ranks", "arrived_rows", "sigmoid_sums",
        "sigmoid_sums_backward",
    )
]  # fmt: skip


@pytest.mark.skipif(not KEEPS_ORDER, reason="compilers of this version of PyTorch cannot be told to keep an order")
def test_compilers_keep_the_order_of_what_ranks_exchange(ranks: Pool) -> None:  # noqa: F811
    forward, backward = ranks.run(graphs)[0]
    names = [name.split(".")[1] for name, _ in forward]
    assert names == ["agree", "start_rows", "start_rows", "gather_rows", "gather_rows", "agree", "other_rows"]
    told = ["gather_rows_backward"] * 2 + ["hear_ranks"] * 2 + ["other_rows_backward"]
    assert sorted(name.split(".")[1] for name, _ in backward) == told
    assert all(kept for _, kept in forward + backward)


def both_models(rank: int, engine: str | None, dynamic: bool | None = None) -> list[Tensor]:
    """Statistics of two models on uneven ranks: gradients, and the measures of the pair."""
    n = 6 + 2 * rank
    za, zb = normal(n, 5, seed=rank).requires_grad_(), normal(n, 4, seed=9 + rank).requires_grad_()
    sample = torch.arange(n) // 2

    def loss(za: Tensor, zb: Tensor) -> tuple[Tensor, fastcl.TwinStats]:
        stats = fastcl.twin_stats(za, zb, sample, sample % 2, temperature=0.3, gather_distributed=True)
        return fastcl.OBJECTIVES["dcl"](stats.a).sum() + fastcl.OBJECTIVES["nscl"](stats.b).sum(), stats

    value, stats = compiled(loss, engine, dynamic)(za, zb)
    pairs = stats.pairs()
    measures = torch.tensor([float(stats.n), pairs.cka, pairs.rsa, pairs.drift], dtype=torch.float64)
    return [value.detach(), *torch.autograd.grad(value, [za, zb]), measures]


def test_compiled_statistics_of_two_models_are_those_of_an_uncompiled_call(ranks: Pool) -> None:  # noqa: F811
    for dynamic in (None, True):
        found = ranks.run(both_models, "aot_eager", dynamic)
        for one, wanted in zip(found, ranks.run(both_models, None), strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-13)
            assert wanted[-1][0] == 6 + 8 + 10


def under_default(rank: int, device: str | None) -> list[Tensor]:
    """Losses of uneven ranks, and gradients, with another default device."""
    z = normal(6 + 2 * rank, 4).requires_grad_()
    sample = torch.arange(len(z)) // 2
    torch.set_default_device(device)
    try:
        losses = [
            fastcl.contrastive_loss(z, sample, gather_distributed=True),
            fastcl.sigmoid_loss(z[::2], z[1::2], 3.0, -1.0, gather_distributed=True),
            fastcl.clip_loss(z[::2], z[1::2], 3.0, label_smoothing=0.1, gather_distributed=True),
        ]
        return [*(loss.detach() for loss in losses), *torch.autograd.grad(sum(losses), z)]
    finally:
        torch.set_default_device(None)


def test_a_default_device_changes_no_loss_over_ranks(ranks: Pool) -> None:  # noqa: F811
    for found, wanted in zip(ranks.run(under_default, "meta"), ranks.run(under_default, None), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
