"""What the ranks of one loss refuse together: arguments that differ, groups, and ranks that do not come."""

import math
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
from gloo_ranks import Failed, Pool, groups, ranks  # noqa: F401
from reference import normal
from torch import distributed as dist

import fastcl
from fastcl import facts
from fastcl.rowstats import agreement

pytestmark = pytest.mark.dist

# What rank 1 does otherwise, and the words that every rank then reads.
ODD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "temperature": ({"temperature": 0.2}, ("temperature", "0.5 on rank 0", "0.2 on rank 1")),
    "learnable temperature": ({"temperature": torch.tensor(0.25)}, ("temperature", "0.25 on rank 1")),
    "dtype": ({"z": normal(6, 4).float()}, ("dtype", "torch.float64 on rank 0", "torch.float32 on rank 1")),
    "width": ({"z": normal(6, 5)}, ("number of columns", "4 on rank 0", "5 on rank 1")),
    "precision": ({"precision": "bf16"}, ("precision", "None on rank 0", "bf16 on rank 1")),
    "labels": ({"labels": None}, ("labels", "no labels on rank 1")),
    "objective": ({"objective": "supcon_in"}, ("objective", "dcl on rank 0", "supcon_in on rank 1")),
    "own objective": ({"objective": lambda stats: stats.lse_other}, ("objective", "dcl on rank 0", "lambda")),
    "margin": ({"margin": 0.2}, ("margin of objective 1", "0.1 on rank 0", "0.2 on rank 1")),
    "reduction": ({"reduction": "sum"}, ("reduction", "mean on rank 0", "sum on rank 1")),
    "normalize": ({"normalize": False}, ("normalize", "True on rank 0", "False on rank 1")),
    "gradients": ({"z": normal(6, 4).requires_grad_()}, ("gradients", "rank 1")),
    "label smoothing": ({"label_smoothing": 0.1}, ("label_smoothing", "0 on rank 0", "0.1 on")),
    "no label smoothing": ({"label_smoothing": 1.5}, ("rank 1 of 3", "label_smoothing", "1.5")),
    "explicit reduction": ({"reduction": "sum"}, ("reduction", "mean on rank 0", "sum on rank 1")),
    "explicit pairs": ({"pairs": torch.tensor([[0, 6]])}, ("rank 1 of 3", "pairs", "rows 0 to 5", "got 6")),
    "explicit weights": ({"weights": -torch.ones(1)}, ("rank 1 of 3", "weights", "not negative", "-1")),
    "explicit or not": ({"another": True}, ("function", "explicit_pairs_loss on rank 0", "loss on rank 1")),
    "function": ({"function": "clip"}, ("objective", "ntxent on rank 1")),
    "backend": ({"backend": "dense"}, ("backend", "chunked on rank 0", "dense on rank 1")),
    "no rows": ({"z": normal(0, 4)}, ("rank 1 of 3", "z", "non-empty", "(0, 4)")),
    "ids": ({"sample": torch.arange(5)}, ("rank 1 of 3", "sample", "(5,)")),
    "negative temperature": ({"temperature": -1.0}, ("rank 1 of 3", "temperature", "-1.0")),
    "no tensor": ({"z": None}, ("rank 1 of 3", "z", "NoneType")),
    "a name for names": ({"objectives": "dcl"}, ("rank 1 of 3", "sequence of names", "'dcl'")),
    "a number for names": ({"objectives": 5}, ("rank 1 of 3", "sequence of names, got 5")),
    "no names": ({"objectives": [["dcl"]]}, ("rank 1 of 3", "objective", "['dcl']")),
    "unknown objective": ({"objective": "ntxnt"}, ("rank 1 of 3", "'ntxnt'", "'ntxent'")),
}


