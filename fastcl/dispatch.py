"""Selects the backend: the one requested by `with backend(...)`, or the fastest that supports the given tensors.

The state belongs to a context (`contextvars`: a thread, an asyncio task, a `Context.run`), so that none of them affects
another. Code traced by torch.compile keeps its state separately, in an object per thread: the compiler traces and
guards attributes; from PyTorch 2.14 on it can read a ContextVar, but it cannot set one.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastcl.checks import describe
from fastcl.choices import BACKENDS, Backend, UsedBackend
from fastcl.errors import FastclError, one_of

MAX_WIDTH = 4096  # maximum width of rows on the Triton backend

_COMPILER_READS_CONTEXT = torch.__version__ >= (2, 14)  # pyright: ignore[reportOperatorIssue]
_autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
_saved_tensors_hooks = getattr(_autograd, "_top_saved_tensors_default_hooks", None)  # PyTorch 2.7 lacks it

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Compiled:
    """State that compiled code has set and not reset; None if not set."""

    def __init__(self) -> None:
        self.backend: Backend | None = None
        self.last: UsedBackend | None = None


class _Thread(threading.local):
    """Per-thread holder of `_Compiled`: the compiler loses attributes set on a threading.local itself, but keeps those
    of an object inside it."""

    def __init__(self) -> None:
        self.compiled = _Compiled()


_thread = _Thread()
_blocks: ContextVar[tuple[backend, ...]] = ContextVar("fastcl.blocks", default=())
_backend: ContextVar[Backend] = ContextVar("fastcl.backend", default="auto")
_last: ContextVar[UsedBackend] = ContextVar("fastcl.last", default="none")


def constant_while_compiling(function: _Function) -> _Function:
    """Same as torch.compiler.assume_constant_result, which would import torch._dynamo immediately."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


class backend(ContextDecorator):
    """Use one backend inside a `with` block, only in this thread and this context (asyncio task).

    A thread started inside the block begins with "auto". Gradients are computed by the backend of the forward pass,
    wherever `backward` is called, and `torch.utils.checkpoint` repeats the forward pass on the same backend. In three
    cases checkpoint cannot know it: with use_reentrant=True, around a compiled function, and on PyTorch 2.7. It then
    uses the backend requested where `backward` is called, and a saved tensor may not match (CheckpointError); pass it
    the function together with its backend instead: `checkpoint(fastcl.backend("dense")(function), x)`.

    Args:
        name: "triton" (fused kernels, once differentiable), "chunked" (torch, O(N x tile) memory, once
            differentiable), "dense" (reference, N x N, twice differentiable) or "auto" (triton for CUDA tensors;
            chunked on other devices, without Triton, and for what the kernels do not support: float64 and more than
            4096 columns).

    Raises:
        FastclError: an unknown name.
    """

    def __init__(self, name: Backend) -> None:
        if name not in BACKENDS:
            raise FastclError(one_of("backend", BACKENDS, name))
        self.name: Backend = name
        self._around: Backend | None = None  # while compiling: the request of the code around the block

    def _recreate_cm(self) -> backend:
        return backend(self.name)  # ContextDecorator enters one for each call of the function

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            compiled = _thread.compiled
            self._around, compiled.backend = compiled.backend, self.name
        else:
            _set_blocks((*_blocks.get(), self))

    def __exit__(self, *_: object) -> None:
        if torch.compiler.is_compiling():
            _thread.compiled.backend = self._around
            return
        blocks = _blocks.get()
        if blocks and blocks[-1] is self:
            _set_blocks(blocks[:-1])
        else:  # blocks inside generators end in any order, and in a different context from the one they began in
            _set_blocks(tuple(block for block in blocks if block is not self))


def _set_blocks(blocks: tuple[backend, ...]) -> None:
    name = blocks[-1].name if blocks else "auto"
    _blocks.set(blocks)
    _backend.set(name)
    if not _COMPILER_READS_CONTEXT:
        _thread.compiled.backend = name


def current_backend() -> Backend:
    """The name passed to the enclosing `with backend(...)`; "auto" outside."""
    if not torch.compiler.is_compiling():
        return _backend.get()
    inside = _thread.compiled.backend
    if inside is None:
        return _backend.get() if _COMPILER_READS_CONTEXT else "auto"
    return inside


