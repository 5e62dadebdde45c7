"""A queue of negatives apart from the positives: MoCo's loss, and InfoNCE with explicit negatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastcl.checks import check_positive, check_precision, check_rows, describe
from fastcl.choices import REDUCTIONS, Precision, Reduction
from fastcl.dispatch import choose
from fastcl.errors import FastclError, one_of
from fastcl.rowstats.api import prepared
from fastcl.rowstats.log_sums import column_slices, log_sums
from fastcl.rowstats.small import one_pass, route


def queue_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float | Tensor = 0.07,
    reduction: Reduction = "mean",
    normalize: bool = True,
    precision: Precision | None = None,
) -> Tensor:
    """InfoNCE with a queue of negatives (MoCo, He et al. 2020): each query against its own key and the whole queue.

    With positive logit p_i = <query_i, key_i> / temperature the loss of a query is
    log(exp(p_i) + sum_j exp(<query_i, queue_j> / temperature)) - p_i. The other keys of the batch are no negatives.
    There is no N x K matrix on the chunked and Triton backends, except on a CPU, up to 16 MiB in float32, for a queue
    that gets a gradient. The chunked backend reads a queue in half precision as it is; the Triton backend makes a
    working copy in the precision of its products.

    Args:
        query: (N, D) float16, bfloat16, float32 or float64.
        key: (N, D), row k the positive of query k. Detach it if keys get no gradient, as in MoCo.
        queue: (K, D) negatives. The dtypes of the three may differ: computed in float32, in float64 if one is float64.
            It gets a gradient only if it requires one. Overwrite it after `backward`, or pass a clone.
        temperature: positive number, or a tensor with one element, which then gets a gradient.
        reduction: "mean" over the queries, "sum", or "none" for the (N,) losses.
        normalize: divide all rows, those of the queue too, by their norms first.
        precision: of the Triton backend's products, as `fastcl.row_stats`.

    Returns:
        A scalar, or (N,) with reduction "none"; float32, or float64.

    Raises:
        FastclError: wrong rank, shape, dtype or device, an empty batch or queue, a temperature that is not positive and
            finite, an unknown reduction or precision.
    """
    for name, rows in (("query", query), ("key", key), ("queue", queue)):
        check_rows(rows, name)
        if (rows.shape[1], rows.device) != (query.shape[1], query.device):
            raise FastclError(
                f"query, key and queue must have the same width and device, got {describe(query)} for query and "
                f"{describe(rows)} for {name}"
            )
    if len(key) != len(query):
        raise FastclError(f"query and key must have the same number of rows, got {len(query)} and {len(key)}")
    if reduction not in REDUCTIONS:
        raise FastclError(one_of("reduction", REDUCTIONS, reduction))
    check_positive(temperature, "temperature")
    check_precision(precision)
    chosen = choose(query, queue)
    if chosen == "chunked" and all(map(route.supports, (query, key, queue))) and route.untransformed():
        tiles = column_slices(query, queue)
        found = one_pass.queue_loss(query, key, queue, temperature, normalize, reduction, tiles)
        if found is not None:
            return found
    if torch.float64 in (query.dtype, key.dtype, queue.dtype):
        query, key = query.double(), key.double()
    lse, anchors = log_sums(query, queue, temperature, normalize, precision, chosen)
    positive = (anchors * prepared(key, normalize)).sum(1)
    losses = -logsigmoid(positive - lse)
    return losses if reduction == "none" else getattr(losses, reduction)()
