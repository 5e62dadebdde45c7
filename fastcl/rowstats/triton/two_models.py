"""Two models' forward pass: row statistics of both and the sums over their cosine matrices, from the same tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from fastcl.kernels.common.launch import Config, launch
from fastcl.kernels.common.numerics import SCALE
from fastcl.kernels.contrastive.two_models import twin_kernel
from fastcl.rowstats.pair_sums import PairSums, Profile, three
from fastcl.rowstats.triton.forward import WORKSPACE, choose, finish, online, results, splits, views
from fastcl.rowstats.triton.operand import ALIGN, Call, Operand

# Cosines come from float32 sums. Where a matrix varies by less than this fraction of its mean, in root mean square,
# that is their rounding, and the matrix counts as constant.
_ROUNDING = 2.0**-21
_ELEMENTS = 2**22  # of the working copies, in float64 at a time


def statistics(
    a: Operand, b: Operand, call: Call, flags: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(stats of a, stats of b, counts, sums): (5, n), (5, n), (3, n) in source order, (18,) for `PairStats.unpacked`.

    Args:
        a, b: rows in one order.
        flags: of each model, whether its logits leave the range of a fixed shift.
    """
    found = [results(operand, call) for operand in (a, b)]
    stats_b, counts_b, losses = found[1]
    found[1] = stats_b, counts_b[:0], losses  # the ids are the same, and so are the counts
    profiles = [_profile(operand, call) for operand in (a, b)]
    for operand, (stats, _, _) in zip((a, b), found, strict=True):
        views(operand, operand, stats, call, True)
    squares = _tiles(a, b, call, flags, found, torch.stack([p.shift for p in profiles]).float())
    for operand, flag, (stats, _, _) in zip((a, b), flags, found, strict=True):
        if flag is not None:
            online(operand, operand, call, flag, stats)
    return found[0][0], stats_b, found[0][1], _resolved(squares, *profiles)


def _tiles(
    a: Operand, b: Operand, call: Call, flags: tuple[Tensor | None, Tensor | None],
    found: list[tuple[Tensor, Tensor, Tensor]], means: Tensor,
) -> Tensor:  # fmt: skip
    """Waves of resident rows as in the forward pass of one model; returns |K - L|^2, |K|^2, |L|^2, (3,) float64."""
    wide = max((a, b), key=lambda operand: operand.width)
    plain = choose("twin", wide, "all" if call.split == "all" else "none")
    masked = choose("twin_masked", wide, "none" if call.split == "none" else "all")
    n_blocks, n_masked = (triton.cdiv(a.n, chosen.block_r) for chosen in (plain, masked))
    wave = min(n_blocks, max(1, WORKSPACE * 3 // 5 // (8 * a.rows)))
    most = max(1, WORKSPACE * 2 // 5 // (48 * a.rows))
    n_splits = min(splits(wave, triton.cdiv(a.n, plain.block_s)), 1 << (most.bit_length() - 1))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=a.z.device)

    parts = empty(2, 2 * n_splits, 3, a.rows), empty(2, wave, a.rows)
    pairs = empty(n_blocks * n_splits, 3), empty(n_masked * n_splits, 3)
    for first in range(0, n_blocks, wave):
        count = min(wave, n_blocks - first)
        last = first + count == n_blocks
        _launch_tiles(a, b, call, plain, n_splits, parts, pairs[0], means, (first, count, False))
        if last:
            _launch_tiles(a, b, call, masked, n_splits, parts, pairs[1], means, (0, n_masked, True))
        for k, (operand, flag) in enumerate(zip((a, b), flags, strict=True)):
            partial = {
                "part_r": parts[0][k], "part_s": parts[1][k], "first_block": first, "n_blocks": count,
                "BLOCK_R": plain.block_r, "SLOTS": 2 * n_splits, "OWN": True, "STREAMED": True,
                "FIRST": first == 0, "LAST": last,
            }  # fmt: skip
            finish(operand, operand, call, flag, found[k], True, partial)
    # A plain tile stands for its transpose too.
    return 2 * pairs[0].sum(0, dtype=torch.float64) + pairs[1].sum(0, dtype=torch.float64)


def _launch_tiles(
    a: Operand, b: Operand, call: Call, chosen: Config, n_splits: int, parts: tuple[Tensor, Tensor], pairs: Tensor,
    means: Tensor, blocks: tuple[int, int, bool],
) -> None:  # fmt: skip
    """blocks: the first of the resident blocks, their number, and whether their masked tiles are taken."""
    part_r, part_s = parts
    first, count, takes_masked = blocks
    launch(
        twin_kernel, (count, n_splits), chosen.warps, chosen.stages,
        za=a.z, zb=b.z, lo_N=a.order[1], hi_N=a.order[2], first_N=a.order[3], part_ra=part_r[0], part_sa=part_s[0],
        part_rb=part_r[1], part_sb=part_s[1], pairs=pairs, means=means, t=call.temperature, t_value=call.value, n=a.n,
        rows=a.rows, first_block=first, n_blocks=count, first_slot=n_splits * takes_masked, DA=a.width,
        BLOCK_DA=min(a.width, chosen.block_d), DB=b.width, BLOCK_DB=min(b.width, chosen.block_d),
        BLOCK_R=chosen.block_r, BLOCK_S=chosen.block_s, ALIGN=ALIGN, SPLITS=n_splits, MASKED=takes_masked,
        PEERS=call.peers, SPLIT=call.split == "all" or (takes_masked and call.split == "peers"),
        SPLIT_PAIRS=call.split == "all", HAS_T=call.temperature is not None,
    )  # fmt: skip


def _unit_rows(z: Tensor) -> Iterator[Tensor]:
    """Rows of a working copy, float64, some at a time."""
    for rows in z.split(max(_ELEMENTS // z.shape[2], 1), dim=1):
        yield rows.sum(0, dtype=torch.float64) / SCALE.value


def _profile(operand: Operand, call: Call) -> Profile:
    """Of the rows as the pairs' products see them, rounded: all sums are of the same matrix."""
    z = operand.z[: 2 if call.split == "all" else 1, : operand.n]
    return Profile.of(_unit_rows(z), z.sum((0, 1), dtype=torch.float64) / (SCALE.value * operand.n))


def _resolved(squares: Tensor, a: Profile, b: Profile) -> Tensor:
    """The sums; a matrix that varies by rounding alone counts as constant in them."""
    n = len(a.margins)
    shifts = torch.stack([a.shift, b.shift])
    lives = (squares[1:] > (n * _ROUNDING * shifts).square()) | squares[1:].isnan()
    live_a, live_b = lives.double()
    dd, kk, ll = squares
    inner = torch.stack([(kk + ll - dd) / 2 * live_a * live_b, kk * live_a, ll * live_b])
    models = a.times(live_a), b.times(live_b)
    diagonals = models[0].diagonal, models[1].diagonal
    rows = n * models[0].margins - diagonals[0], n * models[1].margins - diagonals[1]
    return PairSums(inner - three(*diagonals), rows, diagonals, (a.shift, b.shift)).packed()
