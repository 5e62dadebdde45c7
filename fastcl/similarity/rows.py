"""The row maps f of the kernels: K_ij = <f(x_i), f(x_j)>; for "rbf" K_ij is a function of the distance |x_i - x_j|.

| kernel        | f(x)                          | K is                                                   |
| ------------- | ----------------------------- | ------------------------------------------------------ |
| "linear"      | x                             | XX', as in the code published with arXiv 2510.08852     |
| "cosine"      | x / |x|                       | cosines: Sigma of the paper; RSA's 1 - RDM              |
| "correlation" | (x - mean(x)) / |x - mean(x)| | Pearson correlations: the other usual RDM of RSA        |
| "rbf"         | x                             | exp(-|x_i - x_j|^2 / (2 sigma^2)), Kornblith et al. 2019 |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Kernel: TypeAlias = Literal["linear", "cosine", "correlation", "rbf"]
INNER = ("linear", "cosine", "correlation")  # kernels that are inner products of rows: they can be streamed

# A row whose entries agree up to this fraction of the largest is constant: what its mean leaves is rounding.
_CONSTANT = 64 * torch.finfo(torch.float64).eps


def unit_rows(x: Tensor) -> Tensor:
    """(n, d) float64 rows divided by their lengths; a zero row has no direction and stays zero. Safe at any scale."""
    largest = x.abs().amax(dim=1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1.0)


def standard_rows(x: Tensor) -> Tensor:
    """(n, d) float64 rows less their own mean, divided by their lengths; a constant row becomes zero."""
    largest = x.abs().amax(dim=1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)
    x = x - x.mean(dim=1, keepdim=True)
    constant = x.abs().amax(dim=1, keepdim=True) <= _CONSTANT
    return unit_rows(x.masked_fill(constant, 0.0))


def mapped(x: Tensor, kernel: str) -> Tensor:
    """(n, d) float64 rows f(x) of features of any floating dtype.

    Always in memory of its own: equal values take equal arithmetic only from buffers of equal layout and alignment.
    """
    return ROWS[kernel](x.to(torch.float64, copy=True, memory_format=torch.contiguous_format))


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x, "cosine": unit_rows, "correlation": standard_rows, "rbf": lambda x: x
}  # fmt: skip
