"""`self_y` of row statistics: the candidate that is the anchor is left out, on every backend and with gathered rows."""

from typing import Any

import pytest
import torch
from gloo_ranks import Pool, groups, own, ranks  # noqa: F401
from reference import normal
from test_rowstats import FIELDS, check, integers
from torch import Tensor
from torch import distributed as dist
from torch.autograd import gradcheck, gradgradcheck
from torch.distributed.nn.functional import all_gather

import fastcl
from fastcl import FastclError

SAMPLE, SAMPLE_Y = integers(12, 17, 1), integers(12, 23, 2)
LABELS = torch.tensor([0, 1, -1, 0, 2, 1, -1, 0, 2, 2, 0, 1])
IDS = {"sample": SAMPLE, "sample_y": SAMPLE_Y, "labels": LABELS[SAMPLE], "labels_y": LABELS[SAMPLE_Y]}


def selves() -> Tensor:
    """For most anchors a candidate of their sample, which may be their only one."""
    same = SAMPLE[:, None] == SAMPLE_Y
    found = torch.where(same.any(1), same.int().argmax(1), -1)
    found[::5] = -1
    return found


def test_some_anchors_have_no_view_but_themselves() -> None:
    found, n = selves(), (SAMPLE[:, None] == SAMPLE_Y).sum(1)
    assert {0, 1, 2} <= set((n - (found >= 0).long()).tolist()) and (n[found >= 0] == 1).any()


@pytest.mark.parametrize("labelled", (False, True))
@pytest.mark.parametrize("temperature", (0.01, 0.3))
@pytest.mark.parametrize("backend, dtype", (
    ("dense", torch.float64), ("chunked", torch.float64), ("chunked", torch.float32), ("triton", torch.float32)
))  # fmt: skip
def test_statistics_and_gradients_without_the_anchor(backend, dtype, temperature, labelled) -> None:
    x, y = normal(17, 6).to(dtype), normal(23, 6, seed=1).to(dtype)
    found = selves()
    y[found[found >= 0]] = x[found >= 0]  # the rows of the anchors, as in a memory that has them
    ids = IDS if labelled else {key: IDS[key] for key in ("sample", "sample_y")}
    check(backend, FIELDS, x, y, ids | {"self_y": found.int()}, temperature)


def gathered(rank: int | None, name: str) -> list[Tensor]:
    """Loss and rows' gradient; rows of two ranks are gathered by hand. Rank None: of one process."""
    z, sample = normal(16, 5).requires_grad_(), torch.arange(8).repeat_interleave(2)
    ids = {"sample": sample, "labels": sample % 3}
    if rank is None:
        return [fastcl.contrastive_loss(z, **ids, objective=name, temperature=0.2), z]
    mine = own(rank, (8,), 16)
    x = z.detach()[mine].requires_grad_()
    ids |= {"sample_y": sample, "labels_y": sample % 3, "sample": sample[mine], "labels": (sample % 3)[mine]}
    y = torch.cat(all_gather(x, group=groups["pair"]))
    place = torch.arange(mine.start, mine.stop)
    stats = fastcl.row_stats(x, y, self_y=place, temperature=0.2, gather_distributed=False, **ids)
    loss = fastcl.OBJECTIVES[name](stats).mean()
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss, group=groups["pair"])
    return [loss / 2, x.grad / 2]  # as DDP averages


@pytest.mark.dist
def test_rows_gathered_by_hand_give_the_loss_of_one_process(ranks: Pool) -> None:  # noqa: F811
    for name in ("ntxent", "supcon"):
        loss, z = gathered(None, name)
        (want,) = torch.autograd.grad(loss, z)
        results = ranks.run(gathered, name, world=2)
        for got, _ in results:
            assert got.item() == pytest.approx(loss.item(), rel=1e-12)
        assert (torch.cat([grad for _, grad in results]) - want).norm() < 1e-12 * want.norm()


