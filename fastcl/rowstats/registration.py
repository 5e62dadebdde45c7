"""Helpers shared by the registrations of the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastcl.errors import FastclError
from fastcl.rowstats.hidden import Hidden, Kept

_torch: Any = torch._C
_is_batched, _is_batched_by_autograd = _torch._functorch.is_batchedtensor, _torch._functorch.is_legacy_batchedtensor
_is_transformed, _dispatch_modes = _torch._are_functorch_transforms_active, _torch._len_torch_dispatch_stack
_is_profiled, _is_traced = _torch._autograd._profiler_enabled, _torch._get_tracing_state

KEEPS_ORDER = hasattr(torch.library.Library, "_register_effectful_op")
_hooks = getattr(_torch._autograd, "_top_saved_tensors_default_hooks", None)  # PyTorch 2.7 lacks it

_CLASSES = frozenset((Tensor, Parameter))
_is_functional: Any = torch._is_functional_tensor  # pyright: ignore[reportPrivateImportUsage]


class _Operator(NamedTuple):
    registered: Callable[..., Any]  # torch.ops.fastcl.NAME
    direct: Callable[..., Any]  # its node of autograd; of a backward pass, its implementation
    leading: int  # how many tensors the node takes one by one; what follows them is one argument


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
    compilers choose one by sizes, which may differ between ranks. Older versions of PyTorch (2.7) cannot be told so."""
    if KEEPS_ORDER:
        for name in names:
            effect = torch._library.effects.EffectType.ORDERED  # pyright: ignore[reportAttributeAccessIssue]
            library._register_effectful_op(getattr(torch.ops.fastcl, name).default, effect)


def register_for_small(
    library: torch.library.Library, name: str, impl: Callable, fake: Callable, autograd: Callable,
    setup_context: Callable | None = None, tensors: int = 0, leading: int = 0, results: int = 0,
    differentiable: int = 0,
) -> None:  # fmt: skip
    """Register an operator whose host code would take longer than its kernels for few rows; `call` calls it, or
    `call_backward` if it is a backward pass.

    Args:
        impl: as `triton.replay.run` takes it, which runs it. The others are as in `register`, but for results that are
            None, which `setup_context` sees as None, and for what is saved: with `keep`, for `kept`.
        setup_context: takes what callers use of the results and what they do not see as two arguments.
        tensors: how many of the arguments are tensors or None; they come first.
        leading: how many of these may have a gradient or, of a backward pass, were given to the forward pass too; they
            come first.
        results: how many results callers use; the others are only saved.
        differentiable: how many of these may have a gradient; they come first.
    """

    def repeated(*args: Any) -> Any:
        return replayed(impl, args[:tensors], _with_hash(args[tensors:]))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        assert setup_context is not None
        found = tuple(None if t.numel() == 0 else t for t in output)
        setup_context(ctx, _with_hash(inputs), found[:results], found[results:])
        ctx.mark_non_differentiable(*output[differentiable:])

    def forward(ctx: Any, *args: Any) -> Any:
        assert setup_context is not None
        *given, (others, options) = args
        given += others
        # What is saved one by one in any case should be tensors from the first.
        found, hidden = _run()(impl, given, options, (), results if _hooks else None)
        found, hidden = found[:results], found[results:] or hidden
        setup_context(ctx, (*given, *options), found, hidden)
        if differentiable < results:
            ctx.mark_non_differentiable(*found[differentiable:])
        return found

    def backward(ctx: Any, *grads: Any) -> Any:
        return *autograd(ctx, *grads)[:leading], None

    register(library, name, repeated, fake, autograd, setup_context and setup)
    registered = getattr(torch.ops.fastcl, name)
    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node = type(f"fastcl_{name}", (torch.autograd.Function,), parts)
    _operators[name] = _Operator(registered, impl if setup_context is None else node.apply, leading)


