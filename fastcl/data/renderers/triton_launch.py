"""Launches the augmentation kernels: views of images on the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastcl.kernels.augment.views import blur_kernel, colour_kernel, levels_kernel, view_kernel
from fastcl.kernels.common.launch import launch

WHOLE = 64  # pixels: up to this size one program holds a whole view
WHOLE_TURNED = 32  # with rotation, registers spill above this size
_TILE = 32  # pixels, for larger views and for blurs


def render(
    images: Tensor, table: Tensor, statistics: Tensor, blurred: Tensor, size: int, turns: bool, kernel: int
) -> Tensor:
    """All views of a batch: one launch up to `WHOLE` (rotated: `WHOLE_TURNED`) pixels, else two; two more for blurs.

    Args:
        images: (n, H, W, C) uint8, C = 1 or 3.
        table: (views, COLUMNS) int32, laid out as in fastcl.kernels.augment.parameters.
        statistics: (2, 3) float32, means and standard deviations.
        blurred: (k,) int32, indices of the blurred views.
        size: side of a view in pixels.
        turns: whether views may be rotated.
        kernel: size of the blur kernel in pixels.

    Returns:
        (views, C, size, size) float32.
    """
    _, height, width, channels = images.shape
    n = len(table)
    views = torch.empty(n, channels, size, size, dtype=torch.float32, device=images.device)
    shape = {"SIZE": size, "C": channels}
    if size <= (WHOLE_TURNED if turns else WHOLE):
        tile = triton.next_power_of_2(size)
        pixels_a_warp = 128 if turns else 256  # the most that fit in registers without spills
        launch(
            view_kernel, (n,), max(1, min(16, tile * tile // pixels_a_warp)), 1,
            images=images, table=table, statistics=statistics, views=views, height=height, width=width,
            **shape, TILE=tile, TURNS=turns,
        )  # fmt: skip
    else:
        tiles = triton.cdiv(size, _TILE) ** 2
        pixels = torch.empty(n, channels, size, size, dtype=torch.uint8, device=images.device)
        sums = torch.empty(n, tiles, dtype=torch.int64, device=images.device)
        launch(
            levels_kernel, (n, tiles), 8 if turns else 4, 1,
            images=images, table=table, pixels=pixels, sums=sums, height=height, width=width,
            **shape, TILE=_TILE, TURNS=turns, TILES=tiles,
        )  # fmt: skip
        launch(
            colour_kernel, (n, tiles), 4, 1,
            pixels=pixels, sums=sums, table=table, statistics=statistics, views=views,
            **shape, TILE=_TILE, TILES=tiles, BLOCK_T=triton.next_power_of_2(tiles),
        )  # fmt: skip
    if len(blurred):
        _blur(blurred, table, statistics, views, kernel)
    return views


def _blur(blurred: Tensor, table: Tensor, statistics: Tensor, views: Tensor, kernel: int) -> None:
    _, channels, size, _ = views.shape
    tile = min(_TILE, triton.next_power_of_2(size))
    rows = torch.empty(len(blurred), channels, size, size, dtype=torch.float32, device=views.device)
    for last in (False, True):
        launch(
            blur_kernel, (len(blurred) * channels, triton.cdiv(size, tile) ** 2), max(1, min(4, tile * tile // 256)), 1,
            blurred=blurred, table=table, statistics=statistics, views=views, rows=rows,
            SIZE=size, C=channels, TILE=tile, KERNEL=kernel, LAST=last,
        )  # fmt: skip
