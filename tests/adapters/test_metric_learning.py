"""pytorch-metric-learning's losses: ours against its own, with its reducers and wrappers."""

import itertools

import pytest
import torch
from originals import value_and_gradients
from reference import normal
from torch import Tensor

pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")

from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

from fastcl.adapters import metric_learning, payoff, shared

LABELS = torch.tensor([0, -1, 0, 2, -1, 0, 5, 2, 7])
NAMES = ("NTXentLoss", "SupConLoss")
each_loss = pytest.mark.parametrize("name", NAMES)


def test_few_rows_are_left_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(payoff.FEWEST, "peers", 5)  # of two views: 9 embeddings
    computed: list[int] = []
    original = metric_learning.computed
    monkeypatch.setattr(metric_learning, "computed", lambda *a: computed.append(len(a[2])) or original(*a))
    for n, seen in ((8, []), (9, [9])):
        agree("SupConLoss", LABELS[:n], embeddings=normal(n, 6))
        assert computed == seen
    metric_learning.SupConLoss()(normal(8, 6).bfloat16(), LABELS[:8])
    assert computed == [9, 8]  # which the original would round


def agree(name: str, *arguments, embeddings: Tensor | None = None, **options) -> None:
    """The adapter's value and gradients are the original's."""
    ref = arguments[-1] if len(arguments) == 2 else None
    z = normal(9, 6) if embeddings is None else embeddings
    found = []
    for module in (metric_learning, losses):
        leaves = [z.clone().requires_grad_()] + ([] if ref is None else [ref[0].clone().requires_grad_()])
        given = {} if ref is None else {"ref_emb": leaves[1], "ref_labels": ref[1]}
        loss = getattr(module, name)(**options)(leaves[0], arguments[0], **given)
        found.append(value_and_gradients(loss, leaves))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@each_loss
@pytest.mark.parametrize("labels", (LABELS, LABELS / 2, 0 * LABELS, torch.arange(9), torch.arange(9) // 2))
def test_labels(name: str, labels: Tensor) -> None:
    agree(name, labels)
    agree(name, labels, temperature=0.3)


@each_loss
@pytest.mark.filterwarnings("ignore:.*ref_labels that are the same tensor")
def test_references(name: str) -> None:
    for count, labels in ((5, LABELS[:5]), (9, LABELS.clone()), (1, LABELS[:1]), (9, LABELS)):
        agree(name, LABELS, (normal(count, 6, seed=1), labels))


@each_loss
def test_few_rows(name: str) -> None:
    for n in (1, 2, 3):
        agree(name, LABELS[:n], embeddings=normal(n, 6))
        agree(name, torch.zeros(n), (normal(1, 6, seed=1), torch.tensor([1.0])), embeddings=normal(n, 6))
    one_pair_of_each = normal(2, 6, seed=1), torch.tensor([0, 3])  # which the original takes for none
    agree(name, LABELS[:1], one_pair_of_each, embeddings=normal(1, 6))


@each_loss
def test_reducers_distances_and_regularizers(name: str) -> None:
    for reducer in (
        reducers.MeanReducer(), reducers.ThresholdReducer(low=0.5), reducers.DoNothingReducer(),
        reducers.ClassWeightedReducer(torch.rand(9, dtype=torch.float64)), reducers.AvgNonZeroReducer(),
    )[: 5 if name == "NTXentLoss" else 2]:  # fmt: skip
        if not isinstance(reducer, reducers.DoNothingReducer):
            agree(name, LABELS.abs(), reducer=reducer)
    agree(name, LABELS, distance=distances.DotProductSimilarity(normalize_embeddings=False))
    agree(name, LABELS, embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.5)


@each_loss
def test_wrappers(name: str) -> None:
    z, other = normal(5, 6), normal(5, 6, seed=1)
    results = []
    for module in (metric_learning, losses):
        a, b = z.clone().requires_grad_(), other.clone().requires_grad_()
        loss = losses.SelfSupervisedLoss(getattr(module, name)())(a, b)
        results.append([loss.detach(), *torch.autograd.grad(loss, (a, b))])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@each_loss
def test_what_needs_pairs_is_left_to_the_original_with_one_warning(name: str) -> None:
    z = normal(9, 6).requires_grad_()
    tuples = miners.MultiSimilarityMiner()(z.detach(), LABELS)
    kinds = distances.LpDistance(), distances.CosineSimilarity(collect_stats=True), distances.CosineSimilarity(power=2)
    for options, given in (({}, {"indices_tuple": tuples}), *(({"distance": kind}, {}) for kind in kinds)):
        shared._told.clear()
        ours, theirs = (getattr(module, name)(**options) for module in (metric_learning, losses))
        with pytest.warns(UserWarning, match=f"{name} with .* is computed by pytorch_metric_learning itself") as told:
            for _ in range(2):
                assert torch.equal(ours(z, LABELS, **given), theirs(z, LABELS, **given))
        assert [w.filename for w in told if "computed by" in str(w.message)] == [__file__]
    with pytest.raises(ValueError, match="labels and indices_tuple cannot both be None"):
        ours(z)


@each_loss
@pytest.mark.filterwarnings("ignore:.*indices_tuple is computed by")
def test_a_memory_of_batches(name: str) -> None:
    """CrossBatchMemory, which needs pairs, computes with the original."""
    found = []
    for module in (metric_learning, losses):
        memory = losses.CrossBatchMemory(getattr(module, name)(), 6, 12)
        memory.embedding_memory = memory.embedding_memory.double()
        batches = [normal(9, 6, seed=k).requires_grad_() for k in range(3)]
        total = torch.stack([memory(z, LABELS) for z in batches]).sum()
        found.append(value_and_gradients(total, batches))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_pairs_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_learning, "PAIRS", 3)
    agree("NTXentLoss", LABELS)


def test_positive_pairs_are_in_the_librarys_order() -> None:
    for itself, labels_y in itertools.product((True, False), (LABELS, LABELS[:4].repeat(2))):
        if itself and labels_y is not LABELS:
            continue
        same = LABELS[:, None] == labels_y
        if itself:
            same.fill_diagonal_(False)
        a, p = metric_learning._positive_pairs(LABELS, labels_y, itself)
        assert torch.equal(torch.stack([a, p]), torch.stack(torch.where(same)))
