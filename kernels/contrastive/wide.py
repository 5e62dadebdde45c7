"""Gradient of wide rows, whose float32 accumulator does not fit a program: write weights to memory, then multiply.

Both passes run on square blocks of pairs, small enough for the workspace. A block serves the rows of both sides, in one
launch, unless it lies on the diagonal: 3 N N D operations instead of 4.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.arguments import Block
from ..common.numerics import class_range, dot, logits_of, products, split_half
from .backward import tile_weights


class Pairs(NamedTuple):
    """A square block of pairs."""

    weights: Any  # (2 or 1, size, size) half precision: weights of rows first_s + ., columns first_r + .; remainders
    first_r: int
    first_s: int
    size: int


class Summed(NamedTuple):
    """The rows that a product sums over: `count` of them, from working row `first` on."""

    z: Any  # (2 or 1, rows, D)
    rows: int
    first: int
    count: int


class Gradient(NamedTuple):
    """The rows whose gradient a product adds to, from working row `first` on."""

    sums: Any  # (n, d) float32 in source order
    src_N: Any  # (n,) int32: source row of each working row
    lo_N: Any  # (n,) int32: class ranges among the rows summed over
    hi_N: Any
    n: int
    d: int
    first: int


class Half(NamedTuple):
    """What `product_kernel` makes of a block of pairs for the rows of one side."""

    summed: Any  # Summed
    gradient: Any  # Gradient


class Product(NamedTuple):
    """Constants of `product_kernel`."""

    D: int
    BLOCK_M: int
    BLOCK_K: int
    BLOCK_D: int  # columns of a program, and how many more: blocks are powers of two
    BLOCK_T: int
    ALIGN: int
    SPLIT_PLAIN: bool
    SPLIT_MASKED: bool
    ADD_ONE: bool  # add to the gradient of the first half; False: overwrite it
    ADD_TWO: bool


@triton.jit
def _masked(r, s, start_r, start_s, TILE):
    """Whether a tile may have pairs of a class, or padding, which must be masked: for a product of 0 the weight may
    overflow half precision."""
    lo, hi = class_range(r, start_r, TILE.ALIGN)
    padded = (start_s + TILE.BLOCK_S > s.n) | (start_r + TILE.BLOCK_R > r.n)
    return ((start_s >= lo) & (start_s < hi)) | padded


@triton.jit
def _weights(r, s, w_r, w_s, start_r, start_s, logits, TILE, MASKED: tl.constexpr, ONLINE: tl.constexpr):
    """(S, R) weights of a tile."""
    SPLIT: tl.constexpr = TILE.SPLIT_MASKED if MASKED else TILE.SPLIT_PLAIN
    # Rows wider than BLOCK_D are loaded from memory in pieces: no rows stay in registers.
    b_none = tl.zeros([TILE.BLOCK_R, TILE.BLOCK_D], r.z.dtype.element_ty)
    b_p, _, _ = products(Block(r.z, r.rows, b_none, b_none, start_r), s, start_s, TILE, SPLIT)
    return tile_weights(b_p * logits.factor, logits.shift, r, s, w_r, w_s, start_r, start_s, TILE, MASKED, ONLINE)


@triton.jit
def _store_weights(pairs, b_w, o_r, o_s, TILE):
    b_high, b_low = split_half(b_w, pairs.weights.dtype.element_ty)
    o_w = (o_s + tl.arange(0, TILE.BLOCK_S)).to(tl.int64)[:, None] * pairs.size
    p_w = pairs.weights + o_w + (o_r + tl.arange(0, TILE.BLOCK_R))[None, :]
    tl.store(p_w, b_high)
    if TILE.SPLIT_PLAIN or TILE.SPLIT_MASKED:
        tl.store(p_w + pairs.size.to(tl.int64) * pairs.size, b_low)


@triton.jit
def pair_weights_kernel(
    r, s,  # Resident, Streamed
    w_r, w_s,  # their Weights
    pairs,  # Pairs
    temperature, flag,
    TILE, ONLINE: tl.constexpr,
):  # fmt: skip
    if flag is not None:
        if (tl.load(flag) != 0) != ONLINE:
            return
    o_r = tl.program_id(0) * TILE.BLOCK_R
    o_s = tl.program_id(1) * TILE.BLOCK_S
    start_r = pairs.first_r + o_r
    start_s = pairs.first_s + o_s
    logits = logits_of(temperature, r, s)
    if _masked(r, s, start_r, start_s, TILE):
        b_w = _weights(r, s, w_r, w_s, start_r, start_s, logits, TILE, True, ONLINE)
    else:
        b_w = _weights(r, s, w_r, w_s, start_r, start_s, logits, TILE, False, ONLINE)
    _store_weights(pairs, b_w, o_r, o_s, TILE)


@triton.jit
def masked_weights_kernel(
    r, s,  # Resident, Streamed
    w_r, w_s,  # their Weights
    pairs,  # Pairs
    temperature,
    n_tiles,  # of streamed rows
    TILE, TILES: tl.constexpr,  # that a program looks at
):  # fmt: skip
    """Overwrites the weights of masked tiles, after `weights_hopper_kernel`, which takes all for plain."""
    o_r = tl.program_id(0) * TILE.BLOCK_R
    first = tl.program_id(1) * TILES
    logits = logits_of(temperature, r, s)
    for i in range(first, tl.minimum(first + TILES, n_tiles)):
        o_s = i * TILE.BLOCK_S
        if _masked(r, s, pairs.first_r + o_r, pairs.first_s + o_s, TILE):
            b_w = _weights(r, s, w_r, w_s, pairs.first_r + o_r, pairs.first_s + o_s, logits, TILE, True, False)
            _store_weights(pairs, b_w, o_r, o_s, TILE)


@triton.jit
def _load_weights(w, o_m, o_k, size, TRANSPOSED: tl.constexpr):
    """(M, K) weights; TRANSPOSED: the output rows are the streamed rows, which are the rows of w."""
    if TRANSPOSED:
        b_w = tl.load(w + o_m.to(tl.int64)[:, None] * size + o_k[None, :])
    else:
        b_w = tl.trans(tl.load(w + o_k.to(tl.int64)[:, None] * size + o_m[None, :]))
    return b_w


@triton.jit
def _load_rows(z, start, m_d, BLOCK_K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_K rows from `start` on, one block of columns of a working copy; m_d masks columns beyond its width."""
    o_z = tl.arange(0, BLOCK_K)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(z + tl.cast(start, tl.int64) * D + o_z, mask=m_d[None, :], other=0.0)


