"""The losses with other kernels and libraries, each imported when it is called.

Arguments and results as in plain.py: z (N, D), labels (N / 2,), and the name of the objective. If a library lacks an
objective, its kernel does the N x N work and PyTorch the rest.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bench.losses import plain
from bench.losses.plain import TEMPERATURE

_ROWS = 4096  # of a chunk; fewer if its float32 logits would take more than a GiB
_LOGITS = 2**28
_VALUE_WIDTH = 16  # the narrowest values that flex_attention's kernels accept; their product is not used


def chunk_rows(n: int) -> int:
    """Number of rows whose logits `chunked` holds at a time."""
    return max(256, min(_ROWS, _LOGITS // n))


def autocast(z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """The plain form under autocast to bfloat16."""
    with torch.autocast(z.device.type, torch.bfloat16):
        return plain.mean_of(objective, z, labels)


def compiled(z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """`autocast`, compiled for the given shape."""
    return _compiled(autocast)(z, labels, objective)


def chunked(z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """bfloat16 products in chunks of rows, recomputed in the backward pass; everything else in float32."""
    if "+" in objective:
        values = [chunked(z, labels, name) for name in objective.split("+")]
        return sum(values) / len(values)
    u = functional.normalize(z)
    if objective == "clip":
        image, text = u.chunk(2)
        return (_chunks(image, text, labels, objective) + _chunks(text, image, labels, objective)) / 2
    return _chunks(u, u, labels.repeat(2), objective)


def _chunks(u: Tensor, v: Tensor, labels: Tensor, objective: str) -> Tensor:
    total, size = u.new_zeros(()), chunk_rows(len(u))
    for k, rows in enumerate(u.split(size)):
        # It uses no random numbers, and their state cannot be read during graph capture.
        arguments = rows, v, k * size, labels, objective
        total = total + checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
    return total / len(u)


def _chunk(rows: Tensor, v: Tensor, first: int, labels: Tensor, objective: str) -> Tensor:
    """Sum of the losses of the rows first, first + 1, ..."""
    logits = (rows.bfloat16() @ v.bfloat16().T).float() / TEMPERATURE
    index = torch.arange(first, first + len(rows), device=v.device)
    if objective == "clip":
        return functional.cross_entropy(logits, index, reduction="sum")
    partner = (index + len(v) // 2) % len(v)
    if objective == "ntxent":
        return functional.cross_entropy(logits.scatter_(1, index[:, None], -torch.inf), partner, reduction="sum")
    same = labels[index, None] == labels
    if objective == "nscl":
        positive = logits.gather(1, partner[:, None])[:, 0]
        return (logits.masked_fill(same, -torch.inf).logsumexp(1) - positive).sum()
    positive = same.scatter_(1, index[:, None], False)
    logits = logits.scatter_(1, index[:, None], -torch.inf)
    return (logits.logsumexp(1) - logits.masked_fill(~positive, 0).sum(1) / positive.sum(1)).sum()


def flex(z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """Log-sum-exps from flex_attention on bfloat16 rows, with zero values of the least width; compiled as a whole."""
    return _compiled(flex_loss)(z, labels, objective)


def flex_loss(z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """The function that `flex` compiles."""
    u = functional.normalize(z)
    if objective == "clip":
        image, text = u.chunk(2)
        positive = (image * text).sum(1) / TEMPERATURE
        return ((_flex_lse(image, text, None) + _flex_lse(text, image, None)) / 2 - positive).mean()
    group = torch.arange(len(u), device=u.device) if objective == "ntxent" else labels.repeat(2)
    positive = (u * u.roll(len(u) // 2, 0)).sum(1) / TEMPERATURE
    return (_flex_lse(u, u, group) - positive).mean()


def _flex_lse(u: Tensor, v: Tensor, group: Tensor | None) -> Tensor:
    """Log-sum-exp of each row of u against those of v outside its group."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def outside(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(group[i] == group[j], -torch.inf, score)

    query, key = (rows.bfloat16()[None, None] for rows in (u, v))
    value = key.new_zeros(1, 1, len(v), _VALUE_WIDTH)
    score_mod = None if group is None else outside
    arguments = {"score_mod": score_mod, "scale": 1 / TEMPERATURE, "return_aux": AuxRequest(lse=True)}
    return flex_attention(query, key, value, **arguments)[1].lse[0, 0]


def inf_cl(z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """Inf-CL. Its InfoNCE cannot exclude a row's similarity with itself, so NT-Xent uses the log-sum-exps of its
    kernels and removes that term afterwards."""
    from inf_cl.flash import FlashProb, cal_flash_loss

    u = functional.normalize(z)
    width = min(u.shape[1], 256)
    if objective == "clip":
        towers = u.chunk(2)
        sides = (cal_flash_loss(*pair, scale=1 / TEMPERATURE, head_dim=width).mean() for pair in (towers, towers[::-1]))
        return sum(sides) / 2
    query, key = (u / TEMPERATURE).view(len(u), -1, width), u.view(len(u), -1, width)
    lse = FlashProb.apply(query, key)
    own = (query * key).sum((1, 2))
    positive = (u * u.roll(len(u) // 2, 0)).sum(1) / TEMPERATURE
    return (lse + torch.log1p(-torch.exp(own - lse)) - positive).mean()


def cut_cross_entropy(z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """cut-cross-entropy as CLIP: each tower's rows are the other's classifier. Its filter of small gradients is off,
    since in a large batch every softmax weight is below its threshold."""
    from cut_cross_entropy import linear_cross_entropy

    towers = functional.normalize(z).bfloat16().chunk(2)
    pair = torch.arange(len(towers[0]), device=z.device)
    sides = (linear_cross_entropy(u / TEMPERATURE, v, pair, filter_eps=None) for u, v in (towers, towers[::-1]))
    return sum(side.float() for side in sides) / 2


def open_clip(z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """open_clip's SigLipLoss."""
    from open_clip.loss import SigLipLoss

    return SigLipLoss()(*functional.normalize(z).chunk(2), plain.SCALE, plain.BIAS)


def lightly(z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """lightly's NTXentLoss."""
    from lightly.loss import NTXentLoss

    return NTXentLoss(TEMPERATURE)(*z.view(2, -1, z.shape[1]).unbind())


def metric_learning(z: Tensor, labels: Tensor, objective: str) -> Tensor:
    """pytorch-metric-learning's SupConLoss, which equals NT-Xent if every sample is its own class; the library's own
    NTXentLoss gives the same value but needs N x N x N numbers."""
    from pytorch_metric_learning.losses import SupConLoss

    classes = torch.arange(len(labels), device=z.device) if objective == "ntxent" else labels
    return SupConLoss(TEMPERATURE)(z, classes.repeat(2))


def forget_compiled() -> None:
    """Drop code compiled for earlier shapes: after a few shapes per function PyTorch falls back to eager calls."""
    if _compiled.cache_info().currsize:
        _compiled.cache_clear()
        torch.compiler.reset()


@lru_cache
def _compiled(function):
    return torch.compile(function, dynamic=False, fullgraph=True)
