"""SupCon with pytorch-metric-learning's loss, or fastcl's in its place.

pip install pytorch-metric-learning
python examples/supcon_metric_learning.py --loss original
python examples/supcon_metric_learning.py --loss fastcl
"""

import torch
from curves import batches, descend, main, optimizer_of
from digits import encoder


def train(loss: str, steps: int) -> list[float]:
    """Losses of all steps."""
    if loss == "original":
        from pytorch_metric_learning.losses import SupConLoss
    else:
        from fastcl.adapters.metric_learning import SupConLoss

    model = encoder()
    criterion = SupConLoss(temperature=0.2)
    optimizer = optimizer_of(*model.parameters())
    losses = []
    for first, second, labels in batches(steps):
        embeddings = model(torch.cat([first, second]))
        losses.append(descend(criterion(embeddings, labels.repeat(2)), optimizer))
    return losses


if __name__ == "__main__":
    main(train)
