"""Row statistics of small batches of pairs: compute the whole matrix of exponentials once, and every gradient from it.

Each anchor has one view here: rows k of both parts belong to sample k. Either all 2B rows are candidates (the matrix is
(2B, 2B) and symmetric), or the B rows of the first part have the second as candidates ("towers": the matrix is (B, M),
its rows are anchors, and with "both ways" its M = B columns too; candidates from the B-th on are nobody's view). Logits
of views are taken out of the matrix: their spread is exactly 0, and their exponentials are not added to any others.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastcl.rowstats.chunked import EXP_LIMIT
from fastcl.rowstats.dense import UNLABELLED

_HALF = (torch.float16, torch.bfloat16)
NORMS = (1e-12, 1e12)  # squares of norms in this range neither overflow nor vanish; other rows are left to tiles

LOWEST, HIGHEST = math.exp(-EXP_LIMIT), math.exp(EXP_LIMIT)

MaybeNone: TypeAlias = Any  # None if statistics of peers are not requested; code that reads it knows whether they are
Pull: TypeAlias = Tensor | float | None
Need: TypeAlias = tuple[bool, bool]  # which of two towers get a gradient; rows that are one matrix get theirs together
SPELLED_OUT = 128  # samples up to which masks of all pairs of rows cost less than four times those of the samples
PULLS = ("view", "other", "peer", "sum_peer")  # the statistics whose gradients `backward` takes, in its order


class Way(NamedTuple):
    """How logits are computed from rows."""

    temperature: float
    normalize: bool
    towers: bool
    both_ways: bool = True  # of towers: both are anchors
    inverted: bool = False  # a gradient of the temperature is that of its reciprocal

    @property
    def halves(self) -> int:
        """Number of halves that are anchors."""
        return 2 if self.both_ways else 1


class Kept(NamedTuple):
    """Saved for the backward pass; only fields about peers can be None."""

    v: Tensor  # (N, D) rows, normalised if requested
    norm: Tensor  # (N, 1) norms of the input rows
    e_other: Tensor  # exponentials of the logits of others, 0 elsewhere: (N, N), towers (B, M)
    other: Tensor  # their sums, positive: (2, B), or (1, B) if the first part alone are anchors
    e_peer: Tensor | MaybeNone = None
    peer: Tensor | MaybeNone = None
    mask: Tensor | MaybeNone = None  # 1 where two rows are peers, of v's dtype: (N, N), or (B, 1, B) of their samples


class Stats(NamedTuple):
    """Statistics of the anchors, (2, B) each, or (1, B); about peers only if requested."""

    lse: dict[str, Tensor]  # by relation; "view" is the logit of the only view, "peer" may be missing
    n_other: int  # 0: no row has others; positive: every row has some (with labels, not their number)
    n_peer: Tensor | MaybeNone = None  # of the rows' dtype
    sum_peer: Tensor | MaybeNone = None  # sum of the peers' logits


def forward(
    x: Tensor, x2: Tensor | None, labels: Tensor | None, peers: bool, way: Way
) -> tuple[Stats, Kept] | None:  # fmt: skip
    """Statistics of pairs, or None if rows or logits are outside the range in which this method is exact.

    Args:
        x, x2: (B, D) each, or (2B, D) and None; of towers that are anchors one way (B, D) and (M, D) with M >= B.
        labels: (B,) classes, -1 for unlabelled; None: all rows but views are others.
        peers: whether statistics of peers are requested; peers are never counted as others.
    """
    b = x.shape[0] // 2
    if x2 is not None:
        b, x = x.shape[0], torch.cat([x, x2])
    n = x.shape[0]
    if (rows := unit_rows(x, way)) is None:
        return None
    v, norm, high = rows
    if v is x and x2 is None:
        v = v.clone()  # the caller may change x before the backward pass
    scale = 1 / way.temperature
    if way.towers:
        one, two = v.split_with_sizes((b, n - b))
        s = torch.addmm(number(0, v.dtype), one, two.t(), beta=0, alpha=scale)
    else:
        s = torch.addmm(norm, v, v.t(), beta=0, alpha=scale)
    mean_view = s.diagonal(0 if way.towers else b).expand(way.halves, b)
    if high * high > EXP_LIMIT * way.temperature:
        mean_view = mean_view.clone()
        hide(s, way.towers)
        low, high = s.aminmax()
        if not (-EXP_LIMIT <= low.item() and high.item() <= EXP_LIMIT):
            return None
    e = s.exp()
    if labels is None:
        hide(e, way.towers)
        sums = torch.cat((e.sum(1), e.sum(0))) if way.towers and way.both_ways else e.sum(1)
        other = sums.view(way.halves, b)
        n_other = n - b - 1 if way.towers else n - 2
        return Stats({"view": mean_view, "other": other.log()}, n_other), Kept(v, norm, e, other)
    return _classes(s, e, mean_view, labels, peers, v, norm)


def in_range(sums: Tensor) -> bool:
    """Whether sums of exponentials and their reciprocals are well inside float32's range."""
    low, high = sums.aminmax()
    return LOWEST <= low.item() and high.item() <= HIGHEST  # false for NaN


