"""The forward pass over two operands: view pairs, tiles, then statistics and losses."""

from __future__ import annotations

from typing import cast

import torch
import triton
from torch import Tensor

from fastcl.kernels.common.arguments import Parts, Tile, fixed
from fastcl.kernels.common.launch import Config, architecture, config, launch
from fastcl.kernels.contrastive.forward import forward_kernel, forward_online_kernel
from fastcl.kernels.contrastive.statistics import Wave, finish_kernel
from fastcl.kernels.contrastive.view_pairs import views_kernel
from fastcl.rowstats.triton.operand import ALIGN, NARROW, Call, Operand, row_block

WORKSPACE = 256 * 2**20  # limit in bytes for partial results
# Target number of programs per launch: two per multiprocessor of the largest cards. Fixed, so that results do not
# depend on the card.
_PROGRAMS = 528


def choose(kernel: str, operand: Operand, mode: str) -> Config:
    """Tile sizes of a launch that streams an operand's rows; the table must have them."""
    return cast(Config, tabled(kernel, operand, mode))


def tabled(kernel: str, operand: Operand, mode: str) -> Config | None:
    """Tile sizes of a launch that streams an operand's rows, from the table; None if it has none."""
    device = operand.z.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return config(kernel, architecture(capability), mode, operand.width, operand.n)


def parts(call: Call) -> tuple[tuple[str, bool, bool], ...]:
    """The launches over tiles: mode of the table, whether it processes plain tiles, whether masked ones.

    If only masked tiles use split precision, they get a separate launch, because they need smaller tiles than others.
    """
    return (("none", True, False), ("peers", False, True)) if call.split == "peers" else ((call.split, True, True),)


def splits(blocks: int, tiles: int) -> int:
    """Number of programs that share a block of resident rows: a power of two, so that few kernels are compiled."""
    wanted = min(_PROGRAMS // max(blocks, 1), tiles // 2, 16)
    return 1 << max(wanted.bit_length() - 1, 0)


def tile(call: Call, r: Operand, chosen: Config, n_splits: int = 1) -> Tile:
    """Constants of a launch over tiles; narrow rows are processed in one piece."""
    block_d = r.width if r.width <= NARROW else chosen.block_d
    split = call.split == "all", call.split != "none"
    return Tile(r.width, chosen.block_r, chosen.block_s, block_d, ALIGN, n_splits, call.peers, *split)


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
    plain = choose("forward", s, parts(call)[0][0])
    n_blocks = triton.cdiv(r.n, plain.block_r)
    # Two fifths of the workspace hold sums of resident rows, the rest sums of streamed rows.
    wave = min(n_blocks, max(1, WORKSPACE * 3 // 5 // (4 * s.rows))) if both else n_blocks
    most = max(1, WORKSPACE * 2 // 5 // (12 * r.rows * len(parts(call))))
    n_splits = min(splits(wave, triton.cdiv(s.n, plain.block_s)), 1 << (most.bit_length() - 1))
    slots = n_splits * len(parts(call))
    part_r = torch.empty(slots, 3, r.rows, dtype=torch.float32, device=r.z.device)
    part_s = torch.empty(wave, s.rows, dtype=torch.float32, device=r.z.device) if both else None
    for first in range(0, n_blocks, wave):
        count = min(wave, n_blocks - first)
        last = first + count == n_blocks
        made = Parts(part_r, part_s, first, count, 0)
        _launch_tiles(r, s, call, flag, plain, n_splits, symmetric, made)
        if last and len(parts(call)) == 2:
            masked = choose("forward", s, "peers")
            whole = Parts(part_r, None, 0, triton.cdiv(r.n, masked.block_r), n_splits)
            _launch_tiles(r, s, call, flag, masked, n_splits, symmetric, whole)
        done = Wave(ALIGN, plain.block_r, slots, symmetric, call.peers, first == 0, last)
        if both or last:
            finish(r, s, call, flag, found[0], done, made if symmetric else made._replace(streamed=None))
        if len(found) == 2:
            finish(s, r, call, flag, found[1], done, made._replace(resident=None))


def _launch_tiles(
    r: Operand, s: Operand, call: Call, flag: Tensor | None, chosen: Config, n_splits: int, symmetric: bool, made: Parts
) -> None:
    _, takes_plain, takes_masked = parts(call)[made.first_slot // n_splits]
    launch(
        forward_kernel, (made.n_blocks, n_splits), chosen.warps, chosen.stages,
        r=r.resident, s=s.streamed, parts=made, temperature=call.degree, flag=flag,
        TILE=fixed(tile(call, r, chosen, n_splits)), SYMMETRIC=symmetric, PLAIN=takes_plain, MASKED=takes_masked,
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
    chosen = choose("online", s, "none" if call.split == "none" else "all")
    launch(
        forward_online_kernel, (triton.cdiv(r.n, chosen.block_r),), chosen.warps, 1,
        r=r.resident, s=s.streamed, last_N=r.order[4], src_N=r.order[0], stats=stats, temperature=call.degree,
        flag=flag, TILE=fixed(tile(call, r, chosen)),
    )  # fmt: skip
