"""Kernels for the test of the static gate: one is clean, each of the others has a fault that the gate must name."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """An argument of several parts."""

    first: Any
    second: Any
    n: int


class Block(NamedTuple):
    """Constants."""

    R: int
    EVEN: bool
    nothing: Any


@triton.jit
def two_products_kernel(
    z_ND, weight_N, out_ND, n, scale, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr
):
    """(exp(z z') w) z, with the weights in registers when they enter the second product.

    Clean in tiles of 64 by 64; in tiles of 64 by 128 with D = 64 ptxas serialises its WGMMA.
    """
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, D)
    b_r = tl.load(z_ND + o_r[:, None] * D + o_d[None, :])
    b_acc = tl.zeros([BLOCK_R, D], tl.float32)
    for start_s in range(0, n, BLOCK_S):
        b_s = tl.load(z_ND + (start_s + o_s)[:, None] * D + o_d[None, :])
        b_w = tl.exp2(tl.dot(b_r, tl.trans(b_s)) * scale) * tl.load(weight_N + start_s + o_s)[None, :]
        b_acc = tl.dot(b_w.to(b_s.dtype), b_s, b_acc)
    tl.store(out_ND + o_r[:, None] * D + o_d[None, :], b_acc)


@triton.jit
def spills_kernel(x_N, out_N, BLOCK: tl.constexpr):
    """Every element is needed again after a reduction over all, and one warp has no registers for so many."""
    o_n = tl.arange(0, BLOCK)
    b_x = tl.load(x_N + o_n)
    tl.store(out_N + o_n, b_x / tl.sum(b_x, 0))


@triton.jit
def plain_product_kernel(x, y, out, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """A product in full float32 takes no tensor core."""
    o = tl.arange(0, BLOCK)
    p = o[:, None] * BLOCK + o[None, :]
    tl.store(out + p, tl.dot(tl.load(x + p), tl.load(y + p), input_precision=PRECISION))


@triton.jit
def rejected_kernel(x_N, BLOCK: tl.constexpr):
    """The number of elements is no power of two."""
    o_n = tl.arange(0, BLOCK)
    tl.store(x_N + o_n, 0.0)


@triton.jit
def arguments_kernel(
    half, brain, single, double, ints, longs, bytes_, odd, nothing,
    one, sixteen, seventeen, large, real, flag, bare: tl.constexpr, sizes: tl.constexpr, name: tl.constexpr,
    rows, BLOCK, numbers,
):  # fmt: skip
    """Takes one argument of every kind."""
    tl.store(single, real)
    if rows.second is None:
        tl.store(rows.first + rows.n, BLOCK.R + numbers[1])


def cases(sm):
    """The launches of the kernels above, named after the finding that each must give."""
    import torch

    from fastcl.kernels.common.launch import launch, recording

    half = torch.empty(64, 64, dtype=torch.float16)
    single = torch.empty(64, 64)

    def two_products(d, block_s, warps, stages):
        launch(
            two_products_kernel, (1,), warps, stages,
            z_ND=half, weight_N=single, out_ND=single, n=4096, scale=0.5, D=d, BLOCK_R=64, BLOCK_S=block_s,
        )  # fmt: skip

    def plain_product(precision):
        launch(plain_product_kernel, (1,), 4, 2, x=single, y=single, out=single, BLOCK=16, PRECISION=precision)

    calls = {
        "clean": lambda: two_products(128, 64, 4, 2),
        "spill": lambda: launch(spills_kernel, (1,), 1, 1, x_N=single, out_N=single, BLOCK=16384),
        "shared": lambda: two_products(128, 64, 4, 16),
        "tensor core": lambda: plain_product("ieee"),
        "compile": lambda: launch(rejected_kernel, (1,), 4, 1, x_N=single, BLOCK=100),
    }
    if sm == 90:
        calls["serialised"] = lambda: two_products(64, 128, 4, 2)
    for name, call in calls.items():
        with recording() as launches:
            call()
        yield name, launches


def kinds(sm):
    """One launch with an argument of every kind."""
    import torch

    from fastcl.kernels.common.arguments import fixed
    from fastcl.kernels.common.launch import launch, recording

    with recording() as launches:
        launch(
            arguments_kernel, (1,), 4, 1,
            half=torch.empty(4, dtype=torch.float16), brain=torch.empty(4, dtype=torch.bfloat16),
            single=torch.empty(4), double=torch.empty(4, dtype=torch.float64),
            ints=torch.empty(4, dtype=torch.int32), longs=torch.empty(4, dtype=torch.int64),
            bytes_=torch.empty(4, dtype=torch.int8), odd=torch.empty(4)[1:], nothing=None,
            one=1, sixteen=32, seventeen=17, large=2**31, real=1.0, flag=True,
            bare=None, sizes=(64, 128), name="fp16", rows=Rows(torch.empty(4), None, 48),
            BLOCK=fixed(Block(64, True, None)), numbers=fixed((5, 7)),
        )  # fmt: skip
    yield "every kind", launches
    yield "again", launches


def serialised(sm):
    """The case of that name alone."""
    return (case for case in cases(sm) if case[0] == "serialised")


def unfit(sm):
    """Launches that no job can carry."""
    from fastcl.kernels.common.launch import launch, recording

    for name, sizes in {"constant": {"BLOCK": 1j}, "missing": {}, "surplus": {"BLOCK": 1, "SIZE": 1}}.items():
        with recording() as launches:
            launch(spills_kernel, (1,), 1, 1, x_N=None, out_N=None, **sizes)
        yield name, launches
