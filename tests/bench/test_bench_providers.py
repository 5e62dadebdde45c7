"""What the benchmark of the losses compares: every provider is its objective; reasons, counts and bounds."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from reference import assert_gradients, assert_loss, masks, row_losses, solve
from torch import Tensor
from torch.nn import functional

from bench.harness import ceilings, records
from bench.harness.clocks import Sample
from bench.harness.records import record
from bench.losses import peers, plain, providers, report
from bench.losses.providers import OBJECTIVES, PROVIDERS, TOLERANCES, TOWERS, passes
from fastcl.kernels.common import launch

BY_NAME = {p.name: p for p in PROVIDERS}
CPU = torch.device("cpu")
EXACT = [(o, p) for o in OBJECTIVES for p in PROVIDERS if p.precision == "fp32" and "cpu" in p.devices and not p.module]
ROUNDED = [(o, p) for p in PROVIDERS for o in p.objectives if p.precision == "bf16" and "cpu" in p.devices]
# The Triton backend itself has its own tests: here, that the benchmark calls it by the right names.
ROUNDED += [(o, BY_NAME["fastcl fp16"]) for o in ("supcon", "ntxent+supcon")]
ROUNDED += [(o, BY_NAME["fastcl fp32"]) for o in TOWERS]
PEERS = ("lightly", "open_clip", "pytorch-metric-learning")
INSTALLED = [(o, BY_NAME[name]) for name in PEERS for o in BY_NAME[name].objectives]


def ids(value: object) -> str:
    return getattr(value, "name", str(value))


def batch(n: int = 64, d: int = 16) -> tuple[Tensor, Tensor]:
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return z, torch.arange(n // 2) % 5


def assert_agree(found: tuple[Tensor, Tensor], objective: str, precision: str) -> None:
    truth = passes(BY_NAME["plain PyTorch"].loss, *batch(), objective)
    for got, want in zip(found, truth, strict=True):
        assert (got - want).norm() <= TOLERANCES[precision] * want.norm()


@pytest.mark.parametrize(("objective", "provider"), [c for c in EXACT if c[0] in c[1].objectives], ids=ids)
def test_every_provider_in_float32_is_the_formula_of_its_objective(objective, provider):
    z = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.arange(12) % 3
    value, grad = passes(provider.loss, z, labels, objective)
    if objective == "clip":
        u = functional.normalize(z.detach()).requires_grad_()
        logits = u[:12] @ u[12:].T / plain.TEMPERATURE
        rows, columns = (-s.log_softmax(1).diagonal().mean() for s in (logits, logits.T))
        ((rows + columns) / 2).backward()
        across = (u.grad - (u.grad * u).sum(1, keepdim=True) * u) / z.detach().norm(dim=1, keepdim=True)
        torch.testing.assert_close(value, ((rows + columns) / 2).detach())
        torch.testing.assert_close(grad, across)
        return
    if objective == "sigmoid":
        image, text = functional.normalize(z).chunk(2)
        signs = 2 * torch.eye(12, dtype=torch.float64) - 1
        want = functional.softplus(-signs * (image @ text.T * 10 - 10)).sum(1).mean()
        torch.testing.assert_close((value, grad), (want.detach(), *torch.autograd.grad(want, z)))
        return
    relations = masks(torch.arange(12).repeat(2), labels.repeat(2))
    losses = [row_losses(name, relations) for name in objective.split("+")]
    truth = solve(lambda s: sum(loss(s) for loss in losses) / len(losses), z, plain.TEMPERATURE)
    assert_loss(value, truth, torch.float64)
    assert_gradients([grad], truth)


@pytest.mark.parametrize(("objective", "provider"), ROUNDED, ids=ids)
def test_every_provider_in_half_precision_is_near_the_plain_form(objective, provider):
    if "interpreter" in provider.devices and provider.obstacle(CPU, objective):
        pytest.skip("the kernels are compiled here, and this test is for the CPU")
    assert_agree(passes(provider.loss, *batch(), objective), objective, provider.precision)


def test_chunks_of_rows_add_up(monkeypatch):
    monkeypatch.setattr(peers, "chunk_rows", lambda n: 24)
    for objective in BY_NAME["chunked bf16"].objectives:
        assert_agree(passes(peers.chunked, *batch(), objective), objective, "bf16")


@pytest.mark.parametrize(("objective", "provider"), INSTALLED, ids=ids)
def test_an_installed_library_is_its_objective(objective, provider):
    if reason := provider.obstacle(CPU, objective):
        pytest.skip(reason)
    assert_agree(passes(provider.loss, *batch(), objective), objective, "fp32")


@pytest.mark.parametrize("objective", BY_NAME["flex_attention bf16"].objectives)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_without_its_kernels_has_the_value(objective):
    z, labels = batch()  # no backward pass on a CPU
    truth = plain.__dict__[objective](z, labels)
    assert peers.flex_loss(z.detach(), labels, objective) == pytest.approx(truth.item(), rel=1e-3)


class _DenseLse(torch.autograd.Function):
    """What Inf-CL's kernels compute."""

    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(q, k)
        return torch.einsum("nhd,mhd->nm", q, k).logsumexp(1)

    @staticmethod
    def backward(ctx, grad):
        q, k = ctx.saved_tensors
        p = torch.einsum("nhd,mhd->nm", q, k).softmax(1) * grad[:, None]
        return torch.einsum("nm,mhd->nhd", p, k), torch.einsum("nm,nhd->mhd", p, q)


