"""Row statistics in torch, tile by tile: O(N x tile) memory, backward by recomputation.

Rows are sorted by (class, sample). The views of a row are then adjacent, its class is one interval, and a tile whose
rows and columns have no class in common contains only the relation `other`: no mask, one exponential per element. If
the candidates are the anchors themselves, the matrix is symmetric, and each tile above the diagonal serves its rows and
its columns, forward and backward.

The few view pairs are computed separately from the tiles: their softmax weights and means nearly cancel, so they must
be subtracted before anything else is added.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.rowstats.order import Layout, Side

# Rows and columns of a tile: 2 MiB of float32 stay in a CPU's cache; other devices need larger tiles to be busy. Having
# few rows keeps the diagonal blocks small, half of which is redundant work.
TILE = {"cpu": (256, 2048)}
TILE_ELSEWHERE = (2048, 8192)
VIEW_ELEMENTS = 1 << 20  # elements of candidates gathered at a time
WHOLE = 1 << 22  # entries of a matrix that `fastcl.rowstats.small.route` computes at once on a CPU: 16 MiB of float32
EXP_LIMIT = 60.0  # |logit| up to which N exponentials can be summed in float32 without overflow or underflow


@dataclass(frozen=True)
class _Rows:
    """One relation's log-sum-exps and upstream gradients for a set of rows, as used in exp(s - lse) * grad."""

    lse: Tensor
    grad: Tensor

    def __getitem__(self, block: slice) -> _Rows:
        return _Rows(self.lse[block], self.grad[block])


def forward(x: Tensor, y: Tensor | None, layout: Layout) -> tuple[Tensor, ...]:
    """Statistics as `dense.row_stats` returns them, with the ids given as a `Layout`."""
    a, b = layout.x, layout.y
    xs = x[a.order]
    ys = xs if y is None else y[b.order]
    bounded = _is_bounded(xs, ys)
    empty = 0.0 if bounded else -torch.inf
    other, peer = x.new_full((len(x),), empty), x.new_full((len(x),), empty)
    peer_sum = x.new_zeros(len(x))
    for i, j, mixed in _tiles(layout, x.device):
        s = xs[i] @ ys[j].T
        # A diagonal tile already contains both triangles: its columns are its rows.
        columns = j if y is None and i != j else None
        if mixed and layout.labelled:
            is_peer = _peers(a, b, i, j)
            linear = s.masked_fill(~is_peer, 0)
            peer_sum[i] += linear.sum(1)
            if columns is not None:
                peer_sum[columns] += linear.sum(0)
            _add_exponentials(peer, s, ~is_peer, i, columns, bounded)
        _add_exponentials(other, s, _same_class(a, b, i, j) if mixed else None, i, columns, bounded)
    if bounded:
        other, peer = other.log_(), peer.log_()
    n_view, n_peer, n_other = layout.counts()
    mean_view, spread_view = _forward_views(xs, ys, layout)
    mean_peer = peer_sum / n_peer.clamp(min=1)
    # A sum of exponentials cannot tell "no pair" from NaN or underflow; the counts can.
    other, peer = other.masked_fill_(n_other == 0, -torch.inf), peer.masked_fill_(n_peer == 0, -torch.inf)
    return tuple(a.restore(v) for v in (mean_view, spread_view, mean_peer, peer, other, n_view, n_peer, n_other))


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
    bounded = _is_bounded(xs, ys)
    g_mean_view, g_spread_view, g_mean_peer, g_peer, g_other = (g[a.order] for g in grads)
    # Scale the largest upstream gradient to 1, so that grad * exp(-lse) stays in range whatever the reduction.
    scale = torch.stack([g_mean_peer, g_peer, g_other]).abs().amax()
    scale = scale.where(scale > 0, 1)
    _, n_peer, n_other = layout.counts()
    other = _Rows(lse[1][a.order].masked_fill(n_other == 0, torch.inf), g_other / scale)
    peer = _Rows(lse[0][a.order].masked_fill(n_peer == 0, torch.inf), g_peer / scale)
    mean_peer = g_mean_peer / (scale * n_peer.clamp(min=1))
    dx = xs.new_zeros(len(xs) + 1, xs.shape[1])
    dy = dx if y is None else ys.new_zeros(len(ys) + 1, ys.shape[1])
    for i, j, mixed in _tiles(layout, x.device):
        s = xs[i] @ ys[j].T
        columns = j if y is None else None
        w = _softmax(s, other, i, columns, bounded)
        if mixed:
            w.masked_fill_(_same_class(a, b, i, j), 0)
        if mixed and layout.labelled:
            pull = _softmax(s, peer, i, columns, bounded).add_(mean_peer[i, None])
            if columns is not None:
                pull += mean_peer[columns]
            w += pull.masked_fill_(~_peers(a, b, i, j), 0)
        dx[i].addmm_(w, ys[j])
        if y is not None or i != j:
            dy[j].addmm_(w.T, xs[i])
    dx *= scale
    if y is not None:
        dy *= scale
    _backward_views(xs, ys, layout, g_mean_view, g_spread_view, dx, dy)
    return a.restore(dx[:-1]), x.new_empty(0) if y is None else b.restore(dy[:-1])


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


