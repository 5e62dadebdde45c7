"""The forward pass over two operands: working copies and view pairs, tiles, then statistics and losses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.kernels.common.arguments import Parts, fixed
from fastcl.kernels.common.launch import Config, cdiv, folded, launch, launch_sides
from fastcl.kernels.common.launch import waves as planned
from fastcl.kernels.contrastive.forward import Online, forward_kernel, forward_online_kernel
from fastcl.kernels.contrastive.prepare import Initial
from fastcl.kernels.contrastive.statistics import Finished, Wave, finish_kernel
from fastcl.kernels.contrastive.totals import AT_ONCE, Losses, Ready
from fastcl.rowstats.triton import hopper
from fastcl.rowstats.triton.operand import (
    ALIGN,
    NARROW,
    WORKSPACE,
    Call,
    Operand,
    Source,
    allocated,
    fill,
    online_blocks,
    online_tile,
)

_LEAST = 32  # large tiles of a program of the longest block


class Result(NamedTuple):
    """Statistics of an operand, in source order."""

    stats: Tensor  # (5, n)
    counts: Tensor | None  # (3, n) int64; None if there are objectives, or nobody wants them
    losses: Losses


def statistics(
    x: Source, y: Source | None, call: Call, flag: Tensor | None, columns: bool
) -> tuple[list[Operand], list[Result], Tensor | None]:
    """The operands of x and, if there is one, y; results of x and, with columns, of y; and, if `Call.settles` and the
    temperature is a tensor, a counter for its gradient, (1,) int32 that holds 0.

    Args:
        y: the candidates; None: x's rows themselves.
        columns: also compute y's statistics against x, from the same tiles.
    """
    sources = [x] if y is None else [x, y]
    operands = [allocated(source, call) for source in sources]
    found = results(operands[: 2 if columns else 1], call)
    losses, settles = found[0].losses, found[0].losses.ready is not None
    later = torch.empty(1, dtype=torch.int32, device=x.x.device) if settles and call.temperature is not None else None
    initial = Initial(flag, losses.arrived, later)
    given = [found[k].stats if k < len(found) else None for k in range(len(operands))]
    fill(operands, [source.order for source in sources], call, given, initial)
    a, b = operands[0], operands[-1]
    unlabelled = x.order.views == 2 and x.order.labels is None
    _tiles(a, b, call, flag, found, symmetric=y is None, unlabelled=unlabelled)
    if flag is not None:
        online(operands, call, flag, found)
    return operands, found, later


def results(operands: Sequence[Operand], call: Call) -> list[Result]:
    """Uninitialised results; reduced losses are those of all operands together."""
    device, count = operands[0].z.device, len(call.codes)
    ends = list(accumulate((cdiv(operand.n, ALIGN) * ALIGN for operand in operands), initial=0))
    reduced = call.reduced
    most = ends[-1] // ALIGN * online_blocks(call, device, operands[0].width)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    shared = (None, None, None)
    if reduced:
        total = empty() if count == 1 else empty(count)
        shared = empty(count, most), total, empty(2, dtype=torch.int32)
    settles = call.settles(sum(operand.n for operand in operands))
    scales = (empty(1), empty(most)) if settles else None
    found = []
    for k, operand in enumerate(operands):
        n = operand.n
        rows = None if reduced else empty(count, n)
        ready = None if scales is None else Ready(empty(5, operand.rows), operand.rows, *scales)
        losses = Losses(rows, *shared, ready, call.factor(n) if reduced else 1.0, ends[k], ends[-1])
        found.append(Result(empty(5, n), None if count else empty(3, n, dtype=torch.int64), losses))
    return found


def is_many(found: Sequence[Result], blocks: int) -> bool:
    """`Wave.MANY` for kernels with at most so many programs for each block of rows."""
    return found[0].losses.end // ALIGN * blocks > AT_ONCE.value


def _tiles(
    r: Operand, s: Operand, call: Call, flag: Tensor | None, found: list[Result], symmetric: bool, unlabelled: bool
) -> None:  # fmt: skip
    """Process resident rows in waves, each as large as the workspace allows for the sums of streamed rows.

    Args:
        unlabelled: each block has masked tiles on its diagonal alone.
    """
    two_sided = symmetric or len(found) == 2
    parts = parts_of(s, call, apart=symmetric or not two_sided)
    plain = parts[0][0]
    first_masked, bands = hopper.bands(plain, s) if plain.consumers else (1, 1)
    per_split = first_masked + len(parts) - 1
    n_blocks, wave, n_splits = waves(r, s, plain, per_split, bands if two_sided else 0, symmetric)
    foldable = symmetric and unlabelled and len(parts) == 1 and wave == n_blocks and n_splits > 1
    both = folded(n_blocks, cdiv(s.n, plain.block_s), plain.slots) if foldable else 0
    slots = both or n_splits * per_split
    part_r = torch.empty(slots, 3, r.rows, dtype=torch.float32, device=r.z.device)
    part_s = torch.empty(wave * bands, s.rows, dtype=torch.float32, device=r.z.device) if two_sided else None
    for first in range(0, n_blocks, wave):
        count = min(wave, n_blocks - first)
        last = first + count == n_blocks
        made = Parts(part_r, part_s, first, count, 0)
        launch_tiles(r, s, call, flag, parts[0], n_splits, symmetric, made, both)
        if last and len(parts) == 2:
            whole = Parts(part_r, None, 0, cdiv(r.n, parts[1][0].block_r), n_splits * first_masked)
            launch_tiles(r, s, call, flag, parts[1], n_splits, symmetric, whole)
        each = online_blocks(call, s.z.device, s.width)
        many = is_many(found, each)
        done = Wave(ALIGN, plain.block_r // bands, slots, symmetric, call.peers, first == 0, last, each, many, both)
        if two_sided or last:
            there = cdiv(r.n, plain.block_r // bands) - first * bands  # in the last block a band may have no rows
            summed = made._replace(first_block=first * bands, n_blocks=min(count * bands, there))
            own = summed if symmetric else summed._replace(streamed=None)
            sums = [own, summed._replace(resident=None)][: len(found)]
            finish([r] if symmetric else [r, s], call, flag, found, done, sums)


def waves(
    r: Operand, s: Operand, chosen: Config, slots: int, streamed: int, symmetric: bool
) -> tuple[int, int, int]:  # fmt: skip
    """Blocks of resident rows in all and in a wave, and the number of programs that share a block.

    Two fifths of the workspace hold sums of resident rows, the rest sums of streamed rows.

    Args:
        slots: sums of resident rows that a program of each split stores.
        streamed: sums of streamed rows that a block stores; 0: none, so that a single wave suffices.
    """
    n_blocks, tiles = cdiv(r.n, chosen.block_r), cdiv(s.n, chosen.block_s)
    most = max(1, WORKSPACE * 3 // 5 // (4 * s.rows * streamed)) if streamed else n_blocks
    wave, n_splits = planned(n_blocks, most, tiles, chosen.slots, symmetric)
    if chosen.consumers and s.width > NARROW and wave < n_blocks:  # large tiles: short programs end at about one time
        n_splits = max(n_splits, min(tiles // _LEAST, 16))
    return n_blocks, wave, min(n_splits, max(1, WORKSPACE * 2 // 5 // (12 * r.rows * slots)))


def parts_of(s: Operand, call: Call, apart: bool) -> list[tuple[Config, bool, bool]]:
    """The launches over tiles: tiles, whether it processes plain ones, whether masked ones.

    Args:
        apart: masked tiles may have a launch of their own, because they serve resident rows alone. They have one if the
            table has rows for it, for all but few rows: without them, plain tiles can be larger.
    """
    joint, plain, masked = (s.tabled(f"forward_{kind}", call.split) for kind in ("joint", "plain", "masked"))
    if apart and joint is not None:
        return [(joint, True, True)]
    if apart and (by_hand := hopper.chosen("forward_hopper", s, call)):
        return [(by_hand, True, False), (masked or s.chosen("forward", call.split), False, True)]
    if apart and plain is not None and masked is not None:
        return [(plain, True, False), (masked, False, True)]
    return [(s.chosen("forward", mode), plain, masked) for mode, plain, masked in call.parts]


def launch_tiles(
    r: Operand, s: Operand, call: Call, flag: Tensor | None, part: tuple[Config, bool, bool], n_splits: int,
    symmetric: bool, made: Parts, both: int = 0,
) -> None:  # fmt: skip
    """Launch one of `parts_of` over a wave of resident blocks; `both` programs share two blocks, unless it is 0."""
    chosen, takes_plain, takes_masked = part
    if chosen.consumers:
        hopper.forward(r, s, call, chosen, n_splits, symmetric, made)
        return
    tile = call.tile(r, chosen)._replace(BLOCK_D=min(r.width, chosen.block_d))
    grid = (cdiv(made.n_blocks, 2), both) if both else (made.n_blocks, n_splits)
    launch(
        forward_kernel, grid, chosen.warps, chosen.stages,
        r=r.resident, s=s.streamed, parts=made, temperature=call.degree, flag=flag,
        TILE=fixed(tile), SYMMETRIC=symmetric, PLAIN=takes_plain, MASKED=takes_masked, FOLDED=both > 0,
    )  # fmt: skip


def finish(
    operands: Sequence[Operand], call: Call, flag: Tensor | None, found: Sequence[Result], wave: Wave,
    made: Sequence[Parts],
) -> None:  # fmt: skip
    """Turn partial sums into statistics and, after the last wave, counts and losses.

    Args:
        operands: as `fill` takes them.
        found, made: of the first operand, or of each.
    """
    sides = []
    for r, s, result, parts in zip(operands, operands[::-1], found, made, strict=False):
        stats, counts, losses = result
        wanted = counts if wave.LAST else None
        sides.append(Finished(parts, r.order, stats, wanted, losses, r.n, s.n, r.rows))
    launch_sides(
        finish_kernel, sides, [cdiv(side.n, ALIGN) for side in sides], 4, 1,
        flag=flag, temperature=call.degree, WAVE=fixed(wave), CODES=fixed(call.codes if wave.LAST else ()),
    )  # fmt: skip


def online(operands: Sequence[Operand], call: Call, flag: Tensor, found: Sequence[Result]) -> None:
    """If the flag is set, compute statistics with running maxima, and the losses from these; arguments as `finish`."""
    given = zip(operands, operands[::-1], found, strict=False)
    sides = [Online(r.resident, s.streamed, r.order, result.stats, result.losses) for r, s, result in given]
    chosen = online_tile(call, operands[0].z.device, operands[0].width)
    blocks = [cdiv(side.r.n, ALIGN) * (ALIGN // chosen.block_r) for side in sides]
    launch_sides(
        forward_online_kernel, sides, blocks, chosen.warps, 1,
        temperature=call.degree, flag=flag, TILE=fixed(call.tile(operands[0], chosen)), SYMMETRIC=len(operands) == 1,
        CODES=fixed(call.codes), MANY=is_many(found, ALIGN // chosen.block_r),
    )  # fmt: skip
