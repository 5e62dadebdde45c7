"""Compiled kernels without a GPU: Triton's own launch code runs for sm_90, on a CUDA driver that does nothing."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

import fastcl
from fastcl.errors import FastclError

SOURCE = Path(__file__).with_suffix(".c")
_KERNELS = (
    "order", "prepare", "forward", "two_models", "statistics", "backward_prologue", "backward", "wide",
    "backward_epilogue",
)  # fmt: skip


@contextmanager
def compiled() -> Iterator[None]:
    """Within the block, CPU tensors go to the Triton backend, whose kernels are compiled and launched, but not run.

    From then on the process can't use a GPU.

    Raises:
        FastclError: there is no C compiler that works, or kernels are for Triton's interpreter in this process.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise FastclError("kernels have to be compiled: unset TRITON_INTERPRET")
    with TemporaryDirectory() as folder:
        _load(Path(folder))
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver

        active = CudaDriver()
        answers = {"device": lambda: 0, "stream": lambda _: 0, "target": lambda: GPUTarget("cuda", 90, 32)}
        for name, answer in answers.items():  # in place of PyTorch's
            setattr(active, f"get_current_{name}", answer)
        driver.set_active(active)
        for name in _KERNELS:  # before the environment names the interpreter, which is what CPU tensors need
            import_module(f"fastcl.kernels.contrastive.{name}")
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), fastcl.backend("triton"):
            yield


def _load(folder: Path) -> None:
    """Load the driver in place of the machine's, if it has one."""
    wanted = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]  # as Triton does
    compiler = next(filter(None, map(shutil.which, wanted)), None)
    if compiler is None:
        raise FastclError(f"no C compiler was found, which Triton needs to launch kernels: {', '.join(wanted)}; set CC")
    library = folder / "libcuda.so.1"
    options = "-O2", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"
    if status := subprocess.run([compiler, *options, "-o", library, SOURCE]).returncode:
        raise FastclError(f"the C compiler {compiler} ended with status {status}; set CC to one that works")
    (folder / "libcuda.so").symlink_to(library.name)  # by which Triton 3.3 links its own code
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)  # where the launcher's own compilation looks for it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.is_available()  # PyTorch looks for devices once
