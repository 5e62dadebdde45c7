"""Whole losses, recorded without a GPU: the launches of a forward and of a backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastcl.kernels.common.launch import Launch, on_architecture, recording
from fastcl.losses.objectives import OBJECTIVES
from fastcl.rowstats.request import Batch
from fastcl.rowstats.triton import hopper
from fastcl.rowstats.triton.operator import fused
from fastcl.rowstats.triton.working_order import COUNTED

LOSSES = ("ntxent", "nscl", "supcon", "clip")
PRECISIONS = ("fp16", "fp32")
WIDTHS = (64, 128, 256, 512, 1024)
BETWEEN = (192, 320)  # no powers of two: one side and two, with many rows
ROWS = (4096, 65536)
CLASSES = 10  # of equal size, in the labelled losses
TEMPERATURE = 0.5
_SORT = 10  # kernels of PyTorch that sort the labels of many rows: an estimate


@dataclass(frozen=True)
class Loss:
    """A loss of n float32 rows of d columns: two views of n / 2 samples, or for "clip" two towers of n / 2 rows.

    by_hand: with the kernels for sm_90 that are off by default.
    """

    objective: str
    n: int
    d: int
    precision: str
    by_hand: bool = False

    @property
    def rows(self) -> int:
        """Rows of one side."""
        return self.n // 2 if self.objective == "clip" else self.n

    @property
    def labelled(self) -> bool:
        """Whether it takes labels."""
        return self.objective in ("nscl", "supcon")

    @property
    def classes(self) -> int:
        """Classes of rows of one side; without labels every sample is one."""
        return CLASSES if self.labelled else self.n // 2

    @property
    def name(self) -> str:
        """As the tables show it."""
        return f"{self.objective} {self.precision} n={self.n:,} d={self.d}{', by hand' if self.by_hand else ''}"


@dataclass(frozen=True)
class Call:
    """What a loss launches."""

    forward: list[Launch]
    backward: list[Launch]
    torch: tuple[int, int]  # kernels of PyTorch in an eager call besides ours: forward, backward


def losses(sm: int = 90) -> Iterator[Loss]:
    """All losses of the tables of an architecture."""
    for objective in LOSSES:
        for precision in PRECISIONS:
            for d in WIDTHS:
                for n in ROWS:
                    yield Loss(objective, n, d, precision)
    for objective, precision, d in itertools.product(("ntxent", "clip"), PRECISIONS, BETWEEN):
        yield Loss(objective, max(ROWS), d, precision)
    for d in (*hopper.WIDTHS, 512, 1024) if sm == 90 else ():
        yield from (Loss("ntxent", n, d, "fp16", by_hand=True) for n in ROWS)


def record(loss: Loss, sm: int) -> Call:
    """The launches of a loss on an architecture such as 90. Memory is reserved for it, but hardly any is touched."""
    x, y = (torch.empty(loss.n // 2, loss.d, requires_grad=True, device="cpu") for _ in range(2))
    two_towers = loss.objective == "clip"
    labels = torch.arange(loss.n // 2, device="cpu") % CLASSES if loss.labelled else None
    batch = Batch.pairs(x, y) if two_towers else Batch.two_views(x, y, labels)
    code = OBJECTIVES["ntxent" if two_towers else loss.objective].code
    with on_architecture(sm), hopper.using(loss.by_hand), recording() as launches:
        value = fused(batch, TEMPERATURE, True, two_towers, loss.precision, [code], "mean")[2]
        forward = list(launches)
        torch.autograd.grad(value, (x, y))
    return Call(forward, launches[len(forward) :], (_SORT if loss.labelled and loss.n > COUNTED else 0, 1))
