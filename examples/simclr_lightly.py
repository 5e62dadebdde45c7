"""SimCLR with lightly's loss, or fastcl's in its place.

    pip install lightly
    python examples/simclr_lightly.py --loss original
    python examples/simclr_lightly.py --loss fastcl

Without any change of a program, `fastcl.patch("lightly")` does the same.
"""

from curves import batches, descend, main, optimizer_of
from digits import embed, encoder


def train(loss: str, steps: int) -> list[float]:
    """Losses of all steps."""
    if loss == "original":
        from lightly.loss.ntx_ent_loss import NTXentLoss
    else:
        from fastcl.adapters.lightly import NTXentLoss

    model = encoder()
    criterion = NTXentLoss(temperature=0.2)
    optimizer = optimizer_of(*model.parameters())
    return [descend(criterion(*embed(model, first, second)), optimizer) for first, second, _ in batches(steps)]


if __name__ == "__main__":
    main(train)
