"""Two towers with a learnable scale, with open_clip's loss or `fastcl.clip_loss`.

    pip install open-clip-torch
    python examples/clip_towers.py --loss original
    python examples/clip_towers.py --loss fastcl

The towers see the upper and the lower half of a digit, in the place of images and texts.
"""

import math

import torch
from curves import batches, descend, main, optimizer_of
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl


class Towers(nn.Module):
    """Unit embeddings of both halves, and the factor on their products."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, digits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        upper, lower = (
            normalize(tower(half), dim=1) for tower, half in zip(self.towers, digits.chunk(2, 1), strict=True)
        )
        return upper, lower, self.logit_scale.exp()


def train(loss: str, steps: int) -> list[float]:
    """Losses of all steps."""
    if loss == "original":
        from open_clip.loss import ClipLoss

        criterion = ClipLoss()
    else:

        def criterion(upper: Tensor, lower: Tensor, scale: Tensor) -> Tensor:
            return fastcl.clip_loss(upper, lower, scale, normalize=False)

    model = Towers()
    optimizer = optimizer_of(*model.parameters())
    return [descend(criterion(*model(digits)), optimizer) for digits, *_ in batches(steps)]


if __name__ == "__main__":
    main(train)