def _same_class(a: Side, b: Side, i: slice, j: slice) -> Tensor:
    """(rows, columns) mask: self, views and peers."""
    return a.group[i, None] == b.group[j]


def _peers(a: Side, b: Side, i: slice, j: slice) -> Tensor:
    return _same_class(a, b, i, j) & (a.sample[i, None] != b.sample[j])


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


def _softmax(s: Tensor, rows: _Rows, i: slice, columns: slice | None, bounded: bool) -> Tensor:
    """grad_i exp(s_ij - lse_i), plus the column's grad_j exp(s_ij - lse_j) if the matrix is symmetric."""
    r = rows[i]
    if bounded:
        weight = (r.grad * torch.exp(-r.lse))[:, None]
        if columns is not None:
            c = rows[columns]
            weight = weight + c.grad * torch.exp(-c.lse)
        return s.exp().mul_(weight)
    w = torch.exp(s - r.lse[:, None]).mul_(r.grad[:, None])
    if columns is not None:
        c = rows[columns]
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


def _views(xs: Tensor, ys: Tensor, layout: Layout) -> Iterator[_Views]:
    bounds_x, bounds_y = layout.samples()
    widest = max(int((stop - start).amax()) for start, stop in (bounds_x, bounds_y))
    size = max(1, VIEW_ELEMENTS // (widest * xs.shape[1]))
    for k in range(0, len(bounds_x[0]), size):
        i, x = _padded(xs, *(b[k : k + size] for b in bounds_x))
        j, y = _padded(ys, *(b[k : k + size] for b in bounds_y))
        height = max(1, VIEW_ELEMENTS // j.numel())  # the logits of a sample with very many views might not fit
        for p in range(0, i.shape[1], height):
            rows = slice(p, p + height)
            yield _view_block(i[:, rows], j, x[:, rows], y, layout.symmetric, (len(xs), len(ys)))


def _view_block(i: Tensor, j: Tensor, x: Tensor, y: Tensor, symmetric: bool, padding: tuple[int, int]) -> _Views:
    outside = (i == padding[0])[:, :, None] | (j == padding[1])[:, None]
    if symmetric:
        outside |= i[:, :, None] == j[:, None]
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


def _forward_views(xs: Tensor, ys: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """mean_view and spread_view, (N,)."""
    mean, spread = xs.new_zeros(2, len(xs) + 1)  # padding writes to the last element
    for v in _views(xs, ys, layout):
        mean[v.i], spread[v.i] = v.mean, v.spread
    return mean[:-1], spread[:-1]


def _backward_views(
    xs: Tensor, ys: Tensor, layout: Layout, g_mean: Tensor, g_spread: Tensor, dx: Tensor, dy: Tensor
) -> None:
    """Add the view pairs' part to dx and dy, whose extra last row takes the writes of padding."""
    g_mean, g_spread = (torch.nn.functional.pad(g, (0, 1)) for g in (g_mean, g_spread))
    for v in _views(xs, ys, layout):
        inverse = (1 / v.n.to(xs.dtype))[:, :, None]
        # Softmax minus 1/n comes first: exactly 0 for a single view.
        w = (v.softmax - inverse).mul_(g_spread[v.i][:, :, None]).add_(g_mean[v.i][:, :, None] * inverse)
        w.masked_fill_(v.outside, 0)
        dx[v.i] += torch.bmm(w, v.y)
        dy[v.j] += torch.bmm(w.transpose(1, 2), v.x)
