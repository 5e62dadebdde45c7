"""Working order of the rows, if it follows from the call: two views of each sample, or paired towers.

Rows of a class are contiguous, and within a class so are the views of a sample. The candidates of a row's class are
then one interval [lo, hi) of positions, and those of its sample one interval [first, last) inside it.
"""

import triton
import triton.language as tl


@triton.jit
def bisect(sorted_N, b_value, n, RIGHT: tl.constexpr, STEPS: tl.constexpr):
    """Position of the first of n ascending int64 numbers that is not less (RIGHT: that is greater) than b_value."""
    b_lo = tl.zeros_like(b_value).to(tl.int32)
    b_hi = b_lo + n
    for _ in range(STEPS):
        b_mid = (b_lo + b_hi) // 2
        m_open = b_lo < b_hi
        b_at = tl.load(sorted_N + b_mid, mask=m_open, other=0)
        m_less = m_open & ((b_at <= b_value) if RIGHT else (b_at < b_value))
        b_lo = tl.where(m_less, b_mid + 1, b_lo)
        b_hi = tl.where(m_open & (m_less == 0), b_mid, b_hi)
    return b_lo


@triton.jit
def layout_kernel(
    order_B,  # (batch,) int64: samples sorted by label; unused without labels
    sorted_B,  # (batch,) int64: labels in that order
    layout_5N,  # (5, n) int32: source row, lo, hi, first, last
    batch,
    n,
    VIEWS: tl.constexpr,  # 2: rows k and k + batch are views of sample k; 1: row k is sample k, in both towers
    LABELLED: tl.constexpr,
    STEPS: tl.constexpr,  # steps of a binary search over the batch
    BLOCK_N: tl.constexpr,
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    b_k = o_n // VIEWS
    b_first = b_k * VIEWS
    b_sample = b_k
    b_lo = b_first
    b_hi = b_first + VIEWS
    if LABELLED:
        b_sample = tl.load(order_B + b_k, mask=m_n, other=0).to(tl.int32)
        b_label = tl.load(sorted_B + b_k, mask=m_n, other=0)
        # -1 means unlabelled: such a sample is a class of its own.
        b_lo = tl.where(b_label == -1, b_lo, bisect(sorted_B, b_label, batch, False, STEPS) * VIEWS)
        b_hi = tl.where(b_label == -1, b_hi, bisect(sorted_B, b_label, batch, True, STEPS) * VIEWS)
    p_layout = layout_5N + o_n
    tl.store(p_layout, b_sample + o_n % VIEWS * batch, mask=m_n)
    tl.store(p_layout + n, b_lo, mask=m_n)
    tl.store(p_layout + 2 * n, b_hi, mask=m_n)
    tl.store(p_layout + 3 * n, b_first, mask=m_n)
    tl.store(p_layout + 4 * n, b_first + VIEWS, mask=m_n)
