"""Every launch that the launch table allows, recorded without a GPU for the gate to compile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from bench.static import gram_cases
from fastcl.kernels.common.launch import Launch, on_architecture, recording
from fastcl.rowstats.triton import (
    apart_kernels,  # noqa: F401 - registers fused_apart
    hopper,
    sigmoid_kernels,
    two_models,
)
from fastcl.rowstats.triton.backward import Settled, Upstream, gradients
from fastcl.rowstats.triton.forward import statistics
from fastcl.rowstats.triton.operand import NARROW, Call, Source
from fastcl.rowstats.triton.working_order import COUNTED, known_order, orders

_NTXENT, _SUPCON = 0b001_111, 0b011_111  # Objective.code of two rows of the table
_ROWS = 8192  # more than few: masked tiles have launches of their own
_ROWS_WIDE = 16384  # more than one square block of pairs
_MANY = 32768  # the weights of the backward pass do not come from the forward pass


@dataclass(frozen=True)
class _Case:
    name: str
    d: int
    split: str = "none"
    precision: str = "fp16"
    dtype: torch.dtype = torch.float32
    pair: str = "views"  # of samples; two "towers"; a "queue" without gradient; other "ranks"; "sigmoid": pairs
    second: int = 0  # width of the second model's rows; 0: only one model
    learnable: bool = False  # temperature on the device: kernels for logits of any range
    normalize: bool = True
    reduction: str = "mean"
    ids: bool = False  # arbitrary ones
    n: int = 0  # rows; 0: the usual number
    by_hand: bool = False  # with the kernels for one architecture alone


def _cases(sm: int) -> Iterator[_Case]:
    yield _Case("clip fp32 d=32", 32, "all", "fp32", pair="towers")
    for name, split in (("ntxent", "none"), ("supcon", "peers")):
        yield _Case(f"{name} fp16 d=32", 32, split)
        yield _Case(f"{name} fp32 d=32", 32, "all", "fp32")
        yield _Case(f"{name} fp32 d=64, many rows", 64, "all", "fp32", n=_MANY)
    for d in (64, 128, 256, 512):
        yield _Case(f"ntxent fp16 d={d}", d)
        yield _Case(f"supcon fp16 d={d}", d, "peers")
        yield _Case(f"ntxent fp32 d={d}", d, "all", "fp32")
        yield _Case(f"clip fp32 d={d}", d, "all", "fp32", pair="towers")
        yield _Case(f"clip fp16 d={d}, learnable temperature", d, pair="towers", learnable=True)
        yield _Case(f"supcon fp16 d={d}, learnable temperature", d, "peers", learnable=True)
        yield _Case(f"supcon fp32 d={d}, learnable temperature", d, "all", "fp32", learnable=True)
        yield _Case(f"sigmoid fp16 d={d}", d, pair="sigmoid")
        yield _Case(f"sigmoid fp32 d={d}", d, "all", "fp32", pair="sigmoid")
    yield _Case("ntxent fp16 d=192", 192)
    yield _Case("supcon fp16 d=192", 192, "peers")
    yield _Case("supcon fp32 d=192", 192, "all", "fp32")
    yield _Case("clip fp32 d=192, learnable temperature", 192, "all", "fp32", pair="towers", learnable=True)
    yield _Case("ntxent fp16 d=320", 320)
    yield _Case("ntxent bf16 d=128", 128, precision="bf16", dtype=torch.bfloat16)
    yield _Case("ntxent bf16 d=512", 512, precision="bf16", dtype=torch.bfloat16)
    yield _Case("ntxent fp16 d=4096", 4096)
    yield _Case("queue fp16 d=128", 128, pair="queue")
    yield _Case("queue fp16 d=1024", 1024, pair="queue")
    yield _Case("supcon fp16 d=128, rows of any norm", 128, "peers", normalize=False)
    yield _Case("ntxent fp16 d=128, loss of each row", 128, reduction="none")
    yield _Case("supcon fp16 d=128, arbitrary ids", 128, "peers", ids=True)
    yield _Case("ntxent fp16 d=128, other ranks", 128, pair="ranks")
    yield _Case("supcon fp16 d=128, other ranks", 128, "peers", pair="ranks")
    yield _Case("ntxent fp16 d=128, arbitrary ids", 128, ids=True)
    yield _Case("queue fp16 d=128, arbitrary ids", 128, pair="queue", ids=True)
    yield _Case("supcon fp16 d=128, sorted labels", 128, "peers", n=2 * COUNTED)
    yield _Case("ntxent fp16 d=64, many rows", 64, n=_MANY)
    yield _Case("supcon fp16 d=64, many rows", 64, "peers", n=_MANY)
    yield _Case("ntxent fp32 d=128, many rows", 128, "all", "fp32", n=_MANY)
    yield _Case("supcon fp16 d=128, many rows", 128, "peers", n=_MANY)
    for d in (64, 128, 512):
        yield _Case(f"ntxent fp16 d={d}, few rows", d, n=1024)
        yield _Case(f"ntxent fp32 d={d}, few rows", d, "all", "fp32", n=1024)
        yield _Case(f"clip fp16 d={d}, few rows", d, pair="towers", learnable=True, n=1024)
        yield _Case(f"clip fp32 d={d}, few rows", d, "all", "fp32", pair="towers", learnable=True, n=1024)
    yield _Case("ntxent fp16 d=192, few rows", 192, n=1024)
    for d in (64, 128, 256, 512):
        yield _Case(f"supcon fp16 d={d}, few rows", d, "peers", n=1024)
    # One program finishes them, and a number that is 1 is a constant to Triton, which 3.6 takes its own way with.
    yield _Case("ntxent fp32 d=128, 20 rows", 128, "all", "fp32", n=20)
    yield _Case("supcon fp32 d=128, 20 rows", 128, "all", "fp32", n=20)
    yield _Case("clip fp32 d=128, 20 rows", 128, "all", "fp32", pair="towers", learnable=True, n=20)
    for d in (128, 512):
        yield _Case(f"twins fp16 d={d}", d, second=d)
        yield _Case(f"twins fp16 d={d}, labelled", d, "peers", second=d)
        yield _Case(f"twins fp32 d={d}", d, "all", "fp32", second=d)
    yield _Case("twins fp32 d=32 and d=512, learnable temperature", 32, "all", "fp32", second=512, learnable=True)
    if sm == 90:
        for d in (*hopper.WIDTHS, 512):
            yield _Case(f"ntxent fp16 d={d}, by hand", d, by_hand=True)
            yield _Case(f"queue bf16 d={d}, by hand", d, precision="bf16", pair="queue", by_hand=True)


def cases(sm: int) -> Iterator[tuple[str, Iterator[Launch]]]:
    """Name and launches, forward and backward, of each case on an architecture such as 90.

    The launches are recorded when they are asked for: a case whose name is not wanted costs nothing.
    """
    for case in _cases(sm):
        yield case.name, _launches(case, sm)
    yield from gram_cases.cases(sm)


def _launches(case: _Case, sm: int) -> Iterator[Launch]:
    with on_architecture(sm), hopper.using(case.by_hand), recording() as launches:
        special = {"ranks": _run_ranks, "sigmoid": _run_sigmoid}
        (_run_twins if case.second else special.get(case.pair, _run))(case)
    yield from launches


def _run(case: _Case) -> None:
    temperature = torch.ones((), dtype=torch.float32, device="cpu") if case.learnable else None
    code = _SUPCON if case.name.startswith("supcon") else _NTXENT
    # Both directions of two towers in one pass have no labels.
    peers = case.split != "none" and case.pair != "towers"
    columns, views = case.pair == "towers", case.pair == "views"
    options = case.normalize, case.precision, (code,), case.split, peers, case.reduction, 2 if columns else 1
    # `clip_loss` passes the scale of its logits, 1 / T.
    call = Call(temperature, 0.5, *options, columns and case.learnable)
    flag = torch.empty(1, dtype=torch.int32, device="cpu") if call.may_overflow else None
    n = (case.n or (_ROWS if case.d <= NARROW else _ROWS_WIDE)) // 2
    x, y = torch.empty(2, n, case.d, dtype=case.dtype, device="cpu")
    ids = torch.arange(n, dtype=torch.int64, device="cpu")
    labels = ids if call.peers else None
    if case.ids:
        order_x, order_y = orders(ids, labels, None if views else ids, None if views else labels)
    else:
        order_x = order_y = known_order(n, 2 if views else 1, labels if views else None, x.device)
    a = Source(x, y if views and not case.ids else None, order_x)
    b = None if views or order_y is None else Source(y, None, order_y)
    operands, found, arrived = statistics(a, b, call, flag, columns)
    losses, other = found[0].losses, found[-1].losses.ready
    grad = losses.rows if losses.total is None else losses.total
    ready = None if other is None else Settled((losses.ready.weights, other.weights), other.bound, arrived)
    upstreams = [Upstream(one.stats, None, grad) for one in found]
    if not columns:
        upstreams.append(Upstream(found[0].stats[:, :0], None, None))
    gradients(
        operands[0],
        None if views else operands[1],
        call,
        flag,
        tuple(upstreams),
        (True, columns, case.learnable),
        ready,
    )


def _run_ranks(case: _Case) -> None:
    """Own rows in both roles against others' rows, which travel in half precision."""
    n = _ROWS // 2
    x = torch.empty(n, case.d, dtype=case.dtype, device="cpu", requires_grad=True)
    y = torch.empty(n, case.d, dtype=torch.float16, device="cpu")
    labels = torch.arange(n, dtype=torch.int64, device="cpu") if case.split != "none" else None
    stats, _, theirs, *_ = torch.ops.fastcl.fused_apart(
        x, y, labels, labels, None, 0.5, True, case.precision, True, True
    )
    torch.autograd.backward([stats, theirs], [torch.empty_like(stats), torch.empty_like(theirs)])


