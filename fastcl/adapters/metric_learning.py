"""pytorch-metric-learning's NTXentLoss and SupConLoss (pytorch_metric_learning.losses, 2.9), which has to be installed.

They are subclasses under the same names, since wrappers of the library ask for both. Its reducers, regularizers and
wrappers work on their losses as on the originals'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from fastcl.adapters.payoff import pays
from fastcl.adapters.shared import class_ids, supcon_rows, tell_once
from fastcl.rowstats.api import RowStats, row_stats, scaled

PAIRS = 1 << 14  # positive pairs whose rows are held at a time


class Sides(NamedTuple):
    """Anchors, references and their classes; itself: the references are the anchors."""

    x: Tensor
    y: Tensor
    ids: Tensor
    ids_y: Tensor
    itself: bool


class _OnRowStats:
    """What both losses have in common: the statistics where they are enough and pay, otherwise the original."""

    temperature: float
    distance: Any
    kind: str  # as in `payoff.FEWEST`

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor | None
    ) -> dict[str, Any]:
        """The losses for the reducer, as the original; called by the library."""
        found = None
        rows = max(embeddings, ref_emb, key=len)
        if pays(self.kind, rows[::2]):  # of two views, as they were measured
            found = computed(self, type(self).rows, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if found is None:
            compute: Any = super().compute_loss  # pyright: ignore[reportAttributeAccessIssue]
            return compute(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        return found

    def rows(self, stats: RowStats, sides: Sides, /) -> dict[str, Any]:
        """Losses, their indices and their kind, for a reducer."""
        raise NotImplementedError


def computed(
    loss: Any, rows: Callable[[Any, RowStats, Sides], dict[str, Any]], embeddings: Tensor, labels: Tensor | None,
    indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor | None,
) -> dict[str, Any] | None:  # fmt: skip
    """The losses of a loss of pytorch-metric-learning; None, said once, if row statistics are not enough."""
    reason = _obstacle(loss, indices_tuple)
    if reason is None and ref_labels is labels and ref_emb is not embeddings:  # no reference i for anchor i
        reason = "ref_labels that are the same tensor as labels"
    if reason is not None or labels is None or ref_labels is None:
        if reason is not None:
            name = type(loss).__name__
            tell_once(f"{name} with {reason} is computed by pytorch_metric_learning itself, with whole matrices")
        return None
    itself = ref_labels is labels
    ids, ids_y = class_ids(torch.cat([labels, ref_labels])).split([len(labels), len(ref_labels)])
    sample = torch.arange(len(ids) + len(ids_y), dtype=torch.int64, device=embeddings.device)
    other = {} if itself else {"y": ref_emb.to(embeddings.dtype), "sample_y": sample[len(ids) :], "labels_y": ids_y}
    stats = row_stats(
        embeddings, sample=sample[: len(ids)], labels=ids, temperature=loss.temperature, **other,
        normalize=loss.distance.normalize_embeddings, gather_distributed=False,
    )  # fmt: skip
    pairs = max(int(stats.n_peer.sum()), int(stats.n_other.sum()))
    if pairs <= 1 or not stats.n_peer.any() or not stats.n_other.any():
        return loss.zero_losses()
    return {"loss": rows(loss, stats, Sides(embeddings, ref_emb, ids, ids_y, itself))}


def _obstacle(loss: Any, indices_tuple: Any) -> str | None:
    """Why row statistics are not enough, or None."""
    distance = loss.distance
    if indices_tuple is not None:
        return "indices_tuple"
    plain = type(distance) in (CosineSimilarity, DotProductSimilarity) and (distance.p, distance.power) == (2, 1)
    return None if plain and not distance.collect_stats else f"distance={type(distance).__name__}"


class SupConLoss(_OnRowStats, losses.SupConLoss):
    """pytorch_metric_learning.losses.SupConLoss: L_out of each anchor; its reducer drops those of 0."""

    kind = "peers"

    def rows(self, stats: RowStats, _: Sides, /) -> dict[str, Any]:
        """The losses of anchors."""
        found = supcon_rows(stats)
        indices = torch.arange(len(found), dtype=torch.int64, device=found.device)
        return {"losses": found, "indices": indices, "reduction_type": "element"}


class NTXentLoss(_OnRowStats, losses.NTXentLoss):
    """pytorch_metric_learning.losses.NTXentLoss: a loss for each positive pair, alone with the negatives in its
    denominator. The logits of pairs are computed in slices, never the whole matrix."""

    kind = "classes"

    def rows(self, stats: RowStats, sides: Sides, /) -> dict[str, Any]:
        """The losses of positive pairs."""
        normalize = self.distance.normalize_embeddings
        x, y = (scaled(v, self.temperature, normalize) for v in (sides.x, sides.y))
        a, p = _positive_pairs(sides.ids, sides.ids_y, sides.itself)
        parts = zip(a.split(PAIRS), p.split(PAIRS), strict=True)
        logits = [checkpoint(_logits, x, y, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        found = -logsigmoid(torch.cat(logits) - stats.lse_other[a])
        return {"losses": found, "indices": (a, p), "reduction_type": "pos_pair"}


def _logits(x: Tensor, y: Tensor, a: Tensor, p: Tensor) -> Tensor:
    return (x[a] * y[p]).sum(1)


def _positive_pairs(ids: Tensor, ids_y: Tensor, itself: bool) -> tuple[Tensor, Tensor]:
    """(P,) anchors and their positives, anchor by anchor, positives in their order; itself: no row with itself."""
    ordered, order = ids_y.sort(stable=True)
    first = torch.searchsorted(ordered, ids)
    count = torch.searchsorted(ordered, ids, right=True) - first
    a = torch.arange(len(ids), dtype=torch.int64, device=ids.device).repeat_interleave(count)
    place = torch.arange(len(a), dtype=torch.int64, device=ids.device) - (count.cumsum(0) - count)[a]
    p = order[first[a] + place]
    kept = a != p if itself else torch.ones_like(a, dtype=torch.bool)
    return a[kept], p[kept]
