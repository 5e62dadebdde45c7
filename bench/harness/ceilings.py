"""Peak rates of this machine for matrix products, memory copies and exponentials, and the time bounds they imply."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch

from bench.harness.clocks import Sample, time_call
from bench.harness.command import Command
from bench.harness.records import Record, machine, record, table, write

BENCH = "ceilings"
NARROW = 256  # rows up to this width fit one program; its backward pass computes every product once per row
_WARM_UP = 0.2  # seconds, since clocks rise under load

_DESCRIPTION = """\
The ceilings of this machine: large matrix products in fp16 and bf16 (TFLOP/s), copies within the device's memory
(GB/s read and written), exponentials (10^12 a second). On a CPU the sizes are tiny and the numbers say nothing; the
exponentials then need TRITON_INTERPRET=1.
"""


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: floating-point operations, bytes and exponentials per second."""

    flops: float
    bytes: float
    exponentials: float

    def bound_ms(self, objective: str, n: int, d: int) -> dict[str, float]:
        """A lower bound in ms on each pass of an objective on n rows of width d, at any precision.

        Two views: the forward pass visits each pair of rows once (n n d floating-point operations, n n / 2
        exponentials). The backward pass takes 4 n n d and n n exponentials if one program owns a row's gradient (d up
        to 256), else 3 n n d and n n / 2. Two towers of m = n / 2 rows: 2 m m d and m m forward, 8 m m d and 2 m m, or
        6 m m d and m m, backward. Products, exponentials and memory traffic (reading the rows and, in the backward
        pass, writing the gradient) can overlap, so the slowest of them is the bound of a pass.
        """
        # Pairs of towers have no mirror image, so each costs twice what a pair of views does.
        pairs = 2 * (n / 2) ** 2 if objective in ("clip", "sigmoid") else n * n
        products, exponentials = (4, pairs) if d <= NARROW else (3, pairs / 2)
        memory = 4 * n * d
        forward = self.slowest_ms(pairs * d, pairs / 2, memory)
        backward = self.slowest_ms(products * pairs * d, exponentials, 2 * memory)
        return {"fwd": forward, "bwd": backward, "both": forward + backward}

    def slowest_ms(self, flops: float, exponentials: float, size: float) -> float:
        """Time in ms of the slowest of floating-point operations, exponentials and bytes, each at its peak rate."""
        return 1e3 * max(flops / self.flops, exponentials / self.exponentials, size / self.bytes)

    def __str__(self) -> str:
        products, copies = f"matrix products {self.flops / 1e12:.4g} TFLOP/s", f"copies {self.bytes / 1e9:.4g} GB/s"
        return f"{products}, {copies}, exponentials {self.exponentials:.3g}/s"


class Rate(NamedTuple):
    """What a call does and how much of it (floating-point operations, bytes or exponentials), with its times."""

    name: str
    work: float
    times: list[Sample]

    @property
    def a_second(self) -> float:
        """The work in a second of the median call."""
        return 1e3 * self.work / median(s.ms for s in self.times)


def measure(device: torch.device, repeats: int = 15) -> tuple[Ceilings, list[Rate]]:
    """The ceilings of a device, and the rates that they come from."""
    from bench.harness.exponentials import exponentials_kernel  # benchmarks also run without Triton

    cuda = device.type == "cuda"
    size = 8192 if cuda else 128
    found = [_products(dtype, size, device, repeats) for dtype in (torch.float16, torch.bfloat16)]
    found.append(_copies(2**28 if cuda else 2**16, device, repeats))
    rounds, block = 4096 if cuda else 4, 1024
    x = torch.rand(2**22 if cuda else 2**12, device=device)
    y = torch.empty_like(x)
    call = partial(exponentials_kernel[(len(x) // block,)], x, y, ROUNDS=rounds, BLOCK=block)
    found.append(Rate("exp2", 1.0 * len(x) * rounds, _times(call, device, repeats)))
    half, brain, copy, exp2 = (rate.a_second for rate in found)
    return Ceilings(max(half, brain), copy, exp2), found


def of_host(tiny: bool) -> Ceilings:
    """The ceilings of the CPU in float32, measured with PyTorch's functions."""
    device, repeats = torch.device("cpu"), 5
    near = torch.rand(2**16)  # in cache, so that exp is the limit, not memory
    exponentials = _times(partial(torch.exp, near, out=torch.empty_like(near)), device, repeats)
    return Ceilings(
        _products(torch.float32, 256 if tiny else 2048, device, repeats).a_second,
        _copies(2**16 if tiny else 2**26, device, repeats).a_second,
        Rate("exp", 1.0 * len(near), exponentials).a_second,
    )


def _products(dtype: torch.dtype, size: int, device: torch.device, repeats: int) -> Rate:
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    times = _times(partial(torch.mm, a, b, out=torch.empty_like(a)), device, repeats)
    return Rate(f"matmul {str(dtype).removeprefix('torch.')}", 2.0 * size**3, times)


def _copies(size: int, device: torch.device, repeats: int) -> Rate:
    source = torch.randn(size, device=device)
    return Rate("copy", 2.0 * source.nbytes, _times(partial(torch.empty_like(source).copy_, source), device, repeats))


def _times(call: Callable[[], object], device: torch.device, repeats: int) -> list[Sample]:
    began = perf_counter()
    call()
    while device.type == "cuda" and perf_counter() - began < _WARM_UP:
        call()
        torch.cuda.synchronize()
    return [time_call(call, device) for _ in range(repeats)]


def records(found: Sequence[Rate], facts: Record) -> list[Record]:
    """A record per rate; `work` is the floating-point operations, bytes or exponentials of one call."""
    made = []
    for name, work, times in found:
        flops = (work, work) if name.startswith("matmul") else None
        timing = "events" if times[0].gpu else None
        made.append(record(BENCH, name, {"work": work}, facts, "fwd", times, flops, timing=timing))
    return made


def main(argv: list[str] | None = None) -> int:
    """Measure and write the results; return the exit status."""
    parser = Command("harness.ceilings", [_DESCRIPTION], "device", "repeats", repeats=15)
    args = parser.parse(argv)
    if args.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("on a CPU the kernel of the exponentials needs TRITON_INTERPRET=1")
    facts = machine(args.device)
    ceilings, found = measure(args.device, args.repeats)
    rows = [(rate.name, f"{rate.work:.4g}", f"{rate.a_second:.4g}") for rate in found]
    text = f"# Ceilings\n\n{facts['device']}, {facts['date']}\n\n{table(('what', 'in one call', 'a second'), rows)}"
    write(args.out, BENCH, records(found, facts), text)
    print(ceilings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
