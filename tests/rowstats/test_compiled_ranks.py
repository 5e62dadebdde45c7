"""What ranks compare when their loss is compiled: at run time, all that an uncompiled call compares."""

from typing import Any

import pytest
import torch
from gloo_ranks import Pool, ranks  # noqa: F401
from reference import normal
from test_global_batch import compiled
from test_rank_refusals import assert_common
from test_ranks import collectives
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastcl

pytestmark = pytest.mark.dist

# The calls of ranks 0 to 2, and the words that every rank then reads.
ODD: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "temperature": ([{}, {"t": torch.tensor(0.25)}, {}], ("temperature", "0.5 on rank 0", "0.25 on rank 1")),
    "width": ([{}, {"width": 5}, {}], ("number of columns", "4 on rank 0", "5 on rank 1")),
    "objective": ([{}, {}, {"objective": "supcon"}], ("objective", "ntxent on rank 0", "supcon on rank 2")),
    "uncompiled": ([{"engine": None}, {}, {}], ("torch.compile", "not compiled on rank 0", "compiled on rank 1")),
    "uncompiled rows": ([{}, {"n": 8, "engine": None}, {}], ("torch.compile", "not compiled on rank 1")),
    "refused": ([{}, {"t": -1.0, "engine": None}, {}], ("rank 1 of 3", "temperature", "-1.0")),
}


def call(
    rank: int, n: int = 6, width: int = 4, t: float | Tensor = 0.5, objective: str = "ntxent", towers: bool = False,
    engine: str | None = "aot_eager", seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """This rank's share of the loss and the gradient of its rows."""
    z = normal(n, width, seed=seed).requires_grad_()
    sample = torch.arange(n) // 2

    def loss(z: Tensor) -> Tensor:
        if towers:
            return fastcl.sigmoid_loss(z[::2], z[1::2], 1 / t, -1.0, gather_distributed=True)
        return fastcl.contrastive_loss(z, sample, sample % 2, objective, t, gather_distributed=True)

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
        assert sorted(sent) == [6, 6 * 4, 67]  # labels, rows, what ranks compare
