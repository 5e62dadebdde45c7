"""Host code of small calls, recorded once and replayed: what it allocates and launches, as straight-line code.

Between a call of an operator and its last launch lie hundreds of lines of Python, which decide the same for every call
of the same shapes and options. For few rows they take longer than the GPU. So one of these calls is recorded: every
operation of PyTorch and every launch, in order, becomes a line of a function that repeats them on the tensors of later
calls (`repeated.py`). A recording holds no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastcl.kernels.common import launch as launching
from fastcl.rowstats.hidden import Hidden, Kept, Layout
from fastcl.rowstats.triton.recording import Recorder, Unknown
from fastcl.rowstats.triton.repeated import function_of

Results: TypeAlias = tuple[Tensor | None, ...]
Host: TypeAlias = Callable[..., Results]
Replay: TypeAlias = Callable[..., tuple[Results, Kept]]

MOST_ROWS = 16384  # of the first tensor; with more, the host is ahead of the device
MOST_CALLS = 256  # that are remembered
BEFORE = 7  # calls before the one that is recorded, which takes as long as so many
_seen: dict[Any, int] = {}  # how often, for calls without a recording
_recordings: dict[Any, Replay | None] = {}  # None: it cannot be repeated


def run(
    host: Host, tensors: Sequence[Any], options: tuple[Hashable, ...], saved: Kept = (), shown: int | None = None
) -> tuple[Results, Kept]:
    """The results of a host function, which is replayed once it has often been called with tensors of the same shapes
    and equal options: those that callers see, and the others.

    Args:
        host: takes the tensors, the first of which is no None, then the saved ones and the options. What it does may
            follow from shapes, strides, dtypes and options, but not from what the tensors hold. The first tensor's
            device becomes the current one.
        saved: hidden results of another host function for these tensors.
        shown: how many results callers see; None: all.
    """
    first = tensors[0]
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(first):
            return run(host, tensors, options, saved, shown)
    is_hidden = isinstance(saved, Hidden)
    key = None
    layout, rest = (saved.layout, (saved.memory,)) if is_hidden else (None, saved)
    if first.shape[0] <= MOST_ROWS and not launching.is_recording():
        key = host, shown, options, launching.forced_architecture(), layout, *_facts((*tensors, *rest))
        found = _recordings.get(key)
        if found is not None:
            return found(*tensors, *rest)
    given = *tensors, *(saved.tensors() if is_hidden else saved)
    # The backward pass of a replay comes as often as that.
    is_due = key is not None and key not in _recordings and (is_hidden or _is_due(key))
    if is_due and _are_different(given):
        return _record(key, host, given, options, layout, shown)
    return _split(host(*given, *options), shown)


def forget() -> None:
    """Forget all recordings, because launches are chosen in another way from now on."""
    _seen.clear()
    _recordings.clear()


def _facts(tensors: Sequence[Tensor | None]) -> list[tuple[Hashable, ...] | None]:
    """What a recording may follow from. What Triton compiles follows from addresses too, modulo 16."""
    return [None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16) for t in tensors]


def _is_due(key: Any) -> bool:
    """Whether the call has been seen often enough to be recorded."""
    if len(_seen) >= MOST_CALLS:
        _seen.clear()
    _seen[key] = _seen.get(key, 0) + 1
    return _seen[key] > BEFORE


def _are_different(tensors: Sequence[Tensor | None]) -> bool:
    """Whether no two arguments are one tensor, which a recording would take for either."""
    given = [id(t) for t in tensors if t is not None]
    return len(set(given)) == len(given)


def _record(
    key: Any, host: Host, given: Sequence[Tensor | None], options: tuple[Hashable, ...], layout: Layout | None,
    shown: int | None,
) -> tuple[Results, Kept]:  # fmt: skip
    recorder = Recorder(given)
    with recorder, launching.recorded_by(recorder.launch):
        results, hidden = _split(host(*given, *options), shown)
    try:
        found = function_of(recorder, recorder.seen(results), recorder.seen(hidden), layout)
    except Unknown:
        found = None
    _remember(key, found)
    _seen.pop(key, None)
    return results, hidden


def _split(results: Results, shown: int | None) -> tuple[Results, Results]:
    return results[:shown], () if shown is None else results[shown:]


def _remember(key: Any, found: Replay | None) -> None:
    if len(_recordings) >= MOST_CALLS:
        _recordings.clear()
    _recordings[key] = found
