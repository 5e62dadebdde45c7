"""How many kernels an eager step launches on a GPU, forward and backward: ours and PyTorch's. Nothing is started."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl
from fastcl import checks
from fastcl.kernels.common.launch import on_architecture, recording
from fastcl.rowstats.triton import operator

IMPLEMENTATIONS = {"fused": operator._forward, "fused_backward": operator._backward}
NO_KERNEL = {"empty", "new_empty", "empty_like", "empty_strided", "detach"}
FEW, MANY = 1024, 16384
D = 128


class Kernels(TorchDispatchMode):
    """Lists PyTorch's operators that launch a kernel, those inside our operators among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "fastcl":
            with self:
                found = IMPLEMENTATIONS[name](*args, **(kwargs or {}))
            return tuple(args[0].new_empty(0) if v is None else v for v in found)
        if not func.is_view and name not in NO_KERNEL:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def kernels(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> list[str]:
    """The kernels of a loss of CPU tensors and its gradient; values of ids are not read, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch, fastcl.backend("triton"), on_architecture(90), recording() as launches:
        patch.setattr(checks, "is_readable", lambda _: False)
        with Kernels() as seen:
            torch.autograd.grad(loss(), leaves)
    seen.names.remove("ones_like")  # the gradient's own
    return [one.kernel.__name__ for one in launches] + seen.names


def calls(n: int) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Losses of n rows, and what they are differentiated by."""
    z, labels = torch.empty(n, D, requires_grad=True), torch.arange(n // 2) % 10
    halves, rows = [torch.empty(n // 2, D, requires_grad=True) for _ in range(2)], torch.arange(n) // 2
    one = [torch.ones((), requires_grad=True)]
    classes = rows % 10
    return {
        "ntxent": (lambda: fastcl.ntxent_loss(*halves), halves),
        "dcl": (lambda: fastcl.dcl_loss(*halves, reduction="sum"), halves),
        "nscl": (lambda: fastcl.nscl_loss(*halves, labels), halves),
        "supcon": (lambda: fastcl.supcon_loss(*halves, labels), halves),
        "clip": (lambda: fastcl.clip_loss(*halves, one[0]), halves + one),
        "clip, known scale": (lambda: fastcl.clip_loss(*halves, 10.0), halves),
        "learnable temperature": (lambda: fastcl.ntxent_loss(*halves, one[0]), halves + one),
        "ids": (lambda: fastcl.contrastive_loss(z, rows), [z]),
        "ids with labels": (lambda: fastcl.contrastive_loss(z, rows, classes, "nscl"), [z]),
        "loss of each row": (lambda: fastcl.ntxent_loss(*halves, reduction="none").dot(rows.float()), halves),
    }


# Of few rows in half precision, of few rows in fp32, of many rows in either.
COUNTS = {
    "ntxent": (5, 5, 6, 7),
    "dcl": (5, 5, 6, 7),
    "nscl": (5, 5, 6, 7),
    "supcon": (7, 5, 7, 7),
    "clip": (8, 8, 10, 10),
    "clip, known scale": (6, 6, 8, 8),
    "learnable temperature": (7, 7, 8, 9),
    "ids": (6, 6, 7, 8),
    "ids with labels": (6, 6, 7, 8),
}


@pytest.mark.parametrize("name", COUNTS)
def test_launches_of_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are none but our own; masked tiles of many rows have launches of their own."""
    found = []
    for n in (FEW, MANY):
        for wanted in ("high", "highest"):  # fp16 and fp32
            monkeypatch.setattr(operator, "wants_float32", lambda wanted=wanted: wanted == "highest")
            names = kernels(*calls(n)[name])
            assert all(one.endswith("_kernel") for one in names)
            found.append(len(names))
    assert tuple(found) == COUNTS[name]


def test_what_counts_sees() -> None:
    """PyTorch's kernels inside and outside our operators are counted."""
    names = kernels(*calls(FEW)["loss of each row"])
    assert names.count("maxima_kernel") == 1 and {"dot", "mul"} <= set(names)
    x, y = torch.empty(2, 8, 4, requires_grad=True)
    assert "linalg_vector_norm" in kernels(lambda: fastcl.ntxent_loss(x, y, normalize=False), [x, y])
