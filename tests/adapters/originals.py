"""The originals' formulas, written plainly, and the originals themselves where they are installed.

A formula takes tensors of any dtype and returns row losses. Nothing here comes from the package under test.
"""

import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def others(n: int) -> Tensor:
    """(N, N) mask of all but the diagonal."""
    return ~torch.eye(n, dtype=torch.bool)


def lse(s: Tensor, mask: Tensor) -> Tensor:
    return s.masked_fill(~mask, -torch.inf).logsumexp(1)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, twice: bool = False, normalize: bool = True) -> Tensor:
    """(2B,) row losses; twice: the positive is in the denominator twice."""
    z = torch.cat([z1, z2])
    z = unit(z) if normalize else z
    s, positive = z @ z.T / temperature, (z * z.roll(len(z1), 0)).sum(1) / temperature
    denominator = lse(s, others(len(z)))
    return (torch.logaddexp(denominator, positive) if twice else denominator) - positive


def dcl(z1: Tensor, z2: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """(2B,) row losses; weights of the positives: (B,), the same for both views, or (2B,)."""
    z = unit(torch.cat([z1, z2]))
    positive = (z * z.roll(len(z1), 0)).sum(1) / temperature
    views = torch.eye(len(z1), dtype=torch.bool).repeat(2, 2)
    weights = torch.ones_like(positive) if weights is None else weights.repeat(len(z) // len(weights))
    return lse(z @ z.T / temperature, ~views) - weights * positive


def against(x: Tensor, y: Tensor, target: Tensor, scale: float | Tensor, normalize: bool = True) -> Tensor:
    """(N,) cross-entropies of x against y."""
    s = (unit(x) @ unit(y).T if normalize else x @ y.T) * scale
    return s.logsumexp(1) - s.gather(1, target[:, None])[:, 0]


def sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """(N,) sums over all pairs of an image, SigLIP's."""
    z = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return -functional.logsigmoid(z * (scale * x @ y.T + bias)).sum(1)


def queue(query: Tensor, key: Tensor, negatives: Tensor, temperature: float, normalize: bool = True) -> Tensor:
    """(N,) losses against negatives (K, D), or (N, K, D)."""
    q, k, rows = (unit(v) for v in (query, key, negatives)) if normalize else (query, key, negatives)
    found = torch.einsum("nd,nkd->nk" if rows.ndim == 3 else "nd,kd->nk", q, rows)
    return functional.cross_entropy(
        torch.cat([(q * k).sum(1, keepdim=True), found], 1) / temperature,
        torch.zeros(len(q), dtype=torch.long), reduction="none",
    )  # fmt: skip


def with_mask(
    z: Tensor, positives: Tensor, temperature: float, denominator: Tensor | None = None, floor: float = 0.0
) -> Tensor:
    """(N,) means over positives of log-sum-exp minus logit; 0 without positives; floor as the published code has it."""
    s = z @ z.T / temperature
    s = s - s.amax(1, keepdim=True).detach()
    inside = others(len(z)) if denominator is None else denominator
    log = ((s.exp() * inside).sum(1, keepdim=True) + floor).log()
    count = positives.sum(1)
    return (positives * (log - s)).sum(1) / ((count + floor) if floor else count.where(count > 0, 1))


def inside_sum(z: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """solo-learn's rows: -log of the positives' share of all exponentials."""
    z = unit(z)
    s, same = z @ z.T / temperature, ids[:, None] == ids
    return lse(s, others(len(z))) - lse(s, same & others(len(z)))


def loaded(package: str, file: str = "") -> Any:
    """A package of the registry, or one file of it without the rest of the package; absent ones skip."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if file:
            without_their_init(patch)
        return importlib.import_module(".".join(filter(None, [package, *file.removesuffix(".py").split("/")])))


# Packages, and the module of theirs that holds the names which the losses import from them.
_WITHOUT_INIT = {
    "lightly": "", "lightly.loss": "", "open_clip": "", "solo": "", "solo.losses": "", "stable_pretraining": "",
    "stable_pretraining.losses": "", "stable_pretraining.utils": "stable_pretraining.utils.distributed",
}  # fmt: skip


def without_their_init(patch: pytest.MonkeyPatch) -> None:
    """Let losses be imported without the rest of their libraries, whose dependencies may be absent."""
    for name, names in _WITHOUT_INIT.items():
        above = name.rpartition(".")[0]
        absent = name in sys.modules or (above and above not in sys.modules)
        spec = None if absent else importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            module = types.ModuleType(name)
            module.__path__ = list(spec.submodule_search_locations)
            if names:
                module.__getattr__ = lambda wanted, names=names: getattr(importlib.import_module(names), wanted)
            patch.setitem(sys.modules, name, module)


def value_and_gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves, strict=True))]
