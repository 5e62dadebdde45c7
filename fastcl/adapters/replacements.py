"""What computes in place of other libraries' methods and functions, with their arguments, inside `fastcl.patch`.

The adapters do, and the functions here where an adapter is not enough. NotImplemented: the original has to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl.adapters import info_nce, lightly, open_clip, solo_learn, stable_pretraining, vissl
from fastcl.adapters.payoff import worthwhile
from fastcl.adapters.shared import world_size
from fastcl.losses.queue import queue_loss
from fastcl.rowstats.api import normalize_rows


def if_worthwhile(kind: str, ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` where a loss of this kind is worthwhile for the first matrix of a call."""

    def called(*args: Any, **options: Any) -> Any:
        rows = next((v for v in (*args, *options.values()) if isinstance(v, Tensor) and v.ndim == 2), None)
        return NotImplemented if rows is None or not worthwhile(kind, rows) else ours(*args, **options)

    return called


def if_alone(ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` where there is one rank."""
    return lambda *args, **options: ours(*args, **options) if world_size() == 1 else NotImplemented


def lightly_ntxent(self: Any, out0: Tensor, out1: Tensor) -> Any:
    """lightly's NTXentLoss, with the memory bank that it has."""
    if self.memory_bank.size[0] == 0:
        return lightly.NTXentLoss.forward(self, out0, out1) if worthwhile("two views", out0) else NotImplemented
    if not worthwhile("queue", out0) or out0.ndim != 2 or out0.shape != out1.shape:
        return NotImplemented
    u0, u1 = normalize_rows(out0), normalize_rows(out1)
    u1, bank = self.memory_bank(u1, update=out0.requires_grad)
    u0 = u0 if self.temperature > 0 else -u0
    return queue_loss(u0, u1, bank.T.to(u0.device), abs(self.temperature), normalize=False)


def openclip_clip(self: Any, image_features: Tensor, text_features: Tensor, *args: Any, **options: Any) -> Any:
    """open_clip's ClipLoss."""
    if self.use_horovod or not worthwhile("two directions", image_features):
        return NotImplemented
    return open_clip.ClipLoss.forward(self, image_features, text_features, *args, **options)


def infonce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, *args: Any, **options: Any
) -> Any:
    """info_nce."""
    if not worthwhile("one direction" if negative_keys is None else "queue", query):
        return NotImplemented
    return info_nce.info_nce(query, positive_key, negative_keys, *args, **options)


def metric_learning(name: str, kind: str) -> Callable[..., Any]:
    """A loss of pytorch-metric-learning."""

    def ours(self: Any, embeddings: Tensor, *args: Any) -> Any:
        from fastcl.adapters import metric_learning  # which needs the library

        if not worthwhile(kind, embeddings[::2]):
            return NotImplemented
        found = metric_learning.computed(self, getattr(metric_learning, name).rows, embeddings, *args)
        return NotImplemented if found is None else found

    return ours


def solo_views(z1: Tensor, z2: Tensor, temperature: float = 0.1, extra_pos_mask: Tensor | None = None) -> Any:
    """solo-learn's SimCLR of two views; with a mask, which has all pairs, nothing was measured."""
    if extra_pos_mask is not None or z2.ndim != 2 or not worthwhile("two views", z1):
        return NotImplemented
    return solo_learn.simclr_loss_func(z1, z2, temperature)


def solo_indexes(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Any:
    """solo-learn's SimCLR of views with indexes."""
    if indexes.ndim != 1 or not worthwhile("two views", z[::2]):
        return NotImplemented
    return solo_learn.simclr_loss_func(z, indexes, temperature)


def solo_nnclr(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Any:
    """solo-learn's NNCLR."""
    if nn.shape != p.shape or not worthwhile("one direction", nn):
        return NotImplemented
    return solo_learn.nnclr_loss_func(nn, p, temperature)


def stable_infonce(
    self: Any, anchors: Tensor, candidates: Tensor, targets: Tensor, mask: Tensor | None = None,
    logit_scale: float | Tensor | None = None,
) -> Any:  # fmt: skip
    """stable-pretraining's InfoNCELoss; with a mask the adapter would call it again."""
    if mask is not None or not worthwhile("one direction", anchors):
        return NotImplemented
    return stable_pretraining.InfoNCELoss.forward(self, anchors, candidates, targets, None, logit_scale)


def vissl_simclr(self: Any, embedding: Tensor) -> Any:
    """vissl's SimclrInfoNCECriterion."""
    if self.num_pos != 2 or not worthwhile("two views", embedding[::2]):
        return NotImplemented
    return vissl.SimclrInfoNCECriterion.forward(self, embedding)


def ranking(self: Any, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Any:  # noqa: ARG001
    """sentence-transformers' MultipleNegativesRankingLoss."""
    from fastcl.adapters import sentence_transformers  # which needs the library

    if not embeddings or not worthwhile("in batch", embeddings[0]):
        return NotImplemented
    found = sentence_transformers.computed(self, embeddings)
    return NotImplemented if found is None else found


def cached_ranking(
    self: Any,
    reps: Sequence[Sequence[Tensor]],
    labels: Tensor | None = None,  # noqa: ARG001
    *,
    with_backward: bool = False,
) -> Any:
    """sentence-transformers' CachedMultipleNegativesRankingLoss."""
    from fastcl.adapters import sentence_transformers

    if not reps or not worthwhile("in batch", torch.cat(list(reps[0]))):
        return NotImplemented
    found = sentence_transformers.computed_cached(self, reps, with_backward)
    return NotImplemented if found is None else found
