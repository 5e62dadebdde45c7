"""What the Triton operator promises beside its numbers: torch.library, torch.compile, autocast, errors."""

import os
import subprocess
import sys

import pytest
import torch
from reference import masks, normal, row_losses, solve
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from triton_runs import (  # noqa: F401
    DEVICE,
    compare_gradients,
    compare_rows,
    few_programs,
    launches,
    leaf,
    row_weights,
    tables_own_tiles,
)

import fastcl
from fastcl import FastclError

pytestmark = pytest.mark.usefixtures("few_programs")
NTXENT, SUPCON = (fastcl.OBJECTIVES[name].code for name in ("ntxent", "supcon"))
IDS = torch.arange(10) % 5

# Name, then whether there are x2, y, ids and labels, columns, the codes and the reduction.
KINDS = {
    "two views": (True, False, False, True, False, [SUPCON, NTXENT], "sum"),
    "ids": (False, False, True, True, False, [], "none"),
    "rectangular": (False, True, True, True, False, [SUPCON], "none"),
    "columns": (False, True, False, False, True, [NTXENT], "mean"),
    "columns with ids": (False, True, True, False, True, [], "none"),
}


def call(kind: str, learnable: bool, normalize: bool = True, precision: str = "fp16", d: int = 4) -> list:
    """Arguments of torch.ops.fastcl.fused, with leaves; rows of y lie apart in memory."""
    two, rectangular, ids, labelled, columns, codes, reduction = KINDS[kind]
    x, y = normal(10, d).float(), normal(10, d, seed=1).float().T.contiguous().T
    ids_y = IDS.flip(0)
    t = torch.tensor([0.3], device=DEVICE, requires_grad=True) if learnable else None
    given = [
        IDS if ids else None, IDS % 2 if labelled else None, ids_y if ids and rectangular else None,
        ids_y % 2 if labelled and rectangular else None,
    ]  # fmt: skip
    given = [None if v is None else v.to(DEVICE) for v in given]
    rows = [leaf(x), leaf(y) if two else None, leaf(y) if rectangular else None]
    return [
        *rows,
        t,
        *given,
        0.0 if learnable else 0.3,
        normalize,
        precision,
        columns,
        codes,
        reduction,
        columns and learnable,
    ]


def gradient_call(arguments: list) -> list:
    """Arguments of torch.ops.fastcl.fused_backward for a call of the forward operator."""
    rows, temperature, labelled, options = arguments[:3], arguments[3], arguments[5] is not None, arguments[8:]
    with torch.no_grad():
        stats, _, losses, stats_y, _, losses_y, *saved = torch.ops.fastcl.fused(*arguments)
    ones = [torch.ones_like(v) if v.numel() else None for v in (stats, losses, stats_y, losses_y)]
    plain = [v.detach() if isinstance(v, Tensor) else v for v in (*rows, temperature)]
    kept = [v if v.numel() else None for v in (stats, stats_y, *saved)]
    return [*plain, *ones, *kept, *options, labelled, [True, rows[2] is not None, temperature is not None]]


both = pytest.mark.parametrize("learnable", (False, True))
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@both
def test_the_operators_keep_the_rules_of_torch_library(learnable: bool, kind: str) -> None:
    arguments = call(kind, learnable)
    torch.library.opcheck(torch.ops.fastcl.fused.default, tuple(arguments))
    torch.library.opcheck(torch.ops.fastcl.fused_backward.default, tuple(gradient_call(arguments)))


@every_kind
@pytest.mark.parametrize(
    ("learnable", "normalize", "precision", "d"),
    ((False, True, "fp32", 4), (True, True, "bf16", 4), (False, False, "fp16", 4), (False, True, "fp32", 150)),
)
def test_fake_results_lie_in_memory_as_the_real_ones(
    learnable: bool, normalize: bool, precision: str, d: int, kind: str
) -> None:
    """torch.compile's generated code reads results by these strides; opcheck does not compare them."""
    arguments = call(kind, learnable, normalize, precision, d)
    with tables_own_tiles():  # they decide how wide a working copy is
        for operator, given in (
            (torch.ops.fastcl.fused, [v.detach() if isinstance(v, Tensor) else v for v in arguments]),
            (torch.ops.fastcl.fused_backward, gradient_call(arguments)),
        ):
            real = operator(*given)
            with FakeTensorMode() as mode:
                fake = operator(*tree_map_only(Tensor, mode.from_tensor, given))
            for k, (a, b) in enumerate(zip(real, fake, strict=True)):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), k


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
def test_shapes_on_a_gpu_are_traced_where_there_is_none() -> None:
    with FakeTensorMode():
        for d in (4, 150, 300):
            z = torch.empty(8, d, device="cuda", requires_grad=True)
            losses = fastcl.ntxent_loss(z, z, reduction="none")
            assert losses.shape == (16,) and losses.requires_grad and losses.device.type == "cuda"


