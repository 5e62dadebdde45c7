"""The working order of the rows, and the intervals that follow from it.

Rows of a class are contiguous, and within a class so are the views of a sample. The candidates of a row's class are
then one interval [lo, hi) of positions, and those of its sample one interval [first, last) inside it. An unlabelled
sample is a class of its own; these come first if ids are arbitrary.

Few rows are not sorted: a row's position and intervals are the numbers of ids that are less than its own, or equal,
which each program counts for its rows in one pass over all ids.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .prepare import store_layout


class Ids(NamedTuple):
    """The ids of a side's rows."""

    sample_N: Any  # (n,) int64
    label_N: Any  # (n,) int64, -1 where unlabelled; None: no labels
    n: int


@triton.jit
def _count_ids(ids, b_sample, b_label, o_n, CHUNK: tl.constexpr):
    """The intervals of rows' classes and samples among a side's sorted rows, as (start, length, start, length); and how
    many of a row's sample come before position o_n in source order."""
    o_j = tl.arange(0, CHUNK)
    b_less = tl.zeros([o_n.shape[0], CHUNK], tl.int32)
    b_same = b_less
    b_less_in = b_less  # within the class
    b_same_in = b_less
    b_before = b_less
    for start in range(0, ids.n, CHUNK):
        m_j = (start + o_j < ids.n)[None, :]
        b_sample_j = tl.load(ids.sample_N + start + o_j, mask=start + o_j < ids.n, other=0)[None, :]
        m_less = m_j & (b_sample_j < b_sample[:, None])
        m_same = m_j & (b_sample_j == b_sample[:, None])
        m_same_in = m_same
        if ids.label_N is not None:
            b_label_j = tl.load(ids.label_N + start + o_j, mask=start + o_j < ids.n, other=0)[None, :]
            m_none_j = b_label_j == -1
            m_none = (b_label == -1)[:, None]
            m_class = m_j & (b_label_j == b_label[:, None]) & (m_none == 0)
            b_less_in += (m_class & m_less).to(tl.int32)
            m_same_in = m_same & (b_label_j == b_label[:, None])
            m_label = (m_none_j == 0) & (b_label_j < b_label[:, None])
            m_less = (m_none & m_none_j & m_less) | ((m_none == 0) & m_j & (m_none_j | m_label))
            m_same = m_class | (m_none & m_same_in)
        b_less += m_less.to(tl.int32)
        b_same += m_same.to(tl.int32)
        b_same_in += m_same_in.to(tl.int32)
        b_before += (m_same_in & (start + o_j[None, :] < o_n[:, None])).to(tl.int32)
    b_lo = tl.sum(b_less, 1)
    return b_lo, tl.sum(b_same, 1), b_lo + tl.sum(b_less_in, 1), tl.sum(b_same_in, 1), tl.sum(b_before, 1)


@triton.jit
def order_kernel(
    own, other,  # Ids of the rows, and of their candidates
    layout,  # (5, n) int32: source row, lo, hi, first, last; with OWN (7, n): also lo and first among the own rows
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    OWN: tl.constexpr,  # the candidates are other rows
):  # fmt: skip
    """The order for arbitrary ids, by counting: for few rows."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = own.n
    m_n = o_n < n
    b_sample = tl.load(own.sample_N + o_n, mask=m_n, other=0)
    b_label = b_sample
    if own.label_N is not None:
        b_label = tl.load(own.label_N + o_n, mask=m_n, other=0)
    b_lo, b_group, b_first, b_key, b_before = _count_ids(own, b_sample, b_label, o_n, CHUNK)
    p_layout = layout + (b_first + b_before)
    if OWN:
        tl.store(p_layout + 5 * n, b_lo, mask=m_n)
        tl.store(p_layout + 6 * n, b_first, mask=m_n)
        b_lo, b_group, b_first, b_key, _ = _count_ids(other, b_sample, b_label, o_n, CHUNK)
    # The start of an empty interval is stored as -1 - position.
    b_begins = tl.where(b_group > 0, b_lo, -1 - b_lo)
    b_starts = tl.where(b_key > 0, b_first, -1 - b_first)
    store_layout(p_layout, n, o_n, b_begins, b_lo + b_group, b_starts, b_first + b_key, m_n)


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
    order_B,  # (batch,) int64: samples sorted by label
    sorted_B,  # (batch,) int64: labels in that order
    layout_5N,  # (5, n) int32: source row, lo, hi, first, last
    batch,
    n,
    VIEWS: tl.constexpr,  # 2: rows k and k + batch are views of sample k; 1: row k is sample k
    STEPS: tl.constexpr,  # steps of a binary search over the batch
    BLOCK_N: tl.constexpr,
):
    """The order of views whose samples PyTorch has sorted."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    b_k = o_n // VIEWS
    b_first = b_k * VIEWS
    b_sample = tl.load(order_B + b_k, mask=m_n, other=0).to(tl.int32)
    b_label = tl.load(sorted_B + b_k, mask=m_n, other=0)
    # -1 means unlabelled: such a sample is a class of its own.
    b_lo = tl.where(b_label == -1, b_first, bisect(sorted_B, b_label, batch, False, STEPS) * VIEWS)
    b_hi = tl.where(b_label == -1, b_first + VIEWS, bisect(sorted_B, b_label, batch, True, STEPS) * VIEWS)
    b_src = b_sample + o_n % VIEWS * batch
    store_layout(layout_5N + o_n, n, b_src, b_lo, b_hi, b_first, b_first + VIEWS, m_n)