def last_backend() -> UsedBackend:
    """The backend of the most recent loss, statistic or similarity in this thread and context; "none" before the
    first. The torch code of the similarities counts as "chunked", or "dense" inside `backend("dense")`."""
    return _thread.compiled.last or _last.get()


def ran_on(name: UsedBackend) -> UsedBackend:
    """Record the backend of an operation for `last_backend`, and return it."""
    if torch.compiler.is_compiling():
        _thread.compiled.last = name
    else:
        _thread.compiled.last = None
        _last.set(name)
    return name


def choose(*rows: Tensor, widest: int | None = MAX_WIDTH) -> UsedBackend:
    """Choose the backend for tensors (n, d) on one device and record it for `last_backend`.

    Args:
        widest: maximum number of columns that the operation's Triton kernels support; None: no limit.

    Raises:
        FastclError: the Triton backend was requested by name, but does not support these rows.
    """
    wanted = _wanted()
    if wanted in ("chunked", "dense"):
        return ran_on(wanted)
    on_gpu = rows[0].is_cuda
    obstacle = _obstacle(rows, widest) if on_gpu or wanted == "triton" else None
    if wanted == "triton" and obstacle:
        raise FastclError(f"the triton backend {obstacle}, got {', '.join(map(describe, rows))}")
    return ran_on("triton" if wanted == "triton" or (on_gpu and not obstacle) else "chunked")


def on_triton(*features: Tensor) -> bool:
    """Whether the similarities use their Triton kernels, which support features of any width; otherwise as `choose`."""
    return choose(*features, widest=None) == "triton"


def choose_torch() -> UsedBackend:
    """Choose the backend of an operation that has no Triton kernels."""
    return ran_on("dense" if _wanted() == "dense" else "chunked")


class _Calls:
    """Backends requested for the operations inside one activation checkpoint, in order."""

    def __init__(self) -> None:
        self.names: list[Backend] = []
        self.repeated: Counter[Any] = Counter()  # number of repeated calls, per backward pass


_checkpoints: WeakKeyDictionary[Any, _Calls] = WeakKeyDictionary()


def _wanted() -> Backend:
    """The requested backend; when `torch.utils.checkpoint` repeats a forward pass, the one that the same call requested
    in the original pass.

    The passes are matched by PyTorch's own saved-tensor hooks, whose closures hold the checkpoint: the passes have
    nothing else in common.
    """
    if torch.compiler.is_compiling():
        return current_backend()
    name = _backend.get()
    hooks = None if _saved_tensors_hooks is None else _saved_tensors_hooks(False)
    if hooks is None:
        return name
    pack = inspect.unwrap(hooks[0])
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return name
    cells = (cell.cell_contents for cell in pack.__closure__ or ())
    held = dict(zip(pack.__code__.co_freevars, cells, strict=True))
    if "frame" in held:  # the forward pass
        _checkpoints.setdefault(held["frame"], _Calls()).names.append(name)
    elif "target_frame_ref" in held and held["target_frame_ref"]() in _checkpoints:
        calls, backward = _checkpoints[held["target_frame_ref"]()], held["gid"]
        calls.repeated[backward] += 1
        return calls.names[min(calls.repeated[backward], len(calls.names)) - 1]
    return name


def _obstacle(rows: tuple[Tensor, ...], widest: int | None) -> str | None:
    """Reason why the Triton backend does not support these rows, or None."""
    if not _has_triton():
        return "needs Triton, which is not installed (on Linux: pip install triton)"
    for x in rows:
        if x.dtype == torch.float64:
            return "does not support float64"
        if widest is not None and x.shape[1] > widest:
            return f"supports at most {widest} columns"
    if not rows[0].is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs CUDA tensors (to run it on a CPU, slowly, set TRITON_INTERPRET=1 before Python starts)"
    return None


@constant_while_compiling
def _has_triton() -> bool:
    return sys.modules.get("triton") is not None or find_spec("triton") is not None


@constant_while_compiling
def wants_float32() -> bool:
    """Whether `torch.get_float32_matmul_precision()` requests full float32."""
    return torch.get_float32_matmul_precision() == "highest"
