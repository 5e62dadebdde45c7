"""Normalisation kernels: values and gradients against float64 formulas, the ends of the range, compilation."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# One to three blocks of columns (of at most 1024), one and several blocks of rows.
SHAPES = [(1, 1), (3, 7), (5, 129), (2, 1000), (3, 2500), (70, 33)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT32_MAX = torch.finfo(torch.float32).max


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN, so an element that no kernel writes is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


def normalize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from fastcl.kernels.contrastive.normalize import normalize_rows

    z, inv_norm = normalize_rows(x)
    assert z.dtype == inv_norm.dtype == torch.float32
    assert z.shape == x.shape and inv_norm.shape == x.shape[:1]
    return z, inv_norm


def backward(z: torch.Tensor, inv_norm: torch.Tensor, dz: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from fastcl.kernels.contrastive.normalize import normalize_rows_backward

    dx = normalize_rows_backward(z, inv_norm, dz, dtype)
    assert dx.dtype == dtype and dx.shape == z.shape
    return dx


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    norm = x.double().square().sum(1).sqrt()
    return x.double() / norm[:, None], 1 / norm


def reference_backward(x: torch.Tensor, dz: torch.Tensor) -> torch.Tensor:
    leaf = x.double().requires_grad_()
    unit = leaf / leaf.square().sum(1, keepdim=True).sqrt()
    (gradient,) = torch.autograd.grad(unit, leaf, dz.double())
    return gradient


def roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """Relative error of one store; a GPU rounds to bfloat16, Triton's interpreter cuts off."""
    cuts = dtype == torch.bfloat16 and device.type == "cpu"
    return torch.finfo(dtype).eps / (1 if cuts else 2)


def random_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_agree_with_float64(shape, dtype, device):
    x = random_rows(shape, dtype, device, seed=1)
    dz = random_rows(shape, torch.float32, device, seed=2)
    z, inv_norm = normalize(x)
    expected_z, expected_inv = reference(x)
    torch.testing.assert_close(z.double(), expected_z, rtol=3e-7, atol=0)
    torch.testing.assert_close(inv_norm.double(), expected_inv, rtol=3e-7, atol=0)

    dx = backward(z, inv_norm, dz, dtype)
    expected_dx = reference_backward(x, dz)
    # The projection subtracts two vectors of the size of dz: its float32 error is measured against that size.
    bound = 1e-6 * expected_inv[:, None] * dz.double().norm(dim=1, keepdim=True)
    bound = bound + roundoff(dtype, device) * (expected_dx.abs() + bound)
    bound = bound.clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    assert ((dx.double() - expected_dx).abs() <= bound).all()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e20),
        (torch.float32, 1e-20),
        (torch.float32, 3e38),
        (torch.float32, 2e-38),
        (torch.float16, 1e-6),
        (torch.float16, 6e4),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
    ],
    ids=str,
)
def test_rows_of_any_size_keep_their_direction_and_gradient(dtype, size, device):
    x = (random_rows((4, 129), torch.float64, device, seed=3).clamp(-1, 1) * size).to(dtype)
    dz = random_rows((4, 129), torch.float32, device, seed=4)
    assert x.isfinite().all()
    z, inv_norm = normalize(x)
    expected_z, expected_inv = reference(x)
    torch.testing.assert_close(z.double(), expected_z, rtol=1e-6, atol=0)
    torch.testing.assert_close(inv_norm.double(), expected_inv, rtol=1e-6, atol=2.0**-149)
    # Below float32's normal numbers (inv_norm of rows of 3e38) the spacing is 2^-149.
    bound = 1e-6 * expected_inv[:, None] * dz.double().norm(dim=1, keepdim=True) + 2.0**-147
    assert ((backward(z, inv_norm, dz, torch.float32).double() - reference_backward(x, dz)).abs() <= bound).all()


def test_a_row_that_mixes_sizes_across_column_blocks(device):
    x = torch.zeros(3, 2500, device=device)
    x[0, 0], x[0, 1500], x[0, 2400] = 1e-20, 3.0, 4.0  # the maximum rises twice
    x[1, 0], x[1, 1500] = -1e30, 1e-30  # and here it falls
    x[2, 2499] = -1e-30  # all of the row in its last element
    z, inv_norm = normalize(x)
    expected_z, expected_inv = reference(x)
    torch.testing.assert_close(z.double(), expected_z, rtol=3e-7, atol=1e-38)
    torch.testing.assert_close(inv_norm.double(), expected_inv, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_row_has_zero_value_and_zero_gradient(dtype, device):
    x = random_rows((3, 40), dtype, device, seed=5)
    x[1] = 0
    z, inv_norm = normalize(x)
    dx = backward(z, inv_norm, torch.ones(3, 40, device=device), dtype)
    assert (z[1] == 0).all() and inv_norm[1] == 0 and (dx[1] == 0).all()
    assert (dx[[0, 2]] != 0).any(1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 1033])