@pytest.mark.parametrize("objective", BY_NAME["Inf-CL"].objectives)
def test_inf_cl_around_its_kernels(objective, monkeypatch):
    def cal_flash_loss(q, k, scale, head_dim):
        q, k = ((v * s).view(len(v), -1, head_dim) for v, s in ((q, scale), (k, 1)))
        return _DenseLse.apply(q, k) - (q * k).sum((1, 2))

    flash = ModuleType("inf_cl.flash")
    flash.FlashProb, flash.cal_flash_loss = _DenseLse, cal_flash_loss
    monkeypatch.setitem(sys.modules, "inf_cl", ModuleType("inf_cl"))
    monkeypatch.setitem(sys.modules, "inf_cl.flash", flash)
    assert_agree(passes(peers.inf_cl, *batch(), objective), objective, "fp32")


def test_cut_cross_entropy_around_its_kernels(monkeypatch):
    def linear_cross_entropy(e, c, targets, filter_eps):
        assert e.dtype == c.dtype == torch.bfloat16 and filter_eps is None
        return functional.cross_entropy(e.float() @ c.float().T, targets)

    module = ModuleType("cut_cross_entropy")
    module.linear_cross_entropy = linear_cross_entropy
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    assert_agree(passes(peers.cut_cross_entropy, *batch(), "clip"), "clip", "bf16")


@pytest.mark.parametrize("objective", providers.OBJECTIVES)
def test_what_is_compiled_can_be_traced_as_a_whole(objective):
    traced = torch.compile(peers.autocast, backend="eager", fullgraph=True, dynamic=False)
    assert_agree(passes(traced, *batch(), objective), objective, "bf16")
    torch.compiler.reset()


def test_what_is_compiled_is_forgotten_before_the_next_size(monkeypatch):
    compiled, forgotten = [], []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(1))
    peers.forget_compiled()
    assert not forgotten
    for _ in range(2):
        assert_agree(passes(peers.compiled, *batch(), "nscl"), "nscl", "bf16")
    assert compiled == [{"dynamic": False, "fullgraph": True}]
    peers.forget_compiled()
    peers.forget_compiled()
    assert forgotten == [1]


