"""What the Triton operator promises beside its numbers: torch.library, torch.compile, memory, errors."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from reference import masks, normal, row_losses, solve
from test_rowstats import Results
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
from fastcl.backends.triton import backward, forward
from fastcl.backends.triton.backward import Upstream, gradients
from fastcl.backends.triton.operand import Call, known_order, prepare
from fastcl.kernels.contrastive.launch import Launch, recording
from fastcl.operators import fused

pytestmark = pytest.mark.usefixtures("few_programs")
NTXENT, SUPCON = (fastcl.OBJECTIVES[name].code for name in ("ntxent", "supcon"))
IDS = torch.arange(10) % 5

# Name, then whether there are x2, y, ids and labels, columns, and the codes.
KINDS = {
    "two views": (True, False, False, True, False, [SUPCON, NTXENT]),
    "ids": (False, False, True, True, False, []),
    "rectangular": (False, True, True, True, False, [SUPCON]),
    "columns": (False, True, False, False, True, [NTXENT]),
    "columns with ids": (False, True, True, False, True, []),
}


def call(kind: str, learnable: bool, normalize: bool = True, precision: str = "fp16") -> list:
    """Arguments of torch.ops.fastcl.fused, with leaves; rows of y lie apart in memory."""
    two, rectangular, ids, labelled, columns, codes = KINDS[kind]
    x, y = normal(10, 4).float(), normal(10, 4, seed=1).float().T.contiguous().T
    ids_y = IDS.flip(0)
    t = torch.tensor([0.3], device=DEVICE, requires_grad=True) if learnable else None
    given = [
        IDS if ids else None, IDS % 2 if labelled else None, ids_y if ids and rectangular else None,
        ids_y % 2 if labelled and rectangular else None,
    ]  # fmt: skip
    given = [None if v is None else v.to(DEVICE) for v in given]
    rows = [leaf(x), leaf(y) if two else None, leaf(y) if rectangular else None]
    return [*rows, *given, t, 0.0 if learnable else 0.3, normalize, precision, columns, codes]


def gradient_call(arguments: list) -> list:
    """Arguments of torch.ops.fastcl.fused_backward for a call of the forward operator."""
    rows, labelled, rest = arguments[:3], arguments[4] is not None, arguments[7:]
    with torch.no_grad():
        stats, _, losses, stats_y, _, losses_y, *saved = torch.ops.fastcl.fused(*arguments)
    one = [torch.ones_like(v) if v.numel() else None for v in (stats, losses, stats_y, losses_y)]
    plain = [v.detach() if isinstance(v, Tensor) else v for v in (*rows, labelled, *rest)]
    return [*plain, [stats, stats_y, *saved], one, [True, rows[2] is not None, rest[0] is not None]]


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
    ("learnable", "normalize", "precision"), ((False, True, "fp32"), (True, True, "bf16"), (False, False, "fp16"))
)
def test_fake_results_lie_in_memory_as_the_real_ones(
    learnable: bool, normalize: bool, precision: str, kind: str
) -> None:
    """torch.compile's generated code reads results by these strides; opcheck does not compare them."""
    arguments = call(kind, learnable, normalize, precision)
    for operator, given in (
        (torch.ops.fastcl.fused, [v.detach() if isinstance(v, Tensor) else v for v in arguments]),
        (torch.ops.fastcl.fused_backward, gradient_call(arguments)),
    ):
        real = operator(*given)
        with FakeTensorMode() as mode:
            fake = operator(*tree_map_only(Tensor, mode.from_tensor, given))
        for k, (a, b) in enumerate(zip(real, fake, strict=True)):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), k


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
        assert not ran.of("forward_kernel")[0].arguments["SPLIT_PLAIN"]
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
    assert one.arguments["SPLIT_PLAIN"] == split and one.arguments["zr"].dtype == torch.float16


