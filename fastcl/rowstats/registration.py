"""Helpers shared by the registrations of the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastcl.errors import FastclError

_torch: Any = torch._C
_is_batched, _is_batched_by_autograd = _torch._functorch.is_batchedtensor, _torch._functorch.is_legacy_batchedtensor
_is_transformed, _dispatch_modes = _torch._are_functorch_transforms_active, _torch._len_torch_dispatch_stack
_is_profiled, _is_traced = _torch._autograd._profiler_enabled, _torch._get_tracing_state

KEEPS_ORDER = hasattr(torch.library.Library, "_register_effectful_op")
_CLASSES = (Tensor, Parameter)
# Tensors whose memory does not hold what they say: PyTorch's dispatcher sees to them before a kernel does.
_ELSEWHERE = [getattr(_torch.DispatchKey, name) for name in ("Conjugate", "Negative", "ZeroTensor", "Functionalize")]
_known_keys: dict[int, bool] = {}  # whether any of them is in a set of dispatch keys


class _Operator(NamedTuple):
    registered: Callable[..., Any]  # torch.ops.fastcl.NAME
    direct: Callable[..., Any]


_operators: dict[str, _Operator] = {}


def register(
    library: torch.library.Library, name: str, impl: Callable, fake: Callable, autograd: Callable,
    setup_context: Callable | None = None,
) -> None:  # fmt: skip
    """Register the implementation, fake implementation and derivative of an operator that the library defines.

    Args:
        impl, fake: functions of tensors, the first of which is no None, to a tensor or a tuple of tensors and Nones.
            An operator of torch.library can only return tensors: with it, empty ones stand for None.
        setup_context: saves what `autograd` needs; None: the operator is itself a backward pass.
    """
    library.impl(name, _tensors(impl), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastcl::{name}", _tensors(fake), lib=library)
    torch.library.register_autograd(f"fastcl::{name}", autograd, setup_context=setup_context, lib=library)


def keep_order(library: torch.library.Library, *names: str) -> None:
    """Have compilers keep the order of operators that communicate: all ranks have to run them in one order, and
    compilers choose one by sizes, which may differ between ranks. Before PyTorch 2.10 they cannot be told so."""
    if KEEPS_ORDER:
        for name in names:
            effect = torch._library.effects.EffectType.ORDERED  # pyright: ignore[reportAttributeAccessIssue]
            library._register_effectful_op(getattr(torch.ops.fastcl, name).default, effect)


def register_for_small(
    library: torch.library.Library, name: str, impl: Callable, fake: Callable, autograd: Callable,
    setup_context: Callable | None = None, results: int | None = None,
) -> None:  # fmt: skip
    """Register an operator whose host code would take longer than its kernels for few rows; `call` calls it.

    Args:
        impl: as `triton.replay.run` takes it, which runs it. The others are as in `register`.
        results: how many results callers use; the others are only saved. None: all.
    """
    replayed = partial(_replayed, impl)
    register(library, name, replayed, fake, autograd, setup_context)
    registered = getattr(torch.ops.fastcl, name)

    def backward_pass(*args: Any) -> Any:
        return registered(*args) if torch.is_grad_enabled() else replayed(*args)

    node = None if setup_context is None else _function(name, replayed, autograd, setup_context, results)
    _operators[name] = _Operator(registered, backward_pass if node is None else node.apply)


def _replayed(host: Callable, *args: Any) -> Any:
    from fastcl.rowstats.triton.replay import run  # not with the package, which imports quickly

    return run(host, args)


def _tensors(function: Callable) -> Callable:
    """The function, with empty tensors in place of None among its results."""

    @wraps(function)
    def filled(x: Tensor, *args: Any) -> Any:
        results = function(x, *args)
        if not isinstance(results, tuple):
            return results
        return tuple(x.new_empty(0) if result is None else result for result in results)

    return filled


def _function(
    name: str, impl: Callable, autograd: Callable, setup_context: Callable, results: int | None
) -> type[torch.autograd.Function]:
    """An operator as a node of autograd."""

    def forward(ctx: Any, *args: Any) -> Any:
        found = impl(*args)
        setup_context(ctx, args, found)
        return found[:results]

    parts = {"forward": staticmethod(forward), "backward": staticmethod(autograd)}
    return type(f"fastcl_{name}", (torch.autograd.Function,), parts)


def call(name: str, *args: Any) -> Any:
    """torch.ops.fastcl.NAME, an operator of `register_for_small`. A call that autograd alone can see goes round
    PyTorch's dispatcher."""
    registered, direct = _operators[name]
    return direct(*args) if is_plain(args) else registered(*args)


def is_plain(args: Iterable[Any]) -> bool:
    """Whether nobody but autograd can see a call: it is neither compiled, traced, profiled nor transformed by
    torch.func, no dispatch mode is on, and its tensors are of no class of their own and hold what they say. Those in
    lists are results of plain calls, or gradients that the caller has seen to."""
    if torch.compiler.is_compiling() or _dispatch_modes() or _is_transformed() or _is_profiled() or _is_traced():
        return False
    for value in args:
        if isinstance(value, Tensor) and (type(value) not in _CLASSES or _is_elsewhere(_torch._dispatch_keys(value))):
            return False
        if type(value) is list and any(isinstance(one, Tensor) and type(one) not in _CLASSES for one in value):
            return False
    return True


def _is_elsewhere(keys: Any) -> bool:
    found = _known_keys.get(keys.raw_repr())
    if found is None:
        found = _known_keys[keys.raw_repr()] = any(map(keys.has, _ELSEWHERE))
    return found


def refuse_batched(backend: str, *grads: torch.Tensor | None) -> None:
    """Raise FastclError for batched gradients, such as those of torch.autograd.grad(is_grads_batched=True)."""
    for g in grads:
        if g is not None and (_is_batched(g) or _is_batched_by_autograd(g)):
            raise FastclError(
                f"the {backend} backend does not support batched gradients (is_grads_batched, vectorize); run the "
                "forward pass inside `with fastcl.backend('dense')`"
            )


def refuse_second(*_: object) -> None:
    """Derivative of what ranks exchange in a backward pass: there is none."""
    raise FastclError("second derivatives are not supported across ranks")


def differentiable_once(backend: str) -> Callable:
    """Derivative of a backend's backward pass: a function that raises FastclError, because there is none."""

    def refuse(*_: object) -> None:
        raise FastclError(
            f"the {backend} backend does not support second derivatives; run the forward pass inside `with "
            "fastcl.backend('dense')`"
        )

    return refuse
