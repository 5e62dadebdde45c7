"""`forward_kernel` for plain tiles on sm_90, warp-specialised: one warp copies streamed rows into a ring of stages in
shared memory by TMA; consumers, a warpgroup each, take the tiles in turn.

Every consumer has a slot of its own for the sums of resident rows. Written in Gluon, which Triton's interpreter does
not run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..common.numerics import logits_of, plain_start, share, walk_of
from ..common.ring import Buffers, Turns, filled, released, stage


@gluon.jit
def _produce(z_r, z_s, b, turns, TILE, RING):
    mbarrier.expect(b.here, z_r.block_type.nbytes)
    tma.async_copy_global_to_shared(z_r, [turns.start_r, 0], b.here, b.r)
    for i in range(turns.last - turns.first):
        at = stage(i, RING)
        start_s = plain_start(turns.walk, turns.first + i, TILE)
        mbarrier.wait(b.empty.index(at), released(i, RING))
        mbarrier.expect(b.full.index(at), z_s.block_type.nbytes)
        tma.async_copy_global_to_shared(z_s, [start_s, 0], b.full.index(at), b.s.index(at))


@gluon.jit
def _sums(
    FIRST: gl.constexpr, b, turns, p_part, m_r, logits, TILE, RING, STREAMED: gl.constexpr, PADDED: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """(R,) sums over every CONSUMERS-th tile; STREAMED: sums of streamed rows go to p_part."""
    o_s = gl.arange(0, TILE.BLOCK_S, gl.SliceLayout(1, layout))
    b_zero = gl.zeros([TILE.BLOCK_S, TILE.BLOCK_R], gl.float32, layout)
    b_sum = b_zero
    for i in range(FIRST, turns.last - turns.first, RING.CONSUMERS):
        at = stage(i, RING)
        mbarrier.wait(b.full.index(at), filled(i, RING))
        b_p = warpgroup_mma(b.s.index(at), b.r.permute([1, 0]), b_zero, use_acc=False, is_async=True)
        b_p = warpgroup_mma_wait(0, [b_p])
        mbarrier.arrive(b.empty.index(at), count=1)
        b_e = gl.exp2(b_p * logits.factor - logits.shift)
        if PADDED:  # padding among the resident rows
            b_e = gl.where(m_r[None, :], b_e, 0.0)
        b_sum += b_e
        if STREAMED:
            gl.store(p_part + plain_start(turns.walk, turns.first + i, TILE) + o_s, gl.sum(b_e, 1))
    return gl.sum(b_sum, 0)


@gluon.jit
def _consume(FIRST: gl.constexpr, b, turns, p_part, p_sum, n_r, rows, logits, TILE, RING, STREAMED: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE.BLOCK_R, 16])
    o_r = turns.start_r + gl.arange(0, TILE.BLOCK_R, gl.SliceLayout(0, layout))
    m_r = o_r < n_r
    mbarrier.wait(b.here, 0)
    if STREAMED and turns.start_r + TILE.BLOCK_R > n_r:
        b_sum = _sums(FIRST, b, turns, p_part, m_r, logits, TILE, RING, STREAMED, True, layout)
    else:
        b_sum = _sums(FIRST, b, turns, p_part, m_r, logits, TILE, RING, STREAMED, False, layout)
    p_sum += FIRST * 3 * rows.to(gl.int64) + o_r
    gl.store(p_sum, b_sum, mask=m_r)
    if TILE.PEERS:
        b_none = gl.zeros([TILE.BLOCK_R], gl.float32, gl.SliceLayout(0, layout))
        gl.store(p_sum + rows, b_none, mask=m_r)
        gl.store(p_sum + 2 * rows, b_none, mask=m_r)


@gluon.jit
def forward_hopper_kernel(
    r, s,  # Resident, Streamed
    z_r, z_s,  # TMA descriptors of their working copies, in blocks of BLOCK_R and BLOCK_S rows
    parts,  # Parts, with CONSUMERS slots for each program of a block
    temperature,
    TILE,
    RING,
    SYMMETRIC: gl.constexpr,
):  # fmt: skip
    # A consumer keeps to its own stages: if it met one for the first time in phase 1, that would count as over already.
    gl.static_assert(RING.STAGES % RING.CONSUMERS == 0)
    # Start the blocks with the most tiles first, so that only short ones run at the end.
    block_r = parts.n_blocks - 1 - gl.program_id(0)
    split = gl.program_id(1)
    start_r = (parts.first_block + block_r) * TILE.BLOCK_R
    logits = logits_of(temperature, r, s)
    walk = walk_of(r, s, start_r, TILE, SYMMETRIC)
    first, last = share(walk.n_plain, split)
    turns = Turns(walk, first, last, start_r)
    STREAMED: gl.constexpr = parts.streamed is not None
    p_part = parts.resident
    if STREAMED:
        p_part = parts.streamed + block_r.to(gl.int64) * s.rows
    slot = parts.first_slot + split * RING.CONSUMERS
    p_sum = parts.resident + slot.to(gl.int64) * 3 * r.rows

    b = Buffers(
        gl.allocate_shared_memory(z_r.dtype, [TILE.BLOCK_R, TILE.D], z_r.layout),
        gl.allocate_shared_memory(z_s.dtype, [RING.STAGES, TILE.BLOCK_S, TILE.D], z_s.layout),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [RING.STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [RING.STAGES, 1], mbarrier.MBarrierLayout()),
    )
    mbarrier.init(b.here, count=1)
    for i in gl.static_range(RING.STAGES):
        mbarrier.init(b.full.index(i), count=1)
        mbarrier.init(b.empty.index(i), count=1)
    if RING.CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, b, turns, p_part, p_sum, r.n, r.rows, logits, TILE, RING, STREAMED)),
                (_consume, (1, b, turns, p_part, p_sum, r.n, r.rows, logits, TILE, RING, STREAMED)),
                (_produce, (z_r, z_s, b, turns, TILE, RING)),
            ],
            [4, 1],
            [RING.REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, b, turns, p_part, p_sum, r.n, r.rows, logits, TILE, RING, STREAMED)),
                (_consume, (1, b, turns, p_part, p_sum, r.n, r.rows, logits, TILE, RING, STREAMED)),
                (_consume, (2, b, turns, p_part, p_sum, r.n, r.rows, logits, TILE, RING, STREAMED)),
                (_produce, (z_r, z_s, b, turns, TILE, RING)),
            ],
            [4, 4, 1],
            [RING.REGISTERS, RING.REGISTERS, 24],
        )
