"""Argument checks: they raise a single exception type, which names the argument and repeats its value."""

from __future__ import annotations

import numbers
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastcl.choices import PRECISIONS
from fastcl.errors import FastclError, brief, one_of, type_of

_SMALLEST = 1e-30  # lower bound of temperatures and scales: inverses stay in float32's range, with room for the logits
_is_transformed = torch._C._are_functorch_transforms_active  # pyright: ignore[reportAttributeAccessIssue]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_positive(value: float | Tensor, name: str) -> None:
    """Raise FastclError unless the value is positive and finite: a number, or one float in a tensor.

    The value of a tensor is checked only on the CPU, and not while compiling or within torch.func.vmap.
    """
    if type(value) is float and _SMALLEST <= value <= 1 / _SMALLEST:  # the usual case, in a few steps
        return
    _check_range(value, name, _SMALLEST, "a positive number (1e-30 to 1e+30)")


def check_count(value: object, name: str, least: int) -> None:
    """Raise FastclError unless the value is an integer of at least `least`; booleans do not count."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise FastclError(f"{name} must be an integer >= {least}, got {brief(value)}")


def check_seed(value: object, name: str = "seed") -> None:
    """Raise FastclError unless the value is an integer in [0, 2**32): every generator of random numbers takes those."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise FastclError(f"{name} must be an integer in [0, 2**32), got {brief(value)}")


def check_finite(value: float | Tensor, name: str) -> None:
    """Raise FastclError unless the value is finite, of any sign; otherwise as `check_positive`."""
    _check_range(value, name, -1 / _SMALLEST, "a number (-1e+30 to 1e+30)")


def _check_range(value: float | Tensor, name: str, least: float, what: str) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise FastclError(f"{name} must be a number or a float tensor with one element, got {describe(value)}")
        check_not_meta(value, name)
        if not is_readable(value):
            return
        value = value.item()
    elif not isinstance(value, (int, float)) and isinstance(value, numbers.Real) and hasattr(value, "item"):
        # NumPy types may be too narrow for the bounds
        value = cast(Any, value).item()
    # Type checkers know no ordering of numbers.Real.
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not least <= value <= 1 / _SMALLEST:  # pyright: ignore[reportOperatorIssue]
        negative = is_number and least > 0 > value  # pyright: ignore[reportOperatorIssue]
        why = "; a negative one would attract the negatives and repel the positives" if negative else ""
        raise FastclError(f"{name} must be {what}, got {brief(value)}{why}")


def check_precision(precision: str | None) -> None:
    """Raise FastclError unless it is one of `PRECISIONS` or None."""
    if precision is not None and precision not in PRECISIONS:
        raise FastclError(one_of("precision", (*PRECISIONS, None), precision))


def check_rows(x: Tensor, name: str) -> None:
    """Raise FastclError unless x is a non-empty matrix of a supported dtype."""
    if not isinstance(x, Tensor):
        raise FastclError(f"{name} must be a tensor, got {type_of(x)}")
    if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] == 0:
        raise FastclError(f"{name} must be a non-empty (rows, width) matrix, got {describe(x)}")
    if x.layout != torch.strided:
        raise FastclError(f"{name} must be a dense tensor, got {x.layout}")
    if x.dtype not in _DTYPES:
        raise FastclError(f"{name} must be float16, bfloat16, float32 or float64, got {describe(x)}")
    check_not_meta(x, name)


def check_not_meta(x: Tensor, name: str) -> None:
    """Raise FastclError if x is on the meta device."""
    if x.device.type == "meta":
        raise FastclError(
            f"{name} must be on cpu or cuda, got {describe(x)} (to trace shapes without values, use FakeTensorMode)"
        )


def is_inside(x: Tensor, transform: str) -> bool:
    """Whether x is a tensor of torch.func.vmap ("vmap"), or of torch.func.grad and the like ("grad"), at any depth."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    test = {"vmap": functorch.is_batchedtensor, "grad": functorch.is_gradtrackingtensor}[transform]
    while functorch.is_functorch_wrapped_tensor(x):
        if test(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def check_transforms(chosen: str, *tensors: Tensor | None) -> None:
    """Raise FastclError for transforms that the operators lack: forward mode, which PyTorch would silently treat as
    zero, and torch.func.grad."""
    if torch.compiler.is_compiling() or (forward_ad._current_level < 0 and not _is_transformed()):
        return
    given = [v for v in tensors if v is not None]
    instead = "use `with fastcl.backend('dense')`"
    if any(forward_ad.unpack_dual(v).tangent is not None for v in given):
        raise FastclError(
            f"the {chosen} backend does not support forward-mode differentiation; {instead} for jvp and jacfwd"
        )
    if any(is_inside(v, "grad") for v in given):
        raise FastclError(
            f"the {chosen} backend supports only backward() and torch.autograd.grad; {instead} for torch.func.grad, "
            "vjp, jacrev and hessian"
        )


def is_readable(x: Tensor) -> bool:
    """Whether a check or a choice may read values; otherwise that would synchronise the device, is impossible, or would
    be part of a trace for all values."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if type(x) is not Tensor and hasattr(x, "fake_mode"):  # a FakeTensor
        return False
    return not is_inside(x, "vmap")


