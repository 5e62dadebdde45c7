"""Losses with in-batch negatives against their formula, and those of sentence-transformers against its own."""

import itertools
from typing import Any

import pytest
import torch
from originals import others, unit, value_and_gradients
from reference import normal
from torch import Tensor, nn

from fastcl import FastclError
from fastcl.adapters import payoff, shared
from fastcl.adapters.in_batch import in_batch_loss

B, D, SCALE = 5, 6, 7.0
FURTHER = ("doc_to_query", "query_to_query", "doc_to_doc")
DIRECTIONS = [("query_to_doc", *some) for k in range(4) for some in itertools.combinations(FURTHER, k)]


def formula(embeddings: list[Tensor], directions: tuple[str, ...], mode: str, normalize: bool) -> Tensor:
    queries, *documents = (unit(v) if normalize else v for v in embeddings)
    every = torch.cat(documents)
    own = torch.eye(B, dtype=torch.bool)
    logits = {
        "query_to_doc": queries @ every.T,
        "doc_to_query": documents[0] @ queries.T,
        "query_to_query": (queries @ queries.T).masked_fill(~others(B), -torch.inf),
        "doc_to_doc": (documents[0] @ every.T).masked_fill(own.repeat(1, len(documents)), -torch.inf),
    }
    scores = [logits[name] * SCALE for name in directions]
    positive = scores[0].diagonal()
    if mode == "joint":
        return (torch.cat(scores, 1).logsumexp(1) - positive).mean()
    return torch.stack([s.logsumexp(1) - positive for s in scores]).mean()


@pytest.mark.parametrize("sets", (1, 3))
@pytest.mark.parametrize("directions", DIRECTIONS, ids="+".join)
def test_formula(directions: tuple[str, ...], sets: int) -> None:
    leaves = [normal(B, D, seed=k).requires_grad_() for k in range(1 + sets)]
    modes = ["joint"] + ["per_direction"] * (not set(directions) & set(FURTHER[1:]))
    for mode, normalize in itertools.product(modes, (True, False)):
        got = in_batch_loss(leaves, SCALE, directions, mode, normalize)
        want = formula(leaves, directions, mode, normalize)
        torch.testing.assert_close(
            value_and_gradients(got, leaves), value_and_gradients(want, leaves), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("first", (0, 2))
def test_targets_that_follow_each_other(first: int) -> None:
    x, y = normal(B, D), normal(B + 3, D, seed=1)
    want = torch.nn.functional.cross_entropy(SCALE * unit(x) @ unit(y).T, torch.arange(B) + first)
    for target in (first, torch.arange(B) + first, (torch.arange(B) + first).int()):
        torch.testing.assert_close(shared.one_way(x, y, target, 1 / SCALE), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("wrong", (torch.arange(B - 1), torch.arange(B + 1), torch.arange(B + 0.0)), ids=str)
def test_targets_of_another_number_or_kind_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(FastclError, match=str(tuple(wrong.shape)).replace("(", r"\(").replace(")", r"\)")):
        shared.one_way(normal(B, D), normal(B + 3, D), wrong)


def test_more_anchors_than_candidates_are_refused() -> None:
    with pytest.raises(IndexError, match=f"Target {B} is out of bounds for {B} candidates"):
        shared.one_way(normal(B, D), normal(B, D), 1)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_takes_targets_in_any_order() -> None:
    def loss(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return shared.one_way(x, y, target, 1 / SCALE)

    x, y = normal(B, D), normal(B + 3, D, seed=1)
    traced = torch.jit.trace(loss, (x, y, torch.arange(B)), check_trace=False)
    target = torch.arange(B).flip(0)
    torch.testing.assert_close(traced(x, y, target), loss(x, y, target), rtol=1e-12, atol=0)


def test_one_query() -> None:
    leaves = [normal(1, D, seed=k).requires_grad_() for k in range(2)]
    loss = in_batch_loss(leaves, SCALE, ("query_to_doc", "query_to_query"))
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, leaves))
    with pytest.raises(ValueError, match="at least 2 embeddings, got 1"):
        in_batch_loss(leaves[:1], SCALE)


class Rows(nn.Sequential):
    """A model whose sentences are rows."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(D, D, dtype=torch.float64))

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        return {"sentence_embedding": self[0](features["input_ids"])}


@pytest.fixture(scope="module")
def modules() -> tuple[Any, Any]:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer import losses

    from fastcl.adapters import sentence_transformers

    return sentence_transformers, losses


def test_few_rows_with_several_directions_are_left_to_the_original(modules, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, seen = [normal(B, D, seed=k) for k in range(3)], []
    monkeypatch.setattr(modules[0], "in_batch_loss", lambda *_: seen.append(limit) or torch.zeros(()))
    loss = modules[0].MultipleNegativesRankingLoss(Rows(), directions=DIRECTIONS[-1])
    for limit in (B + 1, B):
        monkeypatch.setitem(payoff.FEWEST, "several directions", limit)
        loss.compute_loss_from_embeddings(rows, None)
    assert seen == [B]


@pytest.mark.parametrize("options", (
    {}, {"scale": 1.0, "directions": DIRECTIONS[-1]}, {"directions": DIRECTIONS[1], "partition_mode": "per_direction"},
), ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"))
def test_sentence_transformers(modules: tuple[Any, Any], name: str, options: dict[str, Any]) -> None:
    model, rows = Rows(), [normal(B, D, seed=k) for k in range(3)]
    results = []
    for module in modules:
        loss = getattr(module, name)(model, **options)
        if name.startswith("Cached"):
            leaves = [v.clone().requires_grad_() for v in rows]
            found = loss.calculate_loss([list(v.split(2)) for v in leaves])
            again = loss.calculate_loss([list(v.split(2)) for v in leaves], with_backward=True)
            assert torch.equal(again, found.detach()) and not again.requires_grad
            results.append([again, *(v.grad for v in leaves), *value_and_gradients(found, leaves)])
        else:
            leaves = list(model.parameters())
            found = loss.compute_loss_from_embeddings(
                [model({"input_ids": v})["sentence_embedding"] for v in rows], None
            )
            results.append(value_and_gradients(found, leaves))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_symmetric_losses_and_what_is_left_to_the_original(modules: tuple[Any, Any]) -> None:
    ours, theirs = modules
    rows, model = [normal(B, D, seed=k) for k in range(2)], Rows()
    for name in ("MultipleNegativesSymmetricRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"):
        pair = [getattr(module, name)(model, scale=SCALE) for module in modules]
        assert pair[0].directions == ("query_to_doc", "doc_to_query")
        if name.startswith("Cached"):
            found = [loss.calculate_loss([[v] for v in rows]) for loss in pair]
        else:
            found = [loss.compute_loss_from_embeddings(rows, None) for loss in pair]
        torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    hard = {"hardness_mode": "all_negatives", "hardness_strength": 0.5}
    shared._told.clear()
    with pytest.warns(UserWarning, match="hardness_mode='all_negatives' is computed by sentence_transformers itself"):
        got = ours.MultipleNegativesRankingLoss(model, **hard).compute_loss_from_embeddings(rows, None)
    want = theirs.MultipleNegativesRankingLoss(model, **hard).compute_loss_from_embeddings(rows, None)
    assert torch.equal(got, want)
