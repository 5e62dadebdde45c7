"""The forward pass: orders, working copies, tiles, then statistics and losses."""

from __future__ import annotations

from typing import cast

import torch
import triton
from torch import Tensor

from fastcl.kernels.common.launch import Config, architecture, config, launch
from fastcl.kernels.contrastive.forward import forward_kernel, forward_online_kernel
from fastcl.kernels.contrastive.forward_epilogue import finish_kernel
from fastcl.kernels.contrastive.view_pairs import views_kernel
from fastcl.rowstats.triton.operand import ALIGN, NARROW, Call, Operand, row_block

WORKSPACE = 256 * 2**20  # bytes that partial results may take
# Programs that a launch should have: two for each multiprocessor of the largest cards. Fixed, and so are the results.
_PROGRAMS = 528


def choose(kernel: str, operand: Operand, mode: str) -> Config:
    """Tile sizes of a launch that streams an operand's rows, where the table has them."""
    return cast(Config, tabled(kernel, operand, mode))


def tabled(kernel: str, operand: Operand, mode: str) -> Config | None:
    """Tile sizes of a launch that streams an operand's rows, from the table; None where it has none."""
    device = operand.z.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return config(kernel, architecture(capability), mode, operand.width, operand.n)


def parts(call: Call) -> tuple[tuple[str, bool, bool], ...]:
    """The launches over tiles: mode of the table, whether it takes plain tiles, whether masked ones.

    Split precision in masked tiles alone has a launch of its own: it needs smaller tiles than the others can afford.
    """
    return (("none", True, False), ("peers", False, True)) if call.split == "peers" else ((call.split, True, True),)


