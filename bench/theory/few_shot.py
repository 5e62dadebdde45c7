"""The few-shot bound on random point clouds, whose population is the points themselves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcl.metrics import cdnv, directional_cdnv
from fastcl.theory import few_shot_bound

TRIALS = 40  # draws of classes and shots


def few_shot(seed: int) -> Iterator[tuple[str, float, float, float]]:
    """(name, bound, measured error, error of a guess) of both versions of the proposition."""
    numbers = torch.Generator().manual_seed(seed)

    def one_of(*values: int) -> int:
        return values[int(torch.randint(len(values), (1,), generator=numbers))]

    classes, points, width, shots = one_of(2, 3, 5, 8), one_of(8, 32), one_of(1, 2, 8, 32), one_of(10, 30, 100, 1000)
    ways = one_of(*range(2, classes + 1))
    spread = 10 ** (2 * torch.rand(1, generator=numbers, dtype=torch.float64).item() - 2)
    cloud = torch.randn(classes, points, width, generator=numbers, dtype=torch.float64)
    cloud = cloud ** one_of(1, 3) * spread  # normal, or with heavy tails
    cloud += torch.randn(classes, 1, width, generator=numbers, dtype=torch.float64)
    labels = torch.arange(classes).repeat_interleave(points)
    rows = cloud.flatten(0, 1)
    bound = few_shot_bound(cdnv(rows, labels), directional_cdnv(rows, labels), shots, ways)
    error = nearest_centre_error(cloud, shots, ways, numbers)
    yield "few-shot error, best a", bound.error, error, bound.chance
    yield "few-shot error, a = 16", bound.printed, error, bound.chance


def nearest_centre_error(cloud: Tensor, shots: int, ways: int, numbers: torch.Generator) -> float:
    """Mean error of the nearest class centre over TRIALS draws of some classes and, with replacement, of shots.

    Args:
        cloud: (C, n, d) points of each class; all n of the drawn classes are queries.
    """
    wrong = 0.0
    for _ in range(TRIALS):
        chosen = cloud[torch.randperm(len(cloud), generator=numbers)[:ways]]
        picks = torch.randint(chosen.shape[1], (ways, shots), generator=numbers)
        centres = torch.stack([points[pick].mean(dim=0) for points, pick in zip(chosen, picks, strict=True)])
        nearest = torch.cdist(chosen, centres[None].expand(ways, -1, -1)).argmin(dim=2)
        wrong += (nearest != torch.arange(ways)[:, None]).double().mean().item()
    return wrong / TRIALS
