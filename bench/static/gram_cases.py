"""Every launch of pair statistics, recorded without a GPU for the gate to compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastcl.kernels.common.launch import Launch, on_architecture, recording
from fastcl.similarity.sums import triton as gram

_ROWS = 4096


def cases(sm: int) -> Iterator[tuple[str, Iterator[Launch]]]:
    """Name and launches of each case on an architecture such as 90; they are recorded when they are asked for."""
    for kernel, dtype in (("linear", torch.bfloat16), ("cosine", torch.float32), ("correlation", torch.float16)):
        yield f"moments {kernel} d=512, 128", _moments(sm, kernel, dtype)
    for width in (64, 128, 2048):
        yield f"tiles d={width}", _tiles(sm, width)


def _moments(sm: int, kernel: str, dtype: torch.dtype) -> Iterator[Launch]:
    x, y = (torch.empty(_ROWS, width, dtype=dtype, device="cpu") for width in (512, 128))
    with on_architecture(sm), recording() as launches:
        gram.StackedMoments(kernel, [v[0].double() for v in (x, y)]).add((x, y))
    yield from launches


def _tiles(sm: int, width: int) -> Iterator[Launch]:
    x, y = torch.empty(2, _ROWS, width, dtype=torch.float32, device="cpu")
    with on_architecture(sm), recording() as launches:
        gram.inner_sums(x, y, "linear")
        for shift in (0.0, 1.0):
            gram.rbf_sums(x, y, (1.0, 1.0), shift)
    yield from launches
