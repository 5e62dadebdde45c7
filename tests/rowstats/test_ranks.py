"""Row statistics of rows that lie on several ranks, what the ranks send each other, and what they refuse together."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from gloo_ranks import Failed, Pool, groups, own, ranks  # noqa: F401
from reference import normal
from test_rowstats import FIELDS
from torch import Tensor
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile

import fastcl

pytestmark = pytest.mark.dist
CUTS = (6, 8)
COUNTS = ("n_view", "n_peer", "n_other")


def rectangle() -> dict[str, Tensor]:
    """20 anchors and 16 candidates of 10 samples; a rank's anchors and candidates are of its own samples."""
    sample = torch.arange(10).repeat_interleave(2)
    sample_y = torch.arange(10).repeat_interleave(torch.tensor([1, 3, 0, 2, 2, 2, 1, 1, 2, 2]))
    labels = torch.tensor([0, 1, 2, 0, 1, -1, 0, 2, -1, 1])
    x, y = normal(20, 5), normal(16, 5, seed=1)
    return {
        "x": x,
        "y": y,
        "sample": sample,
        "sample_y": sample_y,
        "labels": labels[sample],
        "labels_y": labels[sample_y],
    }


Y_CUTS = (4, 6)  # so that samples 0, 1, 2 are the first rank's, sample 3 the second's


def weighted(stats: fastcl.RowStats, first: int) -> Tensor:
    """A sum of all statistics of rows `first` ..., each with a weight of its own."""
    total = stats.lse_other.new_zeros(())
    for k, field in enumerate(FIELDS):
        values = getattr(stats, field)
        weights = normal(40, seed=k)[first : first + len(values)]
        total = total + (weights * values.masked_fill(~values.isfinite(), 0)).sum()
    return total


def rows_against_rows(rank: int, kind: str) -> list[Tensor]:
    """Statistics, counts, and gradients of x, y and the temperature on one rank; kind: what is asked for."""
    given = rectangle()
    mine = {
        k: v[own(rank, Y_CUTS if k.endswith("y") and k != "y" or k == "y" else CUTS, len(v))] for k, v in given.items()
    }
    return outcome(mine, kind, own(rank, CUTS, 20).start, own(rank, Y_CUTS, 16).start, gather_distributed=True)


def outcome(given: dict[str, Tensor], kind: str, at: int, at_y: int, **gathering: Any) -> list[Tensor]:
    given = dict(given)
    x, y = given.pop("x").requires_grad_(), given.pop("y").requires_grad_("queue" not in kind)
    if "labels" not in kind:
        del given["labels"], given["labels_y"]
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    leaves = [x, t] if "queue" in kind else [x, y, t]
    columns = "columns" in kind
    found = fastcl.row_stats(x, y, **given, temperature=t, columns=columns, **gathering)
    a, b = found if columns else (found, None)
    total = weighted(a, at) + (0 if b is None else weighted(b, at_y + 20))
    grads = torch.autograd.grad(total, leaves)
    sides = [a] if b is None else [a, b]
    return [*grads, *(getattr(side, field).detach() for side in sides for field in (*FIELDS, *COUNTS))]


@pytest.mark.parametrize("backend", ("chunked", "dense"))
def test_anchors_against_the_candidates_of_all_ranks(ranks: Pool, backend: str) -> None:  # noqa: F811
    for kind in ("labels", "columns", "labels, columns", "labels, queue"):
        with fastcl.backend(backend):
            wanted = outcome(rectangle(), kind, 0, 0)
        got = [list(parts) for parts in zip(*ranks.run(on, backend, rows_against_rows, kind), strict=True)]
        temperature = 1 if "queue" in kind else 2
        for k, (parts, want) in enumerate(zip(got, wanted, strict=True)):
            value = sum(parts) if k == temperature else torch.cat(parts)
            torch.testing.assert_close(
                value, want, rtol=1e-12, atol=1e-12, msg=lambda m, k=k, kind=kind: f"{kind}, {k}: {m}"
            )