def shared(rank: int | None) -> list[Tensor]:
    """Statistics with a memory on each rank that holds its anchors, and the anchors' gradient."""
    x, memory = normal(12, 5), normal(10, 5, seed=3)
    sample, sample_memory = torch.arange(12) // 2, torch.tensor([0, 1, 1, 2, 9, 9, 3, 5, 5, 8])
    parts = [(own(k, (6,), 12), own(k, (5,), 10)) for k in ((0, 1) if rank is None else (rank,))]
    xs = torch.cat([x[a] for a, _ in parts]).requires_grad_()
    pieces = xs.split([a.stop - a.start for a, _ in parts])
    y = torch.cat([v for piece, (_, b) in zip(pieces, parts, strict=True) for v in (memory[b], piece)])
    ids = {"sample": torch.cat([sample[a] for a, _ in parts])}
    ids["sample_y"] = torch.cat([v for a, b in parts for v in (sample_memory[b], sample[a])])
    ids |= {"labels": ids["sample"] % 2, "labels_y": ids["sample_y"] % 2}
    self_y = torch.cat([torch.arange(6) + 5 + 11 * k for k in range(len(parts))])
    group: dict[str, Any] = {} if rank is None else {"gather_distributed": True, "group": groups["pair"]}
    stats = fastcl.row_stats(xs, y, self_y=self_y, temperature=0.3, **ids, **group)
    total = sum(getattr(stats, field).masked_fill(~getattr(stats, field).isfinite(), 0).sum() for field in FIELDS)
    return [*torch.autograd.grad(total, xs), *(getattr(stats, field).detach() for field in (*FIELDS, "n_view"))]


@pytest.mark.dist
def test_with_gather_distributed(ranks: Pool) -> None:  # noqa: F811
    parts = zip(*ranks.run(shared, world=2), strict=True)
    for got, want in zip(parts, shared(None), strict=True):
        torch.testing.assert_close(torch.cat(got), want, rtol=1e-12, atol=1e-12)


def test_wrong_positions_are_refused() -> None:
    x, y, place = normal(4, 3), normal(6, 3), torch.arange(4)
    ids = {"sample": torch.arange(4), "sample_y": torch.tensor([0, 1, 2, 3, 3, 3])}
    fastcl.row_stats(x, y, self_y=place, temperature=1.0, **ids)
    for wrong, said in (
        (place[:3], r"self_y must have one id per row, shape \(4,\)"), (place.float(), "self_y must be an integer"),
        (place - 2, "positions of y, 0 to 5, or -1, got -2"), (place + 3, "got 6"), ([0, 1], "got list"),
        (place.flip(0), "got sample 0 for anchor 0 and sample_y 3 for candidate 3"),
    ):  # fmt: skip
        with pytest.raises(FastclError, match=said):
            fastcl.row_stats(x, y, self_y=wrong, temperature=1.0, **ids)
    with pytest.raises(FastclError, match="self_y cannot be used with columns=True"):
        fastcl.row_stats(x, y, self_y=place, columns=True, temperature=1.0, **ids)
    with pytest.raises(FastclError, match="self_y cannot be used with y=None"):
        fastcl.row_stats(x, self_y=place, temperature=1.0, sample=ids["sample"])


def test_the_operator_keeps_the_rules_and_dense_has_second_derivatives() -> None:
    x, y = normal(17, 3).requires_grad_(), normal(23, 3, seed=1).requires_grad_()
    given = SAMPLE, SAMPLE_Y, selves()
    torch.library.opcheck(torch.ops.fastcl.views_without_self.default, (x, y, *given))
    grads = [normal(17), normal(17, seed=1)]
    backward = torch.ops.fastcl.views_without_self_backward.default
    torch.library.opcheck(backward, (x.detach(), y.detach(), *given, grads))

    def spreads(x: Tensor, y: Tensor) -> Tensor:
        stats = fastcl.row_stats(x, y, self_y=selves(), temperature=0.5, **IDS)
        return stats.spread_view + stats.mean_view

    found = spreads(x, y)
    (first,) = torch.autograd.grad(found.sum(), x, create_graph=True)
    with pytest.raises(FastclError, match="chunked .*second derivatives"):
        torch.autograd.grad(first.sum(), x)
    with pytest.raises(FastclError, match="chunked .*batched gradients"):
        torch.autograd.grad(found, x, torch.eye(17, dtype=torch.float64), is_grads_batched=True)
    with fastcl.backend("dense"):
        assert gradcheck(spreads, (x, y)) and gradgradcheck(spreads, (x, y))
