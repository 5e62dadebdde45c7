"""Widths between powers of two: how far working copies are padded, and rows that kernels take in blocks of columns."""

import pytest
import torch
from reference import normal
from test_triton_apart import compare
from torch import Tensor
from triton_runs import DEVICE, Launches, check, launches, tables_own_tiles, uneven_batch

import fastcl
from fastcl.kernels.common.launch import on_architecture
from fastcl.rowstats.triton.operand import padded_width, tabled
from fastcl.rowstats.triton.wide import columns

WIDTHS = (129, 150, 160, 191, 192, 193, 255)
# Architecture, split, and whether the table has a tile of 256 columns for the backward pass.
HELD = (
    (90, "none", True), (90, "peers", False), (90, "all", False), (80, "none", False), (100, "peers", True),
    (100, "all", False),
)  # fmt: skip


@pytest.mark.parametrize(("sm", "split", "held"), HELD)
def test_padding_ends_at_a_multiple_of_64_where_no_tile_holds_a_row(sm: int, split: str, held: bool) -> None:
    with on_architecture(sm):
        for d, width in ((1, 32), (65, 128), (100, 128), (128, 128), (193, 256), (256, 256), (257, 320), (513, 576)):
            assert padded_width(d, split, DEVICE) == width
        for d in (129, 160, 192):
            assert padded_width(d, split, DEVICE) == (256 if held else 192)


@pytest.mark.parametrize("most", (128, 256))
def test_a_products_blocks_of_columns(most: int) -> None:
    for width in (32, *range(64, 4096, 64)):
        block, tail = columns(width, most)
        assert block & (block - 1) == 0 and tail & (tail - 1) == 0 and block + tail <= most
        computed = -(-width // (block + tail)) * (block + tail)
        assert width <= computed <= 1.25 * width or (width, most) == (192, 128)
    assert [columns(d, 256) for d in (192, 256, 320, 384, 448)] == [(128, 64), (256, 0), (128, 32), (128, 64), (256, 0)]
    assert [columns(d, 128) for d in (64, 192, 256, 320)] == [(64, 0), (128, 0), (128, 0), (128, 0)]
    assert columns(192, 64) == (64, 0)


def test_the_tables_rows_for_a_products_width_and_rows() -> None:
    """The other kernels take the rows for any width wherever they take pieces."""
    taken = {}
    for sm, d, n in ((86, 192, 65536), (86, 256, 65536), (86, 320, 65536), (90, 192, 4096), (90, 192, 4224)):
        with on_architecture(sm):
            rows = [tabled(kernel, DEVICE, "all", d, n) for kernel in ("product", "online")]
        taken[sm, d, n] = [row and row.block_d for row in rows]
    assert list(taken.values()) == [[64, 64], [128, 256], [128, 64], [128, 64], [256, 64]]


def in_blocks(ran: Launches, width: int) -> None:
    """The wide route, over a working copy of this width."""
    assert ran.of("product_kernel") and not ran.of("backward_kernel")
    assert {one.arguments["pairs"].weights.dtype for one in ran.of("product_kernel")} == {torch.float16}
    assert {one.arguments["TILE"].D for one in ran.of("forward_kernel") + ran.of("product_kernel")} == {width}


@pytest.mark.parametrize("d", WIDTHS)
def test_losses(d: int) -> None:
    sample, labels = uneven_batch()
    z = normal(len(sample), d).float()
    for sm, name, precision in ((80, "ntxent", "fp16"), (90, "supcon", "fp16"), (90, "nscl", "fp32")):
        with tables_own_tiles(), on_architecture(sm):
            ran = check([name], z, sample, labels, 0.2, precision)
        in_blocks(ran, 192 if d <= 192 else 256)


@pytest.mark.parametrize("precision", ("fp16", "fp32"))
def test_logits_of_any_range(precision: str) -> None:
    """The kernels with running maxima take rows in blocks of columns too."""
    sample, labels = uneven_batch()
    with tables_own_tiles(), on_architecture(80):
        ran = check(["supcon_in"], normal(len(sample), 150).float(), sample, labels, torch.tensor(0.005), precision)
    in_blocks(ran, 192)
    assert ran.flag() == 1


@pytest.mark.parametrize("sm", (80, 90))
@pytest.mark.parametrize("kind", ("clip", "sigmoid"))
def test_towers(kind: str, sm: int) -> None:
    found = {}
    for backend, dtype in (("triton", torch.float32), ("dense", torch.float64)):
        rows = [normal(150, 160, seed=k).to(DEVICE, dtype).requires_grad_() for k in (1, 2)]
        with tables_own_tiles(), on_architecture(sm), launches() as ran, fastcl.backend(backend):
            loss = fastcl.clip_loss(*rows, 5.0) if kind == "clip" else fastcl.sigmoid_loss(*rows, 5.0, -5.0)
            found[backend] = [v.detach().double() for v in (loss, *torch.autograd.grad(loss, rows))]
        if backend == "triton":
            in_blocks(ran, 192)
    compared(found["triton"], found["dense"])


def test_rows_of_other_ranks() -> None:
    with tables_own_tiles():
        compare((40, 30, 160), True, 0.2, True)


@pytest.mark.parametrize("widths", ((192, 160), (160, 40), (150, 300)))
def test_two_models(widths: tuple[int, int]) -> None:
    found = {}
    for backend, dtype in (("triton", torch.float32), ("dense", torch.float64)):
        rows = [normal(40, d, seed=d).to(DEVICE, dtype).requires_grad_() for d in widths]
        with tables_own_tiles(), launches() as ran, fastcl.backend(backend):
            twins = fastcl.twin_stats(*rows, torch.arange(40, device=DEVICE) // 2, temperature=0.2, precision="fp32")
            total = sum((one.lse_other - one.mean_view).sum() for one in (twins.a, twins.b))
            found[backend] = [v.detach().double() for v in (total, *torch.autograd.grad(total, rows))]
        if backend == "triton":
            (plain, _) = ran.of("twin_kernel")
            assert [plain.arguments[k].D for k in "AB"] == [padded_width(d, "all", DEVICE) for d in widths]
    compared(found["triton"], found["dense"])


def compared(got: list[Tensor], want: list[Tensor]) -> None:
    """Values and gradients within float32's bounds."""
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
