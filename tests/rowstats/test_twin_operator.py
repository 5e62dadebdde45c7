"""What `twin_stats` promises beside its numbers: torch.library, torch.compile, gradients of one model alone, errors."""

from contextlib import nullcontext

import pytest
import torch
from reference import normal, small_tiles
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from triton_runs import DEVICE, few_programs, launches, leaf  # noqa: F401

import fastcl
from fastcl import FastclError
from fastcl.rowstats import chunked
from fastcl.similarity import two_models  # noqa: F401  (registers the operator)

pytestmark = pytest.mark.usefixtures("few_programs")


def test_gradients_of_one_model_cost_nothing_for_the_other() -> None:
    z, sample = (normal(40, 8).float(), normal(40, 24).float()), torch.arange(40) % 20
    for k in (0, 1):
        rows = [v.to(DEVICE) for v in z]
        rows[k] = leaf(rows[k])
        with launches() as ran:
            found = fastcl.twin_stats(*rows, sample.to(DEVICE), temperature=0.2)
            (found.a, found.b)[k].lse_other.sum().backward()
        assert len(ran.of("backward_kernel")) == 1 and rows[k].grad.any()


@pytest.mark.parametrize(("learnable", "labelled", "precision"), ((True, True, "fp32"), (False, False, "fp16")))
def test_the_operator_keeps_the_rules_of_torch_library(learnable: bool, labelled: bool, precision: str) -> None:
    za, zb = (leaf(normal(10, d).float()) for d in (4, 40))
    t = torch.tensor([0.3], device=DEVICE, requires_grad=True) if learnable else None
    sample = (torch.arange(10) % 5).to(DEVICE)
    given = za, zb, t, sample, sample % 2 if labelled else None, 0.0 if learnable else 0.3, precision
    torch.library.opcheck(torch.ops.fastcl.twin.default, given)
    with FakeTensorMode() as mode:
        fake = torch.ops.fastcl.twin(*tree_map_only(Tensor, mode.from_tensor, given))
    for k, (a, b) in enumerate(zip(torch.ops.fastcl.twin(*given), fake, strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), k


@pytest.mark.parametrize(("width", "rows"), ((4, (10, 16)), (6, (10, 16)), (40, (10, 12, 18))))  # of the second model
def test_compiled_whole_for_any_number_of_rows(width: int, rows: tuple[int, ...]) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def both(za: Tensor, zb: Tensor, t: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        found = fastcl.twin_stats(za, zb, sample, temperature=t)
        return (found.a.lse_other - found.b.mean_view).sum(), found.sums

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=counter)
    for n in rows:
        leaves = [leaf(v) for v in (normal(n, 4).float(), normal(n, width, seed=1).float(), torch.tensor(0.3))]
        sample = (torch.arange(n) % (n // 2)).to(DEVICE)
        results = []
        with fastcl.backend("chunked"), small_tiles(chunked, 256, 2048):
            # Under a mode values are not read, so that the same way is taken as in compiled code.
            for f, mode in ((compiled, nullcontext()), (both, FlopCounterMode(display=False))):
                with mode:
                    loss, sums = f(*leaves, sample)
                results.append((loss, sums, *torch.autograd.grad(loss, leaves)))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    assert counter.frame_count == 1


def test_what_does_not_fit_is_refused() -> None:
    z, sample = torch.zeros(4, 3), torch.arange(4)
    for za, zb, message in (
        (z, z[:3], r"got \(4, 3\) float32 on cpu and \(3, 3\) float32 on cpu"),
        (z, z.double(), "za and zb must have the same number of rows, dtype and device"),
        (z, z[0], "zb must be a non-empty"),
        (z.long(), z, "za must be float16"),
        (z, None, "zb must be a tensor"),
    ):
        with pytest.raises(FastclError, match=message):
            fastcl.twin_stats(za, zb, sample, temperature=0.5)
    for options, message in (
        ({"temperature": 0.0}, "temperature must be a positive"),
        ({"temperature": 0.5, "precision": "tf32"}, "precision must be 'fp16', 'bf16', 'fp32' or None, got 'tf32'"),
        ({"temperature": 0.5, "labels": sample.float()}, "labels must be an integer tensor"),
        ({"temperature": 0.5, "sample": sample[:2]}, r"sample must have one id per row, shape \(4,\)"),
    ):
        with pytest.raises(FastclError, match=message):
            fastcl.twin_stats(z, z, **({"sample": sample} | options))
    found = fastcl.twin_stats(torch.full((4, 3), torch.nan), z, sample, temperature=0.5)
    with pytest.raises(FastclError, match="not finite"):
        found.pairs()
