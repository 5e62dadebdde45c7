"""What the adapters refuse, labels of any dtype, and criteria as other code handles them."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import normal

from fastcl.adapters import inf_cl, info_nce, lightly, open_clip, solo_learn, stable_pretraining, supcontrast, vissl
from fastcl.adapters.shared import class_ids

B, D = 7, 6
IDS = torch.arange(B)
TARGETS = torch.tensor([3, 0, 10, 4, 4, 1, 7])
buffers = type("Buffers", (), {"effective_batch_size": 2 * B, "world_size": 1, "embedding_dim": D})
F = torch.ones(3, 2, 4)
two_ranks = type("Buffers", (buffers,), {"effective_batch_size": 4 * B, "world_size": 2})
REFUSED = [
    (lambda: lightly.NTXentLoss(0.0), ValueError, "Illegal temperature"),
    (lambda: lightly.NTXentLoss(memory_bank_size=64), ValueError, "must be 0 or"),
    (lambda: lightly.NTXentLoss(memory_bank_size=(64, -1)), ValueError, "must not be negative"),
    (lambda: lightly.NTXentLoss()(F[:, 0], F[:2, 0]), ValueError, r"\(3, 4\).*\(2, 4\)"),
    (lambda: open_clip.ClipLoss()(F[0], F[0], 2.0, F[0, 0]), ValueError, r"logit_bias must be one number.*\(4,\)"),
    (lambda: open_clip.ClipLoss(True, rank=1, world_size=2)(F[0], F[0], 2.0), ValueError, "world_size.*, 1, got 2"),
    (lambda: open_clip.ClipLoss(use_horovod=True), NotImplementedError, "use_horovod"),
    (lambda: supcontrast.SupConLoss()(F[0]), ValueError, "`features` needs to be"),
    (lambda: supcontrast.SupConLoss()(F, torch.zeros(3), F), ValueError, "Cannot define both"),
    (lambda: supcontrast.SupConLoss()(F, torch.ones(3) * 1j), ValueError, "labels must be real"),
    (lambda: supcontrast.SupConLoss()(F, torch.zeros(2)), ValueError, "Num of labels"),
    (lambda: supcontrast.SupConLoss(contrast_mode="two")(F), ValueError, "Unknown mode: two"),
    (lambda: info_nce.info_nce(F, F), ValueError, "<query> must have 2 dimensions"),
    (lambda: info_nce.info_nce(F[0], F[:, 0]), ValueError, "same number of samples, got 2, 3"),
    (lambda: info_nce.info_nce(F[0], F[0], F), ValueError, "<negative_keys> must have 2 dimensions"),
    (lambda: info_nce.info_nce(F[0], F[0], F, negative_mode="paired"), ValueError, "same number of samples"),
    (lambda: info_nce.info_nce(F[0], F[0, :, :3]), ValueError, "as many components"),
    (lambda: info_nce.info_nce(F[0], F[0], reduction="max"), ValueError, "reduction"),
    (lambda: info_nce.info_nce(F[0], F[0], F[:2], 0.1, "max", "paired"), ValueError, "reduction.*'max'"),
    (lambda: solo_learn.simclr_loss_func(F[0]), TypeError, "needs z and indexes"),
    (lambda: solo_learn.simclr_loss_func(F[0], IDS[:2], extra_pos_mask=F), ValueError, "extra_pos_mask"),
    (lambda: inf_cl.cal_flash_loss(F[0], F[0], TARGETS[:2]), IndexError, "Target 3 is out of bounds for 2"),
    (
        lambda: vissl.SimclrInfoNCECriterion(two_ranks, 0.1)(torch.ones(B, D).repeat(2, 1)),
        ValueError,
        "world_size.*got 2",
    ),
    (lambda: stable_pretraining.InfoNCELoss()(F.flatten(0, 1), F.flatten(0, 1), IDS[:5]), ValueError, "one id per row"),
    (lambda: vissl.SimclrInfoNCECriterion(buffers, 0.1)(torch.ones(2, D)), ValueError, "14 rows on a rank, got 2"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[str(k) for k in range(len(REFUSED))])
def test_refusals(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_criteria_travel_to_other_processes_and_compile_in_one_graph() -> None:
    a, b = normal(B, D, seed=0), normal(B, D, seed=1)
    criterion = lightly.DCLWLoss(sigma=0.4)
    assert torch.equal(pickle.loads(pickle.dumps(criterion))(a, b), criterion(a, b))
    compiled = torch.compile(stable_pretraining.InfoNCELoss(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(a, b, IDS.flip(0)), stable_pretraining.InfoNCELoss()(a, b, IDS.flip(0)))


def test_labels_of_any_dtype_keep_their_equalities() -> None:
    values = torch.tensor([-1.0, 0.0, -0.0, 1.5, float("inf"), -1.0, -2.0, 1.5, float("nan"), float("nan")])
    for labels in (values, values.half(), values.double(), values[:3].long(), values[:3] > 0):
        ids = class_ids(labels)
        assert torch.equal(ids[:, None] == ids, (labels[:, None] == labels) | torch.eye(len(ids), dtype=torch.bool))
        assert not (ids == -1).any()
    assert torch.equal(class_ids(values[3:5]), class_ids(values)[3:5])  # whatever else a rank has
