"""`fastcl.patch` for losses that do not run where the tests do, with stand-ins of their names.

Inf-CL's need a GPU, solo-learn 1.0.6 is on no registry, and vissl 0.1.6 does not import beside today's PyTorch.
"""

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from originals import against, nt_xent, queue, value_and_gradients
from patched import B, D, alone, of, views  # noqa: F401
from torch import Tensor

import fastcl
from fastcl.adapters.targets import TARGETS

EACH = torch.arange(B)


def original(*args: Any, **options: Any) -> Tensor:
    raise AssertionError("the original ran")


class Criterion(torch.nn.Module):
    """As much of vissl's as fastcl uses."""

    def __init__(self, num_pos: int = 2) -> None:
        super().__init__()
        self.buffer_params = types.SimpleNamespace(effective_batch_size=2 * B, world_size=1, embedding_dim=D)
        self.num_pos, self.temperature = num_pos, 0.5

    forward = precompute_pos_neg_mask = gather_embeddings = original


SOLO = "solo.losses."
ELSEWHERE: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "inf_cl.flash:cal_flash_loss": (
        lambda loss, a, b: loss(a, b, scale=2.0).mean(), lambda a, b: against(a, b, EACH, 2, False).mean()
    ),
    "inf_cl.ring:cal_ring_loss": (lambda loss, a, b: loss(a, b), lambda a, b: against(a, b, EACH, 1, False).mean()),
    "inf_cl.ring:cal_inf_loss": (lambda loss, a, b: loss(a, b), lambda a, b: against(a, b, EACH, 1, False).mean()),
    f"{SOLO}simclr:simclr_loss_func": (
        lambda loss, a, b: loss(torch.cat([a, b]), EACH.repeat(2)), lambda a, b: nt_xent(a, b, 0.1).mean()
    ),
    f"{SOLO}mocov2plus:mocov2plus_loss_func": (
        lambda loss, a, b: loss(a, b, a.detach().T, 0.5), lambda a, b: queue(a, b, a.detach(), 0.5, False).mean()
    ),
    f"{SOLO}mocov3:mocov3_loss_func": (lambda loss, a, b: loss(a, b), lambda a, b: against(a, b, EACH, 5).mean() * 0.4),
    f"{SOLO}nnclr:nnclr_loss_func": (lambda loss, a, b: loss(a, p=b), lambda a, b: against(a, b, EACH, 10).mean()),
    "vissl.losses.simclr_info_nce_loss:SimclrInfoNCECriterion.forward": (
        lambda loss, a, b: loss(Criterion(), torch.cat([a, b])), lambda a, b: nt_xent(a, b, 0.5, normalize=False).mean()
    ),
}  # fmt: skip


@pytest.mark.parametrize("library", ("inf_cl", "solo", "vissl"))
def test_values_and_gradients(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions: dict[str, Callable[..., Tensor]] = {}
    modules = {name: types.ModuleType(name) for name in (library, f"{library}.losses")}
    for place in (place for place in ELSEWHERE if place.startswith(library)):
        module, _, name = place.partition(":")
        functions[place] = types.FunctionType(original.__code__, {}, name)
        stand_in = Criterion if library == "vissl" else functions[place]
        setattr(modules.setdefault(module, types.ModuleType(module)), name.partition(".")[0], stand_in)
    absent = {target.place.partition(":")[0]: None for target in TARGETS[library]}
    for name, module in (absent | modules).items():
        monkeypatch.setitem(sys.modules, name, module)
    leaves = views()
    with fastcl.patch(library, force=True) as done:
        assert done.replaced == tuple(functions)
        for place, function in functions.items():
            call, formula = ELSEWHERE[place]
            found = call(Criterion.forward if library == "vissl" else function, *leaves)
            want = value_and_gradients(formula(*leaves), leaves)
            torch.testing.assert_close(value_and_gradients(found, leaves), want, rtol=1e-9, atol=1e-9)
        if library == "vissl":
            with pytest.raises(AssertionError, match="the original ran"):
                Criterion(num_pos=3)(torch.cat(leaves))


def test_the_sources_of_inf_cl_are_known() -> None:
    flash = of("inf_cl:cal_flash_loss")
    with fastcl.patch("inf_cl"):
        assert flash(*views()).shape == (B,)