@triton.jit
def _store_sums(gradient, b_acc, start_m, start_d, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr):
    """Write or add a block of the gradient: BLOCK_M rows of the half, BLOCK_D columns."""
    o_m = start_m + tl.arange(0, BLOCK_M)
    o_d = start_d + tl.arange(0, BLOCK_D)
    m_m = gradient.first + o_m < gradient.n
    b_src = tl.load(gradient.src_N + gradient.first + o_m, mask=m_m, other=0).to(tl.int64)
    p_acc = gradient.sums + b_src[:, None] * gradient.d + o_d[None, :]
    m_acc = m_m[:, None] & (o_d < gradient.d)[None, :]
    if ADD:
        # Each element has one writer per launch, and launches run in sequence, so the order of additions is fixed.
        # Atomic, so that the addition happens in the cache and the old values take no registers.
        tl.atomic_add(p_acc, b_acc, mask=m_acc, sem="relaxed")
    else:
        tl.store(p_acc, b_acc, mask=m_acc)


@triton.jit
def _multiplied(b_w, z, start, m_d, m_t, b_acc, b_tail, TILE):
    """Sums of both blocks of columns plus weights (M, K) times rows from `start` on."""
    b_acc = dot(b_w, _load_rows(z, start, m_d, TILE.BLOCK_K, TILE.D, TILE.BLOCK_D), b_acc)
    if TILE.BLOCK_T > 0:
        b_z = _load_rows(z + TILE.BLOCK_D, start, m_t, TILE.BLOCK_K, TILE.D, TILE.BLOCK_T)
        b_tail = dot(b_w, b_z, b_tail)
    return b_acc, b_tail


