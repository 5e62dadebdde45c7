"""A loop of plain PyTorch: NT-Xent written down with its matrix, or `fastcl.ntxent_loss`.

    python examples/plain_loop.py --loss original
    python examples/plain_loop.py --loss fastcl

Both print the loss of every step.
"""

import torch
from curves import batches, descend, main, optimizer_of
from digits import TEMPERATURE, embed, encoder
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import fastcl


def nt_xent(first: Tensor, second: Tensor) -> Tensor:
    """NT-Xent with all (2B, 2B) logits."""
    rows = normalize(torch.cat([first, second]), dim=1)
    logits = rows @ rows.T / TEMPERATURE
    itself = torch.eye(len(rows), dtype=torch.bool)
    return cross_entropy(logits.masked_fill(itself, -torch.inf), torch.arange(len(rows)).roll(len(first)))


def train(loss: str, steps: int) -> list[float]:
    """Losses of all steps."""
    model = encoder()
    optimizer = optimizer_of(*model.parameters())
    losses = []
    for first, second, _ in batches(steps):
        z1, z2 = embed(model, first, second)
        value = nt_xent(z1, z2) if loss == "original" else fastcl.ntxent_loss(z1, z2, temperature=TEMPERATURE)
        losses.append(descend(value, optimizer))
    return losses


if __name__ == "__main__":
    main(train)
