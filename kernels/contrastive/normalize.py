"""Unit rows and their inverse norms: the first step of the row statistics.

Forward, for each row x of d elements:

    z = x / |x|        inv_norm = 1 / |x|

Backward, the Jacobian of the normalisation:

    dx = inv_norm * (dz - z <z, dz>)

Squares of float32 overflow above 1.8e19 and vanish below 1e-23, so each row is first multiplied by a power of two s
that brings its largest absolute value into [1, 2). That product is exact, the sum of squares q of s x lies in [1, 4 d),
and z = (s x) / sqrt(q), inv_norm = s / sqrt(q). One pass finds both the largest value and q: when a later block of
columns raises the maximum, the sum so far is rescaled, exactly again.

    row                          z               inv_norm
    zero                         0               0, so that its gradient is zero
    with a NaN or an infinity    NaN             NaN
    norm at most 2^-128          the unit row    largest finite float32 in place of an infinity: the gradient keeps its
                                                 direction, and no 0 * inf turns it into NaN

Notation: x_ND the input, z_ND float32 unit rows, r_N float32 inverse norms; b_ block in registers, o_ offset, m_ mask,
p_ pointer, i_ index.
"""

import torch
import triton
import triton.language as tl

_TILE = 2048  # elements of a tile: 16 per thread with 4 warps
_MAX_BLOCK_D = 1024
_WARPS = 4


@triton.jit
def _power_of_two_scale(b_max):
    # s = 2^-floor(log2(max)) by exponent bits. The clamp keeps s itself a normal number; at the ends of float32's range
    # s * max is then in [2^-23, 4) instead of [1, 2).
    b_exponent = b_max.to(tl.int32, bitcast=True) >> 23
    b_exponent = tl.minimum(tl.maximum(b_exponent, 1), 253)
    return ((254 - b_exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def normalize_fwd_kernel(
    x_ND,  # (n, d) float32, float16 or bfloat16, any strides
    z_ND,  # (n, d) float32, contiguous
    r_N,  # (n,) float32
    n,
    d,
    stride_xn,
    stride_xd,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    p_x = x_ND + o_n[:, None] * stride_xn
    p_z = z_ND + o_n[:, None] * d

    b_max = tl.zeros([BLOCK_N], tl.float32)
    b_s = _power_of_two_scale(b_max)
    b_q = tl.zeros([BLOCK_N], tl.float32)
    for i_d in range(0, d, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D).to(tl.int64)
        m_nd = m_n[:, None] & (o_d < d)[None, :]
        b_x = tl.load(p_x + o_d[None, :] * stride_xd, mask=m_nd, other=0.0).to(tl.float32)
        b_max = tl.maximum(b_max, tl.max(tl.abs(b_x), 1))
        b_s_new = _power_of_two_scale(b_max)
        b_ratio = tl.div_rn(b_s_new, b_s)
        b_u = b_x * b_s_new[:, None]
        b_q = b_q * b_ratio * b_ratio + tl.sum(b_u * b_u, 1)
        b_s = b_s_new

    b_r = tl.where(b_q == 0.0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(b_q)))
    # Written as q < inf so that a NaN falls on the same side as an infinity (maxima skip NaN, sums do not).
    b_r = tl.where(b_q < float("inf"), b_r, float("nan"))
    b_inv = b_r * b_s
    b_inv = tl.where(b_inv == float("inf"), 3.4028234663852886e38, b_inv)
    tl.store(r_N + o_n, b_inv, mask=m_n)

    for i_d in range(0, d, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D).to(tl.int64)
        m_nd = m_n[:, None] & (o_d < d)[None, :]
        b_x = tl.load(p_x + o_d[None, :] * stride_xd, mask=m_nd, other=0.0).to(tl.float32)
        tl.store(p_z + o_d[None, :], b_x * b_s[:, None] * b_r[:, None], mask=m_nd)


@triton.jit
def normalize_bwd_kernel(
    z_ND,  # (n, d) float32, contiguous
    r_N,  # (n,) float32
    dz_ND,  # (n, d) float32, float16 or bfloat16, any strides
    dx_ND,  # (n, d), contiguous
    n,
    d,
    stride_dzn,
    stride_dzd,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    p_z = z_ND + o_n[:, None] * d
    p_dz = dz_ND + o_n[:, None] * stride_dzn
    p_dx = dx_ND + o_n[:, None] * d

    b_dot = tl.zeros([BLOCK_N], tl.float32)
    for i_d in range(0, d, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D).to(tl.int64)
        m_nd = m_n[:, None] & (o_d < d)[None, :]
        b_z = tl.load(p_z + o_d[None, :], mask=m_nd, other=0.0)
        b_dz = tl.load(p_dz + o_d[None, :] * stride_dzd, mask=m_nd, other=0.0).to(tl.float32)
        b_dot += tl.sum(b_z * b_dz, 1)

    b_r = tl.load(r_N + o_n, mask=m_n, other=0.0)
    for i_d in range(0, d, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D).to(tl.int64)
        m_nd = m_n[:, None] & (o_d < d)[None, :]
        b_z = tl.load(p_z + o_d[None, :], mask=m_nd, other=0.0)
        b_dz = tl.load(p_dz + o_d[None, :] * stride_dzd, mask=m_nd, other=0.0).to(tl.float32)
        b_dx = b_r[:, None] * (b_dz - b_z * b_dot[:, None])
        tl.store(p_dx + o_d[None, :], b_dx.to(dx_ND.dtype.element_ty), mask=m_nd)


def block_sizes(d: int) -> tuple[int, int]:
    """Rows and columns of a tile for rows of d elements."""
    block_d = min(triton.next_power_of_2(max(d, 1)), _MAX_BLOCK_D)
    return _TILE // block_d, block_d


def normalize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides each row by its Euclidean norm; rows of any finite size neither overflow nor underflow.

    Reads n d elements of x and writes 4 n d + 4 n bytes; a row is read twice, the second time from cache.

    Args:
        x: (n, d), float32, float16 or bfloat16, any strides.

    Returns:
        z: (n, d) float32, unit rows (zero for a zero row), and inv_norm: (n,) float32 (zero for a zero row).
    """
    n, d = x.shape
    z = torch.empty((n, d), dtype=torch.float32, device=x.device)
    inv_norm = torch.empty(n, dtype=torch.float32, device=x.device)
    block_n, block_d = block_sizes(d)
    with torch.cuda.device_of(x):
        normalize_fwd_kernel[(triton.cdiv(n, block_n),)](
            x, z, inv_norm, n, d, *x.stride(), BLOCK_N=block_n, BLOCK_D=block_d, num_warps=_WARPS
        )
    return z, inv_norm


def normalize_rows_backward(
    z: torch.Tensor, inv_norm: torch.Tensor, dz: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Gradient of the rows from the gradient of the unit rows, for one upstream gradient.

    Args:
        z, inv_norm: what `normalize_rows` returned.
        dz: (n, d), float32, float16 or bfloat16, any strides.
        dtype: the dtype of the result, that of x.

    Returns:
        dx: (n, d) of the given dtype; infinite where the gradient exceeds its range.
    """
    n, d = z.shape
    dx = torch.empty((n, d), dtype=dtype, device=z.device)
    block_n, block_d = block_sizes(d)
    with torch.cuda.device_of(z):
        normalize_bwd_kernel[(triton.cdiv(n, block_n),)](
            z, inv_norm, dz, dx, n, d, *dz.stride(), BLOCK_N=block_n, BLOCK_D=block_d, num_warps=_WARPS
        )
    return dx
