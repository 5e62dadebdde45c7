"""The kernels written by hand for sm_90 beside those in Triton: the same numbers, the same bits again, and faster?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from statistics import median

import torch
import triton
from torch import Tensor

from bench.gpu.repeat import Result, digest
from bench.harness.clocks import PASSES, Sample, Timer, interleave, timer_of
from bench.harness.command import Command
from bench.harness.records import digits, table, write
from bench.losses.providers import fused
from fastcl.rowstats.triton import hopper

_DESCRIPTION = """\
NT-Xent in half precision by the kernels written by hand for sm_90 (fastcl/rowstats/triton/hopper.py) and by those in
Triton, on this card: loss and gradient of both, the bits of a second run, and times. Says at the end whether the
kernels by hand may be on by default for this version of Triton. Exit status 1 where their results are wrong.
"""
CASES = (  # rows, columns
    (4096, 128), (16384, 128), (65536, 128), (4096, 256), (65536, 256), (16384, 512), (65536, 512), (65536, 1024),
)  # fmt: skip
_HOW = ("Triton ms", "by hand ms")
TOLERANCES = (2e-5, 1e-3)  # relative: loss, gradient; both sides round weights to half precision


@dataclass(frozen=True)
class Found:
    """A case: errors of loss and gradient, whether a second run has the same bits, milliseconds by pass in Triton and
    by hand."""

    n: int
    d: int
    errors: tuple[float, float]
    repeats: bool
    ms: dict[str, tuple[float, float]]

    @property
    def right(self) -> bool:
        """Whether the kernels by hand may be used."""
        return self.repeats and all(error <= most for error, most in zip(self.errors, TOLERANCES, strict=True))

    @property
    def faster(self) -> bool:
        """Whether they should be."""
        return all(by_hand < plain for plain, by_hand in self.ms.values())


def obstacle() -> str | None:
    """Why the kernels cannot run here, or None."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "they need a GPU of compute capability 9.0"
    version = ".".join(triton.__version__.split(".")[:2])
    return None if version in hopper.COMPILED else f"they were not compiled with Triton {version}"


def compare(n: int, d: int) -> Found:
    """Run a case both ways."""
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(d)).cuda().requires_grad_()
    labels = torch.arange(n // 2, device=z.device)

    def forward() -> Tensor:
        return fused(True, z, labels, "ntxent")

    truth, first, again = (_result(forward, z, on) for on in (False, True, True))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(first, truth, strict=True)]
    timers = {str(on): _timer(forward, z, on) for on in (False, True)}
    samples = interleave(timers, 30, 1, 0.2)
    ms = {run: (_median(samples["False"][run]), _median(samples["True"][run])) for run in PASSES}
    return Found(n, d, (errors[0], errors[1]), digest(first) == digest(again), ms)


def _result(forward: Callable[[], Tensor], z: Tensor, on: bool) -> Result:
    with hopper.using(on):
        loss = forward()
        return loss.detach(), torch.autograd.grad(loss, z)[0]


def _timer(forward: Callable[[], Tensor], z: Tensor, on: bool) -> Timer:
    with hopper.using(on):
        timer, _ = timer_of(forward, z, True)

    def timed() -> dict[str, Sample]:
        with hopper.using(on):  # for the eager call beside the graphs
            return timer()

    return timed


def _median(samples: list[Sample]) -> float:
    return median(sample.ms for sample in samples)


def verdict(found: list[Found]) -> str:
    """What to do with the kernels by hand."""
    version = ".".join(triton.__version__.split(".")[:2])
    if wrong := [one for one in found if not one.right]:
        return f"WRONG for {_sizes(wrong)}: leave them off"
    if slower := [one for one in found if not one.faster]:
        return f"right, but slower in a pass for {_sizes(slower)}: leave them off, or change their rows of the table"
    return f'right and faster everywhere: add "{version}" to CONFIRMED in fastcl/rowstats/triton/hopper.py'


def _sizes(found: list[Found]) -> str:
    return ", ".join(f"{one.n} x {one.d}" for one in found)


def _rows(found: list[Found]) -> Iterator[tuple[str, ...]]:
    for one in found:
        errors = (f"{error:.1e}" for error in one.errors)
        times = (digits(ms) for run in PASSES for ms in one.ms[run])
        yield str(one.n), str(one.d), *errors, "yes" if one.repeats else "NO", *times


def main(argv: list[str] | None = None) -> int:
    """Compare, print and write; return 1 if the kernels by hand are wrong."""
    args = Command("gpu.by_hand", (_DESCRIPTION,)).parse(argv)
    if reason := obstacle():
        print(f"not run: {reason}")
        return 0
    found = []
    for case in CASES:
        found.append(compare(*case))
        print(" ".join(list(_rows(found))[-1]), flush=True)
    head = ("N", "D", "loss error", "gradient error", "same bits", *(f"{run} {how}" for run in PASSES for how in _HOW))
    text = f"# Kernels by hand, Triton {triton.__version__}\n\n{table(head, _rows(found))}\n{verdict(found)}\n"
    records = [
        {"bench": "by_hand", "n": one.n, "d": one.d, "right": one.right, "repeats": one.repeats, "ms": one.ms,
         "errors": [error if isfinite(error) else None for error in one.errors]}
        for one in found
    ]  # fmt: skip
    write(args.out, "by_hand", records, text)
    print(verdict(found))
    return int(not all(one.right for one in found))


if __name__ == "__main__":
    sys.exit(main())
