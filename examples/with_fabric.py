"""Lightning Fabric and the loss of the global batch.

    pip install lightning-fabric
    torchrun --nproc-per-node 2 examples/with_fabric.py

The loss and the weights after every step are those of one process that trains on whole batches. In a LightningModule,
`training_step` returns the same loss, and the trainer does the rest.
"""

import os

import torch
from digits import BATCH, SGD, TEMPERATURE, embed, encoder, views
from lightning_fabric import Fabric  # also lightning.fabric, of the package lightning
from torch import distributed as dist
from torch.utils.data import DataLoader

import fastcl


def train() -> tuple[list[float], dict[str, torch.Tensor]]:
    """One epoch: the loss of every step, and the final weights; the same on every rank."""
    fabric = Fabric(strategy="ddp", devices=int(os.environ["LOCAL_WORLD_SIZE"]))
    fabric.launch()

    loader = fabric.setup_dataloaders(DataLoader(views(), BATCH // fabric.world_size, drop_last=True))
    model = encoder()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), **SGD))

    losses = []
    for first, second, labels in loader:
        z1, z2 = embed(model, first, second)
        # This rank's share; the average over the ranks is the loss of the global batch. Fabric averages the gradients.
        loss = fastcl.nscl_loss(z1, z2, labels, temperature=TEMPERATURE, gather_distributed=True)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()

        losses.append(fabric.all_reduce(loss.detach(), reduce_op="mean").item())
        fabric.print(f"step {len(losses)}: loss {losses[-1]:.4f}")

    dist.destroy_process_group()
    return losses, model.state_dict()


if __name__ == "__main__":
    losses, weights = train()
