"""What this machine has, and a numerical self-test on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from importlib import metadata

import torch
from torch import Tensor

import fastcl
from fastcl.errors import shown

_PACKAGES = (
    "torch", "triton", "torchvision", "timm", "numpy", "matplotlib", "tensorboard", "safetensors", "scikit-learn",
    "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120",
)  # fmt: skip
_LOSS_TOLERANCE, _GRADIENT_TOLERANCE = 1e-6, 1e-5  # float32 against float64, relative
_PAIR_TOLERANCE = 1e-5  # of CKA and RSA, absolute


def examine() -> bool:
    """Print versions, devices and the self-test; return whether every check that could run passed."""
    print(f"fastcl {fastcl.__version__}, Python {platform.python_version()} on {platform.platform()}")
    for name in _PACKAGES:
        print(f"  {name:22}{_version(name)}")
    devices = [torch.device("cpu")]
    print(f"  {'CPU':22}{os.cpu_count()} cores, threads in torch: {torch.get_num_threads()}")
    print(f"  {'GPU':22}{_gpu()}")
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    print("self-test, float32 against float64")
    checks = [(f"losses, {d}", partial(_check_losses, d, "chunked")) for d in devices]
    checks.append(("losses, Triton kernels", partial(_on_triton, _check_losses)))
    checks += [(f"similarity, {d}", partial(_check_pairs, d, "chunked")) for d in devices]
    checks.append(("similarity, Triton kernels", partial(_on_triton, _check_pairs)))
    return all([_report(name, check) for name, check in checks])


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none available to torch"
    try:
        properties = torch.cuda.get_device_properties(0)
    except RuntimeError as error:  # a broken driver; the checks below fail and report it
        return f"query failed: {shown(error)}"
    memory = properties.total_memory / 2**30
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"


def _report(name: str, check: Callable[[], str]) -> bool:
    try:
        print(f"  {name:28}ok: {check()}")
    except _Skipped as reason:
        print(f"  {name:28}not run: {reason}")
    except Exception as error:  # anything wrong with this machine belongs in the report
        print(f"  {name:28}FAILED: {type(error).__name__}: {error}")
        return False
    return True


class _Skipped(Exception):
    pass


def _version(package: str) -> str:
    try:
        return metadata.version(package) or "unknown"  # None if its metadata is damaged
    except metadata.PackageNotFoundError:
        return "not installed"
    except Exception as error:  # for example, its folder cannot be read
        return f"unknown ({type(error).__name__}: {shown(error)})"


def _check_losses(device: torch.device, backend: str) -> str:
    """Compare values and gradients of every objective on a backend with the dense backend in float64."""
    generator = torch.Generator("cpu").manual_seed(0)
    z = torch.randn(300, 48, generator=generator, dtype=torch.float32, device="cpu")
    sample = torch.arange(300, dtype=torch.int64, device="cpu") // 2
    labels = sample % 7

    def run(rows: Tensor, backend: str, where: torch.device) -> tuple[Tensor, Tensor]:
        rows = rows.detach().to(where).requires_grad_()
        with fastcl.backend(backend):
            losses = fastcl.contrastive_losses(
                rows, sample.to(where), labels.to(where), fastcl.OBJECTIVES, 0.1, precision="fp32"
            )
        values = torch.stack(list(losses.values()))
        values.sum().backward()
        return values.detach().double().cpu(), rows.grad.double().cpu()

    values, gradient = run(z, backend, device)
    true_values, true_gradient = run(z.double(), "dense", torch.device("cpu"))
    loss_error = ((values - true_values) / true_values).abs().max().item()
    gradient_error = ((gradient - true_gradient).norm() / true_gradient.norm()).item()
    if not (loss_error < _LOSS_TOLERANCE and gradient_error < _GRADIENT_TOLERANCE):
        raise ArithmeticError(f"relative error {loss_error:.1e} (losses), {gradient_error:.1e} (gradient)")
    return f"{len(values)} objectives, relative error {loss_error:.0e} (losses), {gradient_error:.0e} (gradient)"


def _check_pairs(device: torch.device, backend: str) -> str:
    """Compare both routes on a backend with the definitions of CKA and RSA on n x n matrices in float64."""
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(150, 20, generator=generator, dtype=torch.float32, device="cpu") + 10
    y = x[:, :12].square() / 10 + torch.randn(150, 12, generator=generator, dtype=torch.float32, device="cpu")
    grams = [v.double() @ v.double().T for v in (x, y)]
    h = torch.eye(150, dtype=torch.float64, device="cpu") - 1 / 150
    off = ~torch.eye(150, dtype=torch.bool, device="cpu")
    kc, lc = (h @ gram @ h for gram in grams)
    cka = ((kc * lc).sum() / (kc.norm() * lc.norm())).item()
    rsa = torch.corrcoef(torch.stack([gram[off] for gram in grams]))[0, 1].item()
    errors = []
    with fastcl.backend(backend):
        for route in ("features", "tiles"):
            stats = fastcl.pair_stats(x.to(device), y.to(device), route=route)
            errors += [abs(stats.cka - cka), abs(stats.rsa - rsa)]
    if not max(errors) < _PAIR_TOLERANCE:
        raise ArithmeticError(f"CKA and RSA by two routes, errors {', '.join(f'{error:.1e}' for error in errors)}")
    return f"CKA and RSA by two routes, error {max(errors):.0e}"


def _on_triton(check: Callable[[torch.device, str], str]) -> str:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise _Skipped("no GPU (set TRITON_INTERPRET=1 to run them on the CPU)")
    return check(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "triton")
