"""What the examples of losses share: batches, a step of descent, and the choice between the original loss and fastcl's.

Each of these examples trains with either; the losses of the first steps agree, and the curves lie on each other
(docs/migration.md).
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat

import torch
from digits import BATCH, views
from torch import Tensor, nn
from torch.utils.data import DataLoader

STEPS = 70  # ten epochs


def batches(steps: int) -> Iterator[list[Tensor]]:
    """Both views (256, 64) and the labels (256,) of scikit-learn's digits, epoch after epoch."""
    return islice(chain.from_iterable(repeat(DataLoader(views(), BATCH, drop_last=True))), steps)


def optimizer_of(*parameters: nn.Parameter, lr: float = 0.1) -> torch.optim.Optimizer:
    """Gradient descent with momentum."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One step; returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def main(train: Callable[[str, int], list[float]]) -> None:
    """Train as the command line says and print the loss of every step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--loss", choices=("original", "fastcl"), default="fastcl")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    for step, loss in enumerate(train(args.loss, args.steps)):
        print(f"step {step}: loss {loss:.4f}")
