"""Distance of two models in weight space."""

import torch
from torch import Tensor, nn

from fastcl.errors import FastclError


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if name.rpartition(".")[2] == "weight"}


@torch.inference_mode()
def weight_gap(a: nn.Module, b: nn.Module) -> float:
    """Mean relative distance between the weights of two models with the same architecture (arXiv 2510.08852).

    The mean over all parameters named `weight` (of convolutions, linear layers and normalisations; no biases, no
    running statistics) of |w_a - w_b|_F / ((|w_a|_F + |w_b|_F) / 2). A tensor that is zero in both models counts as 0.

    Args:
        a: a model. Pass the encoder alone to leave out heads.
        b: a model with the same parameters, on any device; norms are computed in float64.

    Returns:
        Gap in [0, 2]; exactly 0.0 for equal weights.

    Raises:
        FastclError: a weight is missing from one model, shapes differ, a weight is not finite, or there are no weights.
    """
    wa, wb = _weights(a), _weights(b)
    for model, lacking in (("a", wb.keys() - wa.keys()), ("b", wa.keys() - wb.keys())):
        if lacking:
            raise FastclError(f"weight {min(lacking)!r} is missing from {model} ({len(lacking)} such weights)")
    if not wa:
        raise FastclError("the models have no parameter named 'weight'")
    norms = []
    for name, x in wa.items():
        if x.shape != wb[name].shape:
            raise FastclError(f"weight {name!r} has shape {tuple(x.shape)} in a and {tuple(wb[name].shape)} in b")
        x = x.double()
        y = wb[name].to(device=x.device, dtype=x.dtype)
        norms.append(torch.stack([torch.linalg.vector_norm(w) for w in (x - y, x, y)]).cpu())
    gap, size_a, size_b = torch.stack(norms).unbind(dim=1)
    finite = (size_a + size_b).isfinite()
    if not finite.all():
        name = list(wa)[int(finite.logical_not().nonzero()[0])]
        raise FastclError(f"weight {name!r} is not finite")
    size = (size_a + size_b) / 2
    return torch.where(size > 0, gap / size, 0.0).mean().item()
