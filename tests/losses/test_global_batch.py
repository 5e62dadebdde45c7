"""Losses of rows that lie on several ranks: values and gradients of one float64 process that has all rows."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gloo_ranks import Pool, groups, own, ranks  # noqa: F401
from reference import TOLERANCE, normal
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastcl
from fastcl.choices import Precision

pytestmark = pytest.mark.dist
WIDTH = 10  # of the network's input


@dataclass(frozen=True)
class Case:
    """A batch, where it is cut, a loss and how the network is trained."""

    cuts: tuple[int, ...]  # one for two ranks, two for three
    loss: str = "contrastive"
    objective: str = "ntxent"
    views: int = 2
    labels: str = "some"  # "none"; "some": unlabelled rows too; "one rank": a class that lives on the first rank alone
    temperature: float = 0.3
    how: str = "ddp"
    dtype: torch.dtype = torch.float64
    backend: str = "auto"
    normalize: bool = True
    lowered: bool = False  # by autocast to bfloat16
    precision: Precision | None = None

    @property
    def world(self) -> int:
        return len(self.cuts) + 1


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of 12 samples, ids and labels; all views of a sample are adjacent."""
    samples = 12
    sample = torch.arange(samples).repeat_interleave(case.views)
    labels = torch.tensor([0, 1, 2, 0, 1, -1, 0, 2, -1, 1, 0, 2])
    if case.labels == "one rank":
        labels = torch.tensor([7, 7, 1, 1, 2, 2, 1, 2, 1, 1, 2, 2])
    x = normal(samples * case.views, WIDTH, seed=3)
    x += normal(samples, WIDTH, seed=4)[sample]
    return x.to(case.dtype), sample, None if case.labels == "none" else labels[sample]


class Network(nn.Module):
    """Two layers and a learnable temperature: rows, then the loss as a method of its own."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 6)).to(case.dtype)
        self.temperature = nn.Parameter(torch.tensor([case.temperature], dtype=case.dtype))
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x), self.temperature * 1


def my_objective(stats: fastcl.RowStats) -> Tensor:
    """One of the caller's own, of every statistic."""
    some = (stats.n_peer > 0) & stats.valid
    peers = (stats.lse_peer.masked_fill(~some, 0) - 0.3 * stats.mean_peer).where(some, 0)
    return peers + (stats.lse_other - stats.mean_view + stats.spread_view).where(stats.valid, 0)


class Mine(fastcl.Objective):
    """The same, of what looks like a row of the table that needs no peers."""

    def __call__(self, stats: fastcl.RowStats) -> Tensor:
        return my_objective(stats)


MINE = {"mine": my_objective, "mine as a subclass": Mine(("other",), ("view",))}


