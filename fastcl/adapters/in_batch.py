"""Ranking with the negatives of the batch, as sentence-transformers has it, in four directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastcl.adapters.shared import one_way
from fastcl.rowstats.api import row_stats


def in_batch_loss(
    embeddings: Sequence[Tensor],
    scale: float,
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    normalize: bool = True,
    gathers: bool = False,
) -> Tensor:
    """Mean loss of the queries: document k is the positive of query k, everything else its negatives.

    Args:
        embeddings: queries (B, D), their documents (B, D) and any number of further (B, D) with negatives.
        scale: factor on the logits, positive.
        directions: what stands in the denominator: "query_to_doc" (a query against all documents), "doc_to_query" (its
            document against all queries), "query_to_query", "doc_to_doc" (without the documents of the query itself).
        partition_mode: "joint", one denominator, or "per_direction", the mean of one loss each of the first two.
        normalize: cosine similarities.
        gathers: the queries and documents of all ranks.

    Raises:
        ValueError: fewer than two embeddings; otherwise FastclError, as `fastcl.row_stats`.
    """
    if len(embeddings) < 2:
        raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
    queries, positives, *_ = embeddings
    batch, sets = len(queries), len(embeddings) - 1
    if partition_mode == "per_direction" or len(directions) == 1:
        sides = [(queries, torch.cat(list(embeddings[1:])))] + [(positives, queries)] * ("doc_to_query" in directions)
        losses = [one_way(*side, 0, 1 / scale, normalize, gathers=gathers) for side in sides]
        return torch.stack(losses).mean()
    ids = torch.arange(batch, dtype=torch.int64, device=queries.device)
    all_documents = torch.cat(list(embeddings[1:]))
    # Without views, the ids of negatives are new ones.
    strangers = torch.arange(batch, batch * sets, dtype=torch.int64, device=queries.device)
    options = {"temperature": 1 / scale, "normalize": normalize, "gather_distributed": gathers}
    forward = row_stats(queries, all_documents, sample=ids, sample_y=torch.cat([ids, strangers]), **options)
    rest = {"query_to_doc": forward.lse_other}
    if "doc_to_query" in directions:
        back = row_stats(positives, queries, sample=ids, sample_y=ids, **options)
        rest["doc_to_query"] = back.lse_other
    if "doc_to_query" in rest:  # the positive once more
        rest["positive"] = forward.mean_view
    if "query_to_query" in directions:
        rest["query_to_query"] = row_stats(queries, sample=ids, **options).lse_other
    if "doc_to_doc" in directions:
        own = ids.repeat(sets)
        rest["doc_to_doc"] = row_stats(positives, all_documents, sample=ids, sample_y=own, **options).lse_other
    terms = torch.stack(list(rest.values()))
    empty = (terms == -torch.inf).all(0)
    lse = terms.masked_fill(empty, 0).logsumexp(0).masked_fill(empty, -torch.inf)
    return -logsigmoid(forward.mean_view - lse).mean()
