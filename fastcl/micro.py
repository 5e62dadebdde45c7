"""Steps larger than memory: the exact loss of a whole batch, whose activations are held one part at a time.

A contrastive loss compares every row with every other, so the gradients of parts of a batch do not add up to that of
the batch. Two passes do it exactly (Gao et al. 2021, arXiv 2101.06983): embed all parts without a graph, compute the
loss of all embeddings and its gradient with respect to them, then embed each part again, now with a graph, and push its
share of that gradient through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastcl.errors import FastclError, brief, type_of

Embed: TypeAlias = Callable[[Any], Tensor | tuple[Tensor, ...]]


def micro_step(
    embed: Embed, parts: Sequence[Any], loss: Callable[..., Tensor], *, network: nn.Module | None = None
) -> Tensor:
    """Loss of a whole batch and its gradients, with the activations of one part of the batch in memory at a time.

    Adds to `.grad` of all parameters of the network and of the loss, as one `backward()` on the whole batch would; the
    optimiser's step is left to the caller. The price is a second forward pass.

    Without batch normalisation the result equals that of the whole batch up to rounding. With it, each part is
    normalised by its own statistics, in both passes alike, so that the result is exact for "batch normalisation per
    part". Buffers, such as running statistics, move as if each part had been embedded once. Random layers draw the same
    numbers in both passes (PyTorch's generators of the CPU and of the network's GPUs are replayed), and both passes run
    under the caller's autocast.

    DistributedDataParallel and FSDP2 exchange gradients once, with the last part; FSDP2 needs the same number of parts
    on all ranks.

    Args:
        embed: maps one part to its embeddings: a tensor, or a tuple of tensors such as the embeddings of each view or
            tower. Must give the same result if called twice from the same state of PyTorch's generators.
        parts: the batch in pieces, which need not be equally large. All views of a sample belong into the same part.
        loss: maps the embeddings of the whole batch to a scalar. It gets one argument for each tensor that `embed`
            returns: the rows of all parts in their order. May use further parameters, such as a temperature or a
            classifier, which get their gradients too.
        network: the module whose weights `embed` uses, several in a ModuleList. None: `embed` itself, a module.

    Returns:
        The loss, without a graph.

    Raises:
        FastclError: no parts; embed is no module and network is None; embeddings that are not floating-point tensors,
            differ in number between the parts, or in shape between the passes; a loss that is not a scalar with a
            gradient, or uses none of the embeddings.

    Example:
        views = zip(view_1.split(64), view_2.split(64))
        micro_step(lambda pair: net(torch.cat(pair)).chunk(2), list(views), fastcl.ntxent_loss, network=net)
    """
    passes = TwoPasses(embed, parts, network)
    value = loss(*passes.embed())
    _check_loss(value)
    value.backward()
    passes.backward()
    return value.detach()


class TwoPasses:
    """The two passes of `micro_step`, for losses of several networks: call `embed` of each, run the backward pass of
    the losses, then call `backward` of each.

    Args, errors: as `micro_step`.
    """

    def __init__(self, embed: Embed, parts: Sequence[Any], network: nn.Module | None = None) -> None:
        module = embed if network is None else network
        if not isinstance(module, nn.Module):
            raise FastclError(
                "micro_step needs network=, the module whose weights embed uses, unless embed is a module itself, "
                f"got {brief(module)}"
            )
        if not isinstance(parts, Sequence) or not parts:
            raise FastclError(f"parts must be a sequence with at least one part, got {brief(parts)}")
        self._embed, self._parts = embed, parts
        self._network: nn.Module = module
        cuda = {p.device for p in self._network.parameters() if p.device.type == "cuda"}
        self._devices = sorted(cuda, key=str)
        self._states: list[list[Tensor]] = []  # of the random generators, before each part
        self._shapes: list[list[torch.Size]] = []
        self._leaves: tuple[Tensor, ...] = ()
        # DistributedDataParallel averages no gradient before the last pass has reached every parameter, also one that
        # only the loss uses.
        waits = any(getattr(m, "find_unused_parameters", True) is False for m in self._network.modules())
        self._watched = [p for p in self._network.parameters() if p.requires_grad] if waits else []
        self._watching: list[Any] = []
        self._of_the_loss: dict[int, Tensor] = {}

    def embed(self) -> tuple[Tensor, ...]:
        """Pass one: the embeddings of all parts, as leaves that collect the gradient of the loss."""
        found: list[tuple[Tensor, ...]] = []
        with _unmoved(self._network), torch.no_grad():
            for part in self._parts:
                self._states.append(self._random_state())
                found.append(self._rows(part))
                if len(found[-1]) != len(found[0]):
                    raise FastclError(
                        f"embed must return as many tensors for every part, got {len(found[-1])} for part "
                        f"{len(found) - 1} and {len(found[0])} for part 0"
                    )
        self._watching = [p.register_post_accumulate_grad_hook(self._note) for p in self._watched]
        self._shapes = [[rows.shape for rows in each] for each in found]
        self._leaves = tuple(torch.cat(column).requires_grad_() for column in zip(*found, strict=True))
        return self._leaves

    def backward(self) -> None:
        """Pass two: push the gradient that the leaves have collected through the network, part by part."""
        for handle in self._watching:
            handle.remove()
        if all(leaf.grad is None for leaf in self._leaves):
            raise FastclError("loss depends on none of the embeddings, so that there is nothing to train")
        counts = [[shape[0] for shape in column] for column in zip(*self._shapes, strict=True)]
        gradients = [
            leaf.grad.split(n) if leaf.grad is not None else [None] * len(n)
            for leaf, n in zip(self._leaves, counts, strict=True)
        ]
        last = len(self._parts) - 1
        with torch.random.fork_rng(self._devices):
            for k, part in enumerate(self._parts):
                self._replay(self._states[k])
                with _exchanging(self._network, k == last):
                    rows = self._rows(part)
                    if [z.shape for z in rows] != self._shapes[k]:
                        raise FastclError(
                            f"embed must repeat itself: part {k} gave {_shown(self._shapes[k])} in the first pass and "
                            f"{_shown([z.shape for z in rows])} in the second"
                        )
                    pairs = [(z, g[k]) for z, g in zip(rows, gradients, strict=True)]
                    pairs = [(z, g) for z, g in pairs if z.requires_grad and g is not None]
                    if k == last:
                        pairs += [((p * 0).sum(), None) for p in self._of_the_loss.values()]
                    if pairs:  # a frozen network has nothing to learn, though a classifier behind it may
                        tensors, upstream = zip(*pairs, strict=True)
                        torch.autograd.backward(tensors, upstream)

    def _note(self, parameter: Tensor) -> None:
        self._of_the_loss[id(parameter)] = parameter

    def _rows(self, part: Any) -> tuple[Tensor, ...]:
        # Autocast keeps its copies of the weights. Those of pass one have no graph, and PyTorch 2.7 would take them in
        # pass two.
        torch.clear_autocast_cache()
        found = self._embed(part)
        rows = tuple(found) if isinstance(found, tuple | list) else (found,)
        for z in rows:
            if not isinstance(z, Tensor) or not z.is_floating_point() or not z.ndim:
                what = f"{tuple(z.shape)} of {z.dtype}" if isinstance(z, Tensor) else type_of(z)
                raise FastclError(f"embed must return floating-point rows, a tensor or a tuple of tensors, got {what}")
        return rows

    def _random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def _replay(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        for device, one in zip(self._devices, state[1:], strict=True):
            torch.cuda.set_rng_state(one, device)


@contextmanager
def _unmoved(network: nn.Module) -> Iterator[None]:
    """Put all buffers back at the end, and what DistributedDataParallel remembers of having broadcast them."""
    held = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in network.modules()
        for name, buffer in module._buffers.items()
    ]
    told = [(m, m.require_forward_param_sync) for m in network.modules() if hasattr(m, "require_forward_param_sync")]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in held:
                setattr(module, name, None if buffer is None or before is None else buffer.copy_(before))
        for module, due in told:
            module.require_forward_param_sync = due


@contextmanager
def _exchanging(network: nn.Module, now: bool) -> Iterator[None]:
    """Let DistributedDataParallel and FSDP2 exchange gradients in the backward pass, or not."""
    modules: list[Any] = list(network.modules())
    sharded = [m for m in modules if hasattr(m, "set_requires_gradient_sync")]
    with ExitStack() as stack:
        for module in modules:
            if not now and module not in sharded and callable(getattr(module, "no_sync", None)):
                stack.enter_context(module.no_sync())
        for module in sharded:
            module.set_requires_gradient_sync(now, recurse=False)
        try:
            yield
        finally:
            for module in sharded:
                module.set_requires_gradient_sync(True, recurse=False)


def _check_loss(value: Any) -> None:
    what = "" if isinstance(value, Tensor) else type_of(value)
    if not what and (value.numel() != 1 or not value.requires_grad):
        what = f"shape {tuple(value.shape)}" + ("" if value.requires_grad else " without a gradient")
    if what:
        raise FastclError(f"loss must return a scalar tensor with a gradient, got {what}")


def _shown(shapes: Sequence[torch.Size]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)
