"""Every launch of the Triton renderer, recorded without a GPU for the gate to compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastcl.data.renderers.triton_launch import render
from fastcl.kernels.augment.parameters import COLUMNS
from fastcl.kernels.common.launch import Launch, on_architecture, recording

_VIEWS = 512


def cases(sm: int) -> Iterator[tuple[str, list[Launch]]]:
    """Name and launches of each case on an architecture such as 90."""
    for source, size, channels, turns, kernel in (
        (32, 32, 3, False, 3),
        (64, 64, 3, False, 3),
        (256, 224, 3, False, 23),
        (105, 28, 1, True, 3),
        (32, 32, 3, True, 3),
        (64, 64, 1, False, 3),
        (64, 64, 3, True, 3),
        (256, 224, 3, True, 23),
    ):
        images = torch.empty(2, source, source, channels, dtype=torch.uint8, device="cpu")
        table = torch.empty(_VIEWS, COLUMNS.value, dtype=torch.int32, device="cpu")
        blurred = torch.empty(_VIEWS, dtype=torch.int32, device="cpu")
        statistics = torch.empty(2, 3, dtype=torch.float32, device="cpu")
        with on_architecture(sm), recording() as launches:
            render(images, table, statistics, blurred, size, turns, kernel)
        yield f"views {size} pixels C={channels}{', turned' if turns else ''}", launches