@triton.jit
def _product(pairs, half, block_m, TILE, TRANSPOSED: tl.constexpr, ADD: tl.constexpr):
    summed = half.summed
    gradient = half.gradient
    start_m = block_m * TILE.BLOCK_M
    start_d = tl.program_id(1) * (TILE.BLOCK_D + TILE.BLOCK_T)
    o_m = start_m + tl.arange(0, TILE.BLOCK_M)
    b_acc = tl.zeros([TILE.BLOCK_M, TILE.BLOCK_D], tl.float32)
    m_d = start_d + tl.arange(0, TILE.BLOCK_D) < TILE.D
    b_tail = b_acc
    m_t = m_d
    if TILE.BLOCK_T > 0:
        b_tail = tl.zeros([TILE.BLOCK_M, TILE.BLOCK_T], tl.float32)
        m_t = start_d + TILE.BLOCK_D + tl.arange(0, TILE.BLOCK_T) < TILE.D
    w = pairs.weights
    z = summed.z + (summed.first.to(tl.int64) * TILE.D + start_d)
    for i_k in tl.range(0, summed.count, TILE.BLOCK_K):
        b_w = _load_weights(w, o_m, i_k + tl.arange(0, TILE.BLOCK_K), pairs.size, TRANSPOSED)
        b_acc, b_tail = _multiplied(b_w, z, i_k, m_d, m_t, b_acc, b_tail, TILE)
    if TILE.SPLIT_MASKED:  # add the remainders, everywhere or only where classes are shared
        first = 0
        last = summed.count
        if not TILE.SPLIT_PLAIN:
            lo, hi = class_range(gradient, gradient.first + start_m, TILE.ALIGN)
            first = tl.minimum(tl.maximum(lo - summed.first, 0), summed.count)
            last = tl.minimum(tl.maximum(hi - summed.first, 0), summed.count)
        w_low = w + pairs.size.to(tl.int64) * pairs.size
        z_low = z + summed.rows.to(tl.int64) * TILE.D
        for i_k in tl.range(first, last, TILE.BLOCK_K):
            o_k = i_k + tl.arange(0, TILE.BLOCK_K)
            b_w = _load_weights(w, o_m, o_k, pairs.size, TRANSPOSED)
            b_acc, b_tail = _multiplied(b_w, z_low, i_k, m_d, m_t, b_acc, b_tail, TILE)
            b_w = _load_weights(w_low, o_m, o_k, pairs.size, TRANSPOSED)
            b_acc, b_tail = _multiplied(b_w, z, i_k, m_d, m_t, b_acc, b_tail, TILE)
    _store_sums(gradient, b_acc, start_m, start_d, TILE.BLOCK_M, TILE.BLOCK_D, ADD)
    if TILE.BLOCK_T > 0:
        _store_sums(gradient, b_tail, start_m, start_d + TILE.BLOCK_D, TILE.BLOCK_M, TILE.BLOCK_T, ADD)


@triton.jit
def product_kernel(
    one, two, first,  # Half; as `launch_sides` passes them; the second is that of the streamed rows
    pairs,  # Pairs
    TILE,  # Product
):  # fmt: skip
    block_m = tl.program_id(0)
    if first is None:
        _product(pairs, one, block_m, TILE, False, TILE.ADD_ONE)
    else:
        if block_m < first:
            _product(pairs, one, block_m, TILE, False, TILE.ADD_ONE)
            # Otherwise the ends of both ways are merged, and with them accumulators: ptxas would serialise products.
            tl.debug_barrier()
        else:
            _product(pairs, two, block_m - first, TILE, True, TILE.ADD_TWO)
