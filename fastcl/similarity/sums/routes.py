"""How the sums of two Gram matrices are formed: by moments of the features or by tiles, whichever costs less."""

from __future__ import annotations

from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from fastcl.errors import FastclError, one_of
from fastcl.similarity.stats import PairStats
from fastcl.similarity.sums.features import rounding_of
from fastcl.similarity.sums.moments import Moments, chunk_rows
from fastcl.similarity.sums.rows import INNER, Inner
from fastcl.similarity.sums.tiles import tile_sums

Route: TypeAlias = Literal["auto", "features", "tiles"]

# Cost of the elementwise sums over a tile of K and of L, expressed as additional feature columns.
_ELEMENTWISE = 64


def choose_route(n: int, widths: tuple[int, int], kernel: str, route: Route) -> Literal["features", "tiles"]:
    """The requested route, or the cheaper one for "auto".

    Raises:
        FastclError: an unknown route, or "features" for a kernel that is not an inner product.
    """
    if route not in ("auto", "features", "tiles"):
        raise FastclError(one_of("route", ("auto", "features", "tiles"), route))
    if kernel not in INNER:
        if route == "features":
            raise FastclError(
                f"route 'features' supports the kernels {', '.join(INNER)}; {kernel!r} needs route 'tiles'"
            )
        return "tiles"
    if route != "auto":
        return route
    a, b = widths
    return "features" if a * a + a * b + b * b <= n * (a + b + _ELEMENTWISE) / 2 else "tiles"


def stream_of(x: Tensor, y: Tensor, kernel: Inner, dtype: torch.dtype | None = None) -> Moments:
    """The moments of two checked (n, d) features, n >= 1, in one pass over chunks of their rows, which are converted
    to a dtype if one is given."""
    stream, step = Moments(kernel), chunk_rows(x)
    for start in range(0, len(x), step):
        stream.add([v[start : start + step].to(dtype or v.dtype) for v in (x, y)])
    return stream


def statistics_of(stream: Moments, n: int) -> PairStats:
    """PairStats of a stream of two models that has seen n samples."""
    ((_, values, strains),) = stream.pair_sums()
    return PairStats.unpacked(n, stream.kernel, values, stream.rounding, strains)


def statistics(x: Tensor, y: Tensor, kernel: str, bandwidth: float = 1.0, route: Route = "auto") -> PairStats:
    """PairStats of two checked (n, d) features, n >= 1; arguments as in `fastcl.pair_stats`."""
    if choose_route(len(x), (x.shape[1], y.shape[1]), kernel, route) == "features":
        return statistics_of(stream_of(x, y, cast(Inner, kernel)), len(x))
    rounding = rounding_of(x, y)
    values = tile_sums(x, y, kernel, bandwidth).packed().tolist()
    return PairStats.unpacked(len(x), kernel, values, rounding)
