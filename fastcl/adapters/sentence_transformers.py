"""sentence-transformers' losses with in-batch negatives (6), which has to be installed: subclasses of its own.

The cached losses still embed in mini-batches and keep gradients instead of activations; what was chunked is computed on
row statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor

from fastcl.adapters.in_batch import in_batch_loss
from fastcl.adapters.payoff import pays
from fastcl.adapters.shared import tell_once, world_size

# The symmetric losses of the library are this; to subclass them would tell of their deprecation on import.
_SYMMETRIC: dict[str, Any] = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def computed(loss: Any, embeddings: Sequence[Tensor]) -> Tensor | None:
    """The loss by the options of a loss of sentence-transformers; None if row statistics are not enough, said once, or
    do not pay."""
    several = loss.partition_mode == "joint" and len(loss.directions) > 1
    if several and not pays("several directions", embeddings[0]):
        return None
    reason = None
    if loss.similarity_fct not in (cos_sim, dot_score):
        reason = "similarity_fct"
    elif loss.hardness_mode is not None and loss.hardness_strength > 0:
        reason = f"hardness_mode={loss.hardness_mode!r}"
    elif len({one.shape for one in embeddings}) > 1:
        reason = "embeddings of several shapes"
    if reason is not None:
        name = type(loss).__name__
        tell_once(f"{name} with {reason} is computed by sentence_transformers itself, with whole matrices")
        return None
    return in_batch_loss(
        embeddings, loss.scale, loss.directions, loss.partition_mode, loss.similarity_fct is cos_sim,
        loss.gather_across_devices and world_size() > 1,
    )  # fmt: skip


def computed_cached(loss: Any, reps: Sequence[Sequence[Tensor]], with_backward: bool) -> Tensor | None:
    """The same of the embeddings of all mini-batches; with_backward: and its gradient, at once."""
    found = computed(loss, [torch.cat(list(parts)) for parts in reps])
    if found is None or not with_backward:
        return found
    found.backward()
    return found.detach()


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """sentence_transformers' MultipleNegativesRankingLoss."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Loss of queries, their documents and further negatives, (B, D) each."""
        found = computed(self, embeddings)
        return super().compute_loss_from_embeddings(embeddings, labels) if found is None else found


class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss):
    """sentence_transformers' MultipleNegativesSymmetricRankingLoss: both directions, each with its own denominator."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, **_SYMMETRIC)


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """sentence_transformers' CachedMultipleNegativesRankingLoss."""

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Loss of the embeddings of all mini-batches; with_backward: and its gradient, at once."""
        found = computed_cached(self, reps, with_backward)
        return super().calculate_loss(reps, labels, with_backward=with_backward) if found is None else found


class CachedMultipleNegativesSymmetricRankingLoss(CachedMultipleNegativesRankingLoss):
    """sentence_transformers' CachedMultipleNegativesSymmetricRankingLoss."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, **_SYMMETRIC)