def odd_one(rank: int, name: str) -> torch.Tensor:
    changes = dict(ODD[name][0]) if rank == 1 else {}
    z = changes.pop("z", normal(6, 4))
    sample, labels = changes.pop("sample", torch.arange(6) // 2), changes.pop("labels", torch.arange(6) // 4)
    with fastcl.backend(changes.pop("backend", "auto")):
        if changes.pop("function", name.endswith("smoothing")):
            fastcl.clip_loss(z, z, 2.0, **changes, gather_distributed=True)
        if name.startswith("explicit") and not changes.pop("another", False):
            return fastcl.explicit_pairs_loss(z, **{"pairs": torch.tensor([[0, 1]])} | changes, gather_distributed=True)
        if "objectives" in changes:
            fastcl.contrastive_losses(z, sample, labels, **changes, gather_distributed=True)
        if name == "margin":
            changes["objective"] = fastcl.with_margin("dcl", changes.pop("margin", 0.1))
        options = {"objective": "dcl", "temperature": 0.5} | changes
        return fastcl.contrastive_loss(z, sample, labels, **options, gather_distributed=True)


@pytest.mark.parametrize("name", ODD)
def test_what_one_rank_does_otherwise_raises_on_all(ranks: Pool, name: str) -> None:  # noqa: F811
    assert_common(ranks.outcomes(odd_one, name), ODD[name][1])


def assert_common(found: list[Any], words: tuple[str, ...]) -> None:
    """Every rank has raised the same FastclError, with these words."""
    assert all(isinstance(one, Failed) and "FastclError" in one.trace for one in found), found
    assert len({one.text for one in found}) == 1
    assert all(word in found[0].text for word in words), found[0].text


# The same of the sigmoid loss.
ODD_SIGMOID: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bias": ({"logit_bias": -2.0}, ("logit_bias", "-1.0 on rank 0", "-2.0 on rank 1")),
    "learnable bias": ({"logit_bias": torch.tensor(-1.0, requires_grad=True)}, ("logit_bias's gradient", "rank 1")),
    "scale": ({"logit_scale": 4.0}, ("logit_scale", "5.0 on rank 0", "4.0 on rank 1")),
    "reduction": ({"reduction": "sum"}, ("reduction", "mean on rank 0", "sum on rank 1")),
    "width": ({"image": normal(6, 5), "text": normal(6, 5)}, ("number of columns", "4 on rank 0", "5 on rank 1")),
    "function": ({"objective": "ntxent"}, ("function", "sigmoid_loss on rank 0", "loss on rank 1")),
    "text": ({"text": normal(5, 4)}, ("rank 1 of 3", "image and text", "(6, 4)", "(5, 4)")),
}


def odd_sigmoid(rank: int, name: str) -> None:
    given = {"image": normal(6, 4), "text": normal(6, 4), "logit_scale": 5.0, "logit_bias": -1.0}
    changes = ODD_SIGMOID[name][0] if rank == 1 else {}
    if "objective" in changes:
        fastcl.contrastive_loss(given["image"], torch.arange(6) // 2, **changes, gather_distributed=True)
    fastcl.sigmoid_loss(**given | changes, gather_distributed=True)


@pytest.mark.parametrize("name", ODD_SIGMOID)
def test_what_one_rank_of_the_sigmoid_loss_does_otherwise_raises_on_all(ranks: Pool, name: str) -> None:  # noqa: F811
    assert_common(ranks.outcomes(odd_sigmoid, name), ODD_SIGMOID[name][1])


# The same of the row statistics.
ODD_STATS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "candidates": ({"y": normal(4, 4), "sample_y": torch.arange(4)}, ("same y", "no y on rank 0", "candidates y on")),
    "columns": (
        {"y": normal(4, 4), "sample_y": torch.arange(4), "columns": True}, ("y", "no y on rank 0", "candidates y on"),
    ),
    "no candidates": ({"columns": True}, ("rank 1 of 3", "columns=True requires y")),
    "temperature": ({"temperature": 0.3}, ("temperature", "0.5 on rank 0", "0.3 on rank 1")),
    "two models": ({"function": "twin_stats"}, ("function", "row_stats on rank 0", "twin_stats on rank 1")),
}  # fmt: skip


def odd_stats(rank: int, name: str) -> None:
    changes = dict(ODD_STATS[name][0]) if rank == 1 else {}
    z, sample = normal(6, 4), torch.arange(6) // 2
    if changes.pop("function", None):
        fastcl.twin_stats(z, z, sample, temperature=0.5, gather_distributed=True)
    fastcl.row_stats(z, **{"sample": sample, "temperature": 0.5} | changes, gather_distributed=True)


@pytest.mark.parametrize("name", ODD_STATS)
def test_what_one_rank_of_the_statistics_does_otherwise_raises_on_all(ranks: Pool, name: str) -> None:  # noqa: F811
    assert_common(ranks.outcomes(odd_stats, name), ODD_STATS[name][1])


