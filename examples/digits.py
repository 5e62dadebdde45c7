"""What the examples share: data, an encoder, and the numbers that all of them train with."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

BATCH = 256  # samples of the global batch, over all ranks
TEMPERATURE = 0.2
SGD = {"lr": 0.01, "momentum": 0.5}


def views() -> TensorDataset:
    """Two noisy views (1797, 64) of scikit-learn's digits and their labels (1797,).

    The noise is drawn once, so that all examples train on the same numbers. A loader of your own may shuffle and
    augment; both views of a sample have to be on one rank.
    """
    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(images, dtype=torch.get_default_dtype()) / 16
    noise = torch.randn(2, *images.shape, generator=torch.Generator().manual_seed(0))
    first, second = images + 0.2 * noise
    return TensorDataset(first, second, torch.as_tensor(labels))


def encoder() -> nn.Module:
    """From 64 pixels to 32 numbers; the same initial weights in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))


def embed(model: nn.Module, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of both views from one forward pass."""
    first, second = model(torch.cat([first, second])).chunk(2)
    return first, second
