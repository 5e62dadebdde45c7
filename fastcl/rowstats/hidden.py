"""Results of a forward pass that no caller sees, because they are only saved for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a contiguous tensor lies in memory."""

    offset: int  # in bytes, as `size`
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, memory: Tensor) -> Tensor:
        """The tensor."""
        return memory[self.offset : self.offset + self.size].view(self.dtype).view(self.shape)


class Layout:
    """Where a recording puts its hidden results; no other recording's layout equals it.

    Args:
        places: None for a result that is None.
    """

    def __init__(self, places: Sequence[Place | None]) -> None:
        self.places = tuple(places)


class Hidden(NamedTuple):
    """All hidden results of a replay: one allocation in place of many, and tensors only where somebody asks."""

    memory: Tensor  # (bytes,) uint8
    layout: Layout

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The results."""
        return tuple(None if place is None else place.tensor(self.memory) for place in self.layout.places)


Kept: TypeAlias = Hidden | Sequence[Tensor | None]
