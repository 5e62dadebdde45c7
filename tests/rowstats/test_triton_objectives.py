"""The Triton backend: every objective against its paper's formula in float64, in every precision."""

import itertools
import math

import pytest
import torch
from reference import FORMULAS, Formula, Masks, masks, mean, normal, row_losses, solve, sum_exp
from torch import Tensor
from triton_runs import (  # noqa: F401
    DEVICE,
    check,
    check_own,
    compare_gradients,
    compare_rows,
    few_programs,
    launches,
    leaf,
    row_weights,
    simplex,
    uneven_batch,
)

import fastcl
from fastcl import Objective
from fastcl.losses.call_plans import ROWS
from fastcl.losses.functional import _losses

pytestmark = pytest.mark.usefixtures("few_programs")
PRECISIONS = ("fp16", "bf16", "fp32")
every_objective = pytest.mark.parametrize("name", FORMULAS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
SPLIT = {"supcon", "supcon_in", "supcon_negatives"}  # they attract peers: masked tiles in split half precision


@every_objective
@every_precision
def test_values_and_gradients(precision: str, name: str) -> None:
    sample, labels = uneven_batch()
    ran = check([name], normal(len(sample), 24).float(), sample, labels, 0.1, precision)
    peers = name not in ("nscl", "nscl_with_positive")
    split = (precision == "fp32", precision == "fp32" or name in SPLIT)
    for kernel in ("forward_kernel", "backward_kernel"):
        found = ran.of(kernel)
        assert len(found) == (2 if split == (False, True) else 1)
        for one in found:
            tile, z = one.arguments["TILE"], one.arguments["r"].z
            assert (tile.SPLIT_PLAIN, tile.SPLIT_MASKED) == split
            assert tile.PEERS == peers and one.arguments["flag"] is None
            assert z.dtype == (torch.bfloat16 if precision == "bf16" else torch.float16)
            assert z.shape == (2 if any(split) else 1, 128, 32)
    assert not ran.of("forward_online_kernel")


FEW = ["ntxent", "nscl", "supcon"]
CASES = ((0.003, FEW), (0.01, list(FORMULAS)), (0.05, FEW), (0.5, FEW), (10.0, FEW))
LEARNABLE = ((0.003, list(FORMULAS)), (0.01, FEW), (1.0, FEW))


@pytest.mark.parametrize(
    ("learnable", "temperature", "names"), [(k, *case) for k, cases in enumerate((CASES, LEARNABLE)) for case in cases]
)
def test_temperatures(learnable: int, temperature: float, names: list[str]) -> None:
    """Below 1/150 no shift of the exponentials would do, between that and 1/73 one may not: a flag on the device."""
    sample, labels = uneven_batch()
    t = torch.tensor(temperature) if learnable else temperature
    ran = check(names, normal(len(sample), 24).float(), sample, labels, t)
    flagged = learnable or temperature < 1 / 73
    assert ran.flag() == (int(temperature < 1 / 150) if flagged else None)
    assert len(ran.of("forward_online_kernel")) == flagged
    degrees = [one.arguments["temperature"] for one in ran if "temperature" in one.arguments]
    assert {degree.tensor is not None for degree in degrees} == {bool(learnable)}
    assert bool(ran.of("backward_online_kernel")) == flagged


@pytest.mark.parametrize("temperature", (0.01, 0.05, 0.5, 10.0))
@pytest.mark.parametrize("precision", ("fp16", "bf16"))
def test_temperatures_in_half_precision(precision: str, temperature: float) -> None:
    sample, labels = uneven_batch()
    for names in (["dcl", "nscl"], ["supcon"]):
        check(names, normal(len(sample), 24).float(), sample, labels, temperature, precision)


@every_precision
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_rows_of_half_precision(dtype: torch.dtype, precision: str) -> None:
    sample, labels = uneven_batch()
    z = normal(len(sample), 24).to(dtype)
    check(["nscl_with_positive", "supcon"], z, sample, labels, torch.tensor([0.2]), precision)


@every_objective
def test_rows_that_are_not_normalised(name: str) -> None:
    sample, labels = uneven_batch()
    for size, t in ((0.3, 0.5), (2.0, torch.tensor(0.5))):  # logits up to 8 and up to 400
        z = (normal(len(sample), 24) * size).float()
        ran = check([name], z, sample, labels, t, normalize=False)
        assert ran.flag() == 1 and ran.of("forward_kernel")[0].arguments["r"].scale is not None


@every_precision
@every_objective
def test_converged(name: str, precision: str) -> None:
    """At a loss within 1e-3 of its minimum the weights p - 1 and p - 1/n are what is left of two nearly equal terms."""
    for temperature, copies, noise in ((0.05, 2, 1e-3), (0.1, 4, 1e-4)):
        labels = torch.arange(12).repeat(copies)
        # SupCon: what is in one place is one class, of two samples with two views each where there are four copies.
        sample = torch.arange(6 * copies).repeat(2) if name in SPLIT else labels
        formula = row_losses(name, masks(sample, labels))
        z = simplex(12, copies, noise)
        lowest = solve(formula, simplex(12, copies, 0.0).double(), temperature).loss
        assert 0 < solve(formula, z, temperature).loss - lowest < 1e-3
        check([name], z, sample, labels, temperature, precision)


def of_sets(denominator: tuple[str, ...], positives: tuple[str, ...], inside: bool) -> Formula:
    """The formula of any objective, from its sets of relations."""

    def formula(s: Tensor, m: Masks) -> tuple[Tensor, Tensor, Tensor]:
        def union(relations: tuple[str, ...]) -> Tensor:
            return sum((getattr(m, r) for r in relations), torch.zeros_like(m.view)).bool()

        pulled, pushed = union(positives), union(tuple(r for r in denominator if r not in positives))
        everything = sum_exp(s, union(denominator)).log()
        if inside:
            loss = everything - (sum_exp(s, pulled) / pulled.sum(1).clamp(min=1)).log()
        else:
            loss = everything - mean(s, pulled)
        # Where nothing is only repelled, a positive is all that a row needs.
        return loss, pulled, pushed if set(denominator) - set(positives) else pulled

    return formula


def subsets(relations: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [c for k in range(1, len(relations) + 1) for c in itertools.combinations(relations, k)]


SETS = list(itertools.product(subsets(("view", "peer", "other")), subsets(("view", "peer")), (False, True)))
# Rows with every combination of relations present and absent that one batch can have: samples 0 and 1 share a class,
# 2 has one view and peers, 3 two views and no peers, 4 one view and nothing else, 5 is unlabelled, 6 has three views.
MIXED = torch.tensor([0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 6, 6])
CLASSES = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, -1, -1, 0, 0, 0])


