"""Arithmetic that several kernels share: temperature and shift, rows of unit norm, products in split half precision.

The working copy z of the rows is half precision. A unit row has entries of at most 1; they are stored times SCALE, so
that the remainder z - half(z), the second half of split precision, stays above half precision's smallest numbers.

Notation in all kernels: b_ a block in registers, o_ offsets, m_ a mask, p_ pointers, i_ an index; r the rows that stay
in a program, s those that stream past it. Logits and log-sum-exps inside tiles are in units of log2.
"""

import os

import triton
import triton.language as tl

from .arguments import Block, Logits

# Triton's interpreter multiplies the bit patterns of bfloat16; as float32 the same products are exact.
_WIDEN_BFLOAT16 = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_NOWHERE = tl.constexpr(-(2**31))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SCALE = tl.constexpr(256.0)
# Weights of the backward product are at most 4 once upstream gradients are: 2^13 of them fill half precision's range.
WEIGHT_SCALE = tl.constexpr(8192.0)
# Exponentials shifted so that the largest is e^60: 2^20 of them can be summed in float32, and those above e^-87 count.
HEADROOM = tl.constexpr(60.0)
# Logits of unit rows lie in [-1/T, 1/T]. Up to this 1/T none falls out of that range, nor do the inverse sums times
# WEIGHT_SCALE: e^(2/T - 60) * 2^13 is below float32's largest number.
SAFE_INVERSE_T = tl.constexpr(69.0)
# Above this 1/T hardly a row stays in range: no use in trying.
LAST_INVERSE_T = tl.constexpr(150.0)
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
SMALLEST_SUM = tl.constexpr(8.271806125530277e-25)  # 2^-80: what was flushed to zero below such a sum may matter


@triton.jit
def inverse_temperature(temperature):
    """1 / T."""
    if temperature.tensor is None:
        inverse = 1.0 / temperature.value
    else:
        inverse = 1.0 / tl.load(temperature.tensor).to(tl.float32)
    return inverse


@triton.jit
def shift_log2(inverse_t):
    """What is subtracted from logits, in units of log2, before they are exponentiated."""
    return tl.maximum(inverse_t - HEADROOM, 0.0) * LOG2E


@triton.jit
def logits_of(temperature, r, s):
    """How products of two sides' working copies become logits."""
    inverse_t = inverse_temperature(temperature)
    if r.scale is None:
        factor = inverse_t / (SCALE * SCALE)
    else:
        factor = inverse_t / tl.load(r.scale) / tl.load(s.scale)
    return Logits(factor * LOG2E, shift_log2(inverse_t))