def loss_of(case: Case, z: Tensor, t: Tensor, sample: Tensor, labels: Tensor | None, **gathering: Any) -> Tensor:
    """The loss of a case; ids begin at 0 on every rank."""
    sample = sample - sample[0]
    first, second = (z[k :: case.views] for k in (0, 1))
    of = None if labels is None else labels[:: case.views]
    match case.loss:
        case "contrastive":
            objective = MINE.get(case.objective, case.objective)
            return fastcl.contrastive_loss(z, sample, labels, objective, t, normalize=case.normalize, **gathering)
        case "several":
            found = fastcl.contrastive_losses(z, sample, labels, ("dcl", "supcon", "nscl"), t, **gathering)
            return found["dcl"] + 2 * found["supcon"] - 3 * found["nscl"]
        case "ntxent" | "dcl":
            return getattr(fastcl, f"{case.loss}_loss")(first, second, t, **gathering)
        case "nscl" | "supcon":
            return getattr(fastcl, f"{case.loss}_loss")(first, second, of, t, **gathering)
        case "module":
            return fastcl.NSCLLoss(t, positive_in_denominator=True, **gathering)(first, second, of)
        case "clip":
            return fastcl.clip_loss(first, second, 1 / t, **gathering)
        case "explicit pairs":
            own = torch.arange(len(z))
            pairs = torch.stack([own, (own // case.views * case.views).where(own % case.views > 0, own + 1)], 1)
            weights = torch.ones(len(z)).index_fill(0, own[::3], 0)
            return fastcl.explicit_pairs_loss(z, pairs, weights, t, "mean", case.normalize, **gathering)
        case "smooth clip":
            return fastcl.clip_loss(first, second, 1 / t, case.normalize, label_smoothing=0.2, **gathering)
        case "sigmoid":
            return fastcl.sigmoid_loss(first, second, 1 / t, 3 * t - 2, normalize=case.normalize, **gathering)
        case "clip module":
            return fastcl.CLIPLoss(**gathering)(first, second, 1 / t)
    raise AssertionError(case.loss)


def wrapped(network: Network, how: str, group: Any) -> nn.Module:
    """The network as the case trains it."""
    if how == "ddp":
        return DistributedDataParallel(network, process_group=group)
    if how == "fsdp":
        mesh = DeviceMesh.from_group(group, "cpu")
        for layer in network.layers:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        return fully_shard(network, mesh=mesh)
    return network


def flat(tensors: Sequence[Tensor]) -> Tensor:
    full = [v.full_tensor() if hasattr(v, "full_tensor") else v for v in tensors]
    return torch.cat([v.reshape(-1) for v in full])


# Inductor's C++ of all operations compiles for a minute. This leaves its plan of the graph: order, memory, waits.
OPTIONS = {"inductor": {"fallback_by_default": True, "compile_threads": 1}}


def compiled(loss: Callable[..., Tensor], engine: str | None, dynamic: bool | None = None) -> Callable[..., Tensor]:
    """The loss as one graph, if an engine is named."""
    if engine is None:
        return loss
    torch._dynamo.reset()
    return torch.compile(loss, fullgraph=True, backend=engine, options=OPTIONS.get(engine), dynamic=dynamic)


def step(rank: int, cases: Sequence[Case], engine: str | None = None) -> list[tuple[Tensor, ...]]:
    """For each case: this rank's share of the loss, its rows' gradient, and averaged gradients of all parameters.

    Args:
        engine: the one that compiles the loss.
    """
    results = []
    for case in cases:
        group = groups["pair"] if case.world == 2 else None
        x, sample, labels = inputs(case)
        mine = own(rank, [c * case.views for c in case.cuts], len(x))
        network = wrapped(Network(case), case.how, group or dist.group.WORLD)
        given = sample[mine], None if labels is None else labels[mine]

        options = {"gather_distributed": True, "group": group}
        if case.precision is not None:
            options["precision"] = case.precision

        def loss_of_rows(z: Tensor, t: Tensor, case: Case = case, given: Any = given, options: Any = options) -> Tensor:
            return loss_of(case, z, t, *given, **options)

        with fastcl.backend(case.backend):
            z, t = network(x[mine])
            z.retain_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=case.lowered):
                loss = compiled(loss_of_rows, engine)(z, t)
        loss.backward()
        averaged = flat([p.grad for p in network.parameters()])
        if case.how == "mean":
            dist.all_reduce(averaged, group=group)
            averaged /= case.world
        results.append((loss.detach(), z.grad, averaged))
    return results


def whole(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, rows' gradient and parameters' gradients of one process in float64."""
    x, sample, labels = inputs(case)
    network = copy.deepcopy(Network(case)).double()
    with fastcl.backend("dense"):
        z, t = network(x.double())
        z.retain_grad()
        loss = loss_of(case, z, t, sample, labels)
    loss.backward()
    return loss.detach(), z.grad, flat([p.grad for p in network.parameters()])


def errors(case: Case, shares: Sequence[tuple[Tensor, ...]]) -> dict[str, float]:
    """Relative errors of the averaged loss, rows' gradients, weights' and temperature's gradients."""
    loss, rows, averaged = whole(case)
    got = torch.stack([share[0] for share in shares]).mean()
    got_rows = torch.cat([share[1] for share in shares]) / case.world
    found = {"loss": (got, loss), "rows": (got_rows, rows)}
    for rank, share in enumerate(shares):
        found[f"weights, rank {rank}"] = share[2], averaged
    # Parameters come in the order of the module: the temperature is the first.
    found["temperature"] = shares[0][2][:1], averaged[:1]
    return {name: float((a.double() - b).norm() / b.norm()) for name, (a, b) in found.items()}


OBJECTIVES = (*fastcl.OBJECTIVES, "mine")
CASES = [
    *(Case((5,), objective=o, views=2 + k % 3) for k, o in enumerate(OBJECTIVES)),
    *(Case((4, 5), objective=o, views=4 - k % 3, temperature=0.05) for k, o in enumerate(OBJECTIVES)),
    *(Case((2, 7), objective=o, labels="one rank", backend="chunked") for o in ("nscl", "supcon", "supcon_in")),
    *(Case((2, 7), objective=o, backend="dense") for o in ("ntxent", "supcon", "mine")),
    Case((5,), objective="mine as a subclass"),
    *(Case((4, 8), objective=o, labels="none", temperature=0.01) for o in ("ntxent", "dcl")),
    *(Case((3,), loss) for loss in ("several", "ntxent", "dcl", "nscl", "supcon", "module", "clip", "clip module")),
    *(Case((3, 10), loss, how=how) for loss in ("clip", "nscl") for how in ("mean", "fsdp")),
    *(Case((7,), objective=o, how=how) for o in ("ntxent", "supcon") for how in ("mean", "fsdp")),
    *(Case((1, 2), objective=o, normalize=False, temperature=2.0) for o in ("dcl", "supcon")),
    *(Case((5, 6), objective=o, dtype=torch.float32) for o in ("ntxent", "supcon", "nscl")),
    *(Case((5, 6), loss, dtype=torch.float32) for loss in ("clip", "sigmoid")),
    *(Case((3,), "sigmoid", backend=backend, normalize=False) for backend in ("chunked", "dense")),
    *(Case((2, 7), loss, how=how) for loss in ("sigmoid", "smooth clip") for how in ("ddp", "fsdp")),
    *(Case(cuts, "explicit pairs", backend=backend) for cuts, backend in (((3,), "dense"), ((3, 6), "chunked"))),
    Case((5,), "smooth clip", normalize=False),
]


@pytest.mark.parametrize("world", (2, 3))
def test_the_average_over_ranks_is_that_of_one_process(ranks: Pool, world: int) -> None:  # noqa: F811
    cases = [case for case in CASES if case.world == world]
    results = ranks.run(step, cases, world=world)
    wrong = []
    for case, shares in zip(cases, zip(*results, strict=True), strict=True):
        bound = 1e-12 if case.dtype == torch.float64 else TOLERANCE[case.dtype].gradient
        for name, error in errors(case, shares).items():
            if not error <= bound:
                wrong.append(f"{name}: {error:.1e} in {case}")
    assert not wrong, "\n".join(wrong)
