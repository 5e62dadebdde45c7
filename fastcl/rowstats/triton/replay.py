"""Host code of small calls, recorded once and replayed: what it allocates and launches, as straight-line code.

Between a call of an operator and its last launch lie hundreds of lines of Python, which decide the same for every call
of the same shapes and options. For few rows they take longer than the GPU. So one of these calls is recorded: every
operation of PyTorch and every launch, in order, becomes a line of a function that repeats them on the tensors of later
calls (`repeated.py`). A recording holds no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl.kernels.common import launch as launching
from fastcl.rowstats.triton.recording import Recorder, Unknown
from fastcl.rowstats.triton.repeated import function_of

Results = tuple[Tensor | None, ...]
Host = Callable[..., Results]

MOST_ROWS = 16384  # of the first tensor; with more, the host is ahead of the device
MOST_CALLS = 256  # that are remembered
BEFORE = 7  # calls before the one that is recorded, which takes as long as so many
_seen: dict[Any, int] = {}  # how often, for calls without a recording
_recordings: dict[Any, Host | None] = {}  # None: it cannot be repeated


def run(
    host: Host, tensors: Sequence[Any], options: tuple[Hashable, ...], saved: Sequence[Tensor | None] = (),
    after: Host | None = None,
) -> tuple[Results, Host | None]:  # fmt: skip
    """The results of a host function, which is replayed once it has often been called with tensors of the same shapes
    and equal options; and the recording that was replayed, or None.

    Args:
        host: takes the tensors, the first of which is no None, then the saved ones and the options. What it does may
            follow from shapes, strides, dtypes and options, but not from what the tensors hold. The first tensor's
            device becomes the current one.
        saved: results of another host function for these tensors.
        after: the recording that gave the saved tensors, which then need no look.
    """
    first = tensors[0]
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(first):
            return run(host, tensors, options, saved, after)
    if first.shape[0] > MOST_ROWS or launching.is_recording():
        return host(*tensors, *saved, *options), None
    facts = _facts(tensors)
    key = shortcut = host, options, launching.forced_architecture(), after, *facts
    found = _recordings.get(key)
    if found is None and saved:
        key = *key[:3], *_facts(saved), *facts
        found = _recordings.get(key)
        if found is not None and after is not None:
            _remember(shortcut, found)
    if found is not None:
        return found(*tensors, *saved), found
    if key not in _recordings and _is_due(key) and _are_different([*tensors, *saved]):
        return _record(key, host, [*tensors, *saved], options), None
    return host(*tensors, *saved, *options), None


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


def _record(key: Any, host: Host, tensors: Sequence[Tensor | None], options: tuple[Hashable, ...]) -> Results:
    recorder = Recorder(tensors)
    with recorder, launching.recorded_by(recorder.launch):
        results = host(*tensors, *options)
    try:
        found = function_of(recorder, recorder.seen(results))
    except Unknown:
        found = None
    _remember(key, found)
    _seen.pop(key, None)
    return results


def _remember(key: Any, found: Host | None) -> None:
    if len(_recordings) >= MOST_CALLS:
        _recordings.clear()
    _recordings[key] = found
