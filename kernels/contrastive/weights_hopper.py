"""`pair_weights_kernel` for plain tiles on sm_90, warp-specialised: see `multiply_hopper`.

    weights (S, R) = half(exp(Z_s Z_r') (w_s + w_r))

Here the rows of the stored weights, S, are those that stay in a program, and the columns, R, are streamed past them.
Nothing is masked: the side of the square block of pairs is a multiple of both sides of a tile, what lies beyond the
last row is never used, and `masked_weights_kernel` overwrites masked tiles. Written in Gluon, which Triton's
interpreter does not run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..common.multiply_hopper import Tiles, begin_copies, factors_of, multiplied
from ..common.numerics import logits_of, share


@gluon.jit
def _consume(WHICH: gl.constexpr, factors, tiles, p_w_s, p_w_r, p_w, size, logits, TILE, RING, COLUMNS):
    """p_w_s: weights of the program's rows; p_w_r: of its columns; p_w: of its pairs."""
    ROWS: gl.constexpr = TILE.BLOCK_S // RING.CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE.BLOCK_R, 16])
    # A thread stores 8 bytes, four of them 32, for which values change hands by shuffles within a warp.
    stored: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64], [0, 128]], [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]], [], [ROWS, TILE.BLOCK_R],
    )  # fmt: skip
    b_w_s = gl.load(p_w_s + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout)))
    o_r = gl.arange(0, TILE.BLOCK_R, gl.SliceLayout(0, layout))
    p_w += (WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, stored))).to(gl.int64)[:, None] * size
    p_w += gl.arange(0, TILE.BLOCK_R, gl.SliceLayout(0, stored))[None, :]
    if WHICH == 0:
        begin_copies(factors, tiles, RING, COLUMNS)
    for i in range(tiles.count):
        b_p = gl.zeros([ROWS, TILE.BLOCK_R], gl.float32, layout)
        b_p = multiplied(b_p, WHICH, factors, tiles, i, RING, COLUMNS)
        start = i * TILE.BLOCK_R
        b_w_r = gl.load(p_w_r + start + o_r)
        b_e = gl.exp2(b_p * logits.factor - logits.shift)
        b_w = (b_e * (b_w_s[:, None] + b_w_r[None, :])).to(p_w.dtype.element_ty)
        gl.store(p_w + start, gl.convert_layout(b_w, stored))


@gluon.jit
def weights_hopper_kernel(
    r, s,  # Resident, Streamed
    z_r, z_s,  # TMA descriptors of their working copies, in blocks of BLOCK_R and of BLOCK_S / CONSUMERS rows
    w_r, w_s,  # their Weights
    pairs,  # Pairs
    temperature,
    TILE,
    RING,
    COLUMNS,
):  # fmt: skip
    logits = logits_of(temperature, r, s)
    n_tiles = gl.cdiv(gl.minimum(pairs.size, r.rows - pairs.first_r), TILE.BLOCK_R)
    first, last = share(n_tiles, gl.program_id(1))
    o_s = gl.program_id(0) * TILE.BLOCK_S
    start_s = pairs.first_s + o_s
    start_r = pairs.first_r + first * TILE.BLOCK_R
    tiles = Tiles(start_s, start_r, last, 0, last - first)
    p_w_s = w_s.weights + start_s
    p_w_r = w_r.weights + start_r
    p_w = pairs.weights + (o_s.to(gl.int64) * pairs.size + first * TILE.BLOCK_R)
    factors = factors_of(z_s, z_r, RING)
    gl.warp_specialize(
        [
            (_consume, (0, factors, tiles, p_w_s, p_w_r, p_w, pairs.size, logits, TILE, RING, COLUMNS)),
            (_consume, (1, factors, tiles, p_w_s, p_w_r, p_w, pairs.size, logits, TILE, RING, COLUMNS)),
            (_consume, (2, factors, tiles, p_w_s, p_w_r, p_w, pairs.size, logits, TILE, RING, COLUMNS)),
        ],
        [4, 4],
        [RING.REGISTERS, RING.REGISTERS],
    )
