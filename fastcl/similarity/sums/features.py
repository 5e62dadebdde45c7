"""Validation of the features of pair statistics, and the precision of their products."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastcl import dispatch
from fastcl.checks import check_not_meta, is_inside
from fastcl.errors import FastclError, type_of

# Relative error of products of features narrower than float64: split half precision (22 bits) or float32, summed in
# float32.
NARROW_ROUNDING = 2.0**-20
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked(features: Mapping[str, Tensor], seen: int = 0, device: torch.device | None = None) -> list[Tensor]:
    """The features on one device, after checking types, shapes and values; `seen` is the number of earlier rows.

    Raises:
        FastclError: a check failed; the message names the model, and for values the sample.
    """
    for name, x in features.items():
        if not isinstance(x, Tensor) or x.dtype not in _DTYPES or x.layout != torch.strided:
            kind = f"{x.dtype}, {x.layout}" if isinstance(x, Tensor) else type_of(x)
            raise FastclError(f"features of {name!r} must be a dense float16 to float64 tensor, got {kind}")
        if x.ndim != 2 or x.shape[1] == 0:
            raise FastclError(f"features of {name!r} must have shape (b, d) with d >= 1, got {tuple(x.shape)}")
        check_not_meta(x, f"features of {name!r}")
        if is_inside(x, "vmap"):
            raise FastclError(f"features of {name!r} are inside torch.func.vmap, which similarities do not support")
    rows = {name: len(x) for name, x in features.items()}
    if len(set(rows.values())) > 1:
        raise FastclError(f"all models must have the same number of rows, got {rows}")
    device = device or next(iter(features.values())).device
    batch = [x.detach().to(device) for x in features.values()]
    # A sum takes one pass and is finite only if all its terms are. Huge finite features may overflow it, so look again
    # before raising. One device sync serves all models.
    if not torch.stack([x.sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in batch]).isfinite().all():
        broken = torch.stack([x.isfinite().all(dim=1).logical_not() for x in batch]).nonzero()
        if len(broken) == 0:
            return batch
        model, row = broken[0].tolist()
        name = list(features)[model]
        place = f"first in row {row} of {len(batch[0])} of this batch, sample {seen + row}"
        raise FastclError(f"features of {name!r} are not finite: {place}")
    return batch


def checked_pair(x: Tensor, y: Tensor) -> list[Tensor]:
    """Features x and y of the same n >= 1 samples, checked as by `checked`."""
    found = checked({"x": x, "y": y})
    if len(found[0]) == 0:
        raise FastclError(f"x and y must have at least one row, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    return found


def multiplied_narrow(*features: Tensor) -> bool:
    """Whether torch multiplies these features in float32: all narrower than float64, on a CPU with full float32.

    A GPU might use TF32 instead, and a CPU half precision if torch's float32 matmul precision was lowered.
    """
    on_cpu = features[0].device.type == "cpu"
    return on_cpu and dispatch.wants_float32() and all(x.dtype != torch.float64 for x in features)


def rounding_of(*features: Tensor) -> float:
    """Relative rounding error of products of these features; 0 for float64 products."""
    return NARROW_ROUNDING if dispatch.on_triton(*features) or multiplied_narrow(*features) else 0.0