def splits(blocks: int, tiles: int) -> int:
    """Programs that share a block of resident rows: a power of two, so that few kernels are compiled."""
    wanted = min(_PROGRAMS // max(blocks, 1), tiles // 2, 16)
    return 1 << max(wanted.bit_length() - 1, 0)


def scaling(call: Call, flag: Tensor | None, r: Operand, s: Operand) -> dict:
    """Arguments on temperature, scale and flag that all kernels over tiles take."""
    return {
        "scale_r": r.scale, "scale_s": s.scale, "flag": flag, "t": call.temperature, "t_value": call.value,
    }  # fmt: skip


def switches(call: Call, flag: Tensor | None) -> dict:
    """The constant arguments that go with `scaling`."""
    return {
        "HAS_T": call.temperature is not None, "HAS_SCALE": not call.normalize, "HAS_FLAG": flag is not None,
    }  # fmt: skip


def sides(r: Operand, s: Operand) -> dict:
    """Arguments on the resident and the streamed rows that all kernels over tiles take first."""
    return {
        "zr": r.z, "zs": s.z, "lo_r": r.order[1], "hi_r": r.order[2], "first_r": r.order[3],
        "cls_s": s.class_begin(), "smp_s": s.sample_begin(),
    }  # fmt: skip


def statistics(
    x: Operand, y: Operand | None, call: Call, flag: Tensor | None, columns: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(stats, counts, losses) of x and, with columns, of y; in source order.

    Args:
        y: the candidates; None: x's rows themselves.
        columns: y's statistics against x too, from the same tiles.
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
            finish(r, other, call, flag, found[k], y is None, sums=False)
    return found


def results(operand: Operand, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for an operand's (stats, counts, losses)."""

    def empty(rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, operand.n, dtype=dtype, device=operand.z.device)

    counts = 0 if call.codes else 3
    return empty(5, torch.float32), empty(counts, torch.int64), empty(len(call.codes), torch.float32)


def views(x: Operand, y: Operand, stats: Tensor, call: Call, symmetric: bool) -> None:
    """Fill the rows of stats that are about view pairs; symmetric: y is x."""
    block_n, block_d, warps = row_block(x.width)
    arguments = x.source("x") | y.source("y")
    launch(
        views_kernel, (triton.cdiv(x.n, block_n),), warps, 1,
        **arguments, first_N=x.order[3], last_N=x.order[4], stats=stats, t=call.temperature, t_value=call.value, n=x.n,
        d=x.x.shape[1], BLOCK_N=block_n, BLOCK_D=block_d, SYMMETRIC=symmetric, NORMALIZE=call.normalize,
        HAS_TWO=x.x2 is not None, HAS_T=call.temperature is not None,
    )  # fmt: skip


def _tiles(
    r: Operand, s: Operand, call: Call, flag: Tensor | None, found: list[tuple[Tensor, Tensor, Tensor]], symmetric: bool
) -> None:
    """Waves of resident rows, as many at a time as the workspace holds sums of streamed rows for."""
    both = symmetric or len(found) == 2
    plain = choose("forward", s, parts(call)[0][0])
    n_blocks = triton.cdiv(r.n, plain.block_r)
    # Two fifths of the workspace for the sums of resident rows, the rest for those of streamed rows.
    wave = min(n_blocks, max(1, WORKSPACE * 3 // 5 // (4 * s.rows))) if both else n_blocks
    most = max(1, WORKSPACE * 2 // 5 // (12 * r.rows * len(parts(call))))
    n_splits = min(splits(wave, triton.cdiv(s.n, plain.block_s)), 1 << (most.bit_length() - 1))
    slots = n_splits * len(parts(call))
    part_r = torch.empty(slots, 3, r.rows, dtype=torch.float32, device=r.z.device)
    part_s = torch.empty(wave if both else 0, s.rows, dtype=torch.float32, device=r.z.device)
    for first in range(0, n_blocks, wave):
        count = min(wave, n_blocks - first)
        last = first + count == n_blocks
        shared = {"part_r": part_r, "part_s": part_s, "first_block": first, "n_blocks": count}
        _launch_tiles(r, s, call, flag, plain, n_splits, symmetric, both, 0, shared)
        if last and len(parts(call)) == 2:
            masked = choose("forward", s, "peers")
            whole = shared | {"first_block": 0, "n_blocks": triton.cdiv(r.n, masked.block_r)}
            _launch_tiles(r, s, call, flag, masked, n_splits, symmetric, False, 1, whole)
        partial = shared | {"BLOCK_R": plain.block_r, "SLOTS": slots, "FIRST": first == 0, "LAST": last}
        if both or last:
            finish(r, s, call, flag, found[0], symmetric, partial | {"OWN": True, "STREAMED": symmetric})
        if len(found) == 2:
            finish(s, r, call, flag, found[1], False, partial | {"OWN": False, "STREAMED": True})


def _launch_tiles(
    r: Operand, s: Operand, call: Call, flag: Tensor | None, chosen: Config, n_splits: int,
    symmetric: bool, both: bool, part: int, shared: dict,
) -> None:  # fmt: skip
    _, takes_plain, takes_masked = parts(call)[part]
    launch(
        forward_kernel, (shared["n_blocks"], n_splits), chosen.warps, chosen.stages,
        **sides(r, s), **shared, **scaling(call, flag, r, s), n_r=r.n, n_s=s.n, rows_r=r.rows, rows_s=s.rows,
        first_slot=part * n_splits, D=r.width, BLOCK_R=chosen.block_r, BLOCK_S=chosen.block_s,
        BLOCK_D=r.width if r.width <= NARROW else chosen.block_d, ALIGN=ALIGN, SPLITS=n_splits, SYMMETRIC=symmetric,
        BOTH=both, PLAIN=takes_plain, MASKED=takes_masked, PEERS=call.peers, SPLIT_PLAIN=call.split == "all",
        SPLIT_MASKED=call.split != "none", **switches(call, flag),
    )  # fmt: skip


def finish(
    r: Operand, s: Operand, call: Call, flag: Tensor | None, found: tuple[Tensor, Tensor, Tensor],
    symmetric: bool, partial: dict | None = None, sums: bool = True,
) -> None:  # fmt: skip
    """From partial sums to statistics, counts and losses.

    Args:
        partial: arguments of `finish_kernel` on partial sums; None: there are none.
        sums: False: the statistics are there already.
    """
    stats, counts, losses = found
    # Where the flag may yet send all rows through the online kernel, losses come after it.
    codes = call.codes if flag is None or not sums else ()
    codes = codes if partial is None or partial["LAST"] else ()
    partial = partial or {
        "part_r": stats, "part_s": stats, "first_block": 0, "n_blocks": 0, "BLOCK_R": ALIGN, "SLOTS": 1, "OWN": False,
        "STREAMED": False, "FIRST": True, "LAST": True,
    }  # fmt: skip
    launch(
        finish_kernel, (triton.cdiv(r.n, ALIGN),), 4, 1,
        layout_5N=r.order, stats=stats, counts=counts, losses=losses, flag=flag, t=call.temperature,
        t_value=call.value, n=r.n, n_s=s.n, rows=r.rows, BLOCK_N=ALIGN, SYMMETRIC=symmetric, PEERS=call.peers,
        SUMS=sums, COUNTS=len(counts) > 0 and partial["LAST"] and sums, K=len(codes),
        CODES=call.packed_codes if codes else 0, HAS_T=call.temperature is not None, HAS_FLAG=flag is not None,
        **partial,
    )  # fmt: skip


def online(r: Operand, s: Operand, call: Call, flag: Tensor, stats: Tensor) -> None:
    """Where the flag is set, r's statistics about running maxima."""
    chosen = choose("online", s, "none" if call.split == "none" else "all")
    launch(
        forward_online_kernel, (triton.cdiv(r.n, chosen.block_r),), chosen.warps, 1,
        **sides(r, s), last_r=r.order[4], src_r=r.order[0], stats=stats, **scaling(call, flag, r, s), n_r=r.n,
        n_s=s.n, rows_r=r.rows, rows_s=s.rows, D=r.width, BLOCK_R=chosen.block_r, BLOCK_S=chosen.block_s,
        BLOCK_D=r.width if r.width <= NARROW else chosen.block_d, PEERS=call.peers, SPLIT=call.split != "none",
        HAS_T=call.temperature is not None, HAS_SCALE=not call.normalize,
    )  # fmt: skip
