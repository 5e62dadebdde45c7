"""info-nce-pytorch's InfoNCE (info_nce, 0.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fastcl.adapters.shared import one_way
from fastcl.choices import REDUCTIONS, Reduction
from fastcl.errors import FastclError, one_of
from fastcl.losses.queue import queue_loss
from fastcl.rowstats.api import normalize_rows


class InfoNCE(nn.Module):
    """info_nce.InfoNCE: `info_nce` as a module."""

    def __init__(
        self, temperature: float = 0.1, reduction: Reduction = "mean", negative_mode: str = "unpaired"
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction: Reduction = reduction
        self.negative_mode = negative_mode

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        """A scalar, or (N,) with reduction "none"; arguments as `info_nce`."""
        return info_nce(query, positive_key, negative_keys, self.temperature, self.reduction, self.negative_mode)


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float = 0.1,
    reduction: Reduction = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """InfoNCE of queries (N, D) against their keys (N, D) and negatives; all get a gradient.

    Args:
        negative_keys: (M, D) negatives of all queries, or with negative_mode "paired" (N, M, D), those of each query.
            None: the negatives of a query are the keys of the others.

    Returns:
        A scalar, or (N,) with reduction "none".

    Raises:
        ValueError: numbers of dimensions, rows or columns that do not fit together, an unknown mode or reduction.
    """
    if negative_mode not in ("paired", "unpaired"):
        raise ValueError(f"<negative_mode> must be 'paired' or 'unpaired', got {negative_mode!r}")
    if negative_keys is not None or query.ndim != 2 or query.shape != positive_key.shape:
        _check(query, positive_key, negative_keys, negative_mode)
    if negative_keys is None:
        return one_way(query, positive_key, 0, temperature, reduction=reduction)
    if negative_mode == "unpaired":
        return queue_loss(query, positive_key, negative_keys, temperature, reduction)
    if reduction not in REDUCTIONS:
        raise FastclError(one_of("reduction", REDUCTIONS, reduction))
    with torch.autocast(query.device.type, enabled=False):
        negatives = normalize_rows(negative_keys.flatten(0, 1)).view(negative_keys.shape)
        queries = normalize_rows(query) / temperature
        positive = (queries * normalize_rows(positive_key)).sum(1)
        losses = -logsigmoid(positive - torch.einsum("nd,nmd->nm", queries, negatives).logsumexp(1))
    return losses if reduction == "none" else getattr(losses, reduction)()


def _check(query: Tensor, positive_key: Tensor, negative_keys: Tensor | None, negative_mode: str) -> None:
    wanted = {"query": 2, "positive_key": 2, "negative_keys": 3 if negative_mode == "paired" else 2}
    for (name, ndim), rows in zip(wanted.items(), (query, positive_key, negative_keys), strict=True):
        if rows is None:
            continue
        if rows.ndim != ndim:
            raise ValueError(f"<{name}> must have {ndim} dimensions, got {tuple(rows.shape)}")
        if rows.shape[-1] != query.shape[-1]:
            raise ValueError(f"<query> and <{name}> must have as many components, got {query.shape}, {rows.shape}")
        if (name == "positive_key" or ndim == 3) and len(rows) != len(query):
            raise ValueError(
                f"<query> and <{name}> must have the same number of samples, got {len(query)}, {len(rows)}"
            )
