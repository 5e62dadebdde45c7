"""The Triton backend's working copy of the rows: normalised, padded, in half precision; and its inverse norms."""

import pytest
import torch
from reference import normal
from torch import Tensor
from triton_runs import DEVICE, few_programs, launches  # noqa: F401

from fastcl.kernels.contrastive.prepare import Initial
from fastcl.rowstats.triton.operand import ALIGN, Call, Operand, Source, allocated, fill, padded_width
from fastcl.rowstats.triton.working_order import Order

pytestmark = pytest.mark.usefixtures("few_programs")
# Widths up to a program's whole and beyond, numbers of rows around a block of the working copy.
SHAPES = ((1, 1), (3, 7), (127, 8), (128, 16), (129, 33), (5, 150), (5, 257), (2, 1000), (3, 2500))
FLOAT32_MAX = torch.finfo(torch.float32).max
SCALE = 256  # of the working copy: its remainders are normal numbers of half precision
PRECISIONS = {"fp32": 2.0**-21, "fp16": 2.0**-11, "bf16": 2.0**-8}  # and the roundoff of their copies


def prepared(
    x: Tensor, precision: str = "fp32", normalize: bool = True, x2: Tensor | None = None, order: Tensor | None = None
) -> tuple[Operand, Tensor]:
    """The operand of rows in their own order, and what its copy stands for: float64 (rows, width)."""
    call = Call(None, 0.5, normalize, precision, (), "all" if precision == "fp32" else "none", False)
    n = len(x) * (1 if x2 is None else 2)
    source = torch.arange(n) if order is None else order
    given = Order(source.int().expand(5, n).contiguous().to(DEVICE))
    with launches() as ran:
        operand = allocated(Source(x.to(DEVICE), None if x2 is None else x2.to(DEVICE), given), call)
        fill([operand], [given], call, [None], Initial(None, None, None))
    assert [one.kernel for one in ran] == ["prepare_kernel"]
    scale = operand.scale.cpu().double() if operand.scale is not None else SCALE
    return operand, operand.z.cpu().double().sum(0) / scale


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = x.double().norm(dim=1)
    return x.double() / norm[:, None], 1 / norm


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_rows_are_normalised_and_padded_with_zeros(dtype: torch.dtype, precision: str) -> None:
    for n, d in SHAPES:
        x = normal(n, d, seed=n).to(dtype)
        operand, z = prepared(x, precision)
        want, inverse = unit(x)
        halves, split = (2, "all") if precision == "fp32" else (1, "none")
        assert operand.z.shape == (halves, -(-n // ALIGN) * ALIGN, padded_width(d, split, DEVICE))
        assert not z[n:].any() and not z[:, d:].any()
        # In fp32's two halves an error is of the size of the row; half precision also rounds each entry's own size.
        error = (z[:n, :d] - want).abs()
        assert (error <= PRECISIONS[precision] * want.abs() + 2.0**-24).all()
        torch.testing.assert_close(operand.inv.cpu().double(), inverse, rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("dtype", "size"),
    (
        (torch.float32, 1e20),
        (torch.float32, 1e-20),
        (torch.float32, 3e38),
        (torch.float32, 2e-38),
        (torch.float16, 1e-6),
        (torch.float16, 6e4),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
    ),
    ids=str,
)
def test_rows_of_any_size_keep_their_direction(dtype: torch.dtype, size: float) -> None:
    x = (normal(4, 129, seed=3).clamp(-1, 1) * size).to(dtype)
    assert x.isfinite().all()
    operand, z = prepared(x)
    want, inverse = unit(x)
    assert ((z[:4, :129] - want).abs() <= 2.0**-21 * want.abs() + 2.0**-24).all()
    # Below float32's normal numbers, the inverse norms of rows of 3e38, the spacing is 2^-149.
    torch.testing.assert_close(operand.inv.cpu().double(), inverse, rtol=1e-6, atol=2.0**-149)


def test_a_row_that_mixes_sizes() -> None:
    x = torch.zeros(3, 2500)
    x[0, 0], x[0, 1500], x[0, 2400] = 1e-20, 3.0, 4.0
    x[1, 0], x[1, 1500] = -1e30, 1e-30
    x[2, 2499] = -1e-30  # all of the row in its last element
    operand, z = prepared(x)
    want, inverse = unit(x)
    torch.testing.assert_close(z[:3, :2500], want, rtol=2.0**-21, atol=2.0**-30)
    torch.testing.assert_close(operand.inv.cpu().double(), inverse, rtol=3e-7, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_zero_row_stays_zero(precision: str) -> None:
    x = normal(3, 40).float()
    x[1] = 0
    operand, z = prepared(x, precision)
    assert not z[1].any() and operand.inv[1] == 0 and z[0].any() and z[2].any()


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("column", (0, 1033))
def test_a_row_that_is_not_finite_is_nan_and_alone_so(column: int, bad: float) -> None:
    x = normal(5, 1034).float()
    clean, clean_z = prepared(x)
    x[2, column] = bad
    operand, z = prepared(x)
    others = torch.tensor([0, 1, 3, 4])
    assert z[2, :1034].isnan().all() and operand.inv[2].isnan()
    assert torch.equal(z[others], clean_z[others]) and torch.equal(operand.inv[others], clean.inv[others])


def test_subnormal_rows_have_inverse_norms_beyond_float32() -> None:
    """Marked by their sign, and 2^126 times as large as they are written."""
    x = torch.zeros(3, 6)
    x[0, 0] = 2.0**-149
    x[1, :2] = torch.tensor([3 * 2.0**-149, -4 * 2.0**-149])
    x[2, 2] = 2.0**-126
    operand, z = prepared(x)
    directions = torch.tensor([[1.0, 0, 0], [0.6, -0.8, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(z[:3, :3], directions, rtol=1e-6, atol=0)
    inverse = operand.inv.cpu().double()
    want = 1 / x.double().norm(dim=1)
    assert (inverse[:2] < 0).all() and inverse[2] > 0
    assert (want[:2] > FLOAT32_MAX).all()
    torch.testing.assert_close(-inverse[:2] * 2.0**126, want[:2], rtol=1e-6, atol=0)
    torch.testing.assert_close(inverse[2], want[2], rtol=1e-6, atol=0)


def test_strided_rows_need_no_copy() -> None:
    x = normal(12, 14).float()
    for view in (x[::2, :7], x[:, 3:9], x[:1].expand(5, 14)):
        operand, z = prepared(view)
        packed, packed_z = prepared(view.contiguous())
        assert operand.x.data_ptr() == view.data_ptr() or DEVICE.type != "cpu"
        assert torch.equal(z, packed_z) and torch.equal(operand.inv, packed.inv)
    assert torch.equal(prepared(x.T)[1], prepared(x.T.contiguous())[1])  # columns apart: copied


def test_two_tensors_in_any_order() -> None:
    a, b = normal(40, 2, 12).float()[:, 1], normal(40, 12, seed=1).float()
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    operand, z = prepared(a, x2=b, order=order)
    whole, whole_z = prepared(torch.cat([a, b]))
    assert torch.equal(z[:80], whole_z[order]) and torch.equal(operand.inv, whole.inv[order.to(DEVICE)])


@pytest.mark.parametrize("size", (1.0, 1e20, 1e-20, 3e38, 1e-44, 0.0))
def test_rows_that_are_not_normalised_share_a_power_of_two(size: float) -> None:
    """It brings the largest entry to between 128 and 256, where float32 has such a power."""
    x = (normal(9, 20).clamp(-1, 1) * size).float()
    operand, z = prepared(x, normalize=False)
    scale, largest = operand.scale.cpu().double(), x.double().abs().max()
    assert torch.frexp(scale)[0] == 0.5 and operand.inv is None
    if 1e-36 < size:
        assert 128 <= scale * largest < 256
    error = (z[:9, :20] - x.double()).abs() * scale
    assert (error <= 2.0**-21 * 256).all()


def test_a_broken_row_leaves_the_scale_of_others() -> None:
    x = normal(9, 20).float()
    x[4, 4] = float("nan")
    operand, z = prepared(x, normalize=False)
    keep = torch.arange(9) != 4
    assert operand.scale.isfinite().all() and z[4].isnan().any()
    assert ((z[:9, :20] - x.double())[keep].abs() <= 2.0**-20).all()
