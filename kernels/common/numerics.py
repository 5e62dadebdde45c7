"""Arithmetic shared by several kernels: temperature, unit rows, products in split half precision, tiles of a block.

The working copy z of the rows is half precision. Entries of a unit row are at most 1; they are stored times SCALE, so
that the remainder z - half(z), the second half of split precision, does not underflow.
"""

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Block, Logits

# Triton's interpreter multiplies bfloat16 as bit patterns; float32 gives the same products exactly.
_WIDEN_BFLOAT16 = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_NOWHERE = tl.constexpr(-(2**31))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SCALE = tl.constexpr(256.0)
# Weights of the backward product are at most 4 in units of the largest derivative; 4 * 2^13 fits half precision.
WEIGHT_SCALE = tl.constexpr(8192.0)
LEAST_DIVISOR = tl.constexpr(1e-30)  # of weights: WEIGHT_SCALE divided by it stays in float32's range
# Exponentials are shifted so that the largest is e^60: float32 can sum 2^20 of them and holds those above e^-87.
HEADROOM = tl.constexpr(60.0)
# Logits of unit rows lie in [-1/T, 1/T]. Up to this 1/T no exponential leaves that range, and inverse sums times
# WEIGHT_SCALE do not overflow: e^(2/T - 60) * 2^13 is below float32's largest number.
SAFE_INVERSE_T = tl.constexpr(69.0)
LAST_INVERSE_T = tl.constexpr(150.0)  # above it hardly any row stays in range: the fixed shift is not tried
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
SMALLEST_SUM = tl.constexpr(8.271806125530277e-25)  # 2^-80: in a smaller sum, terms flushed to zero may matter


@triton.jit
def inverse_temperature(temperature):
    """1 / T."""
    if temperature.tensor is not None:
        inverse = 1.0 / tl.load(temperature.tensor).to(tl.float32)
    elif temperature.scale is not None:
        inverse = tl.load(temperature.scale).to(tl.float32)
    else:
        inverse = 1.0 / temperature.value
    return inverse


@triton.jit
def shift_log2(inverse_t):
    """Shift subtracted from logits before they are exponentiated, in units of log2."""
    return tl.maximum(inverse_t - HEADROOM, 0.0) * LOG2E


@triton.jit
def logits_of(temperature, r, s):
    """Factor and shift that turn products of two sides' working copies into logits."""
    inverse_t = inverse_temperature(temperature)
    if r.scale is None:
        factor = inverse_t / (SCALE * SCALE)
    else:
        factor = inverse_t / tl.load(r.scale) / tl.load(s.scale)
    shift = shift_log2(inverse_t) if temperature.bias is None else -tl.load(temperature.bias).to(tl.float32) * LOG2E
    return Logits(factor * LOG2E, shift)


