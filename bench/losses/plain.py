"""Plain PyTorch baselines of the losses: as a good user would write them, and the published N x N x D formulation.

All take z (N, D), whose rows k and k + N / 2 are the two views of sample k, and labels (N / 2,) of two or more classes;
all return the mean over the N rows, for two towers the mean of both directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

TEMPERATURE = 0.5  # SimCLR on CIFAR; every provider uses it for every objective but sigmoid
SCALE, BIAS = 10.0, -10.0  # of sigmoid's logits; SigLIP starts with them


def ntxent(z: Tensor, labels: Tensor) -> Tensor:
    """NT-Xent (Chen et al. 2020): one matrix product and a cross entropy, with self-similarities masked."""
    logits = _logits(functional.normalize(z)).fill_diagonal_(-torch.inf)
    return functional.cross_entropy(logits, _partner(z))


def nscl(z: Tensor, labels: Tensor) -> Tensor:
    """Negatives-only supervised contrastive loss (arXiv 2510.08852): only rows of other classes in the denominator."""
    u = functional.normalize(z)
    labels = labels.repeat(2)
    denominator = _logits(u).masked_fill(labels[:, None] == labels, -torch.inf).logsumexp(1)
    positive = (u * u.roll(len(labels) // 2, 0)).sum(1) / TEMPERATURE
    return (denominator - positive).mean()


def supcon(z: Tensor, labels: Tensor) -> Tensor:
    """SupCon L_out (Khosla et al. 2020, eq. 2) without the factor temperature / base temperature."""
    labels = labels.repeat(2)
    logits = _logits(functional.normalize(z)).fill_diagonal_(-torch.inf)
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    mean_positive = logits.masked_fill(~positive, 0).sum(1) / positive.sum(1)
    return (logits.logsumexp(1) - mean_positive).mean()


def clip(z: Tensor, labels: Tensor) -> Tensor:
    """CLIP's symmetric InfoNCE (Radford et al. 2021), with the two views as image and text."""
    image, text = functional.normalize(z).chunk(2)
    logits = image @ text.T / TEMPERATURE
    pair = torch.arange(len(image), device=z.device)
    return (functional.cross_entropy(logits, pair) + functional.cross_entropy(logits.T, pair)) / 2


def sigmoid(z: Tensor, labels: Tensor) -> Tensor:
    """SigLIP's sigmoid loss (Zhai et al. 2023), with the two views as image and text."""
    image, text = functional.normalize(z).chunk(2)
    logits = image @ text.T * SCALE + BIAS
    signs = 2 * torch.eye(len(image), device=z.device, dtype=logits.dtype) - 1
    return -functional.logsigmoid(signs * logits).sum() / len(image)


def mean_of(objectives: str, z: Tensor, labels: Tensor) -> Tensor:
    """The mean of objectives joined by +, each computed from its own matrix."""
    values = [_FUNCTIONS[name](z, labels) for name in objectives.split("+")]
    return sum(values) / len(values)


def broadcast_ntxent(z: Tensor, labels: Tensor) -> Tensor:
    """NT-Xent with similarities as in the code published with arXiv 2510.08852: an N x N x D broadcast."""
    logits = _broadcast_logits(z)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return functional.cross_entropy(logits.masked_fill(own, -torch.inf), _partner(z))


def broadcast_nscl(z: Tensor, labels: Tensor) -> Tensor:
    """NSCL with the same N x N x D broadcast and the paper's denominator; the published code adds the positive."""
    logits = _broadcast_logits(z)
    labels = labels.repeat(2)
    denominator = logits.masked_fill(labels[:, None] == labels, -torch.inf).logsumexp(1)
    return (denominator - logits.gather(1, _partner(z)[:, None])[:, 0]).mean()


def _logits(u: Tensor) -> Tensor:
    return u @ u.T / TEMPERATURE


def _broadcast_logits(z: Tensor) -> Tensor:
    return nn.CosineSimilarity(dim=2)(z[:, None], z[None]) / TEMPERATURE


def _partner(z: Tensor) -> Tensor:
    """(N,) index of the other view of each row."""
    return torch.arange(len(z), device=z.device).roll(len(z) // 2)


_FUNCTIONS = {f.__name__: f for f in (ntxent, nscl, supcon, clip, sigmoid, broadcast_ntxent, broadcast_nscl)}
