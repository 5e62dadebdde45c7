"""DistributedDataParallel and the loss of the global batch.

    torchrun --nproc-per-node 2 examples/ddp.py

The loss and the weights after every step are those of one process that trains on whole batches.
"""

import os

import torch
from digits import BATCH, SGD, TEMPERATURE, embed, encoder, views
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import fastcl


def train() -> tuple[list[float], dict[str, torch.Tensor]]:
    """One epoch: the loss of every step, and the final weights; the same on every rank."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    dist.init_process_group()  # NCCL for tensors on GPUs, gloo for those on the CPU
    world = dist.get_world_size()

    data = views()
    loader = DataLoader(data, BATCH // world, sampler=DistributedSampler(data, shuffle=False), drop_last=True)
    model = DistributedDataParallel(encoder().to(device))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)

    losses = []
    for batch in loader:
        first, second, labels = (v.to(device) for v in batch)
        z1, z2 = embed(model, first, second)
        # This rank's share; the average over the ranks is the loss of the global batch. DDP averages the gradients.
        loss = fastcl.nscl_loss(z1, z2, labels, temperature=TEMPERATURE, gather_distributed=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world)
        if dist.get_rank() == 0:
            print(f"step {len(losses)}: loss {losses[-1]:.4f}")

    dist.destroy_process_group()
    return losses, model.module.state_dict()


if __name__ == "__main__":
    losses, weights = train()
