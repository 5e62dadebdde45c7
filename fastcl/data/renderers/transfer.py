"""Copies of host tensors to the device that never wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's memory on a device. To a GPU from pinned memory, which PyTorch keeps until the copy is
    done: CUDA may wait for the work before a copy from other memory."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
