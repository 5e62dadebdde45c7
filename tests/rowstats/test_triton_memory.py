"""Memory of the Triton backend: what is kept for backward, and what partial results of many rows take."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from reference import normal
from test_rowstats import Results
from torch import Tensor
from triton_runs import DEVICE, few_programs, launches, leaf, tables_own_tiles  # noqa: F401

import fastcl
from fastcl.kernels.common.launch import Launch, recording
from fastcl.rowstats.triton import backward, forward, wide
from fastcl.rowstats.triton import operator as fused
from fastcl.rowstats.triton.backward import Upstream, gradients
from fastcl.rowstats.triton.operand import Call, Source
from fastcl.rowstats.triton.working_order import known_order

pytestmark = pytest.mark.usefixtures("few_programs")
NTXENT, SUPCON = (fastcl.OBJECTIVES[name].code for name in ("ntxent", "supcon"))


@pytest.mark.parametrize("kind", ("two views", "ids", "towers", "rectangular"))
def test_memory_kept_for_backward(kind: str) -> None:
    """Beside the rows themselves and their half-precision copy, at most 64 bytes a row, and a number."""
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
    assert copies < sum(kept.values()) <= copies + 64 * rows + 4


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
        rest = [0.1, True, "fp32", False, [SUPCON if labels is not None else NTXENT], "none", False]
        with Allocations() as seen:
            stats, _, losses, stats_y, _, _, *saved = fused._forward(x, x2, None, None, *given, None, None, *rest)
            grads, need = [None, torch.ones_like(losses), None, None], [True, False, False]
            fused._backward(x, x2, None, None, *grads, stats, stats_y, *saved, *rest, labels is not None, need)
        assert n * 8 <= seen.largest < n * n / 8


@contextmanager
def recorded(n: int, d: int, split: str, columns: bool, labelled: bool) -> Iterator[list[Launch]]:
    """Launches of both passes over n rows, none of which is started."""
    precision = "fp32" if split == "all" else "fp16"
    call = Call(None, 0.1, True, precision, (SUPCON if labelled else NTXENT,), split, labelled)
    with tables_own_tiles(), recording() as seen:
        x = torch.empty(n // 2, d)
        order = known_order(n // 2, 1 if columns else 2, None, x.device)
        sources = Source(x, None if columns else x, order), Source(x, None, order) if columns else None
        operands, found, _ = forward.statistics(*sources, call, None, columns)
        upstreams = [Upstream(stats, None, losses.rows) for stats, _, losses in found]
        given = operands[0], operands[1] if columns else None
        gradients(*given, call, None, (upstreams[0], upstreams[1] if columns else None), (True, columns, False))
        yield seen


@pytest.mark.parametrize(
    ("d", "split", "columns"),
    ((128, "none", False), (64, "all", False), (128, "peers", False), (128, "none", True), (512, "peers", False)),
)
def test_partial_results_of_a_million_rows_fit_the_workspace(d: int, split: str, columns: bool) -> None:
    n = 2**20
    with recorded(n, d, split, columns, labelled=split == "peers") as seen:
        assert forward.WORKSPACE == backward.WORKSPACE == wide.WORKSPACE == 2**28
        sizes = {}
        for kernel, (argument, names) in (
            ("forward_kernel", ("parts", ("resident", "streamed"))), ("backward_kernel", ("acc", ("sums",))),
            ("pair_weights_kernel", ("pairs", ("weights",))),
        ):  # fmt: skip
            for one in seen:
                if one.kernel.fn.__name__ == kernel:
                    fields = (getattr(one.arguments[argument], name) for name in names)
                    tensors = [field for field in fields if field is not None]
                    size = sum(memory.untyped_storage().nbytes() for memory in tensors)
                    sizes[kernel] = max(size, sizes.get(kernel, 0))
    assert sizes.keys() == {"forward_kernel", "backward_kernel" if d <= 256 else "pair_weights_kernel"}
    assert all(2**26 <= size <= 2**28 for size in sizes.values()), sizes
