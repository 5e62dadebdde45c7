"""Row statistics in torch, tile by tile: O(N x tile) memory, backward by recomputation.

Rows are sorted by (class, sample). The views of a row are then adjacent, its class is one interval, and a tile whose
rows and columns have no class in common contains only the relation `other`: no mask, one exponential per element. If
the candidates are the anchors themselves, the matrix is symmetric, and each tile above the diagonal serves its rows and
its columns, forward and backward.

The few view pairs are computed separately from the tiles: their softmax weights and means nearly cancel, so they must
be subtracted before anything else is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.rowstats.order import Layout

# Rows and columns of a tile: 2 MiB of float32 stay in a CPU's cache; other devices need larger tiles to be busy. Having
# few rows keeps the diagonal blocks small, half of which is redundant work.
TILE = {"cpu": (256, 2048)}
TILE_ELSEWHERE = (2048, 8192)
VIEW_ELEMENTS = 1 << 20  # elements of candidates gathered at a time
WHOLE = 1 << 22  # entries of a matrix that `fastcl.rowstats.small.route` computes at once on a CPU: 16 MiB of float32
EXP_LIMIT = 60.0  # |logit| up to which N exponentials can be summed in float32 without overflow or underflow


@dataclass(frozen=True)
class LogSums:
    """One relation's log-sum-exps and upstream gradients for a set of rows, as used in exp(s - lse) * grad."""

    lse: Tensor
    grad: Tensor

    def __getitem__(self, block: slice) -> LogSums:
        return LogSums(self.lse[block], self.grad[block])


@dataclass(frozen=True)
class Anchors:
    """What a set of rows contributes, as anchors, to the derivatives of the logits: dL/ds_ij of all its relations."""

    other: LogSums
    peer: LogSums
    mean_peer: Tensor  # gradient of mean_peer, divided by the number of peers


def forward(x: Tensor, y: Tensor | None, layout: Layout) -> tuple[Tensor, ...]:
    """Statistics as `dense.row_stats` returns them, with the ids given as a `Layout`."""
    a, b = layout.x, layout.y
    xs = x[a.order]
    ys = xs if y is None else y[b.order]
    n_view, *counts = layout.counts()
    sums = forward_tiles(xs, ys, layout, counts)
    views = forward_views(xs, ys, layout)
    return tuple(a.restore(v) for v in (*views, *sums, n_view, *counts))


