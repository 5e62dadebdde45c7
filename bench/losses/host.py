"""Host time of small losses: what an eager call costs the processor before the device has anything to do.

Run it with `python -m bench.losses.host --out DIR`, on a quiet machine. Kernels are compiled and launched by Triton,
but the CUDA driver does nothing, and the tensors are on the CPU: what is left is Python, PyTorch's dispatcher and
allocator, and Triton's own code of a launch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import fastcl
from bench.harness.command import Command
from bench.harness.records import Record, machine, table, write
from bench.losses import no_device, plain
from fastcl.rowstats import registration

N, D = 4096, 128
ROUNDS, CALLS = 40, 50
PLAIN = 16  # rows of the plain PyTorch losses, so few that their operators take no time of their own

_TEXTS = (
    "Time that an eager loss takes on the host, forward and backward, with a CUDA driver that does nothing.",
    "Writes host.json and host.md in two minutes, the first of which compiles. Run it where nothing else does.",
)


class Loss(NamedTuple):
    """A loss of the package and the same in plain PyTorch; both take z1, z2, labels and a logit scale."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    learnable: bool = False


LOSSES = {
    "NT-Xent": Loss(lambda a, b, y, s: fastcl.ntxent_loss(a, b), lambda z, y, s: plain.ntxent(z, y)),
    "NSCL": Loss(lambda a, b, y, s: fastcl.nscl_loss(a, b, y), lambda z, y, s: plain.nscl(z, y)),
    "SupCon": Loss(lambda a, b, y, s: fastcl.supcon_loss(a, b, y), lambda z, y, s: plain.supcon(z, y)),
    "CLIP, learnable scale": Loss(
        lambda a, b, y, s: fastcl.clip_loss(a, b, s), lambda z, y, s: plain.clip(z, y) * s, True
    ),
}


class _Nothing:
    """In place of a compiled kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: None


@contextmanager
def not_launched() -> Iterator[None]:
    """Within the block, calls that are recorded leave out their launches."""
    from fastcl.kernels.common import launch

    start = mock.patch.object(launch, "start", lambda *_: _Nothing())
    with start, launch.on_architecture(90):  # the one of the other recordings, which are told apart by saying so
        yield


@contextmanager
def not_replayed() -> Iterator[None]:
    """Within the block, host code runs anew for every call, below PyTorch's dispatcher, and so does Triton's."""
    from fastcl.rowstats.triton import replay

    with mock.patch.object(replay, "MOST_ROWS", 0), mock.patch.object(registration, "is_plain", lambda *_: False):
        yield


def passes(loss: Loss, ours: bool) -> dict[str, Callable[[], Any]]:
    """The forward pass of a loss, and both passes."""
    generator = torch.Generator().manual_seed(0)
    n, d = (N // 2, D) if ours else (PLAIN // 2, 8)
    views = [torch.randn(n, d, generator=generator).requires_grad_() for _ in range(2)]
    labels, scale = torch.arange(n) % 4, torch.tensor(10.0, requires_grad=loss.learnable)
    leaves = [*views, scale] if loss.learnable else views

    def forward() -> Tensor:
        return loss.ours(*views, labels, scale) if ours else loss.plain(torch.cat(views), labels, scale)

    return {"fwd": forward, "both": lambda: torch.autograd.grad(forward(), leaves)}


def microseconds(call: Callable[[], Any], calls: int) -> float:
    """Mean time of so many calls."""
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) / calls * 1e6


def measured(rounds: int, calls: int) -> Iterator[Record]:
    """A record for every loss, provider and pass; providers take turns."""
    shared = machine(torch.device("cpu"))
    around: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "fastcl": nullcontext, "fastcl without launches": not_launched, "fastcl, every call anew": not_replayed,
        "plain PyTorch": nullcontext,
    }  # fmt: skip
    for name, loss in LOSSES.items():
        given = {provider: passes(loss, provider != "plain PyTorch") for provider in around}
        times: dict[tuple[str, str], list[float]] = {}
        for k in range(rounds + 1):
            for provider, of in given.items():
                with around[provider]():
                    for run, call in of.items():
                        found = microseconds(call, calls)
                        if k:  # the first round records the calls
                            times.setdefault((provider, run), []).append(found)
        for (provider, run), found in times.items():
            yield {
                "bench": "host", "objective": name, "provider": provider, "n": N, "d": D, "pass": run,
                "host_us": median(found), "samples_us": found, **shared,
            }  # fmt: skip


def report(records: Sequence[Record]) -> str:
    """A row for every loss: microseconds of each provider, forward and both passes."""
    providers = list(dict.fromkeys(r["provider"] for r in records))
    found = {(r["objective"], r["provider"], r["pass"]): f"{r['host_us']:.0f}" for r in records}
    head = ["loss", *(f"{provider}, {run}" for provider in providers for run in ("forward", "and backward"))]
    rows = [
        [name, *(found[name, provider, run] for provider in providers for run in ("fwd", "both"))]
        for name in dict.fromkeys(r["objective"] for r in records)
    ]
    return table(head, rows, left=1)


def main(argv: list[str] | None = None) -> int:
    """Measure and write the table; return the exit status."""
    command = Command("losses.host", _TEXTS, "tiny")
    args = command.parse(argv)
    torch.set_num_threads(1)
    with command.refusing(), no_device.compiled():
        records = list(measured(*((2, 3) if args.tiny else (ROUNDS, CALLS))))
    text = report(records)
    write(args.out, "host", records, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