@triton.jit
def power_of_two_scale(b_max):
    """s = 2^-floor(log2(max)) by exponent bits.

    The clamp keeps s itself a normal number; at the ends of float32's range s * max is in [2^-23, 4), not in [1, 2).
    """
    b_exponent = b_max.to(tl.int32, bitcast=True) >> 23
    b_exponent = tl.minimum(tl.maximum(b_exponent, 1), 253)
    return ((254 - b_exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_rows(rows, b_src, m_n, o_d, m_d):
    """Source rows of a side, float32 (R, D), zero where masked."""
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
    """Rows that are not normalised: an infinity becomes NaN, since of its products in split half precision some would
    be finite."""
    return tl.where(tl.abs(b_x) < float("inf"), b_x, float("nan"))


@triton.jit
def unit_rows(rows, o_n, m_n, o_d, m_d):
    """Working rows o_n of a side: (R, D) float32 divided by their norms, their source rows, their inverse norms.

    Where the side is not normalised, rows are as they are and the inverse norms 0. Both sides of a pair have one width:
    with one mask of columns for both the compiler knows it.
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
    """b_acc + b_a b_b, of half-precision blocks, summed in float32."""
    if _WIDEN_BFLOAT16:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc)


@triton.jit
def split_half(b_x, dtype: tl.constexpr):
    """The two halves of x in split precision: half(x) and half(x - half(x))."""
    b_high = b_x.to(dtype)
    return b_high, (b_x - b_high.to(tl.float32)).to(dtype)


@triton.jit
def load_tile(z, start, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start .. start + BLOCK_N of a working copy (., D), its first BLOCK_D columns; nothing is out of bounds."""
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(z + tl.cast(start, tl.int64) * D + (o_n[:, None] * D + o_d[None, :]))


@triton.jit
def load_block(r, start, TILE, SPLIT: tl.constexpr):
    """A resident block; of rows wider than BLOCK_D its first columns, which `products` does not use."""
    b = load_tile(r.z, start, TILE.BLOCK_R, TILE.D, TILE.BLOCK_D)
    b_low = b
    if SPLIT:
        b_low = load_tile(r.z + r.rows.to(tl.int64) * TILE.D, start, TILE.BLOCK_R, TILE.D, TILE.BLOCK_D)
    return Block(r.z, r.rows, b, b_low, start)


@triton.jit
def products(block, s, start_s, TILE, SPLIT: tl.constexpr):
    """Tile (S, R) of inner products, with the streamed rows (S, D) and their remainders where they come in one piece.

    The block's registers count where D == BLOCK_D; wider rows are taken from memory piece by piece.
    """
    low_s = s.rows.to(tl.int64) * TILE.D
    if TILE.D == TILE.BLOCK_D:
        b_s = load_tile(s.z, start_s, TILE.BLOCK_S, TILE.D, TILE.D)
        b_s_low = b_s
        b_p = dot(b_s, tl.trans(block.b), tl.zeros([TILE.BLOCK_S, TILE.BLOCK_R], tl.float32))
        if SPLIT:
            b_s_low = load_tile(s.z + low_s, start_s, TILE.BLOCK_S, TILE.D, TILE.D)
            b_p = dot(b_s, tl.trans(block.b_low), b_p)
            b_p = dot(b_s_low, tl.trans(block.b), b_p)
    else:
        low_r = block.rows.to(tl.int64) * TILE.D
        b_s = block.b
        b_s_low = block.b
        b_p = tl.zeros([TILE.BLOCK_S, TILE.BLOCK_R], tl.float32)
        for i_d in tl.range(0, TILE.D, TILE.BLOCK_D):
            b_s1 = load_tile(s.z + i_d, start_s, TILE.BLOCK_S, TILE.D, TILE.BLOCK_D)
            b_r1 = load_tile(block.z + i_d, block.start, TILE.BLOCK_R, TILE.D, TILE.BLOCK_D)
            b_p = dot(b_s1, tl.trans(b_r1), b_p)
            if SPLIT:
                b_s2 = load_tile(s.z + low_s + i_d, start_s, TILE.BLOCK_S, TILE.D, TILE.BLOCK_D)
                b_r2 = load_tile(block.z + low_r + i_d, block.start, TILE.BLOCK_R, TILE.D, TILE.BLOCK_D)
                b_p = dot(b_s1, tl.trans(b_r2), b_p)
                b_p = dot(b_s2, tl.trans(b_r1), b_p)
    return b_p, b_s, b_s_low


@triton.jit
def begin(b_code):
    """Where an interval begins, from its entry in a layout: the position, or minus one less it where it is empty."""
    return tl.where(b_code < 0, -1 - b_code, b_code)


@triton.jit
def class_range(r, start, ALIGN: tl.constexpr):
    """The streamed rows, in whole blocks of ALIGN, that may share a class with the resident rows' block of ALIGN.

    Two blocks of ALIGN rows of one operand are either both in each other's range or neither is: which tiles are masked
    is symmetric.
    """
    first = start // ALIGN * ALIGN
    last = tl.minimum(first + ALIGN, r.n) - 1
    lo = begin(tl.load(r.lo_N + first)) // ALIGN * ALIGN
    hi = (tl.load(r.hi_N + last) + ALIGN - 1) // ALIGN * ALIGN
    return lo, hi


@triton.jit
def relations(r, class_N, sample_N, o_r, o_s, m_s):
    """(S, R) masks: other class, and peer; where a resident row is padding they mean nothing.

    A class (or sample) is known by where it begins among the streamed rows; one that does not occur there by a negative
    number, which is equal to none.
    """
    m_r = o_r < r.n
    b_cls_r = tl.load(r.lo_N + o_r, mask=m_r, other=-1)
    b_smp_r = tl.load(r.first_N + o_r, mask=m_r, other=-1)
    b_cls_s = tl.load(class_N + o_s, mask=m_s, other=_NOWHERE)
    b_smp_s = tl.load(sample_N + o_s, mask=m_s, other=_NOWHERE)
    m_same = b_cls_s[:, None] == b_cls_r[None, :]
    return m_s[:, None] & (m_same == 0), m_same & (b_smp_s[:, None] != b_smp_r[None, :])