def forward_tiles(xs: Tensor, ys: Tensor, layout: Layout, counts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """mean_peer, lse_peer, lse_other of the sorted anchors, whose numbers of peers and others are given."""
    bounded = _is_bounded(xs, ys)
    empty = 0.0 if bounded else -torch.inf
    other, peer = xs.new_full((len(xs),), empty), xs.new_full((len(xs),), empty)
    peer_sum = xs.new_zeros(len(xs))
    for i, j, mixed in _tiles(layout, xs.device):
        s = xs[i] @ ys[j].T
        # A diagonal tile already contains both triangles: its columns are its rows.
        columns = j if layout.symmetric and i != j else None
        if mixed and layout.labelled:
            is_peer = _peers(layout, i, j)
            linear = s.masked_fill(~is_peer, 0)
            peer_sum[i] += linear.sum(1)
            if columns is not None:
                peer_sum[columns] += linear.sum(0)
            _add_exponentials(peer, s, ~is_peer, i, columns, bounded)
        _add_exponentials(other, s, _same_class(layout, i, j) if mixed else None, i, columns, bounded)
    if bounded:
        other, peer = other.log_(), peer.log_()
    n_peer, n_other = counts
    # A sum of exponentials cannot tell "no pair" from NaN or underflow; the counts can.
    other, peer = other.masked_fill_(n_other == 0, -torch.inf), peer.masked_fill_(n_peer == 0, -torch.inf)
    return peer_sum / n_peer.clamp(min=1), peer, other


def backward(
    x: Tensor, y: Tensor | None, layout: Layout, lse: tuple[Tensor, Tensor], grads: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y from those of the statistics.

    Args:
        x, y, layout: as in `forward`.
        lse: lse_peer, lse_other of the forward pass.
        grads: gradients of mean_view, spread_view, mean_peer, lse_peer, lse_other; (N,) each.

    Returns:
        dx (N, D), and dy (M, D) if y is given, otherwise an empty tensor (dx then covers both sides).
    """
    a, b = layout.x, layout.y
    xs = x[a.order]
    ys = xs if y is None else y[b.order]
    g_mean_view, g_spread_view, *g_tiles = (g[a.order] for g in grads)
    scale = largest(*g_tiles)
    anchors = anchors_of(layout, lse, g_tiles, scale)
    dx = xs.new_zeros(len(xs) + 1, xs.shape[1])
    dy = dx if y is None else ys.new_zeros(len(ys) + 1, ys.shape[1])
    backward_tiles(xs, ys, layout, (anchors, anchors if y is None else None), dx, dy)
    dx *= scale
    if y is not None:
        dy *= scale
    backward_views(xs, ys, layout, (g_mean_view, g_spread_view), dx, dy)
    return a.restore(dx[:-1]), x.new_empty(0) if y is None else b.restore(dy[:-1])


def largest(*grads: Tensor) -> Tensor:
    """Largest absolute value of all gradients, which are divided by it, so that grad * exp(-lse) stays in range
    whatever the reduction; 1 if it is 0."""
    scale = torch.cat(grads).abs().amax()
    return scale.where(scale > 0, 1)


def anchors_of(layout: Layout, lse: tuple[Tensor, Tensor], grads: Sequence[Tensor], scale: Tensor) -> Anchors:
    """The anchors of a layout: `lse` in source order, `grads` of mean_peer, lse_peer and lse_other sorted."""
    order = layout.x.order
    g_mean_peer, g_peer, g_other = grads
    _, n_peer, n_other = layout.counts()
    other = LogSums(lse[1][order].masked_fill(n_other == 0, torch.inf), g_other / scale)
    peer = LogSums(lse[0][order].masked_fill(n_peer == 0, torch.inf), g_peer / scale)
    return Anchors(other, peer, g_mean_peer / (scale * n_peer.clamp(min=1)))


def backward_tiles(
    xs: Tensor, ys: Tensor, layout: Layout, anchors: tuple[Anchors, Anchors | None], dx: Tensor, dy: Tensor | None
) -> None:
    """Add the tiles' part to dx and dy (None: not wanted), for the anchors xs and, if given, those among ys."""
    a, b = anchors
    bounded = _is_bounded(xs, ys)
    for i, j, mixed in _tiles(layout, xs.device):
        s = xs[i] @ ys[j].T
        w = _softmax(s, a.other[i], None if b is None else b.other[j], bounded)
        if mixed:
            w.masked_fill_(_same_class(layout, i, j), 0)
        if mixed and layout.labelled:
            pull = _softmax(s, a.peer[i], None if b is None else b.peer[j], bounded).add_(a.mean_peer[i, None])
            if b is not None:
                pull += b.mean_peer[j]
            w += pull.masked_fill_(~_peers(layout, i, j), 0)
        dx[i].addmm_(w, ys[j])
        if dy is not None and not (layout.symmetric and i == j):
            dy[j].addmm_(w.T, xs[i])


def _is_bounded(xs: Tensor, ys: Tensor) -> bool:
    """Whether every logit is in the range that needs no shift (by Cauchy-Schwarz). Synchronises for one number."""
    bound = torch.linalg.vector_norm(xs, dim=1).amax() * torch.linalg.vector_norm(ys, dim=1).amax()
    return bool(bound <= EXP_LIMIT)


def _tiles(layout: Layout, device: torch.device) -> Iterator[tuple[slice, slice, bool]]:
    """(rows, columns, whether the tile can contain same-class pairs); if the matrix is symmetric, only the diagonal
    blocks and the tiles to the right of them."""
    height, width = TILE.get(device.type, TILE_ELSEWHERE)
    n = len(layout.y.key)
    for i, same in layout.class_intervals(height):
        start = 0
        if layout.symmetric:
            yield i, i, True
            start, same = i.stop, slice(i.stop, max(same.stop, i.stop))
        for first, last, mixed in ((start, same.start, False), (same.start, same.stop, True), (same.stop, n, False)):
            for k in range(first, last, width):
                yield i, slice(k, min(k + width, last)), mixed


def _same_class(layout: Layout, i: slice, j: slice) -> Tensor:
    """(rows, columns) mask: self, views and peers."""
    return layout.x.group[i, None] == layout.y.group[j]


def _peers(layout: Layout, i: slice, j: slice) -> Tensor:
    return _same_class(layout, i, j) & (layout.x.sample[i, None] != layout.y.sample[j])


def _add_exponentials(
    total: Tensor, s: Tensor, outside: Tensor | None, i: slice, columns: slice | None, bounded: bool
) -> None:
    """Add a tile's exponentials, except those masked by `outside`, to the totals (sums if bounded, else lse)."""
    if bounded:
        e = s.exp()  # masked afterwards: on a CPU exp(-inf) is 25 times slower than exp of a finite number
        if outside is not None:
            e.masked_fill_(outside, 0)
        total[i] += e.sum(1)
        if columns is not None:
            total[columns] += e.sum(0)
        return
    if outside is not None:
        s = s.masked_fill(outside, -torch.inf)
    total[i] = torch.logaddexp(total[i], s.logsumexp(1))
    if columns is not None:
        total[columns] = torch.logaddexp(total[columns], s.logsumexp(0))


def _softmax(s: Tensor, r: LogSums, c: LogSums | None, bounded: bool) -> Tensor:
    """grad_i exp(s_ij - lse_i) of the rows, plus grad_j exp(s_ij - lse_j) if the columns are anchors too."""
    if bounded:
        weight = (r.grad * torch.exp(-r.lse))[:, None]
        if c is not None:
            weight = weight + c.grad * torch.exp(-c.lse)
        return s.exp().mul_(weight)
    w = torch.exp(s - r.lse[:, None]).mul_(r.grad[:, None])
    if c is not None:
        w += torch.exp(s - c.lse).mul_(c.grad)
    return w


@dataclass(frozen=True)
class _Views:
    """The view pairs of a block of S samples, padded to P anchors and Q candidates each.

    A row belongs to one sample, so a block adds to it only once. Padding has position N (or M).
    """

    i: Tensor  # (S, P) positions of anchors
    j: Tensor  # (S, Q) positions of candidates
    x: Tensor  # (S, P, D) anchors
    y: Tensor  # (S, Q, D) candidates
    outside: Tensor  # (S, P, Q) mask of entries that are not view pairs: padding, and a row with itself
    mean: Tensor  # (S, P) mean logit; the logit itself for a single view
    spread: Tensor  # (S, P) log-sum-exp minus mean; exactly 0 for a single view
    softmax: Tensor  # (S, P, Q) exp(logit - log-sum-exp); exactly 1 for a single view
    n: Tensor  # (S, P) number of views, at least 1


def _views(xs: Tensor, ys: Tensor, layout: Layout, selves: Tensor | None) -> Iterator[_Views]:
    if layout.symmetric:
        selves = torch.arange(len(xs) + 1, dtype=torch.int64, device=xs.device)
    bounds_x, bounds_y = layout.samples()
    widest = max(int((stop - start).amax()) for start, stop in (bounds_x, bounds_y))
    size = max(1, VIEW_ELEMENTS // (widest * xs.shape[1]))
    for k in range(0, len(bounds_x[0]), size):
        i, x = _padded(xs, *(b[k : k + size] for b in bounds_x))
        j, y = _padded(ys, *(b[k : k + size] for b in bounds_y))
        height = max(1, VIEW_ELEMENTS // j.numel())  # the logits of a sample with very many views might not fit
        for p in range(0, i.shape[1], height):
            rows = slice(p, p + height)
            yield _view_block(i[:, rows], j, x[:, rows], y, selves, (len(xs), len(ys)))


def _view_block(i: Tensor, j: Tensor, x: Tensor, y: Tensor, selves: Tensor | None, padding: tuple[int, int]) -> _Views:
    outside = (i == padding[0])[:, :, None] | (j == padding[1])[:, None]
    if selves is not None:
        outside |= selves[i][:, :, None] == j[:, None]
    s = torch.bmm(x, y.transpose(1, 2))
    n = (~outside).sum(2).clamp_(min=1)
    mean = s.masked_fill(outside, 0).sum(2) / n
    s -= mean[:, :, None]
    rest = s.masked_fill(outside, 0).sum(2) / n  # rounding error of the mean
    peak = s.masked_fill(outside, -torch.inf).amax(2)
    peak.masked_fill_(peak == -torch.inf, 0)
    e = torch.exp(s - peak[:, :, None]).masked_fill_(outside, 0)
    total = e.sum(2)
    total.masked_fill_(total == 0, 1)
    return _Views(i, j, x, y, outside, mean, peak + total.log() - rest, e / total[:, :, None], n)


def _padded(rows: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Positions start .. stop - 1 of each sample, padded with len(rows), and the rows at these positions."""
    width = max(1, int((stop - start).amax()))
    index = start[:, None] + torch.arange(width, dtype=start.dtype, device=start.device)
    index = index.masked_fill(index >= stop[:, None], len(rows))
    return index, rows[index.clamp(max=len(rows) - 1)]


def forward_views(xs: Tensor, ys: Tensor, layout: Layout, selves: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """mean_view and spread_view of the sorted anchors; `selves`: (N + 1,) position of a candidate that is no view."""
    mean, spread = xs.new_zeros(2, len(xs) + 1)  # padding writes to the last element
    for v in _views(xs, ys, layout, selves):
        mean[v.i], spread[v.i] = v.mean, v.spread
    return mean[:-1], spread[:-1]


def backward_views(
    xs: Tensor, ys: Tensor, layout: Layout, grads: Sequence[Tensor], dx: Tensor, dy: Tensor,
    selves: Tensor | None = None,
) -> None:  # fmt: skip
    """Add the view pairs' part to dx and dy, whose extra last row takes the writes of padding."""
    g_mean, g_spread = (torch.nn.functional.pad(g, (0, 1)) for g in grads)
    for v in _views(xs, ys, layout, selves):
        inverse = (1 / v.n.to(xs.dtype))[:, :, None]
        # Softmax minus 1/n comes first: exactly 0 for a single view.
        w = (v.softmax - inverse).mul_(g_spread[v.i][:, :, None]).add_(g_mean[v.i][:, :, None] * inverse)
        w.masked_fill_(v.outside, 0)
        dx[v.i] += torch.bmm(w, v.y)
        dy[v.j] += torch.bmm(w.transpose(1, 2), v.x)