def _run_sigmoid(case: _Case) -> None:
    """Both terms forward, since the bias has a gradient; scale and bias are on the device."""
    scale, bias = torch.ones(2, dtype=torch.float32, device="cpu")
    call = Call(scale, 0.0, case.normalize, case.precision, (), case.split, False, inverted=True, bias=bias)
    n = _ROWS if case.d <= NARROW else _ROWS_WIDE
    order = known_order(n, 1, None, torch.device("cpu"))
    x, y = torch.empty(2, n, case.d, dtype=case.dtype, device="cpu")
    rows = Source(x, None, order), Source(y, None, order)
    a, b, *found = sigmoid_kernels.statistics(*rows, replace(call, term="softplus"))
    grads = torch.empty(2, n, dtype=torch.float32, device="cpu").unbind()
    sigmoid_kernels.gradients(a, b, replace(call, term="sigmoid"), found, grads, (True, True, True, True))


def _run_twins(case: _Case) -> None:
    temperature = torch.ones((), dtype=torch.float32, device="cpu") if case.learnable else None
    labels = torch.arange(_ROWS, dtype=torch.int64, device="cpu") if case.split != "none" else None
    call = Call(temperature, 0.5, True, case.precision, (), case.split, labels is not None)
    flags = tuple(torch.empty(1, dtype=torch.int32, device="cpu") if call.may_overflow else None for _ in range(2))
    order = known_order(_ROWS, 1, labels, torch.device("cpu"))
    za, zb = (torch.empty(_ROWS, width, dtype=case.dtype, device="cpu") for width in (case.d, case.second))
    two_models.statistics(za, zb, order, call, (flags[0], flags[1]))