def on(rank: int, backend: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on a backend."""
    with fastcl.backend(backend):
        return function(rank, *arguments)


def twins(rank: int | None) -> list[Tensor]:
    """Both models' losses and gradients, and the measures of the pair; rank None: of one process."""
    za, zb, sample = normal(20, 5), normal(20, 7, seed=2), torch.arange(10).repeat_interleave(2)
    zb[:, :5] += za
    mine = slice(None) if rank is None else own(rank, CUTS, 20)
    za, zb = (z[mine].clone().requires_grad_() for z in (za, zb))
    labels = (sample % 3)[mine]
    gathering = {} if rank is None else {"gather_distributed": True}
    stats = fastcl.twin_stats(za, zb, sample[mine], labels, temperature=0.2, **gathering)
    dcl, nscl = (fastcl.OBJECTIVES[name] for name in ("dcl", "nscl"))
    grads = torch.autograd.grad(dcl(stats.a).sum() + nscl(stats.b).sum(), [za, zb])
    pair = stats.pairs()
    measures = [pair.cka, pair.cka_debiased, pair.rsa, pair.drift, pair.rho, float(stats.n)]
    return [*grads, torch.tensor(measures, dtype=torch.float64)]


def test_twin_statistics_of_all_ranks(ranks: Pool) -> None:  # noqa: F811
    *grads, measures = twins(None)
    found = ranks.run(twins)
    for k, want in enumerate(grads):
        torch.testing.assert_close(torch.cat([one[k] for one in found]), want, rtol=1e-12, atol=1e-12)
    for one in found:
        torch.testing.assert_close(one[-1], measures, rtol=1e-12, atol=1e-12)


def collectives(events: Any) -> list[int]:
    """Numbers of elements that this rank put into each collective."""
    named = [event for event in events if event.name.startswith("_c10d_functional::all")]
    return [torch.Size(event.input_shapes[0]).numel() for event in named]


def traffic(rank: int) -> tuple[list[int], list[int]]:
    """Sizes of the collectives of a forward and of a backward pass with 128 columns."""
    mine = own(rank, CUTS, 20)
    z = normal(20, 128)[mine].requires_grad_()
    sample = torch.arange(10).repeat_interleave(2)[mine]
    found = []
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        loss = fastcl.contrastive_loss(z, sample, sample % 2, "supcon", gather_distributed=True)
    found.append(collectives(seen.events()))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        loss.backward()
    found.append(collectives(seen.events()))
    return found[0], found[1]


def test_five_numbers_a_row_travel_in_the_backward_pass(ranks: Pool) -> None:  # noqa: F811
    most = 12  # rows of the largest rank
    for forward, backward in ranks.run(traffic):
        assert sorted(forward) == [most, 67, 128 * most]  # labels, what ranks compare, rows
        assert backward == [5 * most]


def alone(_: int) -> bool:
    """In a group of one rank, losses and gradients have the bits that they have without a group."""
    same = []
    z, labels = normal(24, 8).float(), torch.arange(12) % 3
    for loss in (
        partial(
            fastcl.contrastive_loss, sample=torch.arange(12).repeat(2), labels=labels.repeat(2), objective="supcon"
        ),
        lambda z, **gathering: fastcl.ntxent_loss(*z.chunk(2), **gathering),
        lambda z, **gathering: fastcl.clip_loss(*z.chunk(2), 5.0, **gathering),
    ):
        runs = []
        for gathering in ({"gather_distributed": True, "group": groups["last"]}, {"gather_distributed": False}):
            leaf = z.clone().requires_grad_()
            value = loss(leaf, **gathering)
            runs.append((value, *torch.autograd.grad(value, leaf)))
        same += [torch.equal(a, b) for a, b in zip(*runs, strict=True)]
    return all(same)


def only_last(rank: int, function: Callable[[int], Any]) -> Any:
    return function(rank) if rank == 2 else None


def test_one_rank_alone_keeps_the_bits(ranks: Pool) -> None:  # noqa: F811
    assert ranks.run(only_last, alone) == [None, None, True]


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
    "reduction": ({"reduction": "sum"}, ("reduction", "mean on rank 0", "sum on rank 1")),
    "normalize": ({"normalize": False}, ("normalize", "True on rank 0", "False on rank 1")),
    "gradients": ({"z": normal(6, 4).requires_grad_()}, ("gradients", "rank 1")),
    "function": ({"function": "clip"}, ("objective", "ntxent on rank 1")),
    "backend": ({"backend": "dense"}, ("backend", "chunked on rank 0", "dense on rank 1")),
    "no rows": ({"z": normal(0, 4)}, ("rank 1 of 3", "z", "non-empty", "(0, 4)")),
    "ids": ({"sample": torch.arange(5)}, ("rank 1 of 3", "sample", "(5,)")),
    "negative temperature": ({"temperature": -1.0}, ("rank 1 of 3", "temperature", "-1.0")),
    "no tensor": ({"z": None}, ("rank 1 of 3", "z", "NoneType")),
    "a name for names": ({"objectives": "dcl"}, ("rank 1 of 3", "sequence of names", "'dcl'")),
    "no names": ({"objectives": [["dcl"]]}, ("rank 1 of 3", "objective", "['dcl']")),
    "unknown objective": ({"objective": "ntxnt"}, ("rank 1 of 3", "'ntxnt'", "'ntxent'")),
}