@pytest.mark.parametrize("kind", ("ids", "two views", "towers"))
def test_compiled_whole_for_any_number_of_rows(kind: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def loss(z: Tensor, t: Tensor, sample: Tensor, labels: Tensor) -> Tensor:
        if kind == "ids":
            return sum(fastcl.contrastive_losses(z, sample, labels, ("dcl", "supcon"), t).values())
        halves = z.chunk(2)
        return fastcl.supcon_loss(*halves, labels, t) if kind == "two views" else fastcl.clip_loss(*halves, 1 / t)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for n in (10, 16):
        sample = (torch.arange(n) % (n // 2)).to(DEVICE)
        labels = sample[: n // 2] % 2 if kind == "two views" else sample % 2
        leaves = leaf(normal(n, 4).float()), leaf(torch.tensor(0.3))
        results = []
        with fastcl.backend("triton"):
            for f in (compiled, loss):
                value = f(*leaves, sample, labels)
                results.append((value, *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    assert counter.frame_count == 1


@pytest.mark.parametrize("inside", (False, True))
def test_autocast_chooses_half_precision_and_nothing_else(inside: bool) -> None:
    """`inside`: backward, too, which PyTorch advises against and which the operator does not mind."""
    runs = []
    for enabled in (False, True):
        z1, z2 = (leaf(normal(24, 8, seed=k).float()) for k in (0, 1))
        with launches() as ran, torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            assert (z1 @ z2.T).dtype == (torch.bfloat16 if enabled else torch.float32)
            loss = fastcl.contrastive_loss(
                torch.cat([z1, z2]), torch.arange(24, device=DEVICE).repeat(2), precision=None if enabled else "fp16"
            )
            if inside:
                loss.backward()
        if not inside:
            with launches():
                loss.backward()
        assert loss.dtype == torch.float32 == z1.grad.dtype
        assert not ran.of("forward_kernel")[0].arguments["TILE"].SPLIT_PLAIN
        runs.append((loss, z1.grad, z2.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("dtype", "level", "split"),
    ((torch.float32, "highest", True), (torch.float32, "high", False), (torch.bfloat16, "highest", False)),
)
def test_the_precision_by_default(dtype: torch.dtype, level: str, split: bool) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        with launches() as ran:
            z1, z2 = (normal(9, 8, seed=k).to(DEVICE, dtype) for k in (0, 1))
            fastcl.ntxent_loss(z1, z2)
    finally:
        torch.set_float32_matmul_precision(before)
    (one,) = ran.of("forward_kernel")
    assert one.arguments["TILE"].SPLIT_PLAIN == split and one.arguments["r"].z.dtype == torch.float16


def test_second_derivatives_are_refused() -> None:
    z = leaf(normal(8, 3).float())
    with launches():
        loss = fastcl.contrastive_loss(z, torch.arange(8, device=DEVICE) // 2)
        (grad,) = torch.autograd.grad(loss, z, create_graph=True)
        with pytest.raises(FastclError, match="triton .*second derivatives.*'dense'"):
            grad.sum().backward()


def test_forward_mode_is_refused() -> None:
    z, ids = normal(8, 3).float().to(DEVICE), torch.arange(8, device=DEVICE) // 2
    for function, at in (
        (lambda q: fastcl.contrastive_loss(q, ids), z),
        (lambda q: fastcl.ntxent_loss(z, q), z),
        (lambda q: fastcl.clip_loss(z, q, 2.0), z),
        (lambda t: fastcl.contrastive_loss(z, ids, temperature=t), torch.tensor(0.5, device=DEVICE)),
    ):
        with fastcl.backend("triton"), pytest.raises(FastclError, match="triton .*forward-mode.*'dense'"):
            torch.func.jvp(function, (at,), (torch.ones_like(at),))


Z, S = normal(6, 3).float(), torch.arange(3).repeat(2)
BAD = (
    (lambda: fastcl.contrastive_loss(Z.double(), S), ("triton", "does not support float64", "(6, 3)")),
    (lambda: fastcl.row_stats(torch.ones(2, 4097), sample=S[:2], temperature=0.1), ("triton", "4096", "(2, 4097)")),
    (lambda: fastcl.row_stats(Z, sample=S, temperature=0.1, precision="tf32"), ("precision", "fp16", "fp32", "'tf32'")),
    (lambda: fastcl.contrastive_loss(Z, S, precision="half"), ("precision", "bf16", "'half'")),
    (lambda: fastcl.row_stats(Z, sample=S, temperature=0.1, columns=True), ("columns", "y")),
    (lambda: fastcl.contrastive_loss(Z, S, temperature=0.0), ("temperature", "0.0")),
    (lambda: fastcl.contrastive_losses(Z, S, objectives=["nscl"]), ("labels", "'nscl'")),
    (lambda: fastcl.clip_loss(Z, Z, -1.0), ("logit_scale", "-1.0")),
)


@pytest.mark.parametrize(("bad", "words"), BAD, ids=[f"{k}-{words[0]}" for k, (_, words) in enumerate(BAD)])
def test_bad_input(bad, words: tuple[str, ...]) -> None:
    with fastcl.backend("triton"), pytest.raises(FastclError) as error:
        bad()
    assert all(word in str(error.value) for word in words)


def test_a_cpu_without_the_interpreter_is_told_so() -> None:
    code = """
import torch, fastcl
with fastcl.backend("triton"):
    try:
        fastcl.ntxent_loss(torch.ones(4, 3), torch.ones(4, 3))
    except fastcl.FastclError as error:
        print(error)
fastcl.ntxent_loss(torch.ones(4, 3), torch.ones(4, 3))
print(fastcl.last_backend())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    message, automatic = done.stdout.splitlines()
    assert "triton" in message and "TRITON_INTERPRET=1" in message and "(4, 3)" in message
    assert automatic == "chunked"


def test_widths_up_to_the_limit() -> None:
    z, sample, weights = normal(6, 4096).float(), torch.arange(3).repeat(2), row_weights(6)
    with launches() as ran:
        x = leaf(z)
        rows = fastcl.contrastive_loss(x, sample.to(DEVICE), None, "ntxent", 0.1, "none")
        truth = solve(row_losses("ntxent", masks(sample)), z, 0.1, weights=weights)
        compare_gradients(compare_rows(rows, truth, weights, "fp32"), [x], truth, "fp32")
    assert ran.of("product_kernel")
