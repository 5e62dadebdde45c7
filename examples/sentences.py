"""Embeddings of sentences with in-batch negatives: a small transformer that starts from random weights.

    python examples/sentences.py --loss original
    python examples/sentences.py --loss fastcl

The positive of a line is the next one, in the descriptions of scikit-learn's data sets. The original loss is what
sentence-transformers calls MultipleNegativesRankingLoss, written down with its matrix.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain, islice, repeat

import torch
from curves import descend, main, optimizer_of
from sklearn import datasets
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fastcl.adapters.in_batch import in_batch_loss

BATCH, LENGTH, WIDTH, SCALE = 60, 48, 32, 20.0
NAMES = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")


def lines() -> Tensor:
    """(N, LENGTH) bytes of all lines with a few words, 0 behind their ends."""
    texts = [getattr(datasets, f"load_{name}")().DESCR for name in NAMES]
    found = [line.strip() for text in texts for line in text.splitlines() if len(line.split()) > 4]
    return torch.tensor([list(line.encode()[:LENGTH].ljust(LENGTH, b"\0")) for line in found])


class Encoder(nn.Module):
    """The mean of a transformer's outputs over the bytes of a line."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.letters, self.places = nn.Embedding(256, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) / 10)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)

    def forward(self, text: Tensor) -> Tensor:
        kept = (text > 0)[..., None]
        hidden = self.layer(self.letters(text) + self.places, src_key_padding_mask=~kept[..., 0])
        return (hidden * kept).sum(1) / kept.sum(1)


def original(embeddings: Sequence[Tensor]) -> Tensor:
    """Cross-entropy of all (B, B) cosine similarities of queries and documents."""
    queries, documents = embeddings
    scores = cosine_similarity(queries[:, None], documents, dim=2) * SCALE
    return cross_entropy(scores, torch.arange(len(scores)))


def train(loss: str, steps: int) -> list[float]:
    """Losses of all steps."""
    criterion = original if loss == "original" else partial(in_batch_loss, scale=SCALE)
    model, text = Encoder(), lines()
    optimizer = optimizer_of(*model.parameters(), lr=0.02)
    loader = DataLoader(TensorDataset(text[:-1], text[1:]), BATCH, drop_last=True)
    losses = []
    for queries, documents in islice(chain.from_iterable(repeat(loader)), steps):
        embeddings = model(torch.cat([queries, documents])).split(BATCH)
        losses.append(descend(criterion(embeddings), optimizer))
    return losses


if __name__ == "__main__":
    main(train)
