"""Hugging Face Accelerate and the loss of the global batch.

    pip install accelerate
    torchrun --nproc-per-node 2 examples/with_accelerate.py

The loss and the weights after every step are those of one process that trains on whole batches.
"""

import torch
from accelerate import Accelerator
from digits import BATCH, SGD, TEMPERATURE, embed, encoder, views
from torch.utils.data import DataLoader

import fastcl


def train() -> tuple[list[float], dict[str, torch.Tensor]]:
    """One epoch: the loss of every step, and the final weights; the same on every rank."""
    # Without a GPU, Accelerate counts one process unless it is told to use the CPU: every rank would get all batches.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())

    loader = DataLoader(views(), BATCH // accelerator.num_processes, drop_last=True)
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses = []
    for first, second, labels in loader:
        z1, z2 = embed(model, first, second)
        # This rank's share; the average over the ranks is the loss of the global batch. DDP averages the gradients.
        loss = fastcl.nscl_loss(z1, z2, labels, temperature=TEMPERATURE, gather_distributed=True)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()

        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4f}")

    weights = accelerator.get_state_dict(model)
    accelerator.end_training()
    return losses, weights


if __name__ == "__main__":
    losses, weights = train()