def odd_one(rank: int, name: str) -> None:
    changes = dict(ODD[name][0]) if rank == 1 else {}
    z = changes.pop("z", normal(6, 4))
    sample, labels = changes.pop("sample", torch.arange(6) // 2), changes.pop("labels", torch.arange(6) // 4)
    with fastcl.backend(changes.pop("backend", "auto")):
        if changes.pop("function", None):
            fastcl.clip_loss(z, z, 2.0, gather_distributed=True)
        if "objectives" in changes:
            fastcl.contrastive_losses(z, sample, labels, **changes, gather_distributed=True)
        options = {"objective": "dcl", "temperature": 0.5} | changes
        fastcl.contrastive_loss(z, sample, labels, **options, gather_distributed=True)


@pytest.mark.parametrize("name", ODD)
def test_what_one_rank_does_otherwise_raises_on_all(ranks: Pool, name: str) -> None:  # noqa: F811
    found = ranks.outcomes(odd_one, name)
    assert all(isinstance(one, Failed) and "FastclError" in one.trace for one in found), found
    assert len({one.text for one in found}) == 1
    assert all(word in found[0].text for word in ODD[name][1]), found[0].text


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
        assert "FastclError" in error.trace and f"rank {rank} of 3 waited in vain" in error.text


def warned(rank: int) -> list[str]:
    z1, z2 = normal(2, 3, 4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for asked in (False, True, None, None):
            fastcl.NTXentLoss(gather_distributed=asked)(z1, z2)
            seen.append(asked)
    assert [one.filename for one in seen if hasattr(one, "filename")] == [__file__]
    return [str(getattr(one, "message", one)) for one in seen]


def test_a_loss_of_own_rows_alone_warns_once(ranks: Pool) -> None:  # noqa: F811
    for said in ranks.run(warned):
        false, true, message, first, second = said
        assert (false, true, first, second) == ("False", "True", "None", "None")
        assert "3 ranks" in message and "gather_distributed=True" in message and "gather_distributed=False" in message


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


def test_the_package_loads_nothing_that_only_ranks_need() -> None:
    name = "torch.distributed._functional_collectives"
    code = f"import sys, torch\nbefore = {name!r} in sys.modules\nimport fastcl.public\n"
    code += f"assert {name!r} not in sys.modules or before"
    subprocess.run([sys.executable, "-c", code], check=True)
