"""A module as Lightning wants it, with lightly's loss or `fastcl.NTXentLoss`, run by Lightning Fabric.

    pip install lightning-fabric lightly
    python examples/lightning_module.py --loss fastcl

With all of Lightning, derive the class from `LightningModule` and give it to a `Trainer`; its methods stay as they are.
"""

import torch
from curves import batches, main, optimizer_of
from digits import embed, encoder
from lightning_fabric import Fabric  # also lightning.fabric, of the package lightning
from torch import Tensor, nn


class SimCLR(nn.Module):
    """An encoder that learns from two views."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.encoder, self.criterion = encoder(), criterion

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002  Lightning's signature
        """The loss of a batch."""
        first, second, _ = batch
        return self.criterion(*embed(self.encoder, first, second))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """What trains the encoder."""
        return optimizer_of(*self.parameters())


def train(loss: str, steps: int) -> list[float]:
    """Losses of all steps."""
    if loss == "original":
        from lightly.loss.ntx_ent_loss import NTXentLoss
    else:
        from fastcl import NTXentLoss
    model = SimCLR(NTXentLoss(temperature=0.2))
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(model, model.configure_optimizers())
    model.mark_forward_method("training_step")
    losses = []
    for index, batch in enumerate(batches(steps)):
        value = model.training_step(batch, index)
        optimizer.zero_grad()
        fabric.backward(value)
        optimizer.step()
        losses.append(value.item())
    return losses


if __name__ == "__main__":
    main(train)
