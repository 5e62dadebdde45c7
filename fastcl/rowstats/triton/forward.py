"""The forward pass over two operands: view pairs, tiles, then statistics and losses."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastcl.kernels.common.arguments import Parts, fixed
from fastcl.kernels.common.launch import Config, launch
from fastcl.kernels.common.launch import waves as planned
from fastcl.kernels.contrastive.forward import forward_kernel, forward_online_kernel
from fastcl.kernels.contrastive.statistics import Wave, finish_kernel
from fastcl.kernels.contrastive.view_pairs import views_kernel
from fastcl.rowstats.triton.operand import ALIGN, WORKSPACE, Call, Operand, row_block


def statistics(
    x: Operand, y: Operand | None, call: Call, flag: Tensor | None, columns: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(stats, counts, losses) of x and, with columns, of y; in source order.

    Args:
        y: the candidates; None: x's rows themselves.
        columns: also compute y's statistics against x, from the same tiles.
    """
    s = x if y is None else y
    found = [results(operand, call) for operand in ((x, s) if columns else (x,))]
    views(x, s, found[0][0], call, y is None)
    if columns:
        views(s, x, found[1][0], call, False)
    _tiles(x, s, call, flag, found, symmetric=y is None)
    if flag is not None:
        for k, (r, other) in enumerate(((x, s), (s, x))[: len(found)]):
            online(r, other, call, flag, found[k][0])
            finish(r, other, call, flag, found[k], Wave(ALIGN, ALIGN, 1, y is None, call.peers, True, True), None)
    return found


