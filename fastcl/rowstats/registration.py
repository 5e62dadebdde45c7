"""Helpers shared by the registrations of the operators."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastcl.errors import FastclError

_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_is_batched, _is_batched_by_autograd = _functorch.is_batchedtensor, _functorch.is_legacy_batchedtensor


def register(
    library: torch.library.Library, name: str, impl: Callable, fake: Callable, autograd: Callable,
    setup_context: Callable | None = None,
) -> None:  # fmt: skip
    """Register the implementation, fake implementation and derivative of an operator that the library defines."""
    library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastcl::{name}", fake, lib=library)
    torch.library.register_autograd(f"fastcl::{name}", autograd, setup_context=setup_context, lib=library)


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
