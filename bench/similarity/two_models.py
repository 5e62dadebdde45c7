"""Two models' losses and a comparison of their similarities: fastcl.twin_stats against the calls it replaces.

Every provider computes the decoupled loss of the first model and the negatives-only supervised loss of the second, the
two whose similarities arXiv 2510.08852 compares; all but the last also compute RSA of both models' cosines.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

import fastcl
from bench.harness.clocks import PASSES, Peak, first_line, interleave, measure_peak, timer_of
from bench.harness.records import Record, agree, milliseconds, record, shortage
from bench.losses.providers import TOLERANCES

SECTION = "twins"
TEMPERATURE = 0.5
SIZES = {"cpu": ((1024, 128), (4096, 128)), "cuda": ((2048, 128), (8192, 128), (16384, 256))}
TINY = ((32, 8),)
PRECISIONS = {"cpu": ("fp32",), "cuda": ("fp16", "fp32")}  # of fastcl's products on the device

Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]


def make_batch(n: int, d: int, device: torch.device) -> Batch:
    """Embeddings (2, n, d), a leaf, by two models of two views of n / 2 samples; sample ids (n,); labels (n,)."""
    z = torch.randn(2, n, d, generator=torch.Generator().manual_seed(0))
    z[1].mul_(0.6).add_(z[0], alpha=0.8)
    sample = torch.arange(n // 2, device=device).repeat(2)
    return z.to(device).requires_grad_(), sample, sample % max(2, min(100, n // 8))


def _loss(a: fastcl.RowStats, b: fastcl.RowStats) -> Tensor:
    return fastcl.OBJECTIVES["dcl"](a).mean() + fastcl.OBJECTIVES["nscl"](b).mean()


def _losses(precision: str, batch: Batch) -> tuple[Tensor, float | None]:
    z, sample, labels = batch
    options = {"sample": sample, "labels": labels, "temperature": TEMPERATURE, "precision": precision}
    return _loss(*(fastcl.row_stats(one, **options) for one in z)), None


def _apart(precision: str, batch: Batch) -> tuple[Tensor, float | None]:
    za, zb = batch[0].detach()
    return _losses(precision, batch)[0], fastcl.pair_stats(za, zb, "cosine").rsa


def _together(precision: str, batch: Batch) -> tuple[Tensor, float | None]:
    z, sample, labels = batch
    stats = fastcl.twin_stats(*z, sample, labels, temperature=TEMPERATURE, precision=precision)
    return _loss(stats.a, stats.b), stats.pairs().rsa


TOGETHER, APART, ALONE = "twin_stats", "row_stats twice and pair_stats", "row_stats twice"
# Each returns the loss and RSA, or None if it does not compute RSA.
PROVIDERS: dict[str, Callable[[str, Batch], tuple[Tensor, float | None]]] = {
    TOGETHER: _together,
    APART: _apart,
    ALONE: _losses,
}


def passes(provider: str, precision: str, batch: Batch) -> dict[str, Tensor]:
    """Loss, gradient and, if computed, RSA of one forward and backward pass."""
    batch[0].grad = None
    loss, rsa = PROVIDERS[provider](precision, batch)
    loss.backward()
    found = {"loss": loss.detach(), "gradient": batch[0].grad}
    return found if rsa is None else found | {"RSA": loss.new_tensor(rsa)}


def _forward(provider: str, precision: str, batch: Batch) -> Tensor:
    return PROVIDERS[provider](precision, batch)[0]


def memory_case(device: str, name: str, precision: str, n: int, d: int) -> tuple[Callable[[], object], ...]:
    """Warm-up and call for `measure_peak`: one forward and backward pass."""
    batches = [make_batch(rows, d, torch.device(device)) for rows in (8, n)]
    return tuple(partial(passes, name, precision, batch) for batch in batches)


def _peak_of(name: str, precision: str, batch: Batch) -> Peak:
    if batch[0].device.type == "cpu":
        return measure_peak(memory_case, "cpu", name, precision, *batch[0].shape[1:])
    call = partial(passes, name, precision, batch)

    def warm_up() -> None:
        call()
        batch[0].grad = None  # not part of the memory before the call

    return measure_peak(lambda device: (warm_up, call), "cuda")


def run(args: argparse.Namespace, device: torch.device, facts: Record) -> tuple[list[Record], list[str]]:
    """Measure all sizes and print a line for each; return the records and the messages of failures."""
    found, failed = [], []
    for n, d in TINY if args.tiny else SIZES[device.type]:
        batch = make_batch(n, d, device)
        for precision in PRECISIONS[device.type]:
            made, problems = _case(batch, precision, args, facts)
            found += made
            failed += [f"twins, n={n}, d={d}: {problem}" for problem in problems]
    return found, failed


def _case(batch: Batch, precision: str, args: argparse.Namespace, facts: Record) -> tuple[list[Record], list[str]]:
    z, n, d = batch[0], *batch[0].shape[1:]
    case = {"section": SECTION, "n": n, "d": d, "models": 2, "dtype": "float32", "precision": precision}
    found, failed, peaks, timed = [], [], {}, {}
    truth = passes(APART, precision, (z.detach().double().requires_grad_(), *batch[1:]))
    for name in PROVIDERS:
        try:
            peak, result = _peak_of(name, precision, batch), passes(name, precision, batch)
            agree({"float64": {what: truth[what] for what in result}, name: result}, TOLERANCES[precision])
            peaks[name], timed[name] = peak, timer_of(partial(_forward, name, precision, batch), z, False)
        except Exception as problem:  # go on with the other providers
            reason = shortage(problem) or f"failed: {first_line(problem)}"
            failed.append(f"{name}: {reason}")
            found.append(record("similarity", name, case, facts, reason=reason))
    timers = {name: timer for name, (timer, _) in timed.items()}
    rounds = interleave(timers, args.repeats, args.seconds) if timers else {}
    for name, samples in rounds.items():
        for which in PASSES:
            used = peaks[name].bytes if which == "both" else None
            arguments = case, facts, which, samples[which], None, used, None, timed[name][1]
            found.append(record("similarity", name, *arguments))
        print(f"twins, n = {n:,}, d = {d}, {precision}: {name}: {milliseconds(found[-1]['samples_ms'])} ms", flush=True)
    return found, failed
