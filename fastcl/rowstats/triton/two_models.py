"""Forward pass for two models: row statistics of both, and sums over their cosine matrices, from the same tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcl.kernels.common.arguments import Parts, fixed
from fastcl.kernels.common.launch import Config, cdiv, launch
from fastcl.kernels.common.numerics import SCALE
from fastcl.kernels.contrastive.prepare import Initial
from fastcl.kernels.contrastive.statistics import Wave
from fastcl.kernels.contrastive.two_models import twin_kernel
from fastcl.rowstats.pair_sums import PairSums, Profile, three
from fastcl.rowstats.triton.forward import Result, finish, online, results, waves
from fastcl.rowstats.triton.operand import ALIGN, Call, Operand, Source, allocated, fill
from fastcl.rowstats.triton.working_order import Order

# Cosines come from float32 sums. If a matrix's root mean square deviation is below this fraction of its mean, it is
# rounding error, and the matrix counts as constant.
_ROUNDING = 2.0**-21
_ELEMENTS = 2**22  # elements of the working copies converted to float64 at a time


def statistics(
    za: Tensor, zb: Tensor, order: Order, call: Call, flags: tuple[Tensor | None, Tensor | None]
) -> tuple[tuple[Operand, Operand], tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """The operands of both models, and (stats of a, stats of b, counts, sums): (5, n), (5, n), (3, n) in source order,
    (18,) for `PairStats.unpacked`.

    Args:
        za, zb: rows of the same samples.
        flags: for each model, whether its logits leave the range of a fixed shift.
    """
    a, b = (allocated(Source(z, None, order), call) for z in (za, zb))
    found = [results([operand], call)[0] for operand in (a, b)]
    found[1] = found[1]._replace(counts=None)  # same ids, hence same counts: not computed twice
    for operand, flag, result in zip((a, b), flags, found, strict=True):
        fill([operand], [order], call, [result.stats], Initial(flag, None, None))
    profiles = [_profile(operand, call) for operand in (a, b)]
    squares = _tiles(a, b, call, flags, found, torch.stack([p.shift for p in profiles]).float())
    for operand, flag, result in zip((a, b), flags, found, strict=True):
        if flag is not None:
            online([operand], call, flag, [result])
    return (a, b), (found[0].stats, found[1].stats, found[0].counts, _resolved(squares, *profiles))


def _tiles(
    a: Operand, b: Operand, call: Call, flags: tuple[Tensor | None, Tensor | None],
    found: list[Result], means: Tensor,
) -> Tensor:  # fmt: skip
    """Waves of resident rows, as in the forward pass of one model; returns |K - L|^2, |K|^2, |L|^2, (3,) float64."""
    wide = max((a, b), key=lambda operand: operand.width)
    plain = wide.chosen("twin", "all" if call.split == "all" else "none")
    masked = wide.chosen("twin_masked", "none" if call.split == "none" else "all")
    n_blocks, wave, n_splits = waves(a, a, plain, slots=4, streamed=2, symmetric=True)  # of both models
    n_masked = cdiv(a.n, masked.block_r)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=a.z.device)

    resident, streamed = empty(2, 2 * n_splits, 3, a.rows), empty(2, wave, a.rows)
    pairs = empty(n_blocks * n_splits, 3), empty(n_masked * n_splits, 3)
    for first in range(0, n_blocks, wave):
        count = min(wave, n_blocks - first)
        last = first + count == n_blocks
        made = [Parts(r, s, first, count, 0) for r, s in zip(resident, streamed, strict=True)]
        _launch_tiles(a, b, call, plain, n_splits, made, pairs[0], means, False)
        if last:
            whole = [Parts(r, s, 0, n_masked, n_splits) for r, s in zip(resident, streamed, strict=True)]
            _launch_tiles(a, b, call, masked, n_splits, whole, pairs[1], means, True)
        done = Wave(ALIGN, plain.block_r, 2 * n_splits, True, call.peers, first == 0, last, 1, False, 0)
        for operand, flag, own, its in zip((a, b), flags, found, made, strict=True):
            finish([operand], call, flag, [own], done, [its])
    # A plain tile also stands for its transpose.
    return 2 * pairs[0].sum(0, dtype=torch.float64) + pairs[1].sum(0, dtype=torch.float64)


def _launch_tiles(
    a: Operand, b: Operand, call: Call, chosen: Config, n_splits: int, made: list[Parts], pairs: Tensor, means: Tensor,
    takes_masked: bool,
) -> None:  # fmt: skip
    sizes = [call.tile(model, chosen) for model in (a, b)]
    # Plain tiles do not depend on the precision of masked ones: clearing it saves compiling kernels.
    sizes = [
        size._replace(BLOCK_D=min(size.D, chosen.block_d), SPLIT_MASKED=takes_masked and size.SPLIT_MASKED)
        for size in sizes
    ]
    launch(
        twin_kernel, (made[0].n_blocks, n_splits), chosen.warps, chosen.stages,
        a=a.resident, b=b.resident, parts_a=made[0], parts_b=made[1], pair_sums=pairs, means=means,
        temperature=call.degree, A=fixed(sizes[0]), B=fixed(sizes[1]), MASKED=takes_masked,
    )  # fmt: skip


def _unit_rows(z: Tensor) -> Iterator[Tensor]:
    """Rows of a working copy as float64, a few at a time."""
    for rows in z.split(max(_ELEMENTS // z.shape[2], 1), dim=1):
        yield rows.sum(0, dtype=torch.float64) / SCALE.value


def _profile(operand: Operand, call: Call) -> Profile:
    """Profile of the rows as rounded for the pair products, so that all sums belong to the same matrix."""
    z = operand.z[: 2 if call.split == "all" else 1, : operand.n]
    return Profile.of(_unit_rows(z), z.sum((0, 1), dtype=torch.float64) / (SCALE.value * operand.n))


def _resolved(squares: Tensor, a: Profile, b: Profile) -> Tensor:
    """The packed sums; a matrix that varies only by rounding error counts as constant."""
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