def test_reasons_that_hold_for_every_size(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    cuda = torch.device("cuda")
    assert BY_NAME["Inf-CL"].obstacle(cuda, "nscl") == "has no nscl"
    assert BY_NAME["fastcl fp16"].obstacle(CPU, "nscl") == "timed on CUDA only"
    assert BY_NAME["fastcl fp16"].obstacle(cuda, "nscl") is None
    assert BY_NAME["fastcl dense"].obstacle(cuda, "nscl") == "timed on a CPU only"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert BY_NAME["fastcl fp16"].obstacle(CPU, "nscl") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert BY_NAME["lightly"].obstacle(CPU, "ntxent") == "lightly is not installed"
    assert records.versions(providers.PACKAGES).keys() <= {"triton", *(p.package for p in PROVIDERS)}


@pytest.mark.parametrize(
    ("n", "d", "fwd", "bwd"),
    # 790 TFLOP/s, 4.3 TB/s, 3.9e12 exponentials a second; D = 64 waits for the exponentials, a wide row for nothing.
    [(65536, 128, 0.6959, 2.7836), (65536, 512, 2.7836, 8.3507), (65536, 64, 0.5506, 1.3918), (8, 128, 9.5e-7, 1.9e-6)],
)
def test_the_bound_is_the_slowest_of_products_exponentials_and_memory(n, d, fwd, bwd):
    found = ceilings.Ceilings(790e12, 4.3e12, 3.9e12).bound_ms("ntxent", n, d)
    assert found == pytest.approx({"fwd": fwd, "bwd": bwd, "both": fwd + bwd}, rel=2e-2 if n == 8 else 1e-3)


def test_two_towers_have_half_the_bound_of_as_many_views():
    rates = ceilings.Ceilings(790e12, 4.3e12, 3.9e12)
    for d in (64, 1024):
        views, towers = (rates.bound_ms(objective, 65536, d) for objective in ("nscl", "clip"))
        assert towers == pytest.approx({key: value / 2 for key, value in views.items()})


@pytest.mark.parametrize(
    ("name", "objective", "sm", "d", "work"),
    [
        ("fastcl fp16", "ntxent", 90, 128, (1, 4)), ("fastcl fp16", "ntxent", 90, 512, (1, 3)),
        ("fastcl fp32", "nscl", 90, 256, (3, 12)), ("fastcl fp32", "nscl", 80, 256, (3, 9)),  # no such tile on sm_80
        ("fastcl fp16", "supcon", 80, 256, (1, 3)), ("fastcl fp32", "clip", 90, 512, (6, 24)),
    ],
)  # fmt: skip
def test_the_work_of_the_kernels_follows_the_route_that_they_take(monkeypatch, name, objective, sm, d, work):
    table = [{"kernel": "backward", "arch": f"sm_{a}", "mode": mode, "max_d": 256, "max_n": None, "block_r": 64,
              "block_s": 64, "block_d": 256, "warps": 4, "stages": 2}
             for a, modes in ((80, ("none",)), (90, ("none", "peers", "all"))) for mode in modes]  # fmt: skip
    launch.config.cache_clear()
    monkeypatch.setattr(launch, "_rows", lambda: table)
    with launch.on_architecture(sm):
        assert BY_NAME[name].work(objective, d) == work
    launch.config.cache_clear()


def test_ceilings_are_measured_and_written(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the kernel is compiled here, and this test is for the CPU")
    assert ceilings.main(["--out", str(tmp_path), "--device", "cpu", "--repeats", "2"]) == 0
    text = (tmp_path / "ceilings.md").read_text()
    assert all(f"| {name} |" in text for name in ("matmul float16", "matmul bfloat16", "copy", "exp2"))
    rates, found = ceilings.measure(CPU, 2)
    assert min(rates.flops, rates.bytes, rates.exponentials) > 0 and all(len(times) == 2 for *_, times in found)


def test_the_report_of_a_gpu_run_says_how_it_timed_and_what_share_of_the_bound():
    case = {"objective": "ntxent", "n": 64, "d": 8, "dtype": "float32", "precision": "fp16"}
    found = []
    for name, timing, gpu in (("fastcl fp16", "graph", 2.0), ("lightly", "events", 8.0)):
        for run in ("fwd", "bwd", "both"):
            samples = [Sample(9.0 if run == "both" else None, gpu)]
            found.append(record("losses", name, case, {}, run, samples, (1e9, 2e9), 2**20, 0.5, timing))
    found.append(record("losses", "Inf-CL", case, {}, reason="skipped: needs 9 GiB"))
    head, rule, ours, other, skipped = report.body(found, "fastcl fp16", None).strip().splitlines()[2:]
    assert len({line.count("|") for line in (head, rule, ours, other, skipped)}) == 1
    assert "| 2 (2-2) | 2 (2-2) | 2 (2-2) | 9 | 25 % | 0.5 | 1 | 1.0 |  |" in ours
    assert "| 8 (8-8) e |" in other and other.endswith("| 4x |") and "of the bound" in head
    assert "| Inf-CL | skipped: needs 9 GiB |" in skipped