@pytest.mark.parametrize(("denominator", "positives", "inside"), SETS)
def test_every_possible_objective(denominator: tuple[str, ...], positives: tuple[str, ...], inside: bool) -> None:
    sample, labels = MIXED, CLASSES
    if set(denominator) < set(positives):  # neither relation alone leaves a denominator of nothing
        keep = torch.tensor([0, 1, 2, 3, 10, 11, 12])
        sample, labels = sample[keep], labels[keep]
    own = Objective(denominator, positives, inside)
    ran = check_own(of_sets(denominator, positives, inside), own, normal(len(sample), 5).float(), sample, labels, 0.2)
    (finish,) = ran.of("finish_kernel")
    assert finish.arguments["CODES"] == (own.code,) == ran.of("weights_kernel")[0].arguments["CODES"]


@pytest.mark.parametrize("labels", (torch.zeros(13).long(), torch.arange(13) // 2 * 0 - 1))
def test_every_objective_at_once_where_relations_are_empty(labels: Tensor) -> None:
    """All codes in one launch, where no row has an other (one class) and where none has a peer (no class)."""
    sets = [s for s in SETS if s[0] != s[1][:1] and s[0] != s[1][1:] or len(s[1]) == 1]
    weights, z = row_weights(13), normal(13, 5).float()
    with launches() as ran:
        x = leaf(z)
        tensors = x, MIXED.to(DEVICE), labels.to(DEVICE)
        rows = _losses(ROWS, tensors, tuple(Objective(*s) for s in sets), 0.3, True, "none", (False, None))
        total = sum(rows)
        formulas = [row_losses(of_sets(*s), masks(MIXED, labels)) for s in sets]
        truth = solve(lambda s: sum(f(s) for f in formulas), z, 0.3, weights=weights, subtracts=True)
        compare_gradients(compare_rows(total, truth, weights, "fp32"), [x], truth, "fp32")
    assert len(ran.of("finish_kernel")[0].arguments["CODES"]) == len(sets) > 30
    for row, formula in zip(rows, formulas, strict=True):
        assert torch.equal(row.cpu() == 0, solve(formula, z, 0.3).rows == 0)


def test_a_callable_of_ones_own_reads_the_statistics() -> None:
    sample, labels = uneven_batch()
    own = lambda r: torch.where(r.valid, r.lse_other - r.mean_view, 0)  # noqa: E731
    z = normal(len(sample), 24).float()
    ran = check_own(FORMULAS["nscl"], own, z, sample, labels, torch.tensor(0.2))
    assert ran.of("weights_kernel")[0].arguments["one"].grad_stats is not None
    assert ran.of("finish_kernel")[0].arguments["one"].counts is not None


def test_known_values() -> None:
    """Equal similarities leave counts alone."""
    sample, labels = torch.arange(40).repeat(2).to(DEVICE), (torch.arange(40) % 5).repeat(2).to(DEVICE)
    count = dict(zip(FORMULAS, (79, 78, 64, 65, 79, 79, 64), strict=True))
    for precision in PRECISIONS:
        with launches():
            losses = fastcl.contrastive_losses(
                torch.ones(80, 4, device=DEVICE), sample, labels, FORMULAS, 0.1, precision=precision
            )
        for name, rows in count.items():
            assert losses[name].item() == pytest.approx(math.log(rows), abs=2e-6)