def results(operand: Operand, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (stats, counts, losses) of an operand."""

    def empty(rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, operand.n, dtype=dtype, device=operand.z.device)

    counts = 0 if call.codes else 3
    return empty(5, torch.float32), empty(counts, torch.int64), empty(len(call.codes), torch.float32)


def views(x: Operand, y: Operand, stats: Tensor, call: Call, symmetric: bool) -> None:
    """Fill the rows of stats that belong to view pairs; symmetric: y is x."""
    block_n, block_d, warps = row_block(x.width)
    launch(
        views_kernel, (triton.cdiv(x.n, block_n),), warps, 1,
        x=x.source, y=y.source, first_N=x.order[3], last_N=x.order[4], stats=stats, temperature=call.degree,
        BLOCK_N=block_n, BLOCK_D=block_d, SYMMETRIC=symmetric,
    )  # fmt: skip


def _tiles(
    r: Operand, s: Operand, call: Call, flag: Tensor | None, found: list[tuple[Tensor, Tensor, Tensor]], symmetric: bool
) -> None:
    """Process resident rows in waves, each as large as the workspace allows for the sums of streamed rows."""
    both = symmetric or len(found) == 2
    parts = _parts(s, call, apart=symmetric or not both)
    plain = parts[0][0]
    n_blocks, wave, n_splits = waves(r, s, plain, len(parts), int(both), symmetric)
    slots = n_splits * len(parts)
    part_r = torch.empty(slots, 3, r.rows, dtype=torch.float32, device=r.z.device)
    part_s = torch.empty(wave, s.rows, dtype=torch.float32, device=r.z.device) if both else None
    for first in range(0, n_blocks, wave):
        count = min(wave, n_blocks - first)
        last = first + count == n_blocks
        made = Parts(part_r, part_s, first, count, 0)
        _launch_tiles(r, s, call, flag, parts[0], n_splits, symmetric, made)
        if last and len(parts) == 2:
            whole = Parts(part_r, None, 0, triton.cdiv(r.n, parts[1][0].block_r), n_splits)
            _launch_tiles(r, s, call, flag, parts[1], n_splits, symmetric, whole)
        done = Wave(ALIGN, plain.block_r, slots, symmetric, call.peers, first == 0, last)
        if both or last:
            finish(r, s, call, flag, found[0], done, made if symmetric else made._replace(streamed=None))
        if len(found) == 2:
            finish(s, r, call, flag, found[1], done, made._replace(resident=None))


def waves(
    r: Operand, s: Operand, chosen: Config, slots: int, streamed: int, symmetric: bool
) -> tuple[int, int, int]:  # fmt: skip
    """Blocks of resident rows in all and in a wave, and the number of programs that share a block.

    Two fifths of the workspace hold sums of resident rows, the rest sums of streamed rows.

    Args:
        slots: sums of resident rows that a program of each split stores.
        streamed: sums of streamed rows that a block stores; 0: none, so that a single wave suffices.
    """
    n_blocks, tiles = triton.cdiv(r.n, chosen.block_r), triton.cdiv(s.n, chosen.block_s)
    most = max(1, WORKSPACE * 3 // 5 // (4 * s.rows * streamed)) if streamed else n_blocks
    wave, n_splits = planned(n_blocks, most, tiles, chosen.slots, symmetric)
    return n_blocks, wave, min(n_splits, max(1, WORKSPACE * 2 // 5 // (12 * r.rows * slots)))


def _parts(s: Operand, call: Call, apart: bool) -> list[tuple[Config, bool, bool]]:
    """The launches over tiles: tiles, whether it processes plain ones, whether masked ones.

    Args:
        apart: masked tiles may have a launch of their own, because they serve resident rows alone. They have one if the
            table has rows for it: without them, plain tiles can be larger.
    """
    rows = [s.tabled(kernel, call.split) for kernel in ("forward_plain", "forward_masked")]
    if apart and rows[0] is not None and rows[1] is not None:
        return [(rows[0], True, False), (rows[1], False, True)]
    return [(s.chosen("forward", mode), plain, masked) for mode, plain, masked in call.parts]


def _launch_tiles(
    r: Operand, s: Operand, call: Call, flag: Tensor | None, part: tuple[Config, bool, bool], n_splits: int,
    symmetric: bool, made: Parts,
) -> None:  # fmt: skip
    chosen, takes_plain, takes_masked = part
    tile = call.tile(r, chosen)._replace(BLOCK_D=min(r.width, chosen.block_d))
    launch(
        forward_kernel, (made.n_blocks, n_splits), chosen.warps, chosen.stages,
        r=r.resident, s=s.streamed, parts=made, temperature=call.degree, flag=flag,
        TILE=fixed(tile), SYMMETRIC=symmetric, PLAIN=takes_plain, MASKED=takes_masked,
    )  # fmt: skip


def finish(
    r: Operand, s: Operand, call: Call, flag: Tensor | None, found: tuple[Tensor, Tensor, Tensor], wave: Wave,
    made: Parts | None,
) -> None:  # fmt: skip
    """Turn partial sums into statistics, counts and losses.

    Args:
        made: partial sums; None: the statistics are already complete.
    """
    stats, counts, losses = found
    # If the flag may still send all rows through the online kernel, losses are computed after that.
    codes = call.codes if wave.LAST and (flag is None or made is None) else ()
    if not (len(counts) and wave.LAST and made is not None):
        counts = None
    launch(
        finish_kernel, (triton.cdiv(r.n, ALIGN),), 4, 1,
        parts=made or Parts(None, None, 0, 0, 0), layout_5N=r.order, stats=stats, counts=counts, losses=losses,
        flag=flag, temperature=call.degree, n=r.n, n_s=s.n, rows=r.rows, WAVE=fixed(wave), CODES=fixed(codes),
    )  # fmt: skip


def online(r: Operand, s: Operand, call: Call, flag: Tensor, stats: Tensor) -> None:
    """If the flag is set, compute r's statistics with running maxima."""
    chosen = s.chosen("online", "none" if call.split == "none" else "all")
    launch(
        forward_online_kernel, (triton.cdiv(r.n, chosen.block_r),), chosen.warps, 1,
        r=r.resident, s=s.streamed, last_N=r.order[4], src_N=r.order[0], stats=stats, temperature=call.degree,
        flag=flag, TILE=fixed(call.tile(r, chosen)),
    )  # fmt: skip
