"""A user's file: mypy and pyright, both strict, have nothing to say about it, and object at each `type: ignore`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import fastcl
from fastcl.data import ViewLoader, ViewPlan, ViewSpec, load, make_renderer
from fastcl.similarity import bootstrap_interval, permutation_test
from fastcl.theory import similarity_coupling_bound


def losses(z1: Tensor, z2: Tensor, labels: Tensor, temperature: nn.Parameter) -> Tensor:
    """Losses as functions and as modules."""
    sample = torch.arange(len(z1)).repeat(2)
    z = torch.cat([z1, z2])
    total = fastcl.ntxent_loss(z1, z2, temperature=0.5, reduction="sum")
    total += fastcl.dcl_loss(z1, z2, temperature) + fastcl.nscl_loss(z1, z2, labels, positive_in_denominator=True)
    total = total + fastcl.supcon_loss(z1, z2, labels) + fastcl.clip_loss(z1, z2, logit_scale=100.0)
    own: Callable[[fastcl.RowStats], Tensor] = lambda stats: stats.lse_other - stats.mean_view  # noqa: E731
    for objective in (fastcl.OBJECTIVES["dcl"], fastcl.Objective(("other",), ("view",)), own):
        total = total + fastcl.contrastive_loss(z, sample, labels.repeat(2), objective, precision="fp16")
    total = total + fastcl.contrastive_loss(z, sample, objective="ntxent", reduction="none").sum()
    several = fastcl.contrastive_losses(z, sample, labels.repeat(2), objectives=("dcl", "nscl"), precision="bf16")
    total = total + several["dcl"]
    for module in (fastcl.NTXentLoss(temperature), fastcl.DCLLoss(reduction="sum"), fastcl.NTXentLoss(normalize=False)):
        total += module(z1, z2)
    total += fastcl.NSCLLoss(0.2, positive_in_denominator=True)(z1, z2, labels)
    total += fastcl.SupConLoss()(z1, z2, labels) + fastcl.CLIPLoss()(z1, z2, 10.0)
    rows = torch.arange(len(z1))
    total += fastcl.queue_loss(z1, z2, z, temperature, reduction="sum")
    total += fastcl.sigmoid_loss(z1, z2, 10.0, temperature, reduction="sum", precision="fp32")
    total += fastcl.contrastive_loss((z1, z2), (rows, rows))
    total += fastcl.clip_loss(z1, z2, 1.0, reduction="none", precision="bf16").sum()
    with fastcl.backend("dense"):
        print(fastcl.last_backend().upper())
    return total


def statistics(x: Tensor, y: Tensor, sample: Tensor, columns: bool) -> Tensor:
    """Row statistics: two results where columns are asked for, one where they are not."""
    rows = fastcl.row_stats(x, sample=sample, temperature=0.5)
    anchors, candidates = fastcl.row_stats(x, y, sample=sample, sample_y=sample, temperature=0.5, columns=True)
    either = fastcl.row_stats(x, y, sample=sample, sample_y=sample, temperature=0.5, columns=columns)
    twins = fastcl.twin_stats(x, y, sample, temperature=0.5, precision="fp32")
    if isinstance(either, tuple):
        either = either[0]
    total: Tensor = rows.lse_view + anchors.lse_other + candidates.lse_peer + either.mean_view + twins.a.mean_view
    drift: float = twins.pairs().drift
    mass = fastcl.same_class_mass(fastcl.two_view_stats(x, y, sample, 0.5))
    return total * drift + mass + fastcl.normalize_rows(x).sum() + rows.valid


def similarity(x: Tensor, y: Tensor, f: nn.Module, g: nn.Module) -> float:
    """Every measure is a number; a kernel's statistics are there, or asking for them is an error."""
    stats = fastcl.pair_stats(x, y, kernel="rbf", route="tiles", bandwidth=0.5)
    models = fastcl.PairAccumulator(["cl", "nscl"], kernels=("linear", "cosine"), minibatch=True)
    models.update({"cl": x, "nscl": y})
    result = models.compute()
    pair = result["cl", "nscl"]
    numbers: list[float] = [pair.linear.cka_debiased, pair.cosine.rsa, pair.correlation.cka, pair.cka_minibatch]
    numbers += [value for value in pair.hsic1]
    numbers += [stats.cka, stats.rho, stats.cka_bound, fastcl.rsa(x, y), fastcl.linear_cka(x, y, debiased=True)]
    ranks = fastcl.spearman_rsa(x, y)
    numbers += [ranks.value, ranks.low, ranks.high, ranks.error]
    shares: dict[int, float] = fastcl.mutual_knn(x, y, k=(1, 10))
    numbers += [fastcl.mutual_knn(x, y), shares[1], fastcl.procrustes(x, y).distance, fastcl.procrustes(x, y).angle]
    test = permutation_test(x, y, "cka_linear", repeats=10, seed=1)
    numbers += [test.p_value, test.null_mean, test.null_quantiles[0.95], test.null.sum().item()]
    interval = bootstrap_interval(x, y, "mutual_knn", repeats=10, level=0.9, k=3)
    numbers += [interval.low, interval.high, interval.standard_error]
    table = fastcl.layer_cka(f, g, [x], "*", progress=True)
    names: str = "".join(table.names_a)
    bound = similarity_coupling_bound([0.3], batch_size=4, temperature=1.0, largest_class=0.1, n=8)
    return sum(numbers) + len(names) + table.matrix.sum().item() + bound.log10[-1]


def data(device: torch.device, folder: Path) -> Tensor:
    """Data, renderers by name on a device by name or object, a loader and its batches."""
    found = load(f"folder:{folder}", classes=4, corrupt="skip")
    spec = ViewSpec.preset("cifar", size=32)
    renderer = make_renderer("auto", found.train, spec, "cpu")
    renderer = make_renderer("torchvision", found.train, spec, device)
    loader = ViewLoader(found.train, ViewPlan(spec, seed=0), 256, "balanced", renderer=renderer, workers=2)
    total = torch.zeros((), dtype=torch.float32, device=device)
    for (first, second), labels, ids in loader:
        total = total + (first - second).sum() + labels.sum() + ids.sum()
    state: dict[str, int] = loader.state_dict()
    used: torch.device = loader.renderer.device
    print(state["epoch"], used.type)
    return total


if TYPE_CHECKING:
    z = torch.zeros(())
    fastcl.ntxent_loss(z, z, reduction="avg")  # type: ignore[arg-type]
    fastcl.NTXentLoss(reduction="avg")  # type: ignore[arg-type]
    fastcl.contrastive_loss(z, z, objective="simclr")  # type: ignore[arg-type]
    fastcl.contrastive_losses(z, z, objectives=("simclr",))  # type: ignore[arg-type]
    fastcl.contrastive_loss(z, z, precision="fp8")  # type: ignore[arg-type]
    fastcl.row_stats(z, sample=z, temperature=1.0, precision="fp8")  # type: ignore[call-overload]
    fastcl.twin_stats(z, z, z, temperature=1.0, precision="fp8")  # type: ignore[arg-type]
    fastcl.backend("cuda")  # type: ignore[arg-type]
    fastcl.pair_stats(z, z, "gauss")  # type: ignore[arg-type]
    fastcl.PairAccumulator(["a", "b"], ["rbf"])  # type: ignore[list-item]
    make_renderer("pillow", load("digits").train, ViewSpec(), "cpu")  # type: ignore[arg-type]
    load("digits", corrupt="ignore")  # type: ignore[arg-type]
    fastcl.row_stats(z, sample=z, temperature=1.0)[0]  # type: ignore[index]
