"""The Triton backend at sizes that only a GPU reaches, against float64; each check also runs tiny in the interpreter.

The references are the chunked backend in float64, and for the largest batches the written-out formula on sampled rows.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastcl
from bench.gpu import by_hand, repeat, workload
from fastcl.rowstats.triton import hopper

T = 0.2
# Relative, of the loss of 4096 rows (the rounding of fewer averages out less) and of the gradient's norm.
TOLERANCES = {"fp16": (2e-5, 5e-4), "bf16": (2e-4, 5e-3), "fp32": (1e-6, 1e-5)}
OBJECTIVES = sorted(fastcl.OBJECTIVES)
gpu = pytest.mark.gpu

CASES = [
    *((name, 48, 16, "fp16") for name in OBJECTIVES),
    *((name, 48, 16, "fp32") for name in ("nscl", "supcon_in")),
    ("ntxent", 40, 272, "fp32"),
    ("supcon", 48, 16, "bf16"),
]
LARGE = [
    *((name, 4096, 128, precision) for name in OBJECTIVES for precision in ("fp16", "fp32")),
    *((name, 3000, 72, "fp16") for name in ("ntxent", "supcon")),  # no multiple of any tile
    *((name, 2048, 512, precision) for name in ("ntxent", "supcon") for precision in ("fp16", "fp32")),
    ("ntxent", 4096, 128, "bf16"),
    ("ntxent", 4096, 1024, "fp16"),
    *((name, 65536, 128, "fp16") for name in ("ntxent", "nscl", "supcon")),
    ("ntxent", 65536, 128, "fp32"),
]


def batch(n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """z of two views that attract each other a little, as in training; samples; classes, some rows without one."""
    generator = torch.Generator().manual_seed(n + d)
    base, noise = torch.randn(n // 2, d, generator=generator), torch.randn(n, d, generator=generator)
    z = (base.repeat(2, 1) + noise).to(device).requires_grad_()
    sample = torch.arange(n // 2, device=device)
    classes = sample % max(2, min(100, n // 8))
    return z, sample.repeat(2), classes.where(sample % 5 > 0, -1).repeat(2)


def solved(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_close(found: list[Tensor], truth: list[Tensor], precision: str, rows: int) -> None:
    loss, gradient = TOLERANCES[precision]
    for k, (got, want) in enumerate(zip(found, truth, strict=True)):
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error <= (gradient if k else loss * max(1, 4096 / rows) ** 0.5), (k, error)  # NaN is not


@pytest.mark.parametrize(
    ("objective", "n", "d", "precision"), [*CASES, *(pytest.param(*case, marks=gpu) for case in LARGE)]
)
def test_values_and_gradients_are_those_of_float64(device, objective, n, d, precision):
    z, sample, labels = batch(n, d, device)
    with fastcl.backend("triton"):
        found = solved(fastcl.contrastive_loss(z, sample, labels, objective, T, precision=precision), z)
    assert fastcl.last_backend() == "triton"
    exact = z.detach().double().requires_grad_()
    with fastcl.backend("chunked"):
        truth = solved(fastcl.contrastive_loss(exact, sample, labels, objective, T), exact)
    assert_close(found, truth, precision, n)


@pytest.mark.parametrize(("n", "d"), [(32, 16), *(pytest.param(*c, marks=gpu) for c in ((4096, 128), (3000, 640)))])
def test_two_towers_and_their_scale_are_those_of_float64(device, n, d):
    z = batch(n, d, device)[0]
    image, text = (half.detach().requires_grad_() for half in z.chunk(2))
    leaves = [image, text, torch.tensor(20.0, device=device).requires_grad_()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with fastcl.backend("triton"):
        found = solved(fastcl.clip_loss(*leaves), *leaves)
    with fastcl.backend("chunked"):
        truth = solved(fastcl.clip_loss(*exact), *exact)
    assert_close(found, truth, "fp32", n)


@pytest.mark.parametrize("objective", ["ntxent", "nscl"])
@pytest.mark.parametrize(
    ("n", "d", "precision"),
    [(64, 16, "fp16"), *(pytest.param(n, 128, p, marks=gpu) for n in (65536, 262144) for p in ("fp16", "fp32"))],
)
def test_sampled_rows_of_a_large_batch_are_the_written_out_formula(device, objective, n, d, precision):
    z, sample, labels = batch(n, d, device)
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(2))[: min(n // 4, 256)].to(device)
    with fastcl.backend("triton"):
        rows = fastcl.contrastive_loss(z, sample, labels, objective, T, reduction="none", precision=precision)
    found = solved(rows[chosen].sum(), z)
    exact = z.detach().double().requires_grad_()
    u = functional.normalize(exact)
    logits = u[chosen] @ u.T / T
    same = sample[chosen, None] == sample
    itself = chosen[:, None] == torch.arange(n, device=device)
    outside = itself
    if objective == "nscl":
        outside = same | ((labels[chosen, None] == labels) & (labels[chosen, None] >= 0))
    denominator = logits.masked_fill(outside, -torch.inf).logsumexp(1)
    truth = solved((denominator - logits.masked_fill(~same | itself, 0).sum(1)).sum(), exact)
    assert_close(found, truth, precision, len(chosen))


def names(scale: str) -> list[str]:
    return [case.name for case in workload.cases(scale, torch.device("cpu"))]


@pytest.mark.parametrize(
    ("scale", "name"),
    [
        *(("tiny", name) for name in names("tiny") if "fp16" in name),
        *(pytest.param("full", name, marks=gpu) for name in names("full")),
    ],
)
def test_two_runs_a_graph_and_a_compiled_call_agree(device, scale, name):
    (case,) = (case for case in workload.cases(scale, device) if case.name == name)
    outcomes = list(repeat.checks(case, None))
    assert not [(what, detail) for what, passed, detail in outcomes if passed is False]
    assert ("two runs", True, "") in outcomes and (device.type == "cpu" or ("CUDA graph", True, "") in outcomes)


SHAPES = [(40, 20, 33), *(pytest.param(*case, marks=gpu) for case in ((20_000, 512, 300), (3_001, 2_048, 130)))]


@pytest.mark.parametrize(("n", "dx", "dy"), SHAPES)
@pytest.mark.parametrize(("kernel", "route"), [("linear", "features"), ("cosine", "tiles"), ("rbf", "tiles")])
def test_pair_statistics_are_those_of_float64_and_the_same_in_every_run(device, n, dx, dy, kernel, route):
    generator = torch.Generator().manual_seed(n)
    shared = torch.randn(n, 8, generator=generator)
    x, y = (shared @ torch.randn(8, d, generator=generator) + torch.randn(n, d, generator=generator) for d in (dx, dy))
    x, y = (x + 10).bfloat16().to(device), y.to(device)
    with fastcl.backend("triton"):
        found, again, twin = (fastcl.pair_stats(x, other, kernel, route=route) for other in (y, y, x.clone()))
    truth = fastcl.pair_stats(x.double(), y.double(), kernel, route=route)
    assert found == again and truth.rounding == 0 < found.rounding
    for measure in ("cka", "cka_debiased", "rsa"):
        assert getattr(found, measure) == pytest.approx(getattr(truth, measure), abs=1e-5), measure
    assert (twin.cka, twin.cka_debiased, twin.rsa, twin.drift, twin.rho, twin.r) == (1, 1, 1, 0, 0, 0)


@pytest.mark.parametrize(("n", "d"), [(24, 16), *(pytest.param(*c, marks=gpu) for c in ((16_384, 128), (2_048, 640)))])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_twins_have_the_statistics_of_two_calls(device, n, d, precision):
    za, sample, labels = batch(n, d, device)
    zb = (za + torch.randn(n, d, generator=torch.Generator().manual_seed(3)).to(device)).detach().requires_grad_()
    with fastcl.backend("triton"):
        twins = fastcl.twin_stats(za, zb, sample, labels, temperature=T, precision=precision)
        losses = [fastcl.OBJECTIVES["nscl"](stats).mean() for stats in (twins.a, twins.b)]
        gradients = torch.autograd.grad(losses[0] + losses[1], (za, zb))
    for z, loss, gradient in zip((za, zb), losses, gradients, strict=True):
        exact = z.detach().double().requires_grad_()
        with fastcl.backend("chunked"):
            truth = solved(fastcl.contrastive_loss(exact, sample, labels, "nscl", T), exact)
        assert_close([loss.detach(), gradient], truth, precision, n)
    pairs, truth = twins.pairs(), fastcl.pair_stats(za.detach().double(), zb.detach().double(), "cosine")
    for measure in ("cka", "cka_debiased", "rsa"):
        tolerance = 2e-3 if precision == "fp16" else 1e-5
        assert getattr(pairs, measure) == pytest.approx(getattr(truth, measure), abs=tolerance), measure
    assert pairs.drift == pytest.approx(truth.drift, rel=2e-3)


@gpu
@pytest.mark.parametrize(
    ("n", "d", "precision"),
    [(4096, 128, "fp16"), (3000, 256, "fp16"), (4096, 256, "bf16"), (3000, 512, "fp16"), (4096, 1024, "bf16")],
)
def test_kernels_by_hand_are_those_of_float64(device, n, d, precision, monkeypatch):
    if reason := by_hand.obstacle():
        pytest.skip(reason)
    launched, launch = [], hopper.launch
    monkeypatch.setattr(hopper, "launch", lambda kernel, *a, **k: launched.append(kernel) or launch(kernel, *a, **k))
    with hopper.using(True):
        test_values_and_gradients_are_those_of_float64(device, "ntxent", n, d, precision)
    assert len(launched) == 2


def test_what_to_do_with_kernels_by_hand():
    right = by_hand.Found(4096, 128, (1e-6, 1e-4), True, {"both": (2.0, 1.0)})
    assert "CONFIRMED" in by_hand.verdict([right])
    assert "4096 x 128: leave them off, or" in by_hand.verdict([right, replace(right, ms={"both": (1.0, 2.0)})])
    for wrong in (replace(right, repeats=False), replace(right, errors=(1e-6, float("nan")))):
        assert "WRONG" in by_hand.verdict([right, wrong]) and not wrong.right