@triton.jit
def power_of_two_scale(b_max):
    """s = 2^-floor(log2(max)), from the exponent bits.

    The clamp keeps s a normal number; at the ends of float32's range s * max lies in [2^-23, 4) instead of [1, 2).
    """
    b_exponent = b_max.to(tl.int32, bitcast=True) >> 23
    b_exponent = tl.minimum(tl.maximum(b_exponent, 1), 253)
    return ((254 - b_exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_rows(rows, b_src, m_n, o_d, m_d):
    """Load source rows of a side as float32 (R, D), zero where masked."""
    m_d = m_d[None, :]
    b_src = b_src.to(tl.int64)
    if rows.x2 is None:
        p_x = rows.x + b_src[:, None] * rows.stride + o_d[None, :]
        b_x = tl.load(p_x, mask=m_n[:, None] & m_d, other=0.0).to(tl.float32)
    else:
        m_1 = m_n & (b_src < rows.half)
        m_2 = m_n & (b_src >= rows.half)
        p_1 = rows.x + b_src[:, None] * rows.stride + o_d[None, :]
        p_2 = rows.x2 + (b_src - rows.half)[:, None] * rows.stride2 + o_d[None, :]
        b_1 = tl.load(p_1, mask=m_1[:, None] & m_d, other=0.0)
        b_2 = tl.load(p_2, mask=m_2[:, None] & m_d, other=0.0)
        b_x = tl.where(m_2[:, None], b_2, b_1).to(tl.float32)
    return b_x


@triton.jit
def finite_rows(b_x):
    """Rows that are not normalised, with NaN for infinities, whose products in split half precision may be finite."""
    return tl.where(tl.abs(b_x) < float("inf"), b_x, float("nan"))


@triton.jit
def unit_rows(rows, o_n, m_n, o_d, m_d):
    """Working rows o_n of a side: unit rows (R, D) float32, their source rows, their inverse norms.

    If the side is not normalised, rows are returned as they are, with inverse norms 0. Pass both sides of a pair the
    same column mask, so that the compiler knows that their widths are equal.
    """
    b_src = tl.load(rows.src_N + o_n, mask=m_n, other=0)
    b_x = load_rows(rows, b_src, m_n, o_d, m_d)
    if rows.inv_N is None:
        b_inv = tl.zeros(o_n.shape, tl.float32)
        b_x = finite_rows(b_x)
    else:
        b_inv = tl.load(rows.inv_N + o_n, mask=m_n, other=0.0)
        b_power = tl.where(b_inv < 0, 8.507059173023462e37, 1.0)  # 2^126
        b_x = b_x * b_power[:, None] * tl.abs(b_inv)[:, None]
    return b_x, b_src, b_inv


@triton.jit
def dot(b_a, b_b, b_acc):
    """b_acc + b_a b_b for half-precision blocks, accumulated in float32."""
    if _WIDEN_BFLOAT16:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc)


@triton.jit
def split_dot(b_a, b_a_low, b_b, b_b_low, b_acc, SPLIT: tl.constexpr):
    """b_acc + a b; SPLIT: of blocks and their remainders, without the product of both remainders."""
    b_acc = dot(b_a, b_b, b_acc)
    if SPLIT:
        b_acc = dot(b_a, b_b_low, b_acc)
        b_acc = dot(b_a_low, b_b, b_acc)
    return b_acc


@triton.jit
def split_half(b_x, dtype: tl.constexpr):
    """Split x into half(x) and half(x - half(x))."""
    b_high = b_x.to(dtype)
    return b_high, (b_x - b_high.to(tl.float32)).to(dtype)


@triton.jit
def load_tile(z, start, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows start .. start + BLOCK_N, first BLOCK_D columns, of a working copy (., D). Must be in bounds."""
    o_nd = tl.arange(0, BLOCK_N)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(z + tl.cast(start, tl.int64) * D + o_nd)


@triton.jit
def load_block(r, start, TILE, SPLIT: tl.constexpr):
    """Load a resident block. For rows wider than BLOCK_D only the first columns, which `products` does not use."""
    b = load_tile(r.z, start, TILE.BLOCK_R, TILE.D, TILE.BLOCK_D)
    b_low = b
    if SPLIT:
        b_low = load_tile(r.z + r.rows.to(tl.int64) * TILE.D, start, TILE.BLOCK_R, TILE.D, TILE.BLOCK_D)
    return Block(r.z, r.rows, b, b_low, start)


@triton.jit
def pieces(
    z_s, low_s, start_s, z_r, low_r, start_r,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Tile (S, R) of inner products of rows of two working copies, BLOCK_D columns at a time. low_s, low_r: offsets of
    the remainders."""
    b_p = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    for i_d in tl.range(0, D, BLOCK_D):
        b_s = load_tile(z_s + i_d, start_s, BLOCK_S, D, BLOCK_D)
        b_r = load_tile(z_r + i_d, start_r, BLOCK_R, D, BLOCK_D)
        b_s_low = b_s
        b_r_low = b_r
        if SPLIT:
            b_s_low = load_tile(z_s + low_s + i_d, start_s, BLOCK_S, D, BLOCK_D)
            b_r_low = load_tile(z_r + low_r + i_d, start_r, BLOCK_R, D, BLOCK_D)
        b_p = split_dot(b_s, b_s_low, tl.trans(b_r), tl.trans(b_r_low), b_p, SPLIT)
    return b_p


@triton.jit
def products(block, s, start_s, TILE, SPLIT: tl.constexpr, RESIDENT_FIRST: tl.constexpr = False):
    """Tile (S, R) of inner products; also the streamed rows (S, D) and their remainders if D == BLOCK_D.

    The resident rows stay where they are if D == BLOCK_D, as first operand, whose rows the warps share, if
    RESIDENT_FIRST; wider rows of both sides are loaded from memory in pieces.
    """
    low_s = s.rows.to(tl.int64) * TILE.D
    if TILE.D == TILE.BLOCK_D:
        b_s = load_tile(s.z, start_s, TILE.BLOCK_S, TILE.D, TILE.D)
        b_s_low = b_s
        if SPLIT:
            b_s_low = load_tile(s.z + low_s, start_s, TILE.BLOCK_S, TILE.D, TILE.D)
        if RESIDENT_FIRST:
            b_p = tl.zeros([TILE.BLOCK_R, TILE.BLOCK_S], tl.float32)
            b_p = tl.trans(split_dot(block.b, block.b_low, tl.trans(b_s), tl.trans(b_s_low), b_p, SPLIT))
        else:
            b_p = tl.zeros([TILE.BLOCK_S, TILE.BLOCK_R], tl.float32)
            b_p = split_dot(b_s, b_s_low, tl.trans(block.b), tl.trans(block.b_low), b_p, SPLIT)
    else:
        low_r = block.rows.to(tl.int64) * TILE.D
        b_s = block.b
        b_s_low = block.b
        b_p = pieces(
            s.z, low_s, start_s, block.z, low_r, block.start, TILE.BLOCK_S, TILE.BLOCK_R, TILE.D, TILE.BLOCK_D, SPLIT
        )  # fmt: skip
    return b_p, b_s, b_s_low


@triton.jit
def begin(b_code):
    """Start of an interval, from its layout entry; an empty interval stores -1 - position."""
    return tl.where(b_code < 0, -1 - b_code, b_code)


@triton.jit
def class_range(r, start, ALIGN: tl.constexpr):
    """Streamed rows, in whole blocks of ALIGN, that may share a class with the resident rows' block of ALIGN.

    Of two blocks of ALIGN rows of one operand, either each is in the other's range or neither is, so the set of masked
    tiles is symmetric.
    """
    first = start // ALIGN * ALIGN
    last = tl.minimum(first + ALIGN, r.n) - 1
    lo = begin(tl.load(r.lo_N + first)) // ALIGN * ALIGN
    hi = (tl.load(r.hi_N + last) + ALIGN - 1) // ALIGN * ALIGN
    return lo, hi


class Walk(NamedTuple):
    """Inside a kernel: the tiles of streamed rows that a resident block visits. Plain ones: the first n_before from row
    0 on, the others from row hi on. Masked ones: the first n_class from row lo on, then one with padding at `whole`."""

    lo: Any  # class range
    hi: Any
    whole: Any
    n_before: Any
    n_plain: Any
    n_class: Any
    n_masked: Any


@triton.jit
def walk_of(r, s, start_r, TILE, SYMMETRIC: tl.constexpr):
    """The tiles of the resident block at start_r; SYMMETRIC: none behind its class range."""
    lo, hi = class_range(r, start_r, TILE.ALIGN)
    whole = s.n // TILE.BLOCK_S * TILE.BLOCK_S
    n_before = lo // TILE.BLOCK_S
    n_class = (tl.minimum(hi, (s.n + TILE.BLOCK_S - 1) // TILE.BLOCK_S * TILE.BLOCK_S) - lo) // TILE.BLOCK_S
    n_plain = n_before
    n_masked = n_class
    if not SYMMETRIC:
        n_plain += tl.maximum(whole - hi, 0) // TILE.BLOCK_S
        n_masked += tl.where((hi <= whole) & (whole < s.n), 1, 0)
    return Walk(lo, hi, whole, n_before, n_plain, n_class, n_masked)


@triton.jit
def plain_start(walk, i, TILE):
    """First streamed row of plain tile i."""
    return tl.where(i < walk.n_before, i * TILE.BLOCK_S, walk.hi + (i - walk.n_before) * TILE.BLOCK_S)


@triton.jit
def masked_start(walk, i, TILE):
    """First streamed row of masked tile i."""
    return tl.where(i < walk.n_class, walk.lo + i * TILE.BLOCK_S, walk.whole)


@triton.jit
def share(n, split):
    """First and last + 1 of n tiles that the program `split` of a block processes."""
    splits = tl.num_programs(1)
    return n * split // splits, n * (split + 1) // splits


@triton.jit
def coarse_share(n, split, LEAST: tl.constexpr):
    """The same, at least LEAST tiles at a time: if there are few, most programs have none."""
    each = tl.maximum((n + tl.num_programs(1) - 1) // tl.num_programs(1), LEAST)
    first = tl.minimum(split * each, n)
    return first, tl.minimum(first + each, n)


@triton.jit
def relations(r, class_N, sample_N, o_r, o_s, m_s):
    """(S, R) masks of others and of peers; meaningless where a resident row is padding.

    A class (or sample) is identified by its start among the streamed rows. One that does not occur there has a negative
    number, which matches none.
    """
    m_r = o_r < r.n
    b_cls_r = tl.load(r.lo_N + o_r, mask=m_r, other=-1)
    b_smp_r = tl.load(r.first_N + o_r, mask=m_r, other=-1)
    b_cls_s = tl.load(class_N + o_s, mask=m_s, other=_NOWHERE)
    b_smp_s = tl.load(sample_N + o_s, mask=m_s, other=_NOWHERE)
    m_same = b_cls_s[:, None] == b_cls_r[None, :]
    return m_s[:, None] & (m_same == 0), m_same & (b_smp_s[:, None] != b_smp_r[None, :])