def test_second_derivatives_are_refused() -> None:
    z = leaf(normal(8, 3).float())
    with launches():
        loss = fastcl.contrastive_loss(z, torch.arange(8, device=DEVICE) // 2)
        (grad,) = torch.autograd.grad(loss, z, create_graph=True)
        with pytest.raises(FastclError, match="triton .*differentiable once.*'dense'"):
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


@pytest.mark.parametrize("kind", ("two views", "ids", "towers", "rectangular"))
def test_memory_kept_for_backward(kind: str) -> None:
    """Beside the rows themselves and their half-precision copy, at most 64 bytes a row."""
    n, d, kept = 256, 128, {}
    a, b = leaf(normal(n, d).float()), leaf(normal(n, d, seed=1).float())
    ids = torch.arange(n, device=DEVICE) // 2

    def pack(v: Tensor) -> Tensor:
        kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with launches(), torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        if kind == "two views":
            fastcl.supcon_loss(a, b, ids, 0.1)
        elif kind == "ids":
            fastcl.contrastive_loss(a, ids, ids // 2, "nscl", 0.1)
        elif kind == "towers":
            fastcl.clip_loss(a, b, 10.0)
        else:
            fastcl.row_stats(a, b, sample=ids, sample_y=ids, temperature=0.1).lse_other.sum()
    rows = n if kind == "ids" else 2 * n
    copies = 4 * rows * d + 2 * rows * d * 2  # float32, and fp32's two halves
    assert copies < sum(kept.values()) <= copies + 64 * rows


class Allocations(Results):
    """Counts what operators return but for the copies that Triton's interpreter makes of arguments, byte by byte."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.set_, torch.ops.aten.copy_):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_no_tensor_of_the_size_of_the_similarity_matrix() -> None:
    n = 600
    for sample, labels in ((None, torch.arange(n // 2) % 7), (torch.arange(n) % 5, None)):
        x, x2 = normal(n, 8).float().to(DEVICE), None
        if sample is None:
            x, x2 = x.chunk(2)
        given = [None if v is None else v.to(DEVICE) for v in (sample, labels)]
        rest = [None, 0.1, True, "fp32", False, [SUPCON if labels is not None else NTXENT]]
        with Allocations() as seen:
            stats, _, losses, stats_y, _, _, *saved = fused._forward(x, x2, None, *given, None, None, *rest)
            saved, one = [stats, stats_y, *saved], [None, torch.ones_like(losses), None, None]
            fused._backward(x, x2, None, labels is not None, *rest, saved, one, [True, False, False])
        assert n * 8 <= seen.largest < n * n / 8


@contextmanager
def recorded(n: int, d: int, split: str, columns: bool, labelled: bool) -> Iterator[list[Launch]]:
    """Launches of both passes over n rows, none of which is started."""
    precision = "fp32" if split == "all" else "fp16"
    call = Call(None, 0.1, True, precision, (SUPCON if labelled else NTXENT,), split, labelled)
    with tables_own_tiles(), recording() as seen:
        x = torch.empty(n // 2, d)
        order = known_order(n // 2, 1 if columns else 2, None, x.device)
        a = prepare(x, None if columns else x, order, call, None)
        b = prepare(x, None, order, call, None) if columns else None
        found = forward.statistics(a, b, call, None, columns)
        upstreams = [Upstream(stats, None, losses) for stats, _, losses in found]
        gradients(a, b, call, None, (upstreams[0], upstreams[1] if columns else None), (True, columns, False))
        yield seen


@pytest.mark.parametrize(
    ("d", "split", "columns"),
    ((128, "none", False), (64, "all", False), (128, "peers", False), (128, "none", True), (512, "peers", False)),
)
def test_partial_results_of_a_million_rows_fit_the_workspace(d: int, split: str, columns: bool) -> None:
    n = 2**20
    with recorded(n, d, split, columns, labelled=split == "peers") as seen:
        assert forward.WORKSPACE == backward.WORKSPACE == 2**28
        sizes = {}
        for kernel, names in (
            ("forward_kernel", ("part_r", "part_s")), ("backward_kernel", ("acc",)), ("pair_weights_kernel", ("w",)),
        ):  # fmt: skip
            for one in seen:
                if one.kernel.fn.__name__ == kernel:
                    size = sum(one.arguments[name].untyped_storage().nbytes() for name in names)
                    sizes[kernel] = max(size, sizes.get(kernel, 0))
    assert sizes.keys() == {"forward_kernel", "backward_kernel" if d <= 256 else "pair_weights_kernel"}
    assert all(2**26 <= size <= 2**28 for size in sizes.values()), sizes


Z, S = normal(6, 3).float(), torch.arange(3).repeat(2)
BAD = (
    (lambda: fastcl.contrastive_loss(Z.double(), S), ("triton", "float32", "float64", "(6, 3)")),
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
