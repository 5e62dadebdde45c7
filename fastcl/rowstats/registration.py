"""Helpers shared by the registrations of the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastcl.errors import FastclError

_is_transformed = torch._C._are_functorch_transforms_active  # pyright: ignore[reportAttributeAccessIssue]
_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_is_batched, _is_batched_by_autograd = _functorch.is_batchedtensor, _functorch.is_legacy_batchedtensor

_CLASSES = (Tensor, Parameter)


class _Operator(NamedTuple):
    registered: Callable[..., Any]  # torch.ops.fastcl.NAME
    direct: Callable[..., Any]


_operators: dict[str, _Operator] = {}


def register(
    library: torch.library.Library, name: str, impl: Callable, fake: Callable, autograd: Callable,
    setup_context: Callable | None = None, results: int | None = None, replay: bool = False,
) -> None:  # fmt: skip
    """Register the implementation, fake implementation and derivative of an operator that the library defines.

    Args:
        impl, fake: functions of tensors, the first of which is no None, to a tensor or a tuple of tensors and Nones.
            An operator of torch.library can only return tensors: with it, empty ones stand for None.
        setup_context: saves what `autograd` needs; None: the operator is itself a backward pass.
        results: how many results callers use; the others are only saved. None: all.
        replay: the implementation may be replayed (`triton.replay.run`).
    """
    impl = partial(_replayed, impl) if replay else impl
    library.impl(name, _tensors(impl), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastcl::{name}", _tensors(fake), lib=library)
    torch.library.register_autograd(f"fastcl::{name}", autograd, setup_context=setup_context, lib=library)
    registered = getattr(torch.ops.fastcl, name)

    def backward_pass(*args: Any) -> Any:
        return registered(*args) if torch.is_grad_enabled() else impl(*args)

    direct = backward_pass if setup_context is None else _function(name, impl, autograd, setup_context, results).apply
    _operators[name] = _Operator(registered, direct)


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
    """torch.ops.fastcl.NAME. A call that autograd alone can see goes round PyTorch's dispatcher, which would take
    longer than the launches of a small loss."""
    registered, direct = _operators[name]
    return direct(*args) if is_plain(args) else registered(*args)


def is_plain(args: Iterable[Any]) -> bool:
    """Whether a call is neither compiled, nor transformed by torch.func, nor watched by a mode, and its tensors are of
    no class of their own. Lists of tensors are what a plain call has saved."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _is_transformed():
        return False
    return not any(isinstance(value, Tensor) and type(value) not in _CLASSES for value in args)


def refuse_batched(backend: str, *grads: torch.Tensor | None) -> None:
    """Raise FastclError for batched gradients, such as those of torch.autograd.grad(is_grads_batched=True)."""
    for g in grads:
        if g is not None and (_is_batched(g) or _is_batched_by_autograd(g)):
            raise FastclError(
                f"the {backend} backend does not support batched gradients (is_grads_batched, vectorize); run the "
                "forward pass inside `with fastcl.backend('dense')`"
            )


def differentiable_once(backend: str) -> Callable:
    """Derivative of a backend's backward pass: a function that raises FastclError, because there is none."""

    def refuse(*_: object) -> None:
        raise FastclError(
            f"the {backend} backend does not support second derivatives; run the forward pass inside `with "
            "fastcl.backend('dense')`"
        )

    return refuse