def _classes(
    s: Tensor, e: Tensor, mean_view: Tensor, labels: Tensor, peers: bool, v: Tensor, norm: Tensor
) -> tuple[Stats, Kept]:
    """Split the exponentials `e` of the logits `s` by class; overwrites `e`."""
    b, tiny = labels.shape[0], torch.finfo(v.dtype).tiny  # avoids division by an empty sum of exponentials
    low, high = labels.aminmax()
    low, high = low.item(), high.item()
    n_other = 2 * b - 2 if low != high or low == UNLABELLED else 0
    large = b > SPELLED_OUT  # the masks are those of the samples, alike for all four pairs of their views
    ids = labels if large else torch.cat((labels, labels))
    apart = (ids.unsqueeze(1) != ids).to(v.dtype)
    if low < 0:
        apart.masked_fill_((ids == UNLABELLED).unsqueeze(1), 1)
        hide(apart, large)
    grid, mask, n_peer = e, None, None
    if peers:
        mask = number(1, v.dtype) - apart
        hide(mask, large)
        n_peer = mask.sum(1)
        n_peer = n_peer.add_(n_peer).expand(2, b) if large else n_peer.view(2, b)
    if large:
        grid, apart = e.view(2, b, 2, b), apart.unsqueeze(1)
        mask = None if mask is None else mask.unsqueeze(1)
    e_other = (grid * apart if peers else grid.mul_(apart)).view_as(e)
    other = e_other.sum(1).view(2, b)
    lse_other = other.log()
    if not n_other:
        other.clamp_(min=tiny)
    if mask is None:
        return Stats({"view": mean_view, "other": lse_other}, n_other), Kept(v, norm, e, other)
    grid.mul_(mask)
    peer = e.sum(1).view(2, b)
    sum_peer = (s.view_as(grid) * mask).view_as(e).sum(1).view(2, b)
    lse = {"view": mean_view, "other": lse_other, "peer": peer.log()}
    return Stats(lse, n_other, n_peer, sum_peer), Kept(v, norm, e_other, other, e, peer.clamp_(min=tiny), mask)


