"""Arithmetic that several kernels share: temperature and shift, rows of unit norm, products in split half precision.

The working copy z of the rows is half precision. A unit row has entries of at most 1; they are stored times SCALE, so
that the remainder z - half(z), the second half of split precision, stays above half precision's smallest numbers.

Notation in all kernels: b_ a block in registers, o_ offsets, m_ a mask, p_ pointers, i_ an index; r the rows that stay
in a program, s those that stream past it. Logits and log-sum-exps inside tiles are in units of log2.
"""

import os

import triton
import triton.language as tl

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
def inverse_temperature(t, t_value, HAS_T: tl.constexpr):
    """1 / T, from a tensor on the device or from a number of the host."""
    if HAS_T:
        inverse = 1.0 / tl.load(t).to(tl.float32)
    else:
        inverse = 1.0 / t_value
    return inverse


@triton.jit
def shift_log2(inverse_t):
    """What is subtracted from logits, in units of log2, before they are exponentiated."""
    return tl.maximum(inverse_t - HEADROOM, 0.0) * LOG2E


@triton.jit
def logit_scale(inverse_t, scale_r, scale_s, HAS_SCALE: tl.constexpr):
    """Factor from products of working copies to logits."""
    if HAS_SCALE:
        factor = inverse_t / tl.load(scale_r) / tl.load(scale_s)
    else:
        factor = inverse_t / (SCALE * SCALE)
    return factor


@triton.jit
def power_of_two_scale(b_max):
    """s = 2^-floor(log2(max)) by exponent bits.

    The clamp keeps s itself a normal number; at the ends of float32's range s * max is in [2^-23, 4), not in [1, 2).
    """
    b_exponent = b_max.to(tl.int32, bitcast=True) >> 23
    b_exponent = tl.minimum(tl.maximum(b_exponent, 1), 253)
    return ((254 - b_exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def unit_rows(b_x, b_inv, NORMALIZE: tl.constexpr):
    """Rows (R, D) divided by their norms; b_inv (R,) as `prepare_kernel` writes it.

    Not normalised an infinity becomes NaN: of its products in split half precision some would be finite.
    """
    if NORMALIZE:
        b_power = tl.where(b_inv < 0, 8.507059173023462e37, 1.0)  # 2^126
        b_x = b_x * b_power[:, None] * tl.abs(b_inv)[:, None]
    else:
        b_x = tl.where(tl.abs(b_x) < float("inf"), b_x, float("nan"))
    return b_x


@triton.jit
def load_rows(x, x2, o_n, m_n, o_d, d, half, stride, stride2, HAS_TWO: tl.constexpr):
    """Rows o_n of [x; x2], float32 (R, D), zero where masked; x2's first row is row `half`."""
    m_d = o_d[None, :] < d
    o_n = o_n.to(tl.int64)
    if HAS_TWO:
        m_1 = m_n & (o_n < half)
        m_2 = m_n & (o_n >= half)
        b_1 = tl.load(x + o_n[:, None] * stride + o_d[None, :], mask=m_1[:, None] & m_d, other=0.0)
        b_2 = tl.load(x2 + (o_n - half)[:, None] * stride2 + o_d[None, :], mask=m_2[:, None] & m_d, other=0.0)
        b_x = tl.where(m_2[:, None], b_2, b_1).to(tl.float32)
    else:
        b_x = tl.load(x + o_n[:, None] * stride + o_d[None, :], mask=m_n[:, None] & m_d, other=0.0).to(tl.float32)
    return b_x


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
def products(
    zs, zr, b_r, b_r_low, start_s, start_r, low_s, low_r,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Tile (S, R) of inner products, with the streamed rows (S, D) themselves where they come in one piece.

    b_r, b_r_low: the resident rows, used where D == BLOCK_D. low_s, low_r: offsets of the second halves.
    """
    if D == BLOCK_D:
        b_s = load_tile(zs, start_s, BLOCK_S, D, D)
        b_s_low = b_s
        b_p = dot(b_s, tl.trans(b_r), tl.zeros([BLOCK_S, BLOCK_R], tl.float32))
        if SPLIT:
            b_s_low = load_tile(zs + low_s, start_s, BLOCK_S, D, D)
            b_p = dot(b_s, tl.trans(b_r_low), b_p)
            b_p = dot(b_s_low, tl.trans(b_r), b_p)
    else:
        b_s = b_r
        b_s_low = b_r
        b_p = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
        for i_d in tl.range(0, D, BLOCK_D):
            b_s1 = load_tile(zs + i_d, start_s, BLOCK_S, D, BLOCK_D)
            b_r1 = load_tile(zr + i_d, start_r, BLOCK_R, D, BLOCK_D)
            b_p = dot(b_s1, tl.trans(b_r1), b_p)
            if SPLIT:
                b_s2 = load_tile(zs + low_s + i_d, start_s, BLOCK_S, D, BLOCK_D)
                b_r2 = load_tile(zr + low_r + i_d, start_r, BLOCK_R, D, BLOCK_D)
                b_p = dot(b_s1, tl.trans(b_r2), b_p)
                b_p = dot(b_s2, tl.trans(b_r1), b_p)
    return b_p, b_s, b_s_low


@triton.jit
def begin(b_code):
    """Where an interval begins, from its entry in a layout: the position, or minus one less it where it is empty."""
    return tl.where(b_code < 0, -1 - b_code, b_code)


@triton.jit
def class_range(lo_r, hi_r, start_r, n_r, ALIGN: tl.constexpr):
    """The streamed rows, in whole blocks of ALIGN, that may share a class with the resident rows' block of ALIGN.

    Two blocks of ALIGN rows of one operand are either both in each other's range or neither is: which tiles are masked
    is symmetric.
    """
    first = start_r // ALIGN * ALIGN
    last = tl.minimum(first + ALIGN, n_r) - 1
    lo = begin(tl.load(lo_r + first)) // ALIGN * ALIGN
    hi = (tl.load(hi_r + last) + ALIGN - 1) // ALIGN * ALIGN
    return lo, hi


@triton.jit
def relations(lo_r, first_r, cls_s, smp_s, o_r, m_r, o_s, m_s):
    """(S, R) masks: other class, and peer; where a resident row is padding they mean nothing.

    A class (or sample) is known by where it begins among the streamed rows; one that does not occur there by a negative
    number, which is equal to none.
    """
    b_cls_r = tl.load(lo_r + o_r, mask=m_r, other=-1)
    b_smp_r = tl.load(first_r + o_r, mask=m_r, other=-1)
    b_cls_s = tl.load(cls_s + o_s, mask=m_s, other=_NOWHERE)
    b_smp_s = tl.load(smp_s + o_s, mask=m_s, other=_NOWHERE)
    m_same = b_cls_s[:, None] == b_cls_r[None, :]
    return m_s[:, None] & (m_same == 0), m_same & (b_smp_s[:, None] != b_smp_r[None, :])
