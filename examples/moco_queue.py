"""MoCo: keys of a slowly moving encoder and a queue of negatives, with info-nce-pytorch or `fastcl.queue_loss`.

    pip install info-nce-pytorch
    python examples/moco_queue.py --loss original
    python examples/moco_queue.py --loss fastcl

Both print the loss of every step.
"""

import copy

import torch
from curves import batches, descend, main, optimizer_of
from digits import TEMPERATURE, encoder

import fastcl

QUEUE, MOMENTUM = 1024, 0.99


def train(loss: str, steps: int) -> list[float]:
    """Losses of all steps."""
    if loss == "original":
        from info_nce import info_nce as criterion
    else:
        criterion = fastcl.queue_loss

    model = encoder()
    momentum_model = copy.deepcopy(model).requires_grad_(False)
    queue = torch.nn.functional.normalize(torch.randn(QUEUE, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    queue = queue.to(torch.get_default_dtype())
    optimizer = optimizer_of(*model.parameters())
    losses = []
    for first, second, _ in batches(steps):
        keys = momentum_model(second)
        losses.append(descend(criterion(model(first), keys, queue, TEMPERATURE), optimizer))
        queue = torch.cat([queue[len(keys) :], torch.nn.functional.normalize(keys, dim=1)])
        for slow, fast in zip(momentum_model.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast.detach(), 1 - MOMENTUM)
    return losses


if __name__ == "__main__":
    main(train)
