"""Evaluates all twins at one point of training, in one pass over each split."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcl.data import EvalViews
from fastcl.errors import FastclError
from fastcl.metrics import cdnv, directional_cdnv, ncc_accuracy, weight_gap
from fastcl.similarity import PairAccumulator
from fastcl.train.group import ALONE, Ranks
from fastcl.train.models import STEP_VALUES, Twin

log = logging.getLogger("fastcl")
EVAL_BATCH = 512
# "cka" is CKA as computed by the code of arXiv 2510.08852; the paper's text defines it on cosine similarities.
_ALIGNMENT = {
    "cka": "linear.cka",
    "cka_debiased": "linear.cka_debiased",
    "cka_cosine": "cosine.cka",
    "rsa": "cosine.rsa",
    "drift": "cosine.drift",
    "rho": "cosine.rho",
    "cka_bound": "cosine.cka_bound",
    "r": "cosine.r",
    "rsa_bound": "cosine.rsa_bound",
}


def evaluate(
    epoch: int, twins: list[Twin], train: EvalViews, test: EvalViews, means: dict[str, list[float]],
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:  # fmt: skip
    """Records of one evaluation: one per pair of twins, then one per twin. None on ranks other than the first.

    Alignment, CDNV and test accuracy are computed on the encoder outputs h of ALL held-out images; the class centres
    of the nearest-class-centre classifier are computed on all training images.

    Args:
        epoch: number of completed epochs.
        train, test: views of all training images and of all held-out images.
        means: each twin's STEP_VALUES averaged over the epoch; empty before the first epoch (recorded as null).
        ranks: share the images. Features are those of one process to the bit, alignment is up to rounding.
    """
    accumulator = PairAccumulator([t.name for t in twins]) if len(twins) > 1 else None
    held_out = encode(twins, test, accumulator, ranks)
    training = encode(twins, train, ranks=ranks)
    if accumulator is not None and ranks.size > 1:
        accumulator.all_reduce(ranks.group)
    if not ranks.first:
        return []
    device = held_out[twins[0].name].device
    train_labels, test_labels = (torch.from_numpy(v.split.labels).to(device) for v in (train, test))
    records: list[dict[str, Any]] = []
    networks = {t.name: t.network for t in twins}
    for (a, b), result in accumulator.compute().pairs.items() if accumulator is not None else ():
        records.append(
            {
                "epoch": epoch,
                "pair": [a, b],
                **{name: _value(attrgetter(where), result, of=f"{a}, {b}") for name, where in _ALIGNMENT.items()},
                "weight_gap": weight_gap(networks[a].encoder, networks[b].encoder),
            }
        )
    for twin in twins:
        h, h_train = held_out[twin.name], training[twin.name]
        values = means.get(twin.name, [None] * len(STEP_VALUES))
        records.append(
            {
                "epoch": epoch,
                "model": twin.name,
                **dict(zip(STEP_VALUES, values, strict=True)),
                "ncc_train": ncc_accuracy(h_train, train_labels, h_train, train_labels),
                "ncc_test": ncc_accuracy(h_train, train_labels, h, test_labels),
                "cdnv": _value(cdnv, h, test_labels, of=twin.name),
                "cdnv_directional": _value(directional_cdnv, h, test_labels, of=twin.name),
            }
        )
    return records


def _value(measure: Callable[..., float], *arguments: Any, of: str) -> float | None:
    """A measure, or None (null in the records) with a warning if undefined: a collapsed model does not stop the run."""
    try:
        return measure(*arguments)
    except FastclError as error:
        log.warning("%s: %s", of, error)
        return None


@torch.no_grad()
def encode(
    twins: list[Twin], views: EvalViews, accumulator: PairAccumulator | None = None, ranks: Ranks = ALONE
) -> dict[str, Tensor]:
    """Encoder outputs (n, width) float32 of a split for every twin; each batch is rendered once.

    Each rank takes its share of whole batches, which are those of one process; the first rank gets all outputs, the
    others none. The accumulator, if given, is updated with this rank's outputs.
    """
    features: dict[str, list[Tensor]] = {t.name: [] for t in twins}
    n = len(views.split)
    count = math.ceil(n / EVAL_BATCH)
    mine = range(ranks.rank * count // ranks.size, (ranks.rank + 1) * count // ranks.size)
    with ranks.together():
        for twin in twins:
            twin.network.eval()
        for images in views.of([np.arange(k * EVAL_BATCH, min((k + 1) * EVAL_BATCH, n)) for k in mine]):
            batch = {t.name: t.network.encoder(images) for t in twins}
            for name, h in batch.items():
                features[name].append(h)
            if accumulator is not None:
                accumulator.update(batch)
    if ranks.size == 1:
        return {name: torch.cat(parts) for name, parts in features.items()}
    device = next(twins[0].network.parameters()).device
    return ranks.rows_of_all({name: torch.cat(h) if h else None for name, h in features.items()}, device)
