"""`backward_kernel` for plain tiles on sm_90, warp-specialised: one warp copies streamed rows into a ring of stages in
shared memory by TMA; two consumers, a warpgroup each, take every tile for half of the resident rows.

    acc (R / 2, D) += W (R / 2, S) Z_s (S, D)

W goes through shared memory, since ptxas may overwrite a first operand in registers while WGMMA reads it. Written in
Gluon, which Triton's interpreter does not run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common.numerics import logits_of, plain_start, share, walk_of
from ..common.ring import Buffers, Turns, filled, released, stage


@gluon.jit
def _produce(z_r, z_s, b, turns, TILE, RING):
    mbarrier.expect(b.here, RING.CONSUMERS * z_r.block_type.nbytes)
    for k in gl.static_range(RING.CONSUMERS):
        tma.async_copy_global_to_shared(
            z_r, [turns.start_r + k * (TILE.BLOCK_R // RING.CONSUMERS), 0], b.here, b.r.index(k)
        )
    for i in range(turns.last - turns.first):
        at = stage(i, RING)
        start_s = plain_start(turns.walk, turns.first + i, TILE)
        mbarrier.wait(b.empty.index(at), released(i, RING))
        mbarrier.expect(b.full.index(at), z_s.block_type.nbytes)
        tma.async_copy_global_to_shared(z_s, [start_s, 0], b.full.index(at), b.s.index(at))


@gluon.jit
def _consume(WHICH: gl.constexpr, b, b_w, turns, p_w_r, p_w_s, p_acc, logits, TILE, RING):
    """p_w_r, p_acc: of the program's resident rows; p_w_s: weights of all streamed rows."""
    ROWS: gl.constexpr = TILE.BLOCK_R // RING.CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE.BLOCK_S, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE.D, 16])
    o_s = gl.arange(0, TILE.BLOCK_S, gl.SliceLayout(0, layout))
    b_w_r = gl.load(p_w_r + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout)))
    b_zero = gl.zeros([ROWS, TILE.BLOCK_S], gl.float32, layout)
    b_acc = gl.zeros([ROWS, TILE.D], gl.float32, wide)
    mbarrier.wait(b.here, 0)
    for i in range(turns.last - turns.first):
        at = stage(i, RING)
        b_w_s = gl.load(p_w_s + plain_start(turns.walk, turns.first + i, TILE) + o_s)
        mbarrier.wait(b.full.index(at), filled(i, RING))
        b_p = warpgroup_mma(b.r.index(WHICH), b.s.index(at).permute([1, 0]), b_zero, use_acc=False, is_async=True)
        b_p = warpgroup_mma_wait(0, [b_p])
        b_e = gl.exp2(b_p * logits.factor - logits.shift)
        b_w.index(WHICH).store((b_e * (b_w_r[:, None] + b_w_s[None, :])).to(b_w.dtype))
        fence_async_shared()
        b_acc = warpgroup_mma(b_w.index(WHICH), b.s.index(at), b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(0, [b_acc])
        mbarrier.arrive(b.empty.index(at), count=1)
    o_r = WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    gl.store(p_acc + o_r[:, None] * TILE.D + gl.arange(0, TILE.D, gl.SliceLayout(0, wide))[None, :], b_acc)


@gluon.jit
def backward_hopper_kernel(
    r, s,  # Resident, Streamed
    z_r, z_s,  # TMA descriptors of their working copies, in blocks of BLOCK_R / CONSUMERS and of BLOCK_S rows
    w_r, w_s,  # their Weights
    acc,  # Accumulator
    temperature,
    TILE,
    RING,
):  # fmt: skip
    block_r = gl.program_id(0)
    split = gl.program_id(1)
    start_r = (acc.first_block + block_r) * TILE.BLOCK_R
    logits = logits_of(temperature, r, s)
    walk = walk_of(r, s, start_r, TILE, False)
    first, last = share(walk.n_plain, split)
    turns = Turns(walk, first, last, start_r)
    p_acc = acc.sums + (split.to(gl.int64) * acc.rows + block_r * TILE.BLOCK_R) * TILE.D
    p_w_r = w_r.weights + start_r
    p_w_s = w_s.weights

    ROWS: gl.constexpr = TILE.BLOCK_R // RING.CONSUMERS
    b = Buffers(
        gl.allocate_shared_memory(z_r.dtype, [RING.CONSUMERS, ROWS, TILE.D], z_r.layout),
        gl.allocate_shared_memory(z_s.dtype, [RING.STAGES, TILE.BLOCK_S, TILE.D], z_s.layout),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [RING.STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [RING.STAGES, 1], mbarrier.MBarrierLayout()),
    )
    weights: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    b_w = gl.allocate_shared_memory(z_s.dtype, [RING.CONSUMERS, ROWS, TILE.BLOCK_S], weights)
    mbarrier.init(b.here, count=1)
    for i in gl.static_range(RING.STAGES):
        mbarrier.init(b.full.index(i), count=1)
        mbarrier.init(b.empty.index(i), count=RING.CONSUMERS)
    gl.warp_specialize(
        [
            (_consume, (0, b, b_w, turns, p_w_r, p_w_s, p_acc, logits, TILE, RING)),
            (_consume, (1, b, b_w, turns, p_w_r, p_w_s, p_acc, logits, TILE, RING)),
            (_produce, (z_r, z_s, b, turns, TILE, RING)),
        ],
        [4, 1],
        [RING.REGISTERS, 24],
    )
