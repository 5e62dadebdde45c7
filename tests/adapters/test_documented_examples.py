"""The example that each library documents runs with one line changed, its import, and gives the same numbers."""

from typing import NamedTuple

import pytest
import torch
from originals import without_their_init

VIEWS = """
batch, labels = torch.randn(2, 16, 8), torch.arange(16) % 4
model = torch.nn.Linear(8, 6)
"""


class Example(NamedTuple):
    """The line that is changed, what stands in its place, and the code after it, which ends in `loss`."""

    original: str
    ours: str
    code: str


EXAMPLES = {
    "lightly, NTXentLoss": Example(
        "from lightly.loss.ntx_ent_loss import NTXentLoss", "from fastcl.adapters.lightly import NTXentLoss",
        "loss_fn = NTXentLoss(memory_bank_size=0)\n"
        "out0, out1 = model(batch[0]), model(batch[1])\n"
        "loss = loss_fn(out0, out1)",
    ),
    "lightly, DCLLoss": Example(
        "from lightly.loss.dcl_loss import DCLLoss", "from fastcl.adapters.lightly import DCLLoss",
        "weight_fn = lambda out0, out1: torch.sum((out0 - out1) ** 2, dim=1)\n"
        "loss_fn = DCLLoss(weight_fn=weight_fn)\n"
        "loss = loss_fn(model(batch[0]), model(batch[1]))",
    ),
    "lightly, DCLWLoss": Example(
        "from lightly.loss.dcl_loss import DCLWLoss", "from fastcl.adapters.lightly import DCLWLoss",
        "loss_fn = DCLWLoss(temperature=0.07)\n"
        "loss = loss_fn(model(batch[0]), model(batch[1]))",
    ),
    "pytorch-metric-learning": Example(
        "from pytorch_metric_learning import losses", "from fastcl.adapters import metric_learning as losses",
        "loss_func = losses.SupConLoss()\n"
        "embeddings = model(batch[0])\n"
        "loss = loss_func(embeddings, labels)",
    ),
    "sentence-transformers": Example(
        "from sentence_transformers.sentence_transformer import losses",
        "from fastcl.adapters import sentence_transformers as losses",
        "encoder = lambda features: {'sentence_embedding': model(features['input_ids'])}\n"
        "loss_func = losses.MultipleNegativesRankingLoss(torch.nn.Identity())\n"
        "rows = [encoder({'input_ids': part})['sentence_embedding'] for part in batch]\n"
        "loss = loss_func.compute_loss_from_embeddings(rows, None)",
    ),
    "open_clip": Example(
        "from open_clip.loss import ClipLoss", "from fastcl.adapters.open_clip import ClipLoss",
        "loss_func = ClipLoss(local_loss=False, gather_with_grad=False, cache_labels=True, rank=0, world_size=1)\n"
        "normalize = torch.nn.functional.normalize\n"
        "features = {'image_features': normalize(model(batch[0])), 'text_features': normalize(model(batch[1]))}\n"
        "losses = loss_func(**features, logit_scale=torch.tensor(14.3), output_dict=True)\n"
        "loss = sum(losses.values())",
    ),
    "info-nce-pytorch": Example(
        "from info_nce import InfoNCE", "from fastcl.adapters.info_nce import InfoNCE",
        "loss = InfoNCE()\n"
        "batch_size, num_negative, embedding_size = 32, 48, 128\n"
        "query = torch.randn(batch_size, embedding_size)\n"
        "positive_key = torch.randn(batch_size, embedding_size)\n"
        "negative_keys = torch.randn(num_negative, embedding_size)\n"
        "loss = loss(model.weight[:1, :1] * query, positive_key, negative_keys)",
    ),
    "solo-learn": Example(
        "from solo.losses.simclr import simclr_loss_func", "from fastcl.adapters.solo_learn import simclr_loss_func",
        "z1, z2 = model(batch[0]), model(batch[1])\n"
        "loss = simclr_loss_func(z1, z2, temperature=0.1, extra_pos_mask=None)",
    ),
    "stable-pretraining": Example(
        "from stable_pretraining.losses.joint_embedding import NTXEntLoss",
        "from fastcl.adapters.stable_pretraining import NTXEntLoss",
        "simclr_loss = NTXEntLoss(temperature=0.5)\n"
        "loss = simclr_loss(model(batch[0]), model(batch[1]))",
    ),
}  # fmt: skip


def outcome(line: str, code: str) -> list[torch.Tensor]:
    """The loss and the gradient of the model's parameters."""
    names = {"torch": torch}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec("\n".join([VIEWS, line, code]), names)
    loss, model = names["loss"], names["model"]
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_one_line_is_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_their_init(monkeypatch)
    example = EXAMPLES[name]
    try:
        want = outcome(example.original, example.code)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    for got, exact in zip(outcome(example.ours, example.code), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)