def check_all_ids(
    x: Tensor, y: Tensor | None, sample: Tensor, labels: Tensor | None, sample_y: Tensor | None, labels_y: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The four id tensors as int64. Raises FastclError if one is missing, unexpected, misshapen or inconsistent."""
    labels, labels_y = flat_labels(labels), flat_labels(labels_y)
    both = y is not None and labels is not None
    wanted = {
        "sample": (sample, x, True),
        "labels": (labels, x, False),
        "sample_y": (sample_y, y, y is not None),
        "labels_y": (labels_y, y, both),
    }
    for name, (ids, rows, required) in wanted.items():
        if ids is None:
            if required:
                raise FastclError(f"{name} is required: one integer id per row")
            continue
        if rows is None or (name == "labels_y" and labels is None):
            raise FastclError(f"{name} was given without {'y' if rows is None else 'labels'}")
        check_ids(ids, rows, name)
    if all(v is None or is_readable(v) for v in (sample, labels, sample_y, labels_y)):
        _check_views_agree(sample, labels, sample_y, labels_y)
    labels, sample_y, labels_y = (None if v is None else v.long() for v in (labels, sample_y, labels_y))
    return sample.long(), labels, sample_y, labels_y


def flat_labels(labels: Any) -> Any:
    """A column of labels as (N,); anything else as it is."""
    return labels[:, 0] if isinstance(labels, Tensor) and labels.ndim == 2 and labels.shape[1] == 1 else labels


def check_ids(ids: Tensor, rows: Tensor, name: str) -> None:
    """Raise FastclError unless `ids` holds one integer for each row of `rows`, on the same device."""
    if not isinstance(ids, Tensor):
        raise FastclError(f"{name} must be an integer tensor, got {type_of(ids)}")
    if not holds_integers(ids):
        raise FastclError(f"{name} must be an integer tensor, got {describe(ids)}")
    if ids.shape != rows.shape[:1] or ids.device != rows.device:
        raise FastclError(
            f"{name} must have one id per row, shape ({len(rows)},) on {rows.device}, got {describe(ids)}"
        )


def _check_views_agree(sample: Tensor, labels: Tensor | None, sample_y: Tensor | None, labels_y: Tensor | None) -> None:
    if labels is None or (sample_y is None and is_stacked(sample, labels)):
        return
    samples = sample if sample_y is None else torch.cat([sample, sample_y])
    classes = labels if labels_y is None else torch.cat([labels, labels_y])
    ordered, order = samples.sort(stable=True)
    classes = classes[order]
    wrong = (ordered[1:] == ordered[:-1]) & (classes[1:] != classes[:-1])
    if wrong.any():
        k = int(wrong.nonzero()[0, 0])
        raise FastclError(
            f"labels must be the same for all views of a sample, got {classes[k].item()} and {classes[k + 1].item()} "
            f"for sample {ordered[k].item()}"
        )


def is_stacked(sample: Tensor, labels: Tensor | None) -> bool:
    """Whether ids on a CPU list first views, then second views, samples ascending, with equal labels; False if values
    cannot be read. For small batches this saves a sort, which costs more than the loss itself."""
    half = len(sample) // 2
    if type(sample) is not Tensor or not is_readable(sample) or len(sample) != 2 * half:
        return False
    return all(torch.equal(v[:half], v[half:]) for v in (sample, labels) if v is not None) and bool(
        (sample[1:half] > sample[: half - 1]).all()
    )


def holds_integers(x: Tensor) -> bool:
    """Whether the elements are integers; booleans are not."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def describe(x: Tensor) -> str:
    """Shape, dtype and device in words."""
    sizes = ", ".join([f"{size}" for size in x.shape])  # torch.compile cannot write a tuple of symbols
    comma = "," if len(x.shape) == 1 else ""
    return f"({sizes}{comma}) {str(x.dtype).removeprefix('torch.')} on {x.device}"
