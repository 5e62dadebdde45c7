"""Kernels like those with published figures on an H100, to hold the model against. They are compiled and never run."""

# pyright: reportGeneralTypeIssues=false
# Type checkers do not know that kernels may loop over tl.range.

import triton
import triton.language as tl


@triton.jit
def _rows(x, first, BLOCK: tl.constexpr, D: tl.constexpr):
    o_n = first + tl.arange(0, BLOCK)
    return tl.load(x + o_n[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def attention_kernel(q, k, v, out, n, scale, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr):
    """softmax(q k') v with running maxima: the forward pass of FlashAttention-2, without a mask."""
    start = tl.program_id(1).to(tl.int64) * n * D
    b_q = _rows(q + start, tl.program_id(0) * BLOCK_R, BLOCK_R, D)
    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_acc = tl.zeros([BLOCK_R, D], tl.float32)
    for i_s in tl.range(0, n, BLOCK_S):
        b_s = tl.dot(b_q, tl.trans(_rows(k + start, i_s, BLOCK_S, D)))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_new[:, None])
        b_shrunk = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrunk + tl.sum(b_p, 1)
        b_acc = b_acc * b_shrunk[:, None]
        b_acc = tl.dot(b_p.to(tl.float16), _rows(v + start, i_s, BLOCK_S, D), b_acc)
        b_max = b_new
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    p_out = out + start + o_r[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(p_out, (b_acc / b_sum[:, None]).to(tl.float16))


@triton.jit
def sigmoid_kernel(q, k, v, out, n, scale, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr):
    """sigmoid(q k') v, the sigmoid by one hyperbolic tangent."""
    start = tl.program_id(1).to(tl.int64) * n * D
    b_q = _rows(q + start, tl.program_id(0) * BLOCK_R, BLOCK_R, D)
    b_acc = tl.zeros([BLOCK_R, D], tl.float32)
    for i_s in tl.range(0, n, BLOCK_S):
        b_k = _rows(k + start, i_s, BLOCK_S, D)
        b_v = _rows(v + start, i_s, BLOCK_S, D)
        b_s = tl.dot(b_q, tl.trans(b_k)) * scale
        b_t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [b_s * 0.5], dtype=tl.float32, is_pure=True, pack=1
        )
        b_acc = tl.dot((b_t * 0.5 + 0.5).to(tl.float16), b_v, b_acc)
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    p_out = out + start + o_r[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(p_out, b_acc.to(tl.float16))


@triton.jit
def matmul_kernel(
    a, b, out, n, depth, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """a b', both stored along the depth."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    p_a = a + o_r[:, None] * depth + o_d[None, :]
    p_b = b + o_s[:, None] * depth + o_d[None, :]
    b_acc = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)
    for _ in tl.range(0, depth, BLOCK_D):
        b_acc = tl.dot(tl.load(p_a), tl.trans(tl.load(p_b)), b_acc)
        p_a += BLOCK_D
        p_b += BLOCK_D
    tl.store(out + o_r[:, None] * n + o_s[None, :], b_acc.to(tl.float16))