def test_a_row_that_is_not_finite_is_nan_and_alone_so(bad, column, device):
    x = random_rows((5, 1034), torch.float32, device, seed=6)
    dz = random_rows((5, 1034), torch.float32, device, seed=7)
    clean_z, clean_inv = normalize(x)
    clean_dx = backward(clean_z, clean_inv, dz, torch.float32)
    x[2, column] = bad
    z, inv_norm = normalize(x)
    dx = backward(z, inv_norm, dz, torch.float32)
    assert z[2].isnan().all() and inv_norm[2].isnan() and dx[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(z[others], clean_z[others]) and torch.equal(inv_norm[others], clean_inv[others])
    assert torch.equal(dx[others], clean_dx[others])


def test_a_subnormal_row_saturates_its_inverse_norm_and_never_gives_nan(device):
    x = torch.zeros(2, 6, device=device)
    x[0, 0] = 2.0**-149
    x[1, :2] = torch.tensor([3 * 2.0**-149, -4 * 2.0**-149])
    z, inv_norm = normalize(x)
    torch.testing.assert_close(z, torch.tensor([[1.0, 0, 0, 0, 0, 0], [0.6, -0.8, 0, 0, 0, 0]], device=device))
    assert (inv_norm == FLOAT32_MAX).all()
    dz = torch.zeros(2, 6, device=device)
    dz[0, 1], dz[1, 2] = 0.25, -0.5
    dx = backward(z, inv_norm, dz, torch.float32)
    torch.testing.assert_close(dx, FLOAT32_MAX * dz)
    assert not backward(z, inv_norm, 8 * dz, torch.float32).isnan().any()  # infinite: beyond float32


def test_strided_inputs_need_no_copy(device):
    x = random_rows((129, 6), torch.float32, device, seed=8)
    z, inv_norm = normalize(x.T)
    packed_z, packed_inv = normalize(x.T.contiguous())
    assert torch.equal(z, packed_z) and torch.equal(inv_norm, packed_inv)
    expanded = torch.tensor(0.5, device=device).expand(6, 129)  # what the backward of a sum hands down
    dx = backward(z, inv_norm, expanded, torch.float32)
    assert torch.equal(dx, backward(z, inv_norm, expanded.contiguous(), torch.float32))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_empty_inputs(shape, device):
    z, inv_norm = normalize(torch.zeros(shape, device=device))
    assert (inv_norm == 0).all()
    backward(z, inv_norm, torch.zeros(shape, device=device), torch.float32)


def compile_ahead_of_time(capability: int) -> list[dict[str, int | str]]:
    """Resource usage of both kernels for one GPU generation; runs in a process of its own, without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastcl.kernels.contrastive import normalize as module

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    rows = []
    for kernel in (module.normalize_fwd_kernel, module.normalize_bwd_kernel):
        for dtype, d in (("fp32", 128), ("bf16", 4096)):
            block_n, block_d = module.block_sizes(d)
            constants = {"BLOCK_N": block_n, "BLOCK_D": block_d}
            # Unit column strides and multiples of 16, the case of contiguous embeddings.
            constants |= {name: 1 for name in kernel.arg_names if name in ("stride_xd", "stride_dzd")}
            types = {"z_ND": "*fp32", "r_N": "*fp32"} | dict.fromkeys(("x_ND", "dz_ND", "dx_ND"), f"*{dtype}")
            signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
            attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n not in constants}
            constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
            source = ASTSource(kernel, signature, constexprs, attrs)
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(built.asm["cubin"])
                file.flush()
                usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
            used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
            rows.append({"name": kernel.__name__, "dtype": dtype, "flushes": built.asm["ptx"].count(".ftz"), **used})
    return rows


@pytest.mark.skipif(sys.platform != "linux", reason="triton is installed on Linux only")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_a_gpu_and_spill_nothing(capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 4
    for row in rows:
        assert 0 < row["REG"] <= 128 and row["STACK"] == 0 and row["LOCAL"] == 0, row
        assert row["flushes"] == 0, row  # subnormal rows rely on arithmetic that does not flush them to zero


if __name__ == "__main__":
    print(json.dumps(compile_ahead_of_time(int(sys.argv[1]))))
