"""Peak memory of one step of one model: a whole batch at once, in parts, and one part alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastcl
from bench.harness.clocks import measure_peak
from bench.harness.records import Record
from fastcl.config.settings import ModelConfig
from fastcl.train.network import build_network

PARTS = 16
WARM_UP = 4  # samples, few enough to stay below every measured peak


def measure(model: ModelConfig, size: int, batch: int, parts: int, device: torch.device) -> Record:
    """Peak memory and duration of the forward and backward passes of NT-Xent on noise.

    Args:
        model: the network.
        size: side of the images in pixels.
        batch: samples, two views of each.
        parts: number of parts that are embedded one at a time; 1: the whole batch at once.

    Returns:
        peak_bytes: beyond the weights and the images. seconds: of the first step.
    """
    peak = measure_peak(_prepare, device.type, model, size, batch, parts)
    return {"peak_bytes": peak.bytes, "seconds": peak.seconds}


def _prepare(
    device: str, model: ModelConfig, size: int, batch: int, parts: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    torch.set_num_threads(1)  # the buffers of more threads would count too
    network = build_network(model, 3, size, 0).to(device).train()
    views = torch.randn(2, batch, 3, size, size, device=device)
    network(views[0, :WARM_UP]).sum().backward()  # gradients are there before the measured step

    def step(views: torch.Tensor, parts: int) -> None:
        if parts == 1:
            fastcl.ntxent_loss(*network(views.flatten(0, 1)).chunk(2)).backward()
        else:
            pairs = [pair.flatten(0, 1) for pair in views.chunk(parts, dim=1)]
            fastcl.micro_step(lambda x: network(x).chunk(2), pairs, fastcl.ntxent_loss, network=network)

    return lambda: step(views[:, :WARM_UP], min(parts, 2)), lambda: step(views, parts)