@lru_cache(maxsize=256)
def number(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor, made once: an operation makes one of each Python number that it is given, which for few
    rows takes longer than the operation. Not an inference tensor: later calls may be outside of inference mode."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def unit_rows(x: Tensor, way: Way) -> tuple[Tensor, Tensor, float] | None:
    """Rows in working precision, normalised if requested, which may be x itself; their original norms (N, 1); the
    largest resulting norm. None if squares are out of range."""
    if x.dtype in _HALF:
        x = x.float()
    if (found := norms(x)) is None:
        return None
    norm, high = found
    return (x / norm, norm, 1.0) if way.normalize else (x, norm, high)


def norms(x: Tensor) -> tuple[Tensor, float] | None:
    """(N, 1) norms of rows in working precision, and the largest; None if squares are out of range."""
    if x.stride(1) == 1:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    else:  # of a transposed matrix, such as a queue that is kept as columns, that takes many times as long
        norm = x.square().sum(1, keepdim=True).sqrt()
    low, high = norm.detach().aminmax()
    top = high.item()
    return (norm, top) if NORMS[0] <= low.item() and top <= NORMS[1] else None  # None for NaN


def backward(
    kept: Kept, way: Way, need: Need, factor: float, view: Pull, other: Pull, peer: Pull, sum_peer: Tensor | MaybeNone
) -> Tensor:
    """Gradient of `Kept.v`, times `factor`: (N, D), or that of the one tower that needs it.

    Args:
        factor: a number, which includes the upstream gradient's magnitude.
        view, other, peer, sum_peer: gradients of mean_view, lse_other, lse_peer, sum_peer: (2, B) or (1, B) as `Stats`,
            or one number for all rows, or None for zero.
    """
    v = kept.v
    if other is None:
        pull = torch.zeros_like(kept.e_other)
    else:
        pull = weights(other / kept.other, way.towers)
        pull = pull.mul_(kept.e_other) if way.both_ways else pull * kept.e_other
    if peer is not None:
        pull.addcmul_(weights(peer / kept.peer, way.towers), kept.e_peer)
    if sum_peer is not None:
        pairs = weights(sum_peer, way.towers)
        if kept.mask.dim() > 2:
            pairs = pairs.view(2, len(kept.mask), 2, len(kept.mask))
        pull.view_as(pairs).addcmul_(pairs, kept.mask)
    if isinstance(view, Tensor):
        pair = view.sum(0) if way.both_ways else view[0]
    else:
        pair = way.halves * (view or 0.0)
    places = pull.diagonal() if way.towers else partners(pull)
    places.copy_(pair) if isinstance(pair, Tensor) else places.fill_(pair)
    return pulled(pull, v, way, need, factor / way.temperature)


def pulled(pull: Tensor, v: Tensor, way: Way, need: Need, scale: float) -> Tensor:
    """Gradient of v, times `scale`, from those of the matrix entries; result as of `backward`."""
    if not way.towers:
        return torch.addmm(v, pull, v, beta=0, alpha=scale)
    b = pull.shape[0]
    one, two = v.split_with_sizes((b, v.shape[0] - b))
    if need == (False, True):
        return torch.addmm(two, pull.t(), one, beta=0, alpha=scale)
    first = torch.addmm(one, pull, two, beta=0, alpha=scale)
    return torch.cat((first, torch.addmm(two, pull.t(), one, beta=0, alpha=scale))) if need[1] else first


def to_inputs(
    v: Tensor, norm: Tensor | MaybeNone, way: Way, need: Need, dv: Tensor, need_temperature: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input rows, of one tower if `dv` is, and of the temperature. Overwrites `dv`."""
    if not (way.normalize or need_temperature):
        return dv, None
    logits = 2  # how often dv * v has each logit times its gradient
    wanted, rows = dv.shape[0], v.shape[0]
    if wanted < rows:
        first = rows - wanted if need == (False, True) else 0
        v, norm = v.narrow(0, first, wanted), norm.narrow(0, first, wanted) if way.normalize else None
        logits = 1
    radial = (dv * v).sum(1, keepdim=True) if way.normalize else dv * v
    if way.normalize:
        dv.addcmul_(v, radial, value=-1).div_(norm)
    slope = way.temperature if way.inverted else -1 / way.temperature
    return dv, radial.sum() * (slope / logits) if need_temperature else None


def weights(w: Tensor, towers: bool) -> Tensor:
    """Factors of the matrix entries: of (2, B) weights the sums of those of row and column, of (1, B) those of the
    rows, (B, 1)."""
    if len(w) == 1:
        return w.t()
    if towers:
        one, two = w.unbind()
        return one.unsqueeze(1) + two
    column = w.reshape(-1, 1)
    return column + column.t()


def partners(matrix: Tensor) -> Tensor:
    """(2, B) view of the pairs' entries in a (2B, 2B) matrix: in the first half's rows, then in the second's."""
    n = matrix.shape[0]
    b = n // 2
    return matrix.as_strided((2, b), (b * n - b, n + 1), b)


def hide(matrix: Tensor, towers: bool) -> None:
    """Zero the entries of a row with itself and with its view."""
    if towers:
        matrix.diagonal().zero_()
    else:
        n = matrix.shape[0]
        b = n // 2
        matrix.as_strided((2, 2, b), (b * n, b, n + 1)).zero_()
