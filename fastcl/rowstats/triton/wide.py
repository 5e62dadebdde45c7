"""The gradient of wide rows: the weights of a square block of pairs are stored, then multiplied by the rows."""

from __future__ import annotations

from math import lcm

import torch
import triton
from torch import Tensor

from fastcl.kernels.common.arguments import fixed
from fastcl.kernels.common.launch import Config, cdiv, launch, launch_sides, square
from fastcl.kernels.contrastive import wide
from fastcl.rowstats.triton import hopper
from fastcl.rowstats.triton.operand import ALIGN, WORKSPACE, Call
from fastcl.rowstats.triton.weighted import Side, over_pairs

_MASKED = 24  # tiles of a program that looks for masked ones


def columns(width: int, most: int) -> tuple[int, int]:
    """Columns of a program of `product_kernel`: a power of two, and another one beside it, or 0.

    Blocks of `most` columns, if they exceed the rows by a fourth at most, or if narrower ones for as many programs had
    less than 128 columns: two products for a tile of weights are predicted to be slower there.
    """
    programs = cdiv(width, most)
    each = cdiv(width, 32 * programs) * 32
    block = 1 << (each.bit_length() - 1)
    if 4 * programs * most <= 5 * width or block < min(width, 128):
        return most, 0
    return block, triton.next_power_of_2(each - block)


def accumulate(r: Side, s: Side, call: Call, flag: Tensor | None, acc: Tensor, acc_s: Tensor | None) -> None:
    """Work through square blocks of pairs; in the symmetric case only those on and above the diagonal.

    Args:
        acc: (n, d) float32, the gradient of r's rows in source order.
        acc_s: of s's rows; None: it is not wanted, or s is r.
    """
    halves = 1 if call.split == "none" else 2
    most = int((WORKSPACE / (2 * halves)) ** 0.5) // ALIGN
    chosen = s.operand.chosen("product", call.split)
    width = s.operand.width
    each = ALIGN // chosen.block_r * cdiv(width, sum(columns(width, chosen.block_d)))
    blocks = [x.operand.rows // ALIGN for x in (r, s)]
    size = square(blocks[0], None if r is s else blocks[1], most, each, chosen.slots) * ALIGN
    by_hand = hopper.chosen("weights_hopper", s.operand, call)
    if by_hand:  # blocks of one size, of whole tiles
        rows = max(r.operand.rows, s.operand.rows)
        tile = lcm(by_hand.block_r, by_hand.block_s)
        size = cdiv(rows, cdiv(rows, size) * tile) * tile
    w = torch.empty(halves, size, size, dtype=r.operand.z.dtype, device=acc.device)
    for i in range(0, r.operand.rows, size):
        for j in range(i if r is s else 0, s.operand.rows, size):
            pairs = wide.Pairs(w, i, j, size)
            if by_hand:
                _pair_weights_by_hand(r, s, call, by_hand, pairs)
            else:
                _pair_weights(r, s, call, flag, pairs)
            into_s = acc_s if r is not s else acc if j > i else None
            _product(r, s, call, chosen, pairs, acc, into_s)


def _pair_weights(r: Side, s: Side, call: Call, flag: Tensor | None, pairs: wide.Pairs) -> None:
    size, i, j = pairs.size, pairs.first_r, pairs.first_s
    for online in (False,) if flag is None else (False, True):
        chosen = s.operand.chosen("weights_online" if online else "weights", call.split)
        if call.peers and not online:
            chosen = s.operand.tabled("weights_peers", call.split) or chosen
        grid = min(size, r.operand.rows - i) // chosen.block_r, min(size, s.operand.rows - j) // chosen.block_s
        constants = call.tile(r.operand, chosen)._replace(BLOCK_D=chosen.block_d)  # even for narrow rows
        launch(
            wide.pair_weights_kernel, grid, chosen.warps, chosen.stages,
            **over_pairs(r, s, call, flag), pairs=pairs, TILE=fixed(constants), ONLINE=online,
        )  # fmt: skip


def _pair_weights_by_hand(r: Side, s: Side, call: Call, by_hand: Config, pairs: wide.Pairs) -> None:
    """All tiles as if they were plain, then those that are not."""
    x, y, weights = r.operand, s.operand, (r.weighted, s.weighted)
    hopper.pair_weights(x, y, weights, call, by_hand, pairs)
    chosen = y.chosen("weights", call.split)
    blocks = min(pairs.size, x.rows - pairs.first_r) // chosen.block_r
    tiles = min(pairs.size, y.rows - pairs.first_s) // chosen.block_s
    launch(
        wide.masked_weights_kernel, (blocks, cdiv(tiles, _MASKED)), chosen.warps, chosen.stages,
        r=x.resident, s=y.streamed, w_r=weights[0], w_s=weights[1], pairs=pairs, temperature=call.degree,
        n_tiles=tiles, TILE=fixed(call.tile(x, chosen)), TILES=_MASKED,
    )  # fmt: skip


def _product(
    r: Side, s: Side, call: Call, chosen: Config, pairs: wide.Pairs, acc: Tensor, acc_s: Tensor | None
) -> None:  # fmt: skip
    """Add to acc, and to acc_s unless it is None, what a block of pairs contributes; the first block of a row of blocks
    overwrites what is there."""
    i, j, width = pairs.first_r, pairs.first_s, r.operand.width
    own, other = (r.operand, i), (s.operand, j)
    halves, blocks = [], []
    for (x, first), (y, start), into in (own, other, acc), (other, own, acc_s):
        if into is not None:
            m, count = min(pairs.size, x.rows - first), min(pairs.size, y.rows - start)
            gradient = wide.Gradient(into, x.lists[0], x.lists[1], x.lists[2], x.n, into.shape[1], first)
            halves.append(wide.Half(wide.Summed(y.z, y.rows, start, count), gradient))
            blocks.append(m // chosen.block_r)
    split = call.split == "all", call.split != "none"
    add = j > 0, i > 0 and acc_s is not None
    block, tail = columns(width, chosen.block_d)
    sizes = width, chosen.block_r, chosen.block_s, block, tail, ALIGN
    launch_sides(
        wide.product_kernel, halves, blocks, chosen.warps, chosen.stages, cdiv(width, block + tail),
        pairs=pairs, TILE=fixed(wide.Product(*sizes, *split, *add)),
    )  # fmt: skip
