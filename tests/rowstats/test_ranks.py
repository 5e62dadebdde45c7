"""Row statistics of rows that lie on several ranks, and what the ranks send each other."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from gloo_ranks import Pool, groups, own, ranks  # noqa: F401
from reference import TOLERANCE, normal
from test_rowstats import FIELDS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastcl

pytestmark = pytest.mark.dist
CUTS = (6, 8)
COUNTS = ("n_view", "n_peer", "n_other")


def rectangle(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """20 anchors and 16 candidates of 10 samples; a rank's anchors and candidates are of its own samples."""
    sample = torch.arange(10).repeat_interleave(2)
    sample_y = torch.arange(10).repeat_interleave(torch.tensor([1, 3, 0, 2, 2, 2, 1, 1, 2, 2]))
    labels = torch.tensor([0, 1, 2, 0, 1, -1, 0, 2, -1, 1])
    x, y = normal(20, 5).to(dtype), normal(16, 5, seed=1).to(dtype)
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


def rows_against_rows(rank: int, kind: str, dtype: torch.dtype) -> list[Tensor]:
    """Statistics, counts, and gradients of x, y and the temperature on one rank; kind: what is asked for."""
    given = rectangle(dtype)
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


@pytest.mark.parametrize("backend", ("chunked", "dense", "triton"))
def test_anchors_against_the_candidates_of_all_ranks(ranks: Pool, backend: str) -> None:  # noqa: F811
    dtype = torch.float32 if backend == "triton" else torch.float64
    for kind in ("labels", "columns", "labels, columns", "labels, queue"):
        with fastcl.backend("dense"):
            wanted = outcome(rectangle(), kind, 0, 0)
        given = backend, rows_against_rows, kind, dtype
        got = [list(parts) for parts in zip(*ranks.run(on, *given), strict=True)]
        temperature = 1 if "queue" in kind else 2
        for k, (parts, want) in enumerate(zip(got, wanted, strict=True)):
            value = sum(parts) if k == temperature else torch.cat(parts)
            assert_near(value, want, dtype, f"{kind}, {k}")


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype, what: str) -> None:
    """In float64, and where they are counts, all entries are; in float32 the whole."""
    if dtype == torch.float64 or not want.is_floating_point():
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=lambda m: f"{what}: {m}")
        return
    known = want.isfinite()
    error = (got.double() - want)[known].norm()
    assert torch.equal(got.isfinite(), known), what
    assert error <= 2 * TOLERANCE[dtype].gradient * want[known].norm(), f"{what}: {error:.1e} of {want[known].norm()}"


def on(rank: int, backend: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on a backend."""
    with fastcl.backend(backend):
        return function(rank, *arguments)


def twins(rank: int | None, dtype: torch.dtype) -> list[Tensor]:
    """Both models' losses and gradients, and the measures of the pair; rank None: of one process."""
    za, zb, sample = normal(20, 5), normal(20, 7, seed=2), torch.arange(10).repeat_interleave(2)
    zb[:, :5] += za
    mine = slice(None) if rank is None else own(rank, CUTS, 20)
    za, zb = (z[mine].to(dtype, copy=True).requires_grad_() for z in (za, zb))
    labels = (sample % 3)[mine]
    gathering = {} if rank is None else {"gather_distributed": True}
    stats = fastcl.twin_stats(za, zb, sample[mine], labels, temperature=0.2, **gathering)
    dcl, nscl = (fastcl.OBJECTIVES[name] for name in ("dcl", "nscl"))
    grads = torch.autograd.grad(dcl(stats.a).sum() + nscl(stats.b).sum(), [za, zb])
    pair = stats.pairs()
    measures = [pair.cka, pair.cka_debiased, pair.rsa, pair.drift, pair.rho, float(stats.n)]
    return [*grads, torch.tensor(measures, dtype=torch.float64)]


@pytest.mark.parametrize("backend", ("chunked", "triton"))
def test_twin_statistics_of_all_ranks(ranks: Pool, backend: str) -> None:  # noqa: F811
    dtype = torch.float32 if backend == "triton" else torch.float64
    *grads, measures = twins(None, torch.float64)
    found = ranks.run(on, backend, twins, dtype)
    for k, want in enumerate(grads):
        assert_near(torch.cat([one[k] for one in found]), want, dtype, f"gradient {k}")
    for one in found:
        assert_near(one[-1], measures, dtype, "measures")


def collectives(events: Any) -> list[int]:
    """Numbers of elements that this rank put into each collective."""
    named = [event for event in events if event.name.startswith("_c10d_functional::all")]
    return [torch.Size(event.input_shapes[0]).numel() for event in named]


def traffic(rank: int) -> tuple[list[int], list[int], list[str]]:
    """Sizes of the collectives of a forward and of a backward pass with 128 columns; what the forward pass does, in
    order, between the time that the rows begin to travel and the time that they have arrived."""
    mine = own(rank, CUTS, 20)
    z = normal(20, 128)[mine].requires_grad_()
    sample = torch.arange(10).repeat_interleave(2)[mine]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        loss = fastcl.contrastive_loss(z, sample, sample % 2, "supcon", gather_distributed=True)
    forward = sorted(seen.events(), key=lambda event: event.time_range.start)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        loss.backward()
    named = [(event.name, event.input_shapes[:1]) for event in forward]
    started = named.index(("_c10d_functional::all_gather_into_tensor", [[12, 128]]))
    arrived = named.index(("_c10d_functional::wait_tensor", [[36, 128]]))
    return collectives(forward), collectives(seen.events()), [name for name, _ in named[started:arrived]]


def test_five_numbers_a_row_travel_in_the_backward_pass(ranks: Pool) -> None:  # noqa: F811
    most = 12  # rows of the largest rank
    for forward, backward, meanwhile in ranks.run(traffic):
        assert sorted(forward) == [most, 83, 128 * most]  # labels, what ranks compare, rows
        assert backward == [5 * most]
        assert any(name.endswith("mm") for name in meanwhile)  # own rows against own rows


def alone(_: int) -> bool:
    """In a group of one rank, losses and gradients have the bits that they have without a group."""
    same = []
    z, labels = normal(22, 8).float(), torch.arange(11) % 3
    for loss in (
        partial(
            fastcl.contrastive_loss, sample=torch.arange(11).repeat(2), labels=labels.repeat(2), objective="supcon"
        ),
        lambda z, **gathering: fastcl.ntxent_loss(*z.chunk(2), **gathering),
        lambda z, **gathering: fastcl.clip_loss(*z.chunk(2), 5.0, **gathering),
        lambda z, **gathering: fastcl.clip_loss(*z.chunk(2), 5.0, label_smoothing=0.1, **gathering),
        lambda z, **gathering: fastcl.sigmoid_loss(*z.chunk(2), 5.0, -5.0, **gathering),
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


def test_the_package_loads_nothing_that_only_ranks_need() -> None:
    name = "torch.distributed._functional_collectives"
    code = f"import sys, torch\nbefore = {name!r} in sys.modules\nimport fastcl.public\n"
    code += f"assert {name!r} not in sys.modules or before"
    subprocess.run([sys.executable, "-c", code], check=True)