def replayed(impl: Callable, tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> Any:
    """The results of an implementation, as `triton.replay.run` takes it."""
    return _run()(impl, tensors, options)[0]


def keep(ctx: Any, tensors: Sequence[Tensor | None], hidden: Kept) -> None:
    """Save tensors for the backward pass, as `ctx.save_for_backward` does.

    Args:
        hidden: results that no caller sees. They are saved one by one where hooks ask for what is saved:
            `torch.utils.checkpoint` compares two forward passes, of which one may be a replay.
    """
    ctx.shown, ctx.layout = len(tensors), None
    if isinstance(hidden, Hidden) and _hooks is not None and _hooks(False) is None:
        ctx.layout = hidden.layout
        ctx.save_for_backward(*tensors, hidden.memory)
    else:
        ctx.save_for_backward(*tensors, *tensors_of(hidden))


def kept(ctx: Any) -> tuple[Sequence[Any], Kept]:
    """What `keep` was given."""
    saved = ctx.saved_tensors
    tensors, hidden = saved[: ctx.shown], saved[ctx.shown :]
    return tensors, hidden if ctx.layout is None else Hidden(hidden[0], ctx.layout)


def tensors_of(hidden: Kept) -> Sequence[Any]:
    """Hidden results one by one."""
    return hidden.tensors() if isinstance(hidden, Hidden) else hidden


def _with_hash(args: Iterable[Any]) -> tuple[Any, ...]:
    """The arguments, with tuples in place of the dispatcher's lists."""
    return tuple(tuple(v) if isinstance(v, list) else v for v in args)


@cache
def _run() -> Callable[..., Any]:
    from fastcl.rowstats.triton.replay import run  # not with the package, which imports quickly

    return run


def _tensors(function: Callable) -> Callable:
    """The function, with empty tensors in place of None among its results."""

    @wraps(function)
    def filled(x: Tensor, *args: Any) -> Any:
        results = function(x, *args)
        if not isinstance(results, tuple):
            return results
        return tuple(x.new_empty(0) if result is None else result for result in results)

    return filled


def call(name: str, tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> Any:
    """torch.ops.fastcl.NAME, an operator of `register_for_small`. A call that autograd alone can see goes round
    PyTorch's dispatcher.

    Args:
        options: what follows the tensors, with a hash.
    """
    registered, direct, leading = _operators[name]
    if is_plain(tensors):
        return direct(*tensors[:leading], (tensors[leading:], options))
    return registered(*tensors, *options)


def call_backward(name: str, tensors: Sequence[Tensor | None], saved: Kept, options: tuple[Any, ...]) -> Any:
    """As `call`, for a backward pass.

    Args:
        saved: results of the forward pass, which follow the tensors.
    """
    registered, direct, leading = _operators[name]
    looked_at = *tensors[:leading], *(saved[:1] if isinstance(saved, Hidden) else saved)
    if is_plain(tensors[leading:], looked_at) and not torch.is_grad_enabled():
        return _run()(direct, tensors, options, saved)[0]
    return registered(*tensors, *tensors_of(saved), *options)


def is_plain(tensors: Iterable[Tensor | None], saved: Iterable[Tensor | None] = ()) -> bool:
    """Whether nobody but autograd can see a call: it is neither compiled, traced, profiled nor transformed by
    torch.func, no dispatch mode is on, and its tensors are of no class of their own and hold what they say, as those in
    `saved` do. Tensors whose memory does not hold it, PyTorch's dispatcher sees to before a kernel does."""
    if torch.compiler.is_compiling() or _dispatch_modes() or _is_transformed() or _is_profiled() or _is_traced():
        return False
    for t in tensors:  # those of a loss are real: none is conjugate
        if t is not None and (type(t) not in _CLASSES or t.is_neg() or t._is_zerotensor() or _is_functional(t)):
            return False
    for t in saved:
        if t is not None and type(t) not in _CLASSES:
            return False
    return True


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