def outside(rank: int) -> None:
    fastcl.contrastive_loss(normal(6, 4), torch.arange(6) // 2, gather_distributed=True, group=groups["pair"])


def test_a_group_that_does_not_hold_the_rank(ranks: Pool) -> None:  # noqa: F811
    inside, also, error = ranks.outcomes(outside)
    assert inside is None and also is None
    assert "FastclError" in error.trace and "group does not hold this process" in error.text


def missing(rank: int, backward: bool) -> None:
    group = dist.new_group([0, 1, 2], timeout=timedelta(seconds=2))
    if rank < 2 or backward:
        z = normal(3, 4).requires_grad_()
        loss = fastcl.ntxent_loss(z, z, gather_distributed=True, group=group)
        if rank < 2:
            loss.backward()


@pytest.mark.parametrize("backward", [False, True])
def test_a_rank_that_never_comes_is_an_error_of_the_others(ranks: Pool, backward: bool) -> None:  # noqa: F811
    first, second, absent = ranks.outcomes(missing, backward)
    assert absent is None
    for rank, error in enumerate((first, second)):
        said = f"rank {rank} of 3 waited in vain for the other ranks of its process group, of which rank 2 did not come"
        assert "FastclError" in error.trace and f"{said} within a second of it; does every rank" in error.text


def test_without_a_process_group() -> None:
    z, sample = normal(6, 4), torch.arange(6) // 2
    assert torch.equal(fastcl.contrastive_loss(z, sample), fastcl.contrastive_loss(z, sample, gather_distributed=False))
    for call in (
        lambda: fastcl.contrastive_loss(z, sample, gather_distributed=True),
        lambda: fastcl.NTXentLoss(gather_distributed=True)(z, z),
        lambda: fastcl.row_stats(z, sample=sample, temperature=0.1, gather_distributed=True),
        lambda: fastcl.twin_stats(z, z, sample, temperature=0.1, gather_distributed=True),
    ):
        with pytest.raises(fastcl.FastclError, match="needs a process group"):
            call()


def test_ranks_that_all_refuse_hear_of_the_first(ranks: Pool) -> None:  # noqa: F811
    assert_common(ranks.outcomes(of_devices, (-1.0, -1.0), False), ("rank 0 of 3", "temperature", "-1.0"))


def of_devices(rank: int, values: tuple[float, float], patched: bool) -> torch.Tensor:
    """A loss and its gradients, with a temperature for rank 1 and one for others, which are sent without a look."""
    z = normal(6, 4).requires_grad_()
    t = torch.tensor(values[rank == 1], dtype=torch.float32, device="cpu", requires_grad=True)
    patches = (
        mock.patch.object(agreement, "_is_here", lambda _: not patched),
        mock.patch.object(facts, "packed", wraps=facts.packed),
    )
    with patches[0], patches[1] as packed:
        loss = fastcl.contrastive_loss(z, torch.arange(6) // 2, temperature=t, gather_distributed=True)
        assert list(packed.call_args.args[2]) == ["temperature"] * patched
        return torch.cat([loss.detach().view(1), *(g.flatten() for g in torch.autograd.grad(loss, (z, t)))])


def test_numbers_that_devices_hold_are_compared_too(ranks: Pool) -> None:  # noqa: F811
    for found, want in zip(*(ranks.run(of_devices, (0.5, 0.5), patched) for patched in (True, False)), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert_common(
        ranks.outcomes(of_devices, (0.5, 0.25), True), ("same temperature", "0.5 on rank 0", "0.25 on rank 1")
    )


def row(numbers: dict[str, float], device: str = "cpu") -> torch.Tensor:
    text = "\n".join(f"{name}: {facts.A_TENSOR}" for name in numbers)
    there = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in numbers.items()}
    return facts.packed((6, 0), text, there, torch.device("cpu"))


def test_numbers_are_compared_by_value_and_named() -> None:
    names = [f"margin {k}" for k in range(16)]
    one = dict.fromkeys(names, 0.0) | {"margin 3": math.nan}
    assert facts.are_same(torch.stack([row(one), row(one | {"margin 2": -0.0})]))
    for name in (names[0], names[15]):
        table = torch.stack([row(one), row(one | {name: 0.25})])
        assert not facts.are_same(table)
        assert f"same {name}, got 0.0 on rank 0 and 0.25 on rank 1" in facts.difference(table.tolist())


def test_numbers_elsewhere_are_not_read() -> None:
    assert row({"temperature": 0.5}, "meta").tolist() == row({"temperature": 0.0}).tolist()
