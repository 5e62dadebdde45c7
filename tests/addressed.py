"""Replays as they are where kernels are compiled, in the interpreter: launches take addresses."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastcl.kernels.common import launch
from fastcl.rowstats.triton import repeated

STREAM = 7


def size_of(like: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    last = sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
    return (last + 1) * like.itemsize if like.numel() else 0


def at(address: int, like: Tensor, size: int) -> Tensor:
    """A tensor like another one, in so many bytes at an address."""
    if not like.numel():
        return torch.empty_like(like)
    memory = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    return memory[: size // like.itemsize * like.itemsize].view(like.dtype).as_strided(like.shape, like.stride())


def located(given: Any, recorded: Any, seen: Callable[[int, Tensor], Any]) -> Any:
    """Arguments of a launch with something in place of the addresses, which stand where tensors were recorded."""
    if isinstance(recorded, Tensor):
        assert type(given) is int and given % 16 == recorded.data_ptr() % 16  # which Triton may have compiled it for
        return seen(given, recorded)
    if isinstance(recorded, tuple):
        inside = [located(*pair, seen) for pair in zip(given, recorded, strict=True)]
        return tuple.__new__(type(recorded), inside)
    assert given is recorded or given == recorded
    return recorded


class Compiled:
    """In place of what Triton compiles for a launch."""

    def __init__(self, start: Callable[..., Any], one: tuple[Any, ...], seen: Callable[[int, int], None]) -> None:
        self.start, self.one, self.seen = start, one, seen

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        kernel, before, *options, arguments = self.one
        assert grid == (*before, 1, 1)[:3]

        def run(*given: Any, stream: int) -> None:
            assert stream == STREAM
            recorded = tuple(arguments[name] for name in kernel.arg_names)
            sizes: dict[int, int] = {}  # the largest at an address: the interpreter takes them for one storage

            def measure(address: int, like: Tensor) -> None:
                self.seen(address, size_of(like))
                sizes[address] = max(sizes.get(address, 0), size_of(like))

            located(given, recorded, measure)
            tensors = located(given, recorded, lambda address, like: at(address, like, sizes[address]))
            self.start(kernel, before, *options, dict(zip(kernel.arg_names, tensors, strict=True)))

        return run


@contextmanager
def addressed(seen: Callable[[int, int], None] = lambda *_: None) -> Iterator[None]:
    """Inside, launches are recorded as those of compiled kernels.

    Args:
        seen: is told the address and the size of everything that a replayed launch is given.
    """
    start = launch.start

    def started(*one: Any) -> Compiled:
        start(*one)
        return Compiled(start, one, seen)

    active = mock.Mock(get_current_device=lambda: 3, get_current_stream=lambda device: STREAM + device - 3)
    with mock.patch.object(launch, "start", started), mock.patch.object(repeated, "_driver", lambda: active):
        yield


# On a GPU replays are such anyway, and addresses are not of the CPU's memory.
either = pytest.mark.parametrize(
    "around", (nullcontext,) if torch.cuda.is_available() else (nullcontext, addressed),
    ids=lambda around: "as it is" if around is nullcontext else "compiled",
)  # fmt: skip
